"""``python -m observatory``: the same as the ``observatory`` command."""

from observatory.cli import run

__all__: list[str] = []

if __name__ == "__main__":
    run()
