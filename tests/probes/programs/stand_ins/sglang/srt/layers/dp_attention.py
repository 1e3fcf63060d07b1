from sglang.srt.runtime_context import get_parallel


def is_dp_attention_enabled():
    return get_parallel().attn_dp_size > 1
