"""Names of what a campaign runs, by content: another option is another name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from observatory.campaign.job import ProfileJob


def content_name(*parts: str, content: object) -> str:
    """A folder name: the parts for people, then a digest of everything that decides the content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    return "--".join([*map(slug, parts), digest])


def job_content(job: ProfileJob) -> dict[str, object]:
    """What decides a profile's content: the options, and size and time of change of local files.

    Of a checkpoint directory its files count: new weights over old ones leave the directory as it was.
    """
    content: dict[str, object] = asdict(job)
    for name in ("model", "data"):
        path = Path(getattr(job, name))
        with contextlib.suppress(
            OSError, ValueError
        ):  # not a path: the loader says what is wrong with the name
            if path.exists():
                files = sorted(path.glob("*")) if path.is_dir() else [path]
                stats = [(file.name, file.stat()) for file in files if file.is_file()]
                content[f"{name}_file"] = [
                    str(path.resolve()),
                    *([file, stat.st_size, stat.st_mtime_ns] for file, stat in stats),
                ]
    return content


def slug(name: str) -> str:
    """Letters, digits, dots and dashes of the last part of a path or id."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", last).strip(".-")[:48] or "cell"
