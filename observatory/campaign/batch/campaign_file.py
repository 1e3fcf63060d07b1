"""What a campaign measures: its TOML file, and the points that follow from it (docs/hpc.md)."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from observatory.campaign.job import ProfileJob, profile_argv
from observatory.campaign.naming import content_name, job_content
from observatory.errors import BatchError, ObservatoryError
from observatory.hpc.site import WallTime
from observatory.run.bounded import first_problem, read_toml

_MOST_BYTES = 1 << 20
_MOST_POINTS = 20_000
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$")]
_Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Few = Annotated[int, Field(ge=1, le=65536)]
_Settings = Annotated[tuple[_Text, ...], Field(max_length=1000)]
_JOBS = TypeAdapter(ProfileJob)
#: Options of a profile that the axes of a campaign set.
_AXES = ("model", "data", "ep", "phase")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CommandSettings(_Part):
    """A command line that is a point of its own: a clock sweep, or the user's program.

    Attributes:
        name: of the point.
        command: words, without a shell; ``{out}`` becomes the folder for its results.
        ranks: processes that run it.
        clock_mhz: clock that it asks for.
        resumes: whether it continues from what is in ``{out}``; then it may be started again and again.
        exclusive: whether it takes whole nodes; None: as the site has it for a measurement of power.
    """

    name: _Name
    command: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=1000)]
    ranks: _Few = 1
    clock_mhz: Annotated[int, Field(ge=1, le=10000)] | None = None
    resumes: bool = False
    exclusive: bool | None = None


class FabricSettings(_Part):
    """A benchmark and a fit of the network, before the points.

    Attributes:
        ranks: ranks that exchange.
        options: of ``observatory bench alltoall``.
    """

    ranks: Annotated[int, Field(ge=2, le=65536)]
    options: _Settings = ()


class CampaignFile(_Part):
    """A campaign as its TOML file states it.

    Attributes:
        name: of its jobs.
        models: bundled names, checkpoint directories or hub ids; none where all points are commands.
        data: data conditions, text files, or ``datasets:NAME``.
        ep: EP degrees; each is run on so many ranks.
        phases: ``prefill``, ``decode`` or ``both``.
        clocks_mhz: clocks that the steps ask for, MHz; none leaves clocks alone.
        repeats: how often each point is run.
        time: wall time of a job; None: that of the site.
        profile: further options of ``observatory profile``, by their names in Python.
        fabric: a fit of the network before; None for none.
        command: points that are command lines.
        report: whether a job at the end collects the campaign and writes its report.
    """

    name: _Name | None = None
    models: _Settings = ()
    data: _Settings = ("prose",)
    ep: Annotated[tuple[_Few, ...], Field(min_length=1, max_length=100)] = (1,)
    phases: Annotated[tuple[Literal["prefill", "decode", "both"], ...], Field(min_length=1, max_length=3)] = (
        "both",
    )
    clocks_mhz: Annotated[tuple[Annotated[int, Field(ge=1, le=10000)], ...], Field(max_length=100)] = ()
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    time: WallTime | None = None
    profile: Annotated[dict[_Text, JsonValue], Field(max_length=100)] = {}
    fabric: FabricSettings | None = None
    command: Annotated[tuple[CommandSettings, ...], Field(max_length=1000)] = ()
    report: bool = True

    @model_validator(mode="after")
    def _measures_something(self) -> CampaignFile:
        if not self.models and not self.command:
            raise ValueError("it names neither models nor a command")
        return self


class Point(_Part):
    """One thing that a campaign runs, named by its content.

    Attributes:
        name: of its folder.
        kind: ``profile``, ``command``, or ``fabric``.
        argv: its command line; ``{out}`` is the folder for its results.
        about: one line for people.
        ranks: processes that run it.
        clock_mhz: clock that it asks for.
        resumes: whether a further attempt continues where the last one ended.
        measures_power: whether it needs nodes of its own where the site says so.
        job: the profile; None for commands.
        model, data, repeat: where a profile stands in the campaign; None for commands.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,199}$")]
    kind: Literal["profile", "command", "fabric"]
    argv: Annotated[tuple[str, ...], Field(min_length=1, max_length=2000)]
    about: Annotated[str, Field(max_length=10_000)]
    ranks: _Few = 1
    clock_mhz: int | None = None
    resumes: bool = False
    measures_power: bool = False
    job: ProfileJob | None = None
    model: str | None = None
    data: str | None = None
    repeat: int | None = None


