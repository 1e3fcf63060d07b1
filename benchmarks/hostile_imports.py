"""What happens to mutated files of other tools: none may crash, hang, or take much memory.

    python -m benchmarks.hostile_imports [--files 1000000] [--seed 0] [--seconds S]

Protocol: small valid files of every format are mutated by seed and imported one after another in this
process. Printed: how many were imported and refused, every other end with the file that it is kept in, the
longest import and the peak of memory. The exit code is 1 when any ended otherwise, or took over 10 s.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path

from observatory.errors import ObservatoryError
from observatory.interchange.importers.formats import import_files
from observatory.interchange.importers.imported import ImportOptions
from tests.interchange.mutated import mutate, samples

MOST_SECONDS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    options = parser.parse_args()
    generator, valid = random.Random(options.seed), list(samples())
    imported = refused = done = 0
    otherwise: dict[str, Path] = {}
    longest, began = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for done in range(1, options.files + 1):
            form, name, content = valid[done % len(valid)]
            path = Path(folder) / name
            path.write_bytes(mutate(generator, content))
            started = time.monotonic()
            try:
                import_files(form, [path], out, ImportOptions(top_k=2))
                imported += 1
            except ObservatoryError:
                refused += 1
            except Exception as error:  # what this looks for
                what = f"{form}: {type(error).__name__}: {str(error)[:200]}"
                if what not in otherwise:
                    otherwise[what] = Path(tempfile.mkdtemp()) / name
                    shutil.copy(path, otherwise[what])
                    print(f"! {what}; {otherwise[what]}", flush=True)
            longest = max(longest, time.monotonic() - started)
            shutil.rmtree(out, ignore_errors=True)
            if time.monotonic() - began > options.seconds:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{done:,} files: {imported:,} imported, {refused:,} refused, {len(otherwise)} other ends; longest "
        f"{longest:.1f} s, peak {peak / 1e6:.0f} MB"
    )
    return 1 if otherwise or longest > MOST_SECONDS else 0


if __name__ == "__main__":
    raise SystemExit(main())
