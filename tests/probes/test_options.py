"""Options are declared once: what offers them again offers the same."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields

import observatory
from observatory.campaign.job import ProfileJob
from observatory.cli.profile import profile
from observatory.probes.options import (
    ExchangeOptions,
    PowerOptions,
    RoutingOptions,
    RunLabels,
    WatchOptions,
)

NESTED = (RoutingOptions, ExchangeOptions, PowerOptions, RunLabels)


def default(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory() or None
    return field.default


def test_watch_takes_each_option_of_its_records_with_their_defaults() -> None:
    names = ("model", "out", "rank", "world")
    keywords = inspect.signature(observatory.watch).parameters
    flat = {name: value.default or None for name, value in keywords.items() if name not in names}
    declared = {f.name: default(f) or None for record in (WatchOptions, *NESTED) for f in fields(record)}
    for name in ("where", "made", "steps", "routing", "exchange", "power", "labels"):
        if name not in keywords:
            del declared[name]
    declared["power"] = PowerOptions().power
    assert flat == declared


def test_the_command_takes_each_option_of_a_job_with_its_default() -> None:
    offered = inspect.signature(profile).parameters
    for field in fields(ProfileJob):
        assert field.name in offered
        if field.name != "ep":  # asked of the launcher where it is not given
            assert default(field) in (offered[field.name].default, MISSING)
