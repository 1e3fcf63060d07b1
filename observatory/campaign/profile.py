"""Profile one model on given data: load, watch, run, keep.

Shapes: B sequences per step and rank, T tokens per sequence, S steps, P ranks.

Protocol, in this order, so that two profiles of one seed feed the same tokens:

1. The data give P * B rows of contiguous tokens, of which rank p takes rows p*B .. (p+1)*B. Prefill step s
   reads columns s*T .. (s+1)*T of every row.
2. Decode steps read the columns behind the last prefill, one a step, with the model's own cache: the
   text itself is fed, not what the model would have said, so routing is that of real text.
3. With ``decode`` alone the context is built before the probe is attached and is not part of the run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.campaign.job import ProfileJob
from observatory.campaign.preflight import check_job, check_length
from observatory.errors import ModelError, ObservatoryError
from observatory.host.ranks import find_rank
from observatory.run.files import one_line

if TYPE_CHECKING:
    import torch

    from observatory.campaign.ranks import Ranks
    from observatory.probes.watch import Watch
    from observatory.zoo.data import TokenStream
    from observatory.zoo.models import LoadedModel

#: Called with (steps done, steps in all).
Progress = Callable[[int, int], None]


def run_profile(
    job: ProfileJob,
    out: Path,
    *,
    loaded: LoadedModel | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Run one profile and write its run directory; with several ranks, this rank's part of it.

    Args:
        job: what to profile.
        out: run directory to make.
        loaded: the model, when the caller has it already.
        overwrite: replace an existing run.
        progress: called when the checks have passed, and for every finished step.

    Returns:
        The run directory.

    Raises:
        ModelError: the model cannot be loaded, has no MoE layers, is too short for the sequence, or fails.
        DataError: the data cannot fill the run.
        PlacementError: the experts do not fit the ranks.
        CaptureError: the probe or the run directory failed.
        RunError: something else is in the place of the run.
        ExchangeError: the ranks do not find each other, or one is lost.
    """
    from observatory.campaign.ranks import join_ranks
    from observatory.run.replacing import check_free

    if loaded is None:
        if find_rank().world == 1:
            check_free(out, overwrite=overwrite)
        check_job(job)
    if progress is not None:
        progress(0, job.prefill_steps + job.decode_steps)
    with join_ranks(job) as ranks:
        return _run_rank(job, out, ranks, loaded=loaded, overwrite=overwrite, progress=progress)


def _run_rank(
    job: ProfileJob,
    out: Path,
    ranks: Ranks,
    *,
    loaded: LoadedModel | None,
    overwrite: bool,
    progress: Progress | None,
) -> Path:
    import torch

    from observatory.probes.options import ExchangeOptions, RunLabels, WatchOptions
    from observatory.probes.watch import Watch
    from observatory.run.manifest import DataSpec
    from observatory.zoo.data import load_token_ids
    from observatory.zoo.models import load_model, quiet_transformers

    world = ranks.where.world
    power = job.sampling(rank=ranks.where.rank, ranks=world)
    run_id = ranks.agree_on_place(out, overwrite=overwrite)
    loaded = loaded or load_model(job.model, device=job.device, dtype=job.dtype)
    model = loaded.model.eval()
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    check_length(limit, job.positions, lower="--sequence-length or --steps")
    stream = load_token_ids(
        job.data,
        loaded.tokenizer,
        vocabulary_size=loaded.vocabulary_size,
        tokens=world * job.batch_size * job.row_tokens,
        seed=job.seed,
    )
    ids = _rows(stream, job, rank=ranks.where.rank, world=world)
    total = job.prefill_steps + job.decode_steps
    done = 0

    def step_done(watch: Watch) -> None:
        nonlocal done
        watch.step()
        done += 1
        if progress is not None:
            progress(done, total)

    with (
        torch.inference_mode(),
        quiet_transformers(),
        _model_failures(loaded.name),
        ranks.spread(model, job) as sharded,
    ):
        cache = None if job.prefill_steps else _prefill(model, ids, job, column=0, keep_cache=True)
        with (
            Watch(
                model,
                out,
                WatchOptions(
                    where=ranks.where,
                    flush_s=job.flush_s,
                    overwrite=overwrite,
                    run_id=run_id,
                    made=None if ranks.transport is None else ranks.made,
                    # Spread experts compute tokens of other ranks, too.
                    routing=job.counting(verify="first" if job.ep == 1 else "none"),
                    exchange=ExchangeOptions(
                        exchanges=True if ranks.transport is not None and world > 1 else None,
                        align_clocks=ranks.transport is None,  # else over the transport, whatever it is
                    ),
                    power=power,
                    labels=RunLabels(
                        model_name=loaded.name,
                        family=loaded.family,
                        mixer=loaded.mixer,
                        config=asdict(job),
                        topology=ranks.topology(sharded),
                        data=DataSpec(
                            condition=stream.condition,
                            source=stream.source,
                            real=stream.real,
                            batch_size=world * job.batch_size,
                            sequence_length=job.sequence_length,
                            wrapped=stream.wrapped,
                        ),
                    ),
                ),
            ) as watch,
            ranks.aligned(watch),
        ):
            ranks.report(sharded, watch)
            for step in range(job.prefill_steps):
                last = step == job.prefill_steps - 1
                with watch.phase("prefill"):
                    cache = _prefill(
                        model,
                        ids,
                        job,
                        column=step * job.sequence_length,
                        keep_cache=last and job.decode_steps > 0,
                    )
                step_done(watch)
            context = max(job.prefill_steps, 1) * job.sequence_length
            for step in range(job.decode_steps):
                column = context + step
                with watch.phase("decode"):
                    cache = model(
                        input_ids=ids[:, column : column + 1], past_key_values=cache, use_cache=True
                    ).past_key_values
                step_done(watch)
    return out


@contextlib.contextmanager
def _model_failures(name: str) -> Iterator[None]:
    """Say that it was the model which failed: out of device memory, an operator its device lacks, ..."""
    try:
        yield
    except (ObservatoryError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{name} failed while it ran: {type(error).__name__}: {one_line(error)}; "
            "what was captured is kept, try a smaller batch, another --dtype or --device"
        ) from error


def _rows(stream: TokenStream, job: ProfileJob, *, rank: int, world: int) -> torch.Tensor:
    """Token ids of this rank as B contiguous rows, shape (B, row_tokens)."""
    import torch

    ids = torch.from_numpy(stream.ids.copy())
    return ids.view(world, job.batch_size, job.row_tokens)[rank].to(job.device)


def _prefill(model: Any, ids: torch.Tensor, job: ProfileJob, *, column: int, keep_cache: bool) -> Any:
    """One prefill over T columns of every row; its cache when asked for, else None."""
    window = ids[:, column : column + job.sequence_length]
    output = model(input_ids=window, use_cache=keep_cache, **last_logits_only(model))
    if not keep_cache:
        return None
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ModelError(
            f"{type(model).__name__} returns no cache, so it cannot decode; profile it with --phase prefill"
        )
    return cache


def last_logits_only(model: Any) -> dict[str, Any]:
    """Options of a call that let a model compute the logits of the last token only, if it can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
