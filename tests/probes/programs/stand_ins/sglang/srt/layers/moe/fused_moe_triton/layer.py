from torch import nn


class FusedMoE(nn.Module):
    is_shared_fused_moe = False

    def __init__(self, num_experts, *, layer_id, num_fused_shared_experts=0):
        super().__init__()
        self.layer_id = layer_id
        self._num_global_routed = num_experts - num_fused_shared_experts
