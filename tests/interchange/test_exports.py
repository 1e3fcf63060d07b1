"""Matrices in other tools' formats: their text, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from observatory.cli import main
from observatory.errors import BenchmarkError
from observatory.interchange.exporters.matrices import export_traffic
from observatory.interchange.exporters.nccl_tests import dropped_bytes, matrix_text, parse_matrix
from observatory.interchange.exporters.placements import placement_text
from observatory.interchange.exporters.ucc import parse_patterns, pattern_lines
from observatory.run.documents.bench import Traffic
from tests.conftest import MakeRun

SQUARE = st.integers(1, 12).flatmap(
    lambda ranks: arrays.arrays(np.int64, (ranks, ranks), elements=st.integers(0, ((1 << 32) - 1) // ranks))
)


def captured(step: int, matrix: list[list[int]]) -> Traffic:
    return Traffic(
        pattern="captured",
        send_bytes_PP=tuple(map(tuple, matrix)),
        step=step,
        phase="prefill",
        layer=2,
        role="dispatch",
    )


def test_nccl_tests_text_is_bytes_rounded_down_to_16() -> None:
    assert matrix_text([[0, 31], [16, 47]]) == "0 16\n16 32\n"
    assert dropped_bytes([[0, 31], [16, 47]]) == 15 + 15


@given(SQUARE)
def test_nccl_tests_text_reads_back(bytes_PP: np.ndarray) -> None:
    again = parse_matrix(matrix_text(bytes_PP))
    assert np.array_equal(again, bytes_PP - bytes_PP % 16)
    assert int((bytes_PP - again).sum()) == dropped_bytes(bytes_PP)


@pytest.mark.parametrize("text", ["", "1 2\n3\n", "1 x\n2 3\n", "-16 0\n0 0\n", "1.5 2\n3 4\n", "9" * 30])
def test_text_that_is_no_matrix_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError):
        parse_matrix(text)


def test_a_ucc_pattern_file_has_its_documented_form() -> None:
    assert pattern_lines([[[1, 2], [3, 4]]], description="a\nb") == [
        "[format]",
        "version = 1.0",
        "description = a b",
        "",
        "[collective]",
        "type = ALLTOALLV",
        "team_size = 2",
        "datatype = UINT8",
        "flags = COUNT_32BIT",
        "counts = {",
        "    1,2",
        "    3,4",
        "}",
    ]


@given(st.lists(SQUARE, max_size=3))
def test_ucc_patterns_read_back_byte_for_byte(matrices: list[np.ndarray]) -> None:
    lines = pattern_lines(matrices)
    assert max(map(len, lines)) <= 4 + 8 * 11, "long rows are folded"
    again = parse_patterns("\n".join(lines))
    assert len(again) == len(matrices)
    assert all(np.array_equal(one, other) for one, other in zip(again, matrices, strict=True))


def test_ucc_counts_of_other_types_are_elements() -> None:
    text = "\n".join(pattern_lines([[[5]]])).replace("UINT8", "FLOAT32")
    assert parse_patterns(text)[0].tolist() == [[20]]


def test_counts_over_32_bits_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="32-bit counts"):
        pattern_lines([[[1 << 32]]])
    whole = 1 << 31
    with pytest.raises(BenchmarkError, match="displacements"):
        pattern_lines([[[whole, whole], [0, 0]]])  # each fits, what the rank sends does not
    with pytest.raises(BenchmarkError, match="displacements"):
        pattern_lines([[[whole, 0], [whole, 0]]])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version = 1.0", "version = 2.0", "version 2.0 is not known"),
        ("[format]", "[formed]", "no .format. block"),
        ("ALLTOALLV", "ALLREDUCE", "expected ALLTOALLV"),
        ("UINT8", "OBJECT", "a ALLTOALLV of OBJECT"),
        ("team_size = 2", "team_size = 3", "4 counts for a team of 3"),
        ("team_size = 2", "team_size = 999999999", "counts for a team"),
        ("1,2", "1,-2", "no whole number"),
    ],
)
def test_pattern_files_of_another_kind_are_refused(old: str, new: str, said: str) -> None:
    text = "\n".join(pattern_lines([[[1, 2], [3, 4]]]))
    with pytest.raises(BenchmarkError, match=said):
        parse_patterns(text.replace(old, new))


def test_an_export_says_what_each_file_holds(tmp_path: Path) -> None:
    steps = [captured(0, [[0, 100], [32, 0]]), captured(7, [[1, 2], [3, 4]])]
    for form in ("nccl-tests", "ucc"):
        out = tmp_path / form
        written = export_traffic(steps, out, form=form, run_id="r")  # type: ignore[arg-type]
        index = json.loads(written[-1].read_text())
        assert [entry["file"] for entry in index["files"]] == [path.name for path in written[:-1]]
        assert (index["ranks"], index["run_id"]) == (2, "r")
    back = parse_matrix((tmp_path / "nccl-tests" / "prefill-layer002-step000000-combine.txt").read_text())
    assert back.tolist() == [[0, 32], [96, 0]], "the combine is the transpose"
    index = json.loads((tmp_path / "nccl-tests" / "index.json").read_text())
    assert index["files"][0]["bytes_dropped_by_rounding"] == 4
    both = parse_patterns((tmp_path / "ucc" / "prefill-layer002-dispatch.ptini").read_text())
    assert [matrix.tolist() for matrix in both] == [[[0, 100], [32, 0]], [[1, 2], [3, 4]]]
    index = json.loads((tmp_path / "ucc" / "index.json").read_text())
    assert index["files"][0]["steps"] == [0, 7]


def test_an_export_never_mixes_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(BenchmarkError, match="not an empty folder"):
        export_traffic([captured(0, [[1]])], tmp_path, form="ucc")
    with pytest.raises(BenchmarkError, match="nothing to export"):
        export_traffic([], tmp_path / "new", form="ucc")
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_what_does_not_fit(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(make_run()), str(tmp_path / "out")
    assert main(["export", run, "ucc", "--ep", "2", "--out", out]) == 1
    assert "give --row-bytes" in capsys.readouterr().err
    assert main(["export", run, "morse", "--ep", "2", "--out", out, "--row-bytes", "4"]) == 1
    assert "expected nccl-tests, ucc, chrome-trace, tensorboard, csv" in capsys.readouterr().err
    assert main(["export", run, "ucc", "--ep", "3", "--out", out, "--row-bytes", "4"]) == 1
    assert "degrees that fit: 1, 2, 4" in capsys.readouterr().err
    assert main(["export", run, "ucc", "--ep", "2", "--out", out, "--row-bytes", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    first = parse_patterns(Path(document["files"][0]).read_text())
    index = json.loads(Path(document["files"][-1]).read_text())
    assert index["notes"] == document["notes"] == ["source ranks: spread evenly (estimate)"]
    assert (index["placement"], index["row_bytes"]) == ("linear", 4)
    # Loads 1, 1, 2, 4 of one rank, spread evenly over two: each sends 1 and 3 rows of 4 bytes.
    assert first[0].tolist() == [[4, 12], [4, 12]]


SLOT_LPK = np.array([[[0, 2], [1, 2]], [[2, 0], [1, 1]]])


def test_sglang_reads_a_map_of_every_decoder_layer() -> None:
    document = json.loads(placement_text("sglang", SLOT_LPK, layers=(1, 3), experts=3))
    assert document == {"physical_to_logical_map": [[0, 1, 2, 0], [0, 2, 1, 2], [0, 1, 2, 0], [2, 0, 1, 1]]}


def test_tensorrt_llm_reads_assignments_by_decoder_layer() -> None:
    assert placement_text("tensorrt-llm", SLOT_LPK, layers=(3, 1), experts=3) == (
        "initial_global_assignments:\n  1: [2, 0, 1, 1]\n  3: [0, 2, 1, 2]\n"
        "num_slots: 4\nlayer_updates_per_iter: 0\n"
    )


def test_vllm_ascend_reads_moe_layers_counted_from_0() -> None:
    document = json.loads(placement_text("vllm-ascend", SLOT_LPK, layers=(3, 1), experts=3))
    first, second = document["layer_list"]
    assert document["moe_layer_count"] == 2
    assert (first["layer_id"], second["layer_id"]) == (0, 1)
    assert first["device_list"] == [
        {"device_id": 0, "device_expert": [2, 0]},
        {"device_id": 1, "device_expert": [1, 1]},
    ]
    assert [item["device_expert"] for item in second["device_list"]] == [[0, 2], [1, 2]]


def test_a_placement_file_is_exported_for_the_layers_of_a_run(
    make_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run())  # one MoE layer, number 3, of four experts
    placed, out = tmp_path / "placed.json", tmp_path / "location.json"
    placed.write_text(json.dumps({"expert_to_rank": [1, 0, 0, 1]}))
    command = ["export", run, "sglang", "--ep", "2", "--out", str(out), "--placement"]
    assert main([*command, str(placed)]) == 0
    assert json.loads(out.read_text())["physical_to_logical_map"] == [[0, 1, 2, 3]] * 3 + [[1, 2, 0, 3]]
    assert main([*command, "linear"]) == 1
    assert "is there already" in capfd.readouterr().err
    assert main(["export", run, "tensorrt-llm", "--out", str(tmp_path / "t.yaml")]) == 1
    assert "give it with --ep" in capfd.readouterr().err
    assert main(["export", run, "tensorrt-llm", "--ep", "3", "--out", str(tmp_path / "t.yaml")]) == 1
    assert "do not fill 3 ranks" in capfd.readouterr().err
