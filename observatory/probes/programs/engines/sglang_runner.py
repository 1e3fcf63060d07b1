"""SGLang's model runner: when its model is there, and where a step begins and ends.

A step is one call of ``ModelRunner.forward``: one batch of the scheduler, and with data-parallel attention
also the idle batch of a rank without requests, so that steps of all ranks stay in line. Runners of drafters
are left alone. Rows of real tokens come first, request by request; what pads a batch follows.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from observatory.errors import CaptureError
from observatory.host.ranks import RankOf
from observatory.probes.programs import models
from observatory.probes.programs.engines.engine_watch import EngineProcess, EngineWatch
from observatory.probes.programs.engines.interface import check_interface
from observatory.probes.programs.engines.sglang_layers import sglang_adapter
from observatory.probes.programs.settings import ProgramSettings
from observatory.probes.routing.counters import SLOTS

#: What was tried, on a CPU; others are watched by the interface they show.
TRIED_VERSION = "0.5.23"
_PREFILL, _DECODE, _UNKNOWN = (SLOTS.index(name) for name in ("prefill", "decode", "unknown"))
#: Of a ``ForwardBatch``: one bool for each request, whether it decodes.
_DECODES = "observatory_decodes"
#: Rows of requests that decode, with drafted tokens and padding: the engine knows its bound later.
_MOST_DECODED = 1 << 16
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"
_BATCH = "sglang.srt.model_executor.forward_batch_info:ForwardBatch"
_CONTEXT = "sglang.srt.runtime_context"
_INTERFACE = {
    f"{_RUNNER}.load_model": (),
    f"{_RUNNER}.forward": ("forward_batch",),
    f"{_RUNNER}.attn_tp_sequence_sharded": ("num_tokens",),
    f"{_BATCH}.init_new": ("batch", "model_runner"),
    "sglang.srt.layers.moe.topk:TopK": ("layer_id",),
    "sglang.srt.layers.moe.topk:capture_routed_experts_if_allowed": ("topk_config", "layer_id", "topk_ids"),
    "sglang.srt.layers.moe.topk:TopKConfig.num_shared_topk_slots": (),
    "sglang.srt.layers.moe.hash_topk:HashTopK": (),
    "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.is_shared_fused_moe": (),
    "sglang.srt.layers.moe:get_moe_a2a_backend": (),
    "sglang.srt.layers.dp_attention:is_dp_attention_enabled": (),
    f"{_CONTEXT}:get_parallel": (),
    f"{_CONTEXT}:get_exec": (),
    f"{_CONTEXT}:get_schedule": (),
}
_log = logging.getLogger("sglang.observatory")


def watch_runners(module: ModuleType) -> None:
    """Watch every model runner that this process makes; doing it twice does nothing."""
    runners, batches = module.ModelRunner, module.ForwardBatch
    load = runners.load_model
    if hasattr(load, "__wrapped__"):
        return
    models.leave_alone()

    @functools.wraps(load)
    def load_watched(runner: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(runner, *args, **kwargs)
        if not runner.is_draft_worker and not hasattr(runner, "observatory_watch"):
            runner.observatory_watch = _watch(runner)
        return result

    runners.load_model = load_watched
    make = batches.init_new.__func__

    @functools.wraps(make)
    def make_marked(kind: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(kind, batch, *args, **kwargs)
        decodes = set(map(id, getattr(batch, "decoding_reqs", None) or ()))
        setattr(made, _DECODES, [id(request) in decodes for request in getattr(batch, "reqs", None) or ()])
        return made

    batches.init_new = classmethod(make_marked)


def _watch(runner: Any) -> RunnerWatch | None:
    try:
        where = _rank()
        return None if where is None else RunnerWatch(runner, where)
    except Exception as error:  # an engine without us is better than none
        _log.warning("observatory: nothing is watched: %s", error)
        return None


class RunnerWatch:
    """The watch on one runner's model."""

    def __init__(self, runner: Any, where: RankOf) -> None:
        import sglang

        process = EngineProcess(
            name="sglang",
            version=str(sglang.__version__),
            tried=TRIED_VERSION,
            model=str(runner.server_args.model_path),
            where=where,
            settings=ProgramSettings.of_engine(f"sglang-{os.getppid()}"),
            log=_log,
        )
        self._runner = runner
        self._watch = EngineWatch(process)
        self._watch.guarded(self._begin)
        self._watch.around(
            runner, "forward", before=self._begin_step, after=lambda _output: self._watch.step()
        )

    def _begin(self) -> None:
        import sglang
        from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule

        check_interface(f"SGLang ({sglang.__version__})", _INTERFACE)
        parallel, moe, runner = get_parallel(), get_exec().moe, self._runner
        problem = _unsupported(runner)
        if problem is not None:
            raise CaptureError(problem)
        described: dict[str, JsonValue] = {
            "data_parallel": int(parallel.num_dp_ranks),
            "tensor_parallel": int(parallel.tp_size),
            "pipeline_parallel": int(parallel.pp_size),
            "expert_parallel": int(parallel.moe_ep_size),
            "moe_a2a_backend": str(moe.moe_a2a_backend),
            "redundant_experts": int(moe.ep_num_redundant_experts),
            "eplb": bool(moe.enable_eplb),
            "mixed_chunks": bool(get_schedule().enable_mixed_chunk),
        }
        self._watch.begin(
            runner.model,
            most_rows=_most_rows(runner),
            adapter=lambda phases: sglang_adapter(runner.model, phases, int(moe.ep_num_redundant_experts)),
            described=described,
        )

    def _begin_step(self, forward_batch: Any, *_: Any, **__: Any) -> None:
        self._watch.begin_step()
        if self._watch.is_capturing:
            self._watch.fill(batch_slots(forward_batch))


