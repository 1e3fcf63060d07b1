"""The run directory: Parquet parts per rank and a versioned manifest (format: ``docs/run-format.md``)."""

from observatory.store.appending import TableAppender
from observatory.store.blocks import LoadBlock
from observatory.store.reader import Run, open_run
from observatory.store.rows import routing_rows
from observatory.store.writer import RunWriter

__all__ = ["LoadBlock", "Run", "RunWriter", "TableAppender", "open_run", "routing_rows"]
