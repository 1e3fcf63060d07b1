from dataclasses import dataclass
from enum import IntEnum, auto

import torch


class ForwardMode(IntEnum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DLLM_EXTEND = auto()

    def is_decode(self):
        return self == ForwardMode.DECODE

    def is_idle(self):
        return self == ForwardMode.IDLE

    def is_mixed(self):
        return self == ForwardMode.MIXED

    def is_target_verify(self):
        return self == ForwardMode.TARGET_VERIFY

    def is_dllm_extend(self):
        return self == ForwardMode.DLLM_EXTEND


@dataclass
class ForwardBatch:
    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor
    extend_seq_lens_cpu: list[int] | None = None

    @classmethod
    def init_new(cls, batch, model_runner, *, return_hidden_states_before_norm=False):
        lengths = None if batch.forward_mode in (ForwardMode.DECODE, ForwardMode.IDLE) else batch.extend_lens
        return cls(batch.forward_mode, len(batch.reqs), batch.input_ids, lengths)