def batch_slots(batch: Any) -> NDArray[np.int64]:
    """Slot of each row of a ``ForwardBatch`` before it is padded, (T,)."""
    mode = batch.forward_mode
    if mode.is_idle():
        return np.empty(0, dtype=np.int64)
    if mode.is_decode():
        return np.full(batch.batch_size, _DECODE)
    lengths = batch.extend_seq_lens_cpu
    if mode.is_target_verify():
        return np.full(batch.input_ids.shape[0], _DECODE)
    if lengths is None or mode.is_dllm_extend():
        return np.full(batch.input_ids.shape[0], _UNKNOWN)
    decodes = getattr(batch, _DECODES, [])
    if len(decodes) != len(lengths):
        return np.full(sum(lengths), _UNKNOWN if mode.is_mixed() else _PREFILL)
    return np.repeat(np.where(decodes, _DECODE, _PREFILL), lengths)


def _most_rows(runner: Any) -> int:
    """Of a forward pass with its padding."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    prefill = max(int(schedule.max_prefill_tokens or 0), int(schedule.chunked_prefill_size or 0))
    # A prompt that is not cut into chunks may be as long as the context.
    return max(prefill, int(runner.model_config.context_len)) + _MOST_DECODED


def _rank() -> RankOf | None:
    """Rank among those that see other tokens or hold other layers; None for copies of one.

    The ranks of an attention-TP group route the same tokens: the first one stands for all.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_tp_rank:
        return None
    stages = int(parallel.pp_size)
    replica = int(parallel.dp_rank or 0) * int(parallel.attn_dp_size) + int(parallel.attn_dp_rank)
    return RankOf(
        rank=replica * stages + int(parallel.pp_rank),
        world=int(parallel.num_dp_ranks) * stages,
        launcher="caller",
    )


def _unsupported(runner: Any) -> str | None:
    """Why rows of a batch cannot be assigned to tokens; None where they can."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.layers.moe import get_moe_a2a_backend
    from sglang.srt.runtime_context import get_parallel

    arguments, parallel, exchange = runner.server_args, get_parallel(), get_moe_a2a_backend()
    if arguments.enable_two_batch_overlap:
        return "SGLang splits batches in two (--enable-two-batch-overlap): rows are not assigned to tokens"
    if arguments.enable_pdmux:
        return "SGLang runs layers of a prefill one after the other (--enable-pdmux), which is no step"
    if parallel.attn_cp_size > 1:
        return "SGLang spreads the tokens of a prompt over ranks (context parallelism)"
    if parallel.attn_tp_size > 1 and (not exchange.is_none() or runner.attn_tp_sequence_sharded(1)):
        return "SGLang splits tokens among the ranks of a tensor-parallel group (--moe-a2a-backend)"
    if is_dp_attention_enabled() and exchange.is_none():
        return (
            "SGLang gathers the tokens of all ranks before it routes them (--enable-dp-attention without "
            "--moe-a2a-backend)"
        )
    return None
