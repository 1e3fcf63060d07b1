import torch
from torch import nn


class BaseMoeRoutingMethod(nn.Module):
    def apply(self, _router_logits):
        raise NotImplementedError

    @property
    def experts_per_token(self):
        return self.top_k


class RenormalizeMoeRoutingMethod(BaseMoeRoutingMethod):
    def __init__(self, top_k):
        super().__init__()
        self.top_k = top_k

    def apply(self, router_logits):
        values, ids = router_logits.topk(self.top_k)
        return ids.to(torch.int32), values.softmax(dim=-1)
