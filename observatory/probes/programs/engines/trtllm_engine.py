"""TensorRT-LLM's model engine (PyTorch backend): when its model is there, and where a step begins and ends.

A step is one call of ``PyTorchModelEngine.forward`` outside of warm-up: one batch of the executor. Engines of
drafters are left alone. Rows lie in the order of the sequences: first those of prompts, then those that are
generated, then dummy requests that pad a batch, then rows that pad a CUDA graph.
"""

from __future__ import annotations

import functools
import inspect
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
from observatory.probes.programs.engines.trtllm_layers import trtllm_adapter
from observatory.probes.programs.settings import ProgramSettings
from observatory.probes.routing.counters import NO_SLOT, SLOTS

_PREFILL, _DECODE = SLOTS.index("prefill"), SLOTS.index("decode")
_ENGINE = "tensorrt_llm._torch.pyexecutor.model_engine:PyTorchModelEngine"
_LAYERS = "tensorrt_llm._torch.modules.fused_moe"
_INTERFACE = {
    f"{_ENGINE}.forward": ("scheduled_requests",),
    f"{_ENGINE}._prepare_inputs": ("scheduled_requests", "attn_metadata"),
    f"{_ENGINE}.is_warmup": (),
    f"{_LAYERS}.interface:MoE.forward_impl": ("x", "router_logits"),
    f"{_LAYERS}.routing:BaseMoeRoutingMethod.apply": (),
    f"{_LAYERS}.routing:BaseMoeRoutingMethod.experts_per_token": (),
}
_log = logging.getLogger("observatory")


def watch_engines(module: ModuleType) -> None:
    """Watch every engine that this process makes; doing it twice does nothing."""
    engines = module.PyTorchModelEngine
    make = engines.__init__
    if hasattr(make, "__wrapped__"):
        return
    models.leave_alone()

    @functools.wraps(make)
    def make_watched(engine: Any, *args: Any, **kwargs: Any) -> None:
        make(engine, *args, **kwargs)
        if engine.is_draft_model:
            return
        try:
            where = _rank_of(engine.mapping)
            if where is not None:
                ModelEngineWatch(engine, where)
        except Exception as error:  # an engine without us is better than none
            _log.warning("observatory: nothing is watched: %s", error)

    engines.__init__ = make_watched


class ModelEngineWatch:
    """The watch on one engine's model."""

    def __init__(self, engine: Any, where: RankOf) -> None:
        self._engine = engine
        process = EngineProcess(
            name="tensorrt_llm",
            version=_version(),
            tried=None,
            model=_model_name(engine),
            where=where,
            settings=ProgramSettings.of_engine(f"tensorrt_llm-{os.getppid()}"),
            log=_log,
        )
        self._watch = EngineWatch(process)
        self._watch.guarded(self._begin)

    def _begin(self) -> None:
        check_interface(f"TensorRT-LLM ({_version()})", _INTERFACE)
        engine, mapping = self._engine, self._engine.mapping
        problem = _unsupported(engine)
        if problem is not None:
            raise CaptureError(problem)
        described: dict[str, JsonValue] = {
            "attention_data_parallel": bool(mapping.enable_attention_dp),
            "tensor_parallel": int(mapping.tp_size),
            "pipeline_parallel": int(mapping.pp_size),
            "expert_parallel": int(mapping.moe_ep_size),
            "eplb": getattr(engine, "moe_load_balancer", None) is not None,
            "max_batched_tokens": int(engine.max_num_tokens),
        }
        self._watch.begin(
            engine.model,
            # A layer repeats its first chunk for ranks that lack one, behind the rows of tokens.
            most_rows=2 * int(engine.max_num_tokens),
            adapter=lambda phases: trtllm_adapter(phases, self._watch.refuse),
            described=described,
        )
        self._find_rows()
        self._watch.around(engine, "forward", before=self._begin_step, after=self._end_step)

    def _find_rows(self) -> None:
        """Look at each batch after the engine has laid it out, and before its forward pass."""
        prepare = self._engine._prepare_inputs
        signature = inspect.signature(prepare)

        @functools.wraps(prepare)
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = prepare(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            self._watch.guarded(self._fill, given["scheduled_requests"], given["attn_metadata"])
            return inputs

        self._engine._prepare_inputs = call

    def _fill(self, scheduled: Any, metadata: Any) -> None:
        if self._watch.is_capturing and not self._engine.is_warmup:
            self._watch.fill(batch_slots(scheduled, metadata))

    def _begin_step(self, *_: Any, **__: Any) -> None:
        if not self._engine.is_warmup:
            self._watch.begin_step()

    def _end_step(self, _output: Any) -> None:
        if not self._engine.is_warmup:
            self._watch.step()


def batch_slots(scheduled: Any, metadata: Any) -> NDArray[np.int64]:
    """Slot of each row of a batch, (T,); rows of dummy requests do not count.

    Args:
        scheduled: ``ScheduledRequests``, with those that pad the batch.
        metadata: ``AttentionMetadata`` of it: request and length of each sequence, in the order of the rows.

    Raises:
        CaptureError: sequences and requests do not fit together.
    """
    contexts = [*scheduled.context_requests]
    dummies = {
        request.py_request_id for request in (*contexts, *scheduled.generation_requests) if request.is_dummy
    }
    prompts = {request.py_request_id for request in contexts}
    requests, lengths = list(metadata.request_ids), [int(length) for length in metadata.seq_lens]
    if len(requests) != len(lengths):
        raise CaptureError(f"a batch has {len(requests)} requests and {len(lengths)} sequences")
    slots = [
        NO_SLOT if request in dummies else _PREFILL if request in prompts else _DECODE for request in requests
    ]
    return np.repeat(np.array(slots, dtype=np.int64), lengths)


def _rank_of(mapping: Any) -> RankOf | None:
    """Rank among those that see other tokens or hold other layers; None for copies of one.

    The ranks of a tensor-parallel group route the same tokens, unless attention is data-parallel.
    """
    replicas = int(mapping.tp_size) if mapping.enable_attention_dp else 1
    if mapping.tp_rank >= replicas:
        return None
    stages = int(mapping.pp_size)
    return RankOf(
        rank=int(mapping.tp_rank) * stages + int(mapping.pp_rank), world=replicas * stages, launcher="caller"
    )


def _unsupported(engine: Any) -> str | None:
    """Why rows of a batch cannot be assigned to tokens; None where they can."""
    if engine.mapping.cp_size > 1:
        return "TensorRT-LLM spreads the tokens of a prompt over ranks (context parallelism)"
    if engine.max_beam_width > 1:
        return "TensorRT-LLM searches with beams, whose rows are not assigned to tokens"
    mode = getattr(getattr(engine, "spec_config", None), "spec_dec_mode", None)
    if mode is not None and mode.use_one_engine():
        return "TensorRT-LLM drafts tokens inside of the model (one-engine speculative decoding)"
    return None


def _model_name(engine: Any) -> str:
    config = engine.model.model_config.pretrained_config
    return str(getattr(config, "_name_or_path", "") or type(engine.model).__name__)


def _version() -> str:
    import tensorrt_llm

    return str(tensorrt_llm.__version__)
