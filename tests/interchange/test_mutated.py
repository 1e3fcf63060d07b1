"""No file, however damaged, ends an import in another way than as a run, or in one sentence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from observatory.errors import ObservatoryError
from observatory.interchange.importers.formats import FORMATS, import_files
from observatory.interchange.importers.imported import ImportOptions
from tests.interchange.mutated import mutate, samples

SAMPLES = list(samples())


def test_there_is_a_file_of_every_format() -> None:
    assert {form for form, _, _ in SAMPLES} == set(FORMATS)


@pytest.mark.parametrize(("form", "name", "content"), SAMPLES, ids=[name for _, name, _ in SAMPLES])
def test_mutated_files_are_imported_or_refused_in_one_sentence(
    tmp_path: Path, form: str, name: str, content: bytes
) -> None:
    generator = random.Random(name)
    options = ImportOptions(top_k=2)
    path, out = tmp_path / name, tmp_path / "out"
    path.write_bytes(content)
    import_files("auto" if name != "r.npy" else form, [path], out, options)
    for _ in range(40):
        shutil.rmtree(out, ignore_errors=True)
        path.write_bytes(mutate(generator, content))
        try:
            import_files(form, [path], out, options)
        except ObservatoryError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
            assert not out.exists()
