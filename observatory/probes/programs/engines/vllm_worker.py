"""vLLM's workers: where a model is loaded, a scheduler step begins and ends, and a worker shuts down.

The class that all workers have is changed once in each process; a worker then gets methods around its own.
The watch begins after the weights are loaded and before the first forward pass, in which compilers trace it.

A step is one call of ``execute_model`` that schedules tokens; with data parallelism also the dummy batch of a
rank without requests, so that steps of all ranks stay in line.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

import observatory
from observatory.errors import CaptureError
from observatory.host.ranks import RankOf
from observatory.probes.programs import models
from observatory.probes.programs.engines.engine_watch import EngineProcess, EngineWatch
from observatory.probes.programs.engines.token_phases import token_slots
from observatory.probes.programs.engines.vllm_ending import OpenWatch, wait_for_watches
from observatory.probes.programs.engines.vllm_layers import vllm_adapter
from observatory.probes.programs.settings import ProgramSettings
from observatory.run.files import one_line

#: What was tried; others are watched by the interface they show.
TRIED_VERSION = "0.32.0"
_log = logging.getLogger("vllm.observatory")


def watch_workers() -> None:
    """Watch every worker that this process makes; doing it twice does nothing."""
    from vllm.v1.worker.worker_base import WorkerBase

    make = WorkerBase.__init__
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def make_watched(worker: Any, *args: Any, **kwargs: Any) -> None:
        make(worker, *args, **kwargs)
        try:
            WorkerWatch(worker)
        except Exception as error:
            _log.warning("observatory: nothing is watched: %s", _said(error))

    WorkerBase.__init__ = make_watched
    models.leave_alone()
    wait_for_watches()


class WorkerWatch:
    """The watch on one worker's model."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._config = config = worker.vllm_config
        self._is_in_step = False
        where = _rank_of(worker)
        if where is None:
            return
        process = EngineProcess(
            name="vllm",
            version=_version(),
            tried=TRIED_VERSION,
            model=str(config.model_config.model),
            where=where,
            settings=ProgramSettings.of_engine(f"vllm-{config.instance_id}"),
            log=_log,
        )
        self._watch = watch = EngineWatch(process, OpenWatch())
        _keep_caches_apart(config)
        watch.around(worker, "load_model", after=self._begin)
        watch.around(worker, "execute_model", before=self._begin_step, after=self._end_step)
        watch.around(worker, "execute_dummy_batch", after=self._end_dummy)
        watch.around(worker, "shutdown", before=watch.end)

    def _begin(self, _loaded: Any) -> None:
        if self._watch.has_begun:
            return
        config, model = self._config, self._worker.get_model()
        problem = _unsupported(config.parallel_config)
        if problem is not None:
            raise CaptureError(problem)
        tokens = int(config.scheduler_config.max_num_batched_tokens)
        graphs = int(config.compilation_config.max_cudagraph_capture_size or 0)
        self._watch.begin(
            model,
            most_rows=tokens + graphs,
            adapter=lambda phases: vllm_adapter(phases, config.parallel_config),
            described=_described(self._worker),
        )
        self._find_rows()

    def _find_rows(self) -> None:
        """Look at each batch after the engine has laid it out, and before its forward pass."""
        runner = self._worker.model_runner
        if getattr(self._worker, "use_v2_model_runner", False):
            self._watch.around(
                runner, "prepare_inputs", after=lambda batch: self._fill(lambda: _rows_of_batch(batch))
            )
        else:
            self._watch.around(
                runner, "_model_forward", before=lambda *_a, **_k: self._fill(lambda: _rows_of_runner(runner))
            )

    def _fill(self, rows: Callable[[], NDArray[np.int64]]) -> None:
        if self._is_in_step and self._watch.is_capturing:
            self._watch.fill(rows())

    def _begin_step(self, scheduled: Any, *_: Any, **__: Any) -> None:
        self._is_in_step = scheduled.total_num_scheduled_tokens > 0
        if self._is_in_step:
            self._watch.begin_step()

    def _end_step(self, _result: Any) -> None:
        if self._is_in_step:
            self._is_in_step = False
            self._watch.step()

    def _end_dummy(self, _result: Any) -> None:
        if self._config.parallel_config.data_parallel_size > 1:
            self._watch.step()


def _rows_of_runner(runner: Any) -> NDArray[np.int64]:
    """Slots of the batch that a runner of the first kind has prepared."""
    batch = runner.input_batch
    requests = batch.num_reqs
    return token_slots(
        runner.query_start_loc.np[: requests + 1],
        batch.num_computed_tokens_cpu[:requests],
        batch.num_prompt_tokens[:requests],
    )


def _rows_of_batch(batch: Any) -> NDArray[np.int64]:
    """Slots of a batch of a runner of the second kind."""
    requests = batch.num_reqs
    return token_slots(
        batch.query_start_loc_np[: requests + 1],
        batch.num_computed_tokens_np[:requests],
        batch.prefill_len_np[:requests],
    )


def _rank_of(worker: Any) -> RankOf | None:
    """Rank of a worker among those that see other tokens or hold other layers; None for copies of one.

    The ranks of a tensor-parallel group route the same tokens: the first one stands for all.
    """
    parallel = worker.vllm_config.parallel_config
    tensor = parallel.tensor_parallel_size
    stage, copy = divmod(worker.rank, tensor)
    if copy:
        return None
    stages = parallel.pipeline_parallel_size
    return RankOf(
        rank=parallel.data_parallel_rank * stages + stage,
        world=parallel.data_parallel_size * stages,
        launcher="caller",
    )


def _unsupported(parallel: Any) -> str | None:
    """Why rows of a batch cannot be assigned to tokens; None where they can."""
    if parallel.use_ubatching:
        return "vLLM splits batches into micro-batches (--enable-dbo), whose rows are not assigned to tokens"
    if parallel.prefill_context_parallel_size > 1:
        return "vLLM spreads the tokens of a prompt over ranks (prefill context parallelism)"
    return None


def _keep_caches_apart(config: Any) -> None:
    """Compiled code that counts and code that does not are different entries of vLLM's compile cache."""
    if isinstance(config.additional_config, dict):
        config.additional_config["observatory"] = observatory.__version__


def _described(worker: Any) -> dict[str, JsonValue]:
    """What the manifest says of the engine."""
    config, parallel = worker.vllm_config, worker.vllm_config.parallel_config
    return {
        "runner": "V2" if getattr(worker, "use_v2_model_runner", False) else "V1",
        "compilation": str(getattr(config.compilation_config.mode, "name", None)),
        "data_parallel": parallel.data_parallel_size,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "eplb": bool(parallel.enable_eplb),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
        "max_batched_tokens": config.scheduler_config.max_num_batched_tokens,
    }


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _said(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__)
