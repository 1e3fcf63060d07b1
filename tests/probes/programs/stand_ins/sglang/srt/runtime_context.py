from types import SimpleNamespace

PARALLEL = SimpleNamespace(
    attn_tp_rank=0, attn_tp_size=1, attn_dp_rank=0, attn_dp_size=1, attn_cp_size=1, dp_rank=None,
    num_dp_ranks=1, pp_rank=0, pp_size=1, tp_size=1, moe_ep_size=1,
)  # fmt: skip
MOE = SimpleNamespace(moe_a2a_backend="none", ep_num_redundant_experts=2, enable_eplb=False)
SCHEDULE = SimpleNamespace(enable_mixed_chunk=True, chunked_prefill_size=8, max_prefill_tokens=16)


def get_parallel():
    return PARALLEL


def get_exec():
    return SimpleNamespace(moe=MOE)


def get_schedule():
    return SCHEDULE
