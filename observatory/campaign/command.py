"""Run a command with its MoE models watched, and state what became of them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from observatory.campaign.control import outcome_sentence
from observatory.campaign.control_server import RunsControl, control_port
from observatory.errors import CaptureError, RunError
from observatory.host.ranks import find_rank, launch_name
from observatory.probes.programs import startup
from observatory.probes.programs.settings import SETTINGS, Note, ProgramSettings, read_notes
from observatory.probes.programs.words import program_sentence
from observatory.run.files import MANIFEST_NAME
from observatory.run.manifest_files import read_manifest
from observatory.run.replacing import check_free, empty_run

#: Signals that are for the command; Ctrl-C reaches it by the terminal.
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_NOT_FOUND = 127
_NOT_EXECUTABLE = 126
_FIRST_SIGNAL = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What became of a command.

    Attributes:
        code: its exit code; 128 and the signal's number where a signal ended it, as in a shell.
        rank: number of this process, where a launcher has started several that write one run; else 0.
        runs: run directories that its processes made, in order of their names.
        remarks: one sentence for each model that was not watched, or not to its end; each once.
    """

    code: int
    rank: int
    runs: tuple[Path, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandControl:
    """How the captures of a command are started and stopped from outside.

    Attributes:
        port: of the loopback interface that takes commands; 0: none.
        signal: by which this process is asked to stop or start the capture; None: by none.
        say: takes one line for people, at once.
    """

    port: int = 0
    signal: signal.Signals | None = None
    say: Callable[[str], None] = field(default=lambda _: None)


def run_command(
    command: Sequence[str],
    out: Path,
    *,
    power: bool | None = None,
    exchanges: bool | None = None,
    steps: tuple[int, int | None] = (0, None),
    every: int = 1,
    most_s: float | None = None,
    budget: float | None = None,
    stopped: bool = False,
    control: CommandControl = CommandControl(),
    overwrite: bool = False,
) -> CommandResult:
    """Run a command; every Python under it that builds a model with MoE layers writes a run.

    Nothing is installed: a folder in front of ``PYTHONPATH`` and one variable are the command's own, and go
    with it. Signals for this process are passed on.

    Args:
        command: words; the first is looked up in ``PATH``.
        out: run directory of the first model; those of others have -2, -3 ... after it.
        power: sample power; None: that of the GPUs, if the model is on one.
        exchanges: time exchanges; None: if there are several ranks.
        steps: (first, end): steps before first and from end on are not captured; None: no end.
        every: of the steps from the first on, one in so many is captured.
        most_s: the capture ends so many seconds after its first step; None: no limit.
        budget: the capture ends when it takes more than this share of the program's time; None: no limit.
        stopped: nothing is captured before a command starts it.
        control: how the capture is started and stopped from outside.
        overwrite: replace an existing run.

    Raises:
        CaptureError: the command cannot be started; ``exit_code`` is 127 or 126, as in a shell.
        RunError: something is in the place of the run.
    """
    rank, run_id = _launched()
    if rank == 0:
        check_free(out, overwrite=overwrite)
        if out.exists() and overwrite:
            empty_run(out)
    settings = ProgramSettings(
        out=out.resolve(), run_id=run_id, power=power, exchanges=exchanges,
        first_step=steps[0], end_step=steps[1], every=every, most_s=most_s, budget=budget,
        stopped=stopped,
    )  # fmt: skip
    with _folder_for_settings(settings.out.parent) as folder:
        file = Path(folder) / "settings.json"
        file.write_text(settings.model_dump_json())
        runs = RunsControl(lambda: _runs(settings, ()))
        with ExitStack() as stack:
            if control.port and rank == 0:
                try:
                    stack.enter_context(control_port(control.port, runs))
                except CaptureError as error:  # the command is worth more
                    control.say(str(error))
            code = _finish(_start(command, file), runs, control)
        notes = list(read_notes(Path(folder)))
    return CommandResult(code=code, rank=rank, runs=_runs(settings, notes), remarks=_remarks(notes))


def _folder_for_settings(shared: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder that every process of the command sees: those of other nodes see the place of the run."""
    with contextlib.suppress(OSError):
        shared.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".observatory-run-", dir=shared)
    return tempfile.TemporaryDirectory(prefix="observatory-run-")


def _launched() -> tuple[int, str]:
    """Which of the processes of a launch this is, and the id of the run that they write together.

    A launcher may start this command once for each rank, or for each node: ``srun observatory run -- ...``.

    Raises:
        CaptureError: it is one of several that have no name in common.
    """
    where = find_rank()
    if where.world == 1:
        return 0, uuid.uuid4().hex
    name = launch_name()
    if name is None:
        raise CaptureError(
            f"{where.launcher} has started {where.world} of these without a name that they have in common",
            remedy=f"put it before the launcher: observatory run -- {where.launcher} ...",
        )
    return where.rank, hashlib.sha256(name.encode()).hexdigest()[:32]


def _start(command: Sequence[str], settings: Path) -> subprocess.Popen[bytes]:
    (place,) = startup.__path__
    path = os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, SETTINGS: str(settings)}
    try:
        return subprocess.Popen(command, env=environment)
    except OSError as error:
        failure = CaptureError(
            f"{command[0]} cannot be started ({error.strerror})", remedy="check its name and PATH"
        )
        failure.exit_code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        raise failure from error


def _finish(process: subprocess.Popen[bytes], runs: RunsControl, control: CommandControl) -> int:
    """Wait for the command, however often this process is signalled meanwhile."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number == control.signal:
            threading.Thread(target=_toggle, args=(runs, control.say), daemon=True).start()
        else:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else _FIRST_SIGNAL - code


def _toggle(runs: RunsControl, say: Callable[[str], None]) -> None:
    action, done, refused = runs.toggle()
    for one in done:
        say(f"{one.run}: {outcome_sentence(one)}" if len(done) > 1 else outcome_sentence(one))
    for error in refused:
        say(f"the capture does not {action}: {error}")


def _runs(settings: ProgramSettings, notes: Sequence[Note]) -> tuple[Path, ...]:
    """Those noted, and those of processes that were killed before they could note anything."""
    noted = {Path(note.run) for note in notes if note.run is not None}
    out = settings.out
    found = {path.parent for path in out.parent.glob(f"{glob.escape(out.name)}*/{MANIFEST_NAME}")}
    return tuple(sorted(noted | {path for path in found if _is_of(path, settings.run_id)}))


def _is_of(path: Path, run_id: str) -> bool:
    try:
        return read_manifest(path).run_id.startswith(run_id)
    except RunError:
        return False


def _remarks(notes: Sequence[Note]) -> tuple[str, ...]:
    causes = [note.cause for note in notes]
    return tuple(dict.fromkeys(program_sentence(cause) for cause in causes if cause is not None))
