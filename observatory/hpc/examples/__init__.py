"""Examples that come with the package: files of sites and campaigns, and the definition of a container."""

from __future__ import annotations

from importlib import resources

from observatory.errors import BatchError


def example_names() -> list[str]:
    """Names of the example files."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name for name in files if name.endswith((".toml", ".def")))


def example_text(name: str) -> str:
    """The text of an example.

    Raises:
        BatchError: there is none of that name.
    """
    if name not in example_names():
        raise BatchError(
            f"there is no example {name[:60]!r}", expected=f"one of {', '.join(example_names())}"
        )
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def example_about(name: str) -> str:
    """What an example is: its first comment."""
    return example_text(name).partition("\n")[0].removeprefix("# ")
