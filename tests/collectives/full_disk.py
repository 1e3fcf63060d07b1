"""``python -m tests.collectives.full_disk OUT ARGUMENTS...``: the command, and rank 1 finds its disk full.

That happens once rows of both ranks are under OUT, and not before: MPI itself needs files to begin.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from observatory.cli import main
from observatory.host.ranks import find_rank
from tests.collectives.fault_cases import fill_disk, once_written

if __name__ == "__main__":
    if find_rank().rank == 1:
        threading.Thread(target=once_written, args=(Path(sys.argv[1]), 2, fill_disk), daemon=True).start()
    sys.exit(main(sys.argv[2:]))