def load_campaign(path: Path) -> CampaignFile:
    """Read a campaign file.

    Raises:
        BatchError: it cannot be read, or has a key or value that is not understood; names the key.
    """
    return read_toml(
        path,
        CampaignFile,
        most_bytes=_MOST_BYTES,
        failure=BatchError,
        what="campaign file",
        remedy="docs/hpc.md has its form",
    )


def campaign_points(campaign: CampaignFile) -> tuple[Point, ...]:
    """All points of a campaign; the fabric's first.

    Raises:
        BatchError: an option of the profiles is not understood, there are too many points, or one is named
            twice.
    """
    count = len(campaign.models) * len(campaign.data) * len(campaign.ep) * len(campaign.phases)
    count = count * max(len(campaign.clocks_mhz), 1) * campaign.repeats + len(campaign.command)
    if count > _MOST_POINTS:
        raise BatchError(f"the campaign has {count} points", expected=f"at most {_MOST_POINTS}")
    points = [] if campaign.fabric is None else [_fabric_point(campaign.fabric)]
    points += _profile_points(campaign)
    points += [_command_point(command) for command in campaign.command]
    counts = Counter(point.name for point in points)
    twice = next((point for point in points if counts[point.name] > 1), None)
    if twice is not None:
        raise BatchError(f"the campaign has the point {twice.about!r} twice", remedy="name each once")
    return tuple(points)


def _profile_points(campaign: CampaignFile) -> list[Point]:
    taken = [name for name in _AXES if name in campaign.profile]
    if taken:
        raise BatchError(
            f"[profile] of the campaign sets {taken[0]}",
            remedy="name models, data, ep and phases at the top of the file",
        )
    points = []
    axes = product(
        campaign.models,
        campaign.data,
        campaign.ep,
        campaign.phases,
        campaign.clocks_mhz or (None,),
        range(campaign.repeats),
    )
    for model, data, ep, phase, clock_mhz, repeat in axes:
        job = _job(
            {**campaign.profile, "model": _absolute(model), "data": _absolute(data), "ep": ep, "phase": phase}
        )
        words = [f"ep{ep}", phase] + ([] if clock_mhz is None else [f"{clock_mhz}mhz"])
        name = content_name(
            model, data, *words, content={**job_content(job), "clock_mhz": clock_mhz, "repeat": repeat}
        )
        about = f"{model} on {data}, EP {ep}, {phase}"
        about += "" if clock_mhz is None else f", {clock_mhz} MHz"
        about += f", repeat {repeat + 1} of {campaign.repeats}" if campaign.repeats > 1 else ""
        points.append(
            Point(
                name=name,
                kind="profile",
                argv=("observatory", *profile_argv(job, Path("{out}/run"))),
                about=about,
                ranks=ep,
                clock_mhz=clock_mhz,
                measures_power=job.power != "off",
                job=job,
                model=model,
                data=data,
                repeat=repeat,
            )
        )
    return points


def _command_point(command: CommandSettings) -> Point:
    return Point(
        name=content_name(command.name, content=command.model_dump(mode="json")),
        kind="command",
        argv=command.command,
        about=command.name,
        ranks=command.ranks,
        clock_mhz=command.clock_mhz,
        resumes=command.resumes,
        measures_power=command.exclusive is not False,
    )


def _fabric_point(fabric: FabricSettings) -> Point:
    argv = ("observatory", "bench", "alltoall", *fabric.options, "--out", "{out}/bench.json")
    return Point(
        name=content_name("fabric", f"{fabric.ranks}-ranks", content=fabric.model_dump(mode="json")),
        kind="fabric",
        argv=argv,
        about=f"network between {fabric.ranks} ranks",
        ranks=fabric.ranks,
    )


def _absolute(name: str) -> str:
    """A local file or folder by its whole path, since jobs start elsewhere; other names as they are."""
    try:
        path = Path(name)
        return str(path.resolve()) if path.exists() else name
    except OSError:
        return name


def _job(options: dict[str, Any]) -> ProfileJob:
    try:
        return _JOBS.validate_python(options)
    except (ValidationError, ObservatoryError) as error:
        problem = first_problem(error)
    raise BatchError(
        f"[profile] of the campaign is not valid ({problem})",
        expected="options of `observatory profile`, such as batch_size = 8",
    )
