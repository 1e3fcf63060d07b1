"""Hardware profiles: the bundled ones, and hostile files."""

from __future__ import annotations

import pytest

from observatory.analysis.hardware import load_profile, profile_names
from observatory.errors import BenchmarkError

FIGURE = 'value = 100\nunit = "GB/s"\nsource = "test"\ndate = "2026-01-01"\n'


def test_every_bundled_profile_is_valid():
    names = profile_names()
    assert {"h100-sxm", "h200-sxm", "h800", "h20", "a100-sxm", "b200-sxm"} <= set(names)
    for name in names:
        profile = load_profile(name)
        assert all(figure.source and figure.date for figure in profile.peak.values())


def test_peak_and_achievable_are_apart():
    profile = load_profile("h200-sxm")
    assert profile.peak["memory_bandwidth"].value == 4800
    assert profile.memory_bandwidth().value == pytest.approx(3840e9)
    assert profile.memory_bandwidth().assumed
    assert not profile.memory_bandwidth().peak
    assert profile.rate("torch.bfloat16").peak
    assert not load_profile("mi300x").rate("bfloat16").peak


def test_what_a_profile_lacks_is_refused():
    with pytest.raises(BenchmarkError, match="no fp8"):
        load_profile("a100-sxm").rate("float8_e4m3fn")


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\n[peak.memory_bandwidth]\n{FIGURE}')
    assert load_profile(path).memory_bandwidth().value == 100e9
    assert load_profile(str(path)).name == "mine"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "name = ",
        'name = "x"\n[peak.speed]\n' + FIGURE,
        'name = "x"\n[peak.memory]\n' + FIGURE.replace("GB/s", "MB"),
        'name = "x"\n[peak.memory_bandwidth]\n' + FIGURE.replace("100", "-1"),
        'name = "x"\n[peak.memory_bandwidth]\n' + FIGURE.replace("100", "nan"),
        'name = "x"\n[peak.memory_bandwidth]\n' + FIGURE.replace("100", "1e-300"),
        'name = "x"\n[peak.memory_bandwidth]\n' + FIGURE.replace("100", '"100"'),
        'name = "x"\n[peak.memory_bandwidth]\n' + FIGURE + "extra = 1\n",
        'name = "x"\n[peak.memory_bandwidth]\n' + FIGURE + "[achievable.memory_bandwidth]\n"
        + FIGURE.replace("100", "200"),
        'name = "\\u0007"\n[peak]\n',
        "x = " + "[" * 5000,
        "#" * 70_000,
    ],
)  # fmt: skip
def test_a_damaged_profile_is_one_sentence(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(BenchmarkError) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["no-such", "missing.toml", "../h20", "a\0b.toml"])
def test_what_is_not_there_is_refused(name):
    with pytest.raises(BenchmarkError):
        load_profile(name)
