from sglang.srt.runtime_context import get_exec


class MoeA2ABackend:
    def is_none(self):
        return get_exec().moe.moe_a2a_backend == "none"


def get_moe_a2a_backend():
    return MoeA2ABackend()
