"""What the head of the page says, against loads whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from observatory.reports.frames.committees import committee_overlaps, committee_sizes
from observatory.reports.sections import (
    committee_section,
    key_figure,
    scan_section,
    step_section,
    three_numbers,
    verdicts,
)
from observatory.reports.sections.mock import mock_ratios
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import Phase
from observatory.run.tables import TOKENS_SCHEMA
from tests.reports.sample_runs import manifest, stated, steady_run, write_run
from tests.reports.test_report import frames_of


def test_the_ratio_of_mock_to_real_is_of_means_over_real_text(tmp_path: Path) -> None:
    frames = frames_of(
        steady_run(tmp_path / "a", "m", "prose", [100, 100, 100, 300]),  # Gini 0.25
        steady_run(tmp_path / "b", "m", "code", [100, 100, 100, 100]),  # Gini 0
        steady_run(tmp_path / "c", "m", "mock", [0, 0, 0, 600]),  # Gini 0.75
        ep=(2,),
    )
    ratio = mock_ratios(frames.cells).iloc[0]
    assert (ratio["real"], ratio["mock"], ratio["ratio"]) == pytest.approx((0.125, 0.75, 6.0))
    assert ratio["verdict"] == "over"


def _sentence(sentences: list[str], part: str) -> str:
    (found,) = [sentence for sentence in sentences if part in sentence]
    return found


def test_findings_name_the_most_and_least_concentrated_model(tmp_path: Path) -> None:
    frames = frames_of(
        steady_run(tmp_path / "a", "even", "prose", [100, 100, 100, 100]),
        steady_run(tmp_path / "b", "skewed", "prose", [100, 100, 100, 300]),
        ep=(2,),
    )
    sentences = stated(frames)
    first = _sentence(sentences, "most concentrated on real text")
    assert first.startswith(
        "In prefill, skewed is the most concentrated on real text: Gini 0.250 (0.250 to 0.250), floor 0.0"
    )
    assert "; even is the least: 0.000 (0.000 to 0.000), floor 0.0" in first
    assert "do not differ" not in first
    assert "even on prose (prefill)" in _sentence(sentences, "Not distinguishable from uniform routing")
    assert "layer 0 of skewed on prose" in _sentence(sentences, "most concentrated layer")
    # linear placement over 2 ranks: 200 and 400 of 600, so 400 / 300
    assert "that of skewed on prose laid out over EP 2: 1.33× the mean" in _sentence(
        sentences, "The busiest rank on real text (prefill, more"
    )


def test_findings_of_one_run_keep_its_floor(tmp_path: Path) -> None:
    # 1600 tokens, top-1 of 4: mean load 400, so the floor is close to sqrt(0.75 * 0.75 / (400 pi)) = 0.0212
    run = steady_run(tmp_path / "a", "only", "prose", [50, 50, 50, 50])
    assert stated(frames_of(run, ep=(2,)))[0] == (
        "In prefill, only has Gini 0.000 (0.000 to 0.000), floor 0.021 on real text."
    )


def test_findings_speak_of_mock_only_where_there_is_no_real_text(tmp_path: Path) -> None:
    mock = steady_run(tmp_path / "a", "m", "mock", [0, 0, 0, 600])
    prose = steady_run(tmp_path / "b", "m", "prose", [100, 100, 100, 300])
    both = stated(frames_of(mock, prose, ep=(2,)))
    assert "m on prose" in _sentence(both, "The busiest rank on real text (prefill, more")
    assert "layer 0 of m on prose" in _sentence(both, "most concentrated layer on real text")
    alone = stated(frames_of(mock, ep=(2,)))
    assert "m on mock" in _sentence(alone, "The busiest rank on the data given (prefill, more")


@pytest.mark.parametrize(("phases", "named"), [(("decode", "prefill"), "prefill"), (("decode",), "decode")])
def test_the_busiest_rank_is_that_of_prefill_where_there_is_one(
    tmp_path: Path, phases: tuple[Phase, ...], named: str
) -> None:
    path = write_run(
        tmp_path / "run",
        manifest(layers=1, experts=8, top_k=2),
        steps=6,
        phases=tuple((phase, 64) for phase in phases),
    )
    assert _sentence(stated(frames_of(path)), f"The busiest rank on real text ({named}, more")


def test_committees_are_compared_between_real_texts_with_other_steps_and_with_mock(tmp_path: Path) -> None:
    frames = frames_of(
        steady_run(tmp_path / "a", "m", "prose", [300, 100, 100, 100]),  # committee {0}
        steady_run(tmp_path / "b", "m", "code", [300, 200, 80, 20]),  # {0}
        steady_run(tmp_path / "c", "m", "mock", [100, 200, 200, 100]),  # {1, 2}
        ep=(2,),
    )
    assert committee_sizes(frames.loads)["size"].tolist() == [1, 1, 2]
    overlaps = committee_overlaps(frames).groupby("with_kind")
    assert overlaps["jaccard"].mean().to_dict() == {"mock": 0.0, "real": 1.0, "same": 1.0}
    assert overlaps.size().to_dict() == {"mock": 2, "real": 1, "same": 2}
    # one of 4 experts against one: equal once in 4; against two: inside once in 2, then 1 of 2 in common
    assert overlaps["jaccard_chance"].mean().to_dict() == pytest.approx(
        {"mock": 0.25, "real": 0.25, "same": 0.25}
    )
    assert "overlap by 1.00 with those on another" in _sentence(stated(frames), "hold half of a layer's load")


def test_locality_has_a_table_only_where_tokens_were_sampled(tmp_path: Path) -> None:
    described = manifest(layers=1, experts=4, top_k=1)
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    columns = {
        "step": [0] * 32,
        "phase": ["prefill"] * 32,
        "layer": [0] * 32,
        "source_rank": [0] * 32,
        "position": list(range(32)),
        "expert_ids": [[0]] * 16 + [[1]] * 16,
    }
    tokens = pa.table(columns, schema=TOKENS_SCHEMA)
    for path in (plain, sampled):
        with RunWriter.create(path, described) as writer:
            writer.append(
                "routing",
                routing_rows(
                    step_N=np.arange(1), phase_N="prefill", layer_N=0, source_rank=0, tokens_N=32,
                    load_NE=np.array([[16, 16, 0, 0]]),
                ),
            )  # fmt: skip
            if path == sampled:
                writer.append("tokens", tokens)
    (table,) = [
        block
        for block in committee_section(frames_of(sampled)).blocks
        if "Local" in getattr(block, "caption", "")
    ]
    cells = [cell.text for cell in table.rows[0]]
    # each segment of 16 tokens uses one expert, and 2 are kept: all served; so it is in random order
    assert cells == ["gqa-tiny", "prose", "2", "2", "100.0 %", "100.0 %", "0.0 %"]
    assert "No run here holds token samples" in " ".join(committee_section(frames_of(plain)).lead)
    assert (
        len(committee_section(frames_of(plain)).blocks)
        == len(committee_section(frames_of(sampled)).blocks) - 1
    )


def test_equal_models_are_said_not_to_differ(tmp_path: Path) -> None:
    runs = [steady_run(tmp_path / name, name, "prose", [100, 100, 100, 300]) for name in ("x", "y")]
    assert "x and y do not differ beyond the interval." in _sentence(
        stated(frames_of(*runs, ep=(2,))), "most concentrated on real text"
    )


def test_too_few_steps_give_no_verdict(tmp_path: Path) -> None:
    frames = frames_of(
        steady_run(tmp_path / "a", "m", "prose", [100, 100, 100, 300], steps=2),
        steady_run(tmp_path / "b", "m", "mock", [0, 0, 0, 600], steps=2),
        ep=(2,),
    )
    assert mock_ratios(frames.cells)["verdict"].tolist() == ["unknown"]
    assert "cannot be judged (too few steps for intervals) in m" in _sentence(stated(frames), "mock data")


def test_the_verdict_is_of_the_run_on_real_text_in_which_most_is_at_stake(tmp_path: Path) -> None:
    frames = frames_of(
        steady_run(tmp_path / "a", "even", "prose", [100, 100, 100, 100]),
        steady_run(tmp_path / "b", "skewed", "prose", [100, 100, 100, 300]),
        steady_run(tmp_path / "c", "even", "mock", [0, 0, 0, 600]),
        ep=(2,),
    )
    (routing,) = verdicts(frames)
    assert (routing.part, routing.section, routing.whose) == ("Routing", "layers", "skewed on prose")
    assert routing.sentences[1].startswith("Its busiest expert has 2.00 times the mean load")
    assert routing.next_step.endswith(f"observatory scan {tmp_path / 'b'}")
    sections = [step_section(frames), scan_section(frames, gpus_per_node=4)]
    figure = key_figure(sections, [routing])
    assert figure is not None
    assert [variant.label for variant in figure.variants] == ["prose, prefill"], "as the verdict says"
    assert key_figure([], [routing]) is None


def test_even_routing_is_said_to_be_worth_no_change(tmp_path: Path) -> None:
    (routing,) = verdicts(frames_of(steady_run(tmp_path / "a", "m", "prose", [100] * 4), ep=(2,)))
    assert (routing.sentences, routing.next_step) == (("Nothing here is worth changing.",), "")


def test_no_number_stands_for_loads_that_uniform_routing_shows(tmp_path: Path) -> None:
    even = frames_of(steady_run(tmp_path / "a", "even", "prose", [25, 26, 24, 25]), ep=(2,))
    assert three_numbers(even, []) == []
    skewed = frames_of(steady_run(tmp_path / "b", "skewed", "prose", [100, 100, 100, 300]), ep=(2,))
    assert [number.section for number in three_numbers(skewed, [])] == ["ep", "grid"]
