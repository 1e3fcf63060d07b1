"""vLLM's workers: where a model is loaded, a scheduler step begins and ends, and a worker shuts down.

The class that all workers have is changed once in each process; a worker then gets methods around its own.
Nothing here raises into the engine: what fails is logged, noted, and the worker goes on as without us. The
watch begins after the weights are loaded and before the first forward pass, in which compilers trace it.

A step is one call of ``execute_model`` that schedules tokens; with data parallelism also the dummy batch of a
rank without requests, so that steps of all ranks stay in line.
"""

from __future__ import annotations

import atexit
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
from observatory.probes.options import ExchangeOptions, PowerOptions, RoutingOptions, RunLabels, WatchOptions
from observatory.probes.programs import models
from observatory.probes.programs.engines.token_phases import TokenPhases, phase_of, token_slots
from observatory.probes.programs.engines.vllm_ending import OpenWatch, wait_for_watches
from observatory.probes.programs.engines.vllm_layers import vllm_adapter
from observatory.probes.programs.settings import Note, ProgramSettings
from observatory.probes.programs.watching import begin_watch
from observatory.probes.programs.words import ProgramCode, program_sentence
from observatory.probes.watch import Watch
from observatory.run.files import one_line

#: What was tried; others are watched by the interface they show.
TRIED_VERSION = "0.32.0"
#: A server may be ended by a signal that leaves no time to write.
_FLUSH_S = 2.0
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
        self._config = worker.vllm_config
        self._watch: Watch | None = None
        self._open = OpenWatch()
        self._phases: TokenPhases | None = None
        self._settings = ProgramSettings.of_engine(f"vllm-{self._config.instance_id}")
        self._where = _rank_of(worker)
        self._is_in_step = False
        self._is_over = False
        if self._where is None:
            return
        _keep_caches_apart(self._config)
        self._around("load_model", after=self._begin)
        self._around("execute_model", before=self._begin_step, after=self._end_step)
        self._around("execute_dummy_batch", after=self._end_dummy)
        self._around("shutdown", before=self._end)
        atexit.register(self._guarded, self._end)

    def _around(
        self, name: str, *, before: Callable[..., None] | None = None, after: Callable[[], None] | None = None
    ) -> None:
        """Call ours around a method of the worker; ours never raises."""
        method = getattr(self._worker, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self._guarded(before, *args, **kwargs)
            result = method(*args, **kwargs)
            if after is not None:
                self._guarded(after)
            return result

        setattr(self._worker, name, call)

    def _guarded(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._is_over:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._stop(error)

    def _begin(self) -> None:
        """The weights are loaded; once, as an engine may load them again."""
        if self._phases is not None:
            return
        config, model = self._config, self._worker.get_model()
        problem = _unsupported(config.parallel_config)
        if problem is not None:
            raise CaptureError(problem)
        tokens = int(config.scheduler_config.max_num_batched_tokens)
        graphs = int(config.compilation_config.max_cudagraph_capture_size or 0)
        self._phases = TokenPhases(tokens + graphs, next(model.parameters()).device)
        self._find_rows()
        self._watch = begin_watch(model, self._settings.out, self._options)
        self._open.set()
        version = _version()
        if not _is_tried(version):
            _log.warning(
                "observatory: vLLM %s was not tried (%s was): it is watched by its interface",
                version,
                TRIED_VERSION,
            )
        _log.info("observatory watches %d MoE layers; run %s", len(self._watch.sites), self._watch.run_path)

    def _options(self, number: int) -> WatchOptions:
        assert self._phases is not None
        assert self._where is not None
        config, settings = self._config, self._settings
        return WatchOptions(
            where=self._where,
            flush_s=_FLUSH_S,
            run_id=f"{settings.run_id}-{number}",
            steps=settings.steps,
            routing=RoutingOptions(
                verify="none", adapters=(vllm_adapter(self._phases, config.parallel_config),)
            ),
            exchange=ExchangeOptions(exchanges=bool(settings.exchanges), align_clocks=False),
            power=PowerOptions(power=settings.power),
            labels=RunLabels(
                model_name=one_line(str(config.model_config.model).rstrip("/").rpartition("/")[2]),
                config={"engine": _described(self._worker)},
            ),
        )

    def _find_rows(self) -> None:
        """Look at each batch after the engine has laid it out, and before its forward pass."""
        runner = self._worker.model_runner
        name = "prepare_inputs" if getattr(self._worker, "use_v2_model_runner", False) else "_model_forward"
        method = getattr(runner, name)

        if name == "prepare_inputs":

            @functools.wraps(method)
            def call(*args: Any, **kwargs: Any) -> Any:
                batch = method(*args, **kwargs)
                self._guarded(self._fill, lambda: _rows_of_batch(batch))
                return batch

        else:

            @functools.wraps(method)
            def call(*args: Any, **kwargs: Any) -> Any:
                self._guarded(self._fill, lambda: _rows_of_runner(runner))
                return method(*args, **kwargs)

        setattr(runner, name, call)

    def _fill(self, rows: Callable[[], NDArray[np.int64]]) -> None:
        watch = self._watch
        if watch is not None and watch.is_capturing and self._phases is not None and self._is_in_step:
            slots_T = rows()
            self._phases.fill(slots_T)
            watch.state_step_phase(phase_of(slots_T))

    def _begin_step(self, scheduled: Any) -> None:
        self._is_in_step = scheduled.total_num_scheduled_tokens > 0
        if self._watch is not None and self._is_in_step:
            self._watch.begin_step()

    def _end_step(self) -> None:
        if self._is_in_step:
            self._is_in_step = False
            self._step()

    def _end_dummy(self) -> None:
        if self._config.parallel_config.data_parallel_size > 1:
            self._step()

    def _step(self) -> None:
        watch, phases = self._watch, self._phases
        if watch is None or phases is None:
            return
        phases.clear()
        watch.step()
        if watch.is_over:
            self._end()

    def _end(self) -> None:
        self._is_over = True
        watch, self._watch = self._watch, None
        if watch is not None:
            try:
                watch.__exit__(None, None, None)
            finally:
                self._open.clear()
            Note(run=str(watch.run_path), rank=0 if self._where is None else self._where.rank).write("vllm")

    def _stop(self, error: Exception) -> None:
        """An error of ours: the engine goes on."""
        self._is_over = True
        watch, self._watch = self._watch, None
        if self._phases is not None:
            self._phases.clear()
        model = one_line(str(self._config.model_config.model))
        reason: dict[str, JsonValue]
        if watch is None:
            reason = {"code": ProgramCode.NOT_WATCHED.value, "model": model, "error": _said(error)}
        else:
            reason = {
                "code": ProgramCode.STOPPED.value, "model": model, "step": watch.steps, "error": _said(error),
            }  # fmt: skip
        note = Note(run=None if watch is None else str(watch.run_path), reason=reason)
        note.write("vllm")
        assert note.cause is not None
        _log.warning("observatory: %s", program_sentence(note.cause))
        if watch is not None:
            try:
                watch.__exit__(type(error), error, error.__traceback__)
            except Exception:  # stated above
                pass
            finally:
                self._open.clear()


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


def _described(worker: Any) -> JsonValue:
    """What the manifest says of the engine."""
    config, parallel, version = worker.vllm_config, worker.vllm_config.parallel_config, _version()
    return {
        "name": "vllm",
        "version": one_line(version),
        "is_tried_version": _is_tried(version),
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


def _is_tried(version: str) -> bool:
    return version.partition("+")[0] == TRIED_VERSION


def _said(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__)
