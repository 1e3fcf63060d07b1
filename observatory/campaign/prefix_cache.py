"""``observatory reuse measure``: energy of prefill with a part of the prompt already cached.

Protocol:

    prefix of each cached fraction computed once                 its keys and values stay on the device
    sampler started, idle power calibrated
    for fraction in all fractions x repeats, in random order:    drift and order cannot look like reuse
        prefill of the rest, over and over, for `settle`
        the same for `window`, whole prefills, device waited for at both ends
        cache cut back to the prefix after every prefill         all prefills do the same work
    energy of every window from the telemetry, divided by its prefills

A miss computes the whole prompt into a new cache. An exact hit has all of the prompt cached and still runs
its last token, whose output is what a prefill is for. Windows of 5 s and more bracket many prefills, as
counters renew every 100 ms (arXiv 2605.05696).
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from observatory.analysis.energy.codes import EnergyCode
from observatory.analysis.energy.repeated_iterations import energy_of_repeats
from observatory.analysis.energy.traces import trace_of_frame
from observatory.analysis.energy.windows import energy_of_window
from observatory.analysis.energy.words import reason_words
from observatory.campaign.preflight import check_length
from observatory.campaign.sampled_run import sampled_run
from observatory.campaign.workloads import TEXT, ModelWorkload, Window, Workload, WorkloadFacts, cut_back
from observatory.devices.find import open_device
from observatory.devices.sensors import SensorModel, sensor_of
from observatory.errors import DeviceError, EnergyError, ModelError, ObservatoryError
from observatory.host.provenance import collect_provenance
from observatory.probes.power.watched import gpu_uuid
from observatory.reasons import Reason
from observatory.run import open_run
from observatory.run.documents.prefix_cache import ReuseCell, ReuseMeasurement, ReuseMeasurements
from observatory.run.documents.writing import write_text
from observatory.run.files import one_line
from observatory.run.manifest import DeviceSpec, RankPower

if TYPE_CHECKING:
    import pandas as pd
    import torch

#: Outputs of one prefill and its repetition may differ by this, relative: kernels that add in any order do.
_SAME = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseJob:
    """What to measure.

    Attributes:
        model: name of the model, for the document.
        device: the power device, as ``observatory power`` names it.
        prompt_tokens: length of each prompt.
        batch_size: prompts prefilled together.
        repeats: windows of each cached fraction.
        settle_s: run before each window.
        window_s: length of each window.
        period_s: time between samples.
        seed: of the order.
        note: of the devices, for the document.
    """

    model: str
    device: str
    prompt_tokens: int
    batch_size: int = 1
    repeats: int = 4
    settle_s: float = 0.5
    window_s: float = 5.0
    period_s: float = 0.05
    seed: int = 0
    note: str | None = None


def parse_fractions(text: str, *, prompt_tokens: int) -> tuple[float, ...]:
    """Cached fractions from ``0,0.5,1``, ascending, each once.

    Raises:
        EnergyError: no list of numbers from 0 to 1, fewer than two, or the prompt is too short for them.
    """
    if not re.fullmatch(r"(0|1|[01]?\.\d{1,6}|[01]\.0*)(,(0|1|[01]?\.\d{1,6}|[01]\.0*))*", text):
        raise EnergyError(
            f"--fractions {text[:60]!r} is no list of cached fractions",
            expected="numbers from 0 (a miss) to 1 (an exact hit) such as 0,0.5,1",
        )
    fractions = sorted({float(part) for part in text.split(",")})
    if fractions[-1] > 1 or len(fractions) < 2:
        raise EnergyError(
            f"--fractions {text[:60]!r}: expected two or more different numbers from 0 to 1, such as 0,0.5,1"
        )
    kept = {round(fraction * prompt_tokens) for fraction in fractions}
    if len(kept) < len(fractions) or prompt_tokens - 1 in kept:
        raise EnergyError(
            f"a prompt of {prompt_tokens} tokens has no room for the cached fractions "
            f"{', '.join(f'{fraction:g}' for fraction in fractions)}",
            remedy="take a longer one or fewer fractions",
        )
    return tuple(fractions)


def check_same_device(power_device: str, torch_device: str) -> str | None:
    """Make sure that the power that is read is that of the device the model computes on.

    Args:
        power_device: as ``observatory power`` names it.
        torch_device: where the model is.

    Returns:
        What has to be noted where torch does not report which device that is; None where it is the same.

    Raises:
        DeviceError: there is no such power device, or it is another one.
        ModelError: torch has no such device.
    """
    with open_device(power_device) as opened:
        uuid = opened.uuid
    torch_uuid = gpu_uuid(torch_device)
    if torch_uuid is None:
        return f"the model computed on {torch_device}; that {uuid} is its device was not checked"
    if torch_uuid.lower() != uuid.lower():
        raise DeviceError(
            f"--device {one_line(power_device, 80)} is {uuid}, and the model on {torch_device} computes on "
            f"{torch_uuid}",
            remedy=f"give --device {torch_uuid}, or another --torch-device",
        )
    return None


@contextlib.contextmanager
def cached_prefills(
    model: str,
    *,
    fractions: Sequence[float],
    prompt_tokens: int,
    batch_size: int,
    device: str,
    dtype: str | None,
) -> Iterator[dict[float, Workload]]:
    """Load a model; a workload per cached fraction that prefills what is not cached of real text.

    Fractions are rounded to whole tokens; the keys say what they became.

    Raises:
        ModelError: the model cannot be loaded, or its cache cannot be cut back to a prefix.
        DataError: the text does not fill the batch.
    """
    import torch

    from observatory.zoo.data import load_token_ids
    from observatory.zoo.models import load_model, quiet_transformers

    loaded = load_model(model, device=device, dtype=dtype)
    network: Any = loaded.model.eval()
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    check_length(limit, prompt_tokens, lower="--prompt-tokens")
    stream = load_token_ids(
        TEXT, loaded.tokenizer, vocabulary_size=loaded.vocabulary_size, tokens=batch_size * prompt_tokens,
        seed=0,
    )  # fmt: skip
    ids = torch.from_numpy(stream.ids.copy()).view(batch_size, prompt_tokens).to(device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    result: dict[float, Workload] = {}
    with torch.inference_mode(), quiet_transformers():
        for tokens in sorted({round(fraction * prompt_tokens) for fraction in fractions}):
            facts = WorkloadFacts(
                name=f"{loaded.name} prefill, {tokens} of {prompt_tokens} tokens cached", phase="prefill",
                batch_size=batch_size, context_tokens=prompt_tokens,
            )  # fmt: skip
            iterate = _prefill_rest(network, ids, tokens)
            result[tokens / prompt_tokens] = ModelWorkload(facts, iterate, wait)
        yield result


def _prefill_rest(network: Any, ids: torch.Tensor, cached: int) -> Callable[[], Any]:
    """A function that prefills what is not cached, the same every time."""
    from observatory.campaign.profile import last_logits_only

    options = {"use_cache": True, **last_logits_only(network)}
    if cached == 0:
        return lambda: network(input_ids=ids, **options).logits[:, -1]
    # Of an exact hit the last token is run again: its output is asked for.
    prefix = min(cached, ids.shape[1] - 1)
    cache = network(input_ids=ids[:, :prefix], **options).past_key_values
    name = type(network).__name__

    def iterate() -> torch.Tensor:
        output: torch.Tensor = network(input_ids=ids[:, prefix:], past_key_values=cache, **options).logits
        try:
            cut_back(cache, ids.shape[1] - prefix, network)
        except ModelError as error:
            raise ModelError(
                f"reuse of {name} cannot be measured: its cache holds a state of the whole text (a "
                "recurrence) that cannot be cut back to a prefix to repeat a prefill",
                remedy="take a model whose cache holds keys and values of all tokens in every layer",
            ) from error
        return output[:, -1]

    first, again = iterate().float(), iterate().float()
    if float((first - again).norm()) > _SAME * float(first.norm()):
        raise ModelError(
            f"{name} gives another output when the same prefill is repeated behind its cut back cache: parts "
            "of its state (a recurrence, a sliding window) are not cut back; only models whose cache holds "
            "keys and values of all tokens can be measured"
        )
    return iterate


def run_reuse(
    job: ReuseJob,
    workloads: Mapping[float, Workload],
    out: Path,
    *,
    overwrite: bool = False,
    argv: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ReuseMeasurements:
    """Measure, and write the result and its raw telemetry (``OUT`` with the ending ``.run``).

    Ctrl-C, or an error later on, keeps the windows that were measured and is raised again.

    Args:
        job: how.
        workloads: by cached fraction.
        out: result file.
        overwrite: replace both.
        argv: command line, for the document.
        progress: called before the first and after every window: how many are finished, of how many.

    Raises:
        DeviceError: the device cannot be read.
        EnergyError: no window has an energy.
        RunError: the telemetry cannot be kept.
    """
    telemetry = out.with_suffix(".run")
    with open_device(job.device) as opened:
        uuid = opened.uuid
    order = [fraction for fraction in workloads for _ in range(job.repeats)]
    random.Random(job.seed).shuffle(order)
    measured: list[tuple[float, Window]] = []
    problem: BaseException | None = None
    with sampled_run(
        telemetry, f"prefill reuse into {out.name}", [job.device], period_s=job.period_s, flush_s=5.0,
        overwrite=overwrite,
    ) as run:  # fmt: skip
        try:
            if progress is not None:
                progress(0, len(order))
            for fraction in order:
                measured.append(
                    (fraction, workloads[fraction].measure(settle_s=job.settle_s, window_s=job.window_s))
                )
                if progress is not None:
                    progress(len(measured), len(order))
        except (ObservatoryError, KeyboardInterrupt) as error:
            problem = error
        finally:
            # The last window ends between two samples.
            time.sleep(3 * job.period_s)
    if not measured:
        raise problem or EnergyError("nothing was measured", remedy="see the messages above")
    try:
        result = _document(job, uuid, measured, run.power, open_run(telemetry).power(), argv, problem)
    except EnergyError as error:
        raise problem or error from None
    write_text(out, result.model_dump_json(indent=1))
    if problem is not None:
        raise problem
    return result


def _document(
    job: ReuseJob,
    uuid: str,
    measured: Sequence[tuple[float, Window]],
    power: RankPower,
    samples: pd.DataFrame,
    argv: Sequence[str],
    problem: BaseException | None,
) -> ReuseMeasurements:
    origin = collect_provenance()
    spec = next((spec for spec in power.sampled if spec.uuid == uuid), None)
    calibration = power.calibration.get(uuid)
    sensor = sensor_of(
        None if spec is None else spec.name, calibration, kind=None if spec is None else spec.kind
    )
    about = () if job.note is None else (job.note,)
    notes = [*power.notes, *about, "an exact hit still runs the last token of the prompt, for its output"]
    if problem is not None:
        notes.append(
            f"ended early, after {len(measured)} windows: {type(problem).__name__}: {problem}"[:4000]
        )
    rows: list[ReuseMeasurement] = []
    for fraction, window in measured:
        row = _measurement(fraction, window, samples, sensor)
        if isinstance(row, Reason):
            why = reason_words(row)
            notes.append(f"a window at a cached fraction of {fraction:g} has no energy: {why}"[:4000])
        else:
            rows.append(row)
    if not rows:
        raise EnergyError(f"no window has an energy ({notes[-1]})", remedy="see the samples, kept in the run")
    return ReuseMeasurements(
        created_unix_s=time.time(),
        argv=tuple(argv),
        model=job.model,
        prompt_tokens=job.prompt_tokens,
        batch_size=job.batch_size,
        device=spec or DeviceSpec(kind="unknown", uuid=uuid),
        idle_power_mw=None if calibration is None else calibration.idle_power_mw,
        measurements=tuple(rows),
        git_sha=origin["git_sha"],
        hosts=origin["hosts"],
        software=origin["software"],
        notes=tuple(dict.fromkeys(notes)),
    )


def _measurement(
    fraction: float, window: Window, samples: pd.DataFrame, sensor: SensorModel
) -> ReuseMeasurement | Reason:
    """One window with its energy, or why it has none."""
    if samples.empty:
        return Reason(EnergyCode.NO_SAMPLES)
    trace = trace_of_frame(samples)
    whole = energy_of_window(trace, window.start_ns, window.end_ns, sensor=sensor)
    energy = energy_of_repeats(whole, trace, sensor, iterations=window.iterations)
    if energy.energy_mj is None or energy.energy_mj <= 0:
        return energy.reason or Reason(EnergyCode.NO_POSITIVE_ENERGY)
    cell: ReuseCell = "MISS" if fraction == 0 else "EXACT_HIT" if fraction == 1 else "PARTIAL"
    return ReuseMeasurement(
        cell=cell,
        cached_fraction=fraction,
        prefills=window.iterations,
        duration_s=whole.duration_s,
        energy_mj=energy.energy_mj,
        energy_error=energy.error,
        energy_flag=energy.flag,
    )
