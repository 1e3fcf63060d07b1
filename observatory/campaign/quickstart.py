"""The quickstart: the bundled models on the bundled data, scanned and reported, with no arguments."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from observatory.campaign.grid import GridConfig
from observatory.campaign.job import ProfileJob, ProfileOptions
from observatory.campaign.ranks import start_ranks
from observatory.campaign.run_folders import is_complete
from observatory.devices.simulated import write_simulated

#: EP degrees of the runs with real exchanges.
EXCHANGE_DEGREES = (2, 4)
#: Their model and data, which is also a cell of the grid.
EXCHANGE_MODEL, EXCHANGE_DATA = "tiny-gqa", "prose"

#: Steps of each phase of the run with a simulated device, and the length of its recording.
_SIMULATED_STEPS, _RECORDED_S = 900, 600.0


def quickstart_grid() -> GridConfig:
    """Five trained models on six data conditions, prefill and decode.

    The sizes are chosen for two CPU cores: 8 x 256 tokens a prefill step are enough for a sampling floor
    well below the Gini of the bundled models, and the held-out texts fill them without repeating.
    """
    from observatory.zoo.data import CONDITIONS
    from observatory.zoo.models import bundled_models

    return GridConfig(
        models=tuple(model.name for model in bundled_models()),
        data=CONDITIONS,
        ep=(4, 8, 16, 32),
        gpus_per_node=4,
        profile=ProfileOptions(batch_size=8, sequence_length=256, steps=16, phase="both"),
    )


def quickstart_exchanges(out: Path, *, report: Callable[[str], None]) -> list[Path]:
    """One model spread over 2 and over 4 ranks of this machine, with real exchanges; finished runs are kept.

    Args:
        out: directory of the runs, the quickstart's own: an unfinished run in it is made again.
        report: called with what is kept and what is made.

    Returns:
        One run directory per degree.

    Raises:
        ExchangeError: a rank failed or was lost.
    """
    runs = []
    for ep in EXCHANGE_DEGREES:
        run = out / f"ep-{ep}"
        kept = is_complete(run)
        report(f"one model on {ep} ranks of this machine: {'kept' if kept else 'running'}")
        if not kept:
            if (run / "run.json").is_file():
                shutil.rmtree(run)
            job = ProfileJob(
                model=EXCHANGE_MODEL,
                data=EXCHANGE_DATA,
                batch_size=4,
                sequence_length=128,
                steps=20,
                phase="both",
                sample_tokens=256,
                ep=ep,
                ranks_per_node=2,
            )
            start_ranks(job, run)
        runs.append(run)
    return runs


def quickstart_simulated(out: Path, *, report: Callable[[str], None]) -> list[Path]:
    """A run whose power a simulated device plays, so that the reports on energy can be seen without a GPU.

    Every name that stands for it says so: the run directory, the recording, its device, and its label in the
    report. Nothing about it was measured but its times.

    Args:
        out: directory of the run and the recording, the quickstart's own; a finished run is kept.
        report: called with what is kept and what is made.

    Returns:
        The run directory; none where the name of ``out`` cannot stand in the name of a device.
    """
    from observatory.campaign.profile import run_profile

    run, recording = out / "run", out / "simulated-device.parquet"
    if any(character in str(recording) for character in ",#"):
        report("power of a simulated device: left out, as the path holds a comma or a #")
        return []
    kept = is_complete(run)
    report(f"one model with the power of a simulated device: {'kept' if kept else 'running'}")
    if not kept:
        if (run / "run.json").is_file():
            shutil.rmtree(run)
        out.mkdir(parents=True, exist_ok=True)
        write_simulated(recording, seconds=_RECORDED_S)
        # Phases of five seconds or more have a power of their own.
        job = ProfileJob(
            model=EXCHANGE_MODEL,
            data=EXCHANGE_DATA,
            batch_size=2,
            sequence_length=16,
            steps=_SIMULATED_STEPS,
            phase="both",
            power=f"replay:{recording}",
        )
        run_profile(job, run)
    return [run]
