"""``observatory top``: a run, or the runs of a folder, while they are captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from observatory.analysis.live import LiveRank, LiveView

#: Ranks and runs that are shown.
_MOST_ROWS = 16
#: Columns that are never folded; a name next to them is.
_WHOLE = ("state", "ranks", "last step", "steps/s", "written")


def top(
    run: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="Run directory, or a folder of runs.")],
    *,
    interval: Annotated[
        float, typer.Option(min=0.5, max=3600.0, metavar="SECONDS", help="Time between two looks.")
    ] = 2.0,
    steps: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Last steps of each phase that are shown.")
    ] = 50,
    layers: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Layers that are shown, the most uneven first.")
    ] = 8,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
) -> None:
    """Show what a run does now: steps, busiest layers and experts, waiting, power and clocks.

    Reads the newest files of the run directory, of any host that sees it; nothing is asked of the program.
    Ctrl-C ends it. Where output is no terminal it prints once.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from observatory.errors import ObservatoryError

    draw: Callable[[], Group | Table]
    if (run / "run.json").is_file():

        def draw() -> Group | Table:
            from observatory.analysis.live import live_view

            return _run_screen(live_view(run, steps=steps), layers)
    else:

        def draw() -> Group | Table:
            return _runs_table(run, steps)

    console = Console(highlight=False, markup=False, emoji=False)
    first = draw()
    if once or not console.is_terminal:
        console.print(first)
        return
    with Live(first, console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                try:
                    live.update(draw(), refresh=True)
                except ObservatoryError as error:  # a file that was replaced while it was read, say
                    live.update(Text(f"{error}"), refresh=True)
        except KeyboardInterrupt:
            pass


def _run_screen(view: LiveView, most_layers: int) -> Group:
    from rich.console import Group
    from rich.text import Text

    from observatory.run.files import one_line

    head = f"{one_line(view.model, 60)}   {view.state}   {len(view.ranks)} of {view.ranks_expected} ranks"
    shares = [rank.watching_share for rank in view.ranks if rank.watching_share is not None]
    if shares:
        head += f"   cost of watching {'' if len(shares) == 1 else 'up to '}{100 * max(shares):.2g} %"
    parts: list[Table | Text] = [Text(head, style="bold")]
    if view.error is not None:
        parts.append(Text(one_line(view.error, 200), style="red"))
    if not view.phases:
        parts.append(Text("no rows have been written yet"))
    else:
        parts += [Text(""), _phase_table(view), Text(""), _layer_table(view, most_layers)]
    if view.ranks:
        parts += [Text(""), _rank_table(view)]
    return Group(*parts)


def _phase_table(view: LiveView) -> Table:
    table = _table("phase", "steps", "last step", "steps/s", "ms a step", "tokens/s")
    for phase in view.phases:
        table.add_row(
            phase.phase, str(phase.steps), str(phase.last_step), _shown(phase.steps_per_s), _shown(phase.ms),
            _shown(phase.tokens_per_s),
        )  # fmt: skip
    return table


def _layer_table(view: LiveView, most: int) -> Table:
    ranks = "ranks" if view.degree is None else f"{view.degree} ranks"
    table = _table("phase", "layer", "expert max/mean", "floor", "busiest", "its share", f"{ranks} max/mean")
    for layer in view.layers[:most]:
        table.add_row(
            layer.phase, str(layer.layer), _shown(layer.expert_max_over_mean), _shown(layer.floor),
            f"expert {layer.busiest_expert}", f"{100 * layer.busiest_share:.1f} %",
            _shown(layer.rank_max_over_mean),
        )  # fmt: skip
    if len(view.layers) > most:
        table.caption = f"{most} of {len(view.layers)} rows, those furthest above their floor; --layers N"
        table.caption_justify = "left"
    return table


def _rank_table(view: LiveView) -> Table:
    """Ranks, those first that the others wait for most."""
    from observatory.devices.event_reasons import reason_bits, reason_name

    ranks = sorted(view.ranks, key=lambda rank: (-(rank.caused_share or 0.0), rank.rank))[:_MOST_ROWS]
    has_exchanges = any(rank.exchange_share is not None for rank in ranks)
    has_devices = any(rank.devices for rank in ranks)
    heads = ["rank", "state", "written"]
    heads += ["exchanges", "waiting", "waited for"] if has_exchanges else []
    heads += ["W", "MHz", "C", "clock held by"] if has_devices else []
    table = _table(*heads)
    for rank in ranks:
        cells = [str(rank.rank), rank.state, _age(rank)]
        if has_exchanges:
            cells += [
                _percent(share) for share in (rank.exchange_share, rank.waiting_share, rank.caused_share)
            ]
        for device in rank.devices or (None,):
            of_device = ["", "", "", ""]
            if device is not None:
                bits = reason_bits(device.event_reasons or 0)
                of_device = [
                    _shown(device.power_w), _shown(device.sm_clock_mhz), _shown(device.temperature_c),
                    ", ".join(map(reason_name, bits)),
                ]  # fmt: skip
            table.add_row(*cells, *(of_device if has_devices else []))
            cells = [""] * len(cells)
    if len(view.ranks) > _MOST_ROWS:
        table.caption = f"{_MOST_ROWS} of {len(view.ranks)} ranks, those waited for most"
        table.caption_justify = "left"
    return table


def _runs_table(folder: Path, steps: int) -> Table:
    """The runs of a folder, those written to last first."""
    from observatory.analysis.live import live_view
    from observatory.campaign.run_folders import find_runs
    from observatory.errors import ObservatoryError, RunError
    from observatory.run.files import one_line

    paths = find_runs(folder)
    if not paths:
        raise RunError(
            f"{folder} is no run and holds none", remedy="give a run directory, or a folder of runs"
        )
    paths.sort(key=lambda path: (path / "ranks").stat().st_mtime if (path / "ranks").is_dir() else 0.0)
    table = _table("run", "state", "ranks", "last step", "steps/s", "written")
    for path in paths[::-1][:_MOST_ROWS]:
        name = one_line(str(path.relative_to(folder)), 60)
        try:
            view = live_view(path, steps=steps)
        except ObservatoryError:
            table.add_row(name, "cannot be read")
            continue
        written = min(view.ranks, key=lambda rank: rank.silent_s or float("inf"), default=None)
        cells = [name, view.state, f"{len(view.ranks)} of {view.ranks_expected}"]
        last = max(view.phases, key=lambda phase: phase.last_step, default=None)
        cells += ["", ""] if last is None else [str(last.last_step), _shown(last.steps_per_s)]
        table.add_row(*cells, "" if written is None else _age(written))
    if len(paths) > _MOST_ROWS:
        table.caption = f"{_MOST_ROWS} of {len(paths)} runs, the newest"
        table.caption_justify = "left"
    return table


def _table(*heads: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for at, head in enumerate(heads):
        is_text = at == 0 or head in ("state", "phase", "busiest", "clock held by")
        table.add_column(
            head, justify="left" if is_text else "right", overflow="fold", no_wrap=head in _WHOLE
        )
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f} %"


def _age(rank: LiveRank) -> str:
    if rank.silent_s is None:
        return "nothing yet"
    seconds = rank.silent_s
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"
