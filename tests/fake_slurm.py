"""Programs that stand for Slurm's where no cluster is needed: jobs wait until a test starts an element.

What is not tested with them is Slurm itself; for that there is tests/slurm_host.py.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

_SBATCH = """#!/bin/bash
script=${@: -1}
until mkdir "FOLDER/lock" 2>/dev/null; do sleep 0.05; done
job=$(( $(cat "FOLDER/last" 2>/dev/null || echo 100) + 1 ))
echo "$job" > "FOLDER/last"
rmdir "FOLDER/lock"
cp "$script" "FOLDER/scripts/$job"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if [ -z "$last" ]; then echo PENDING > "FOLDER/queue/$job"
else for index in $(seq 0 "$last"); do echo PENDING > "FOLDER/queue/${job}_$index"; done; fi
[ ! -e "FOLDER/slow" ] || exec sleep 60
echo "$job"
"""
_SQUEUE = """#!/bin/bash
echo "$*" >> "FOLDER/questions"
if [ -e "FOLDER/away" ]; then
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
for word; do
  case $word in --jobs=*) jobs=${word#*=} ;; --format=*) format=${word#*=} ;; esac
done
for job in ${jobs//,/ }; do
  for file in "FOLDER/queue/$job" "FOLDER/queue/$job"_*; do
    [ -f "$file" ] || continue
    found=1
    if [ "$format" = %T ]; then cat "$file"; else echo "${file##*/}|$(cat "$file")|None|n1"; fi
  done
done
[ -n "$found" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
"""
_SCANCEL = """#!/bin/bash
case $1 in --signal=*) exit 1 ;; esac
for job; do rm -f "FOLDER/queue/$job" "FOLDER/queue/$job"_*; done
"""
_SACCT = """#!/bin/bash
echo "Slurm accounting storage is disabled" >&2
exit 1
"""
_SRUN = """#!/bin/bash
while case $1 in -*) true ;; *) false ;; esac; do shift; done
exec "$@"
"""


class FakeSlurm:
    """A queue in a folder, and the programs that use it; a fixture puts ``programs`` on the path.

    Attributes:
        folder: its folder.
        programs: the folder of its programs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        for name in ("bin", "queue", "scripts"):
            (folder / name).mkdir(parents=True)
        texts = {"sbatch": _SBATCH, "squeue": _SQUEUE, "scancel": _SCANCEL, "srun": _SRUN, "sacct": _SACCT}
        for name, text in texts.items():
            self.program(name, text.replace("FOLDER", str(folder)))

    def program(self, name: str, text: str) -> None:
        """Put a program in the place of the one of this name."""
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def queue(self) -> dict[str, str]:
        """State of each element by its id."""
        return {path.name: path.read_text().strip() for path in sorted((self.folder / "queue").iterdir())}

    @property
    def questions(self) -> list[str]:
        """What squeue was asked."""
        path = self.folder / "questions"
        return path.read_text().splitlines() if path.exists() else []

    def put(self, element: str, state: str) -> None:
        """Let squeue report a state."""
        (self.folder / "queue" / element).write_text(state)

    def forget(self, element: str) -> None:
        """Let squeue know nothing of it any more."""
        (self.folder / "queue" / element).unlink(missing_ok=True)

    def set_away(self, *, is_away: bool) -> None:
        """Whether the scheduler does not answer."""
        (self.folder / "away").touch()
        if not is_away:
            (self.folder / "away").unlink()

    def start(self, element: str, *, restarts: int = 0) -> subprocess.Popen[bytes]:
        """Start an element of an array; it is in the queue as RUNNING."""
        job, _, index = element.partition("_")
        self.put(element, "RUNNING")
        environment = {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": job,
            "SLURM_ARRAY_JOB_ID": job,
            "SLURM_ARRAY_TASK_ID": index,
            "SLURM_RESTART_COUNT": str(restarts),
        }
        with (self.folder / f"said-{element}").open("w") as said:
            return subprocess.Popen(
                ["bash", str(self.folder / "scripts" / job)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def end(self, element: str, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Wait until an element ends, whereupon the queue forgets it: its exit code, and what it wrote."""
        code = process.wait(60)
        self.forget(element)
        return code, (self.folder / f"said-{element}").read_text()

    def run(self, element: str, *, restarts: int = 0) -> tuple[int, str]:
        """Run an element to its end: its exit code, and what it wrote."""
        return self.end(element, self.start(element, restarts=restarts))


def until(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)
