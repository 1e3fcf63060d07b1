"""Text columns of the optional Hugging Face `datasets` package, read as a stream."""

from importlib.util import find_spec

from observatory.errors import DataError


def check_dataset_name(name: str) -> None:
    """Refuse a name of another form, or a missing `datasets` package, without loading it.

    Raises:
        DataError: one of these.
    """
    parts = name.split(":")[1:]
    if not 1 <= len(parts) <= 4 or not parts[0] or len(name) > 1000 or not name.isprintable():
        raise DataError(
            f"{ascii(name)[:120]} is not datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]; write it like that"
        )
    if find_spec("datasets") is None:
        raise DataError(
            f"{name} needs the package `datasets`, which is not installed; run `pip install datasets`"
        )


def read_dataset_text(name: str, *, limit_characters: int) -> str:
    """Rows of one text column, joined by blank lines, up to a limit.

    Args:
        name: `datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]`; an empty part means the default
            (no configuration, split `train`, the first column that holds text).
        limit_characters: stop after this many characters.

    Raises:
        DataError: as of :func:`check_dataset_name`, the data set cannot be read, or has no such column.
    """
    check_dataset_name(name)
    dataset, config, split, column = (*name.split(":")[1:], "", "", "")[:4]
    try:
        import datasets

        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        texts: list[str] = []
        size = 0
        for row in rows:
            if not column:
                column = next((key for key, value in row.items() if isinstance(value, str)), "")
            if not isinstance(row.get(column), str):
                raise DataError(f"{name}: column {column!r} holds no text; columns are {', '.join(row)}")
            texts.append(row[column])
            size += len(row[column]) + 2
            if size >= limit_characters:
                break
    except DataError:
        raise
    except Exception as error:  # the package raises its own, requests', and plain ones
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{name} cannot be read: {first_line}; check the name and the network") from error
    return "\n\n".join(texts)[:limit_characters]
