"""The equality table of docs/evidence/exchange.md: spread experts against whole ones, over every family.

``python -m tests.collectives.table`` prints it; ``... table mixtral gpt_oss`` does it for these families.
Differences are the largest over ranks, of logits (each algorithm) and of gradients (flat), in fp32, relative
to the largest value; inputs differ from rank to rank.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from observatory.collectives.dispatch import Algorithm
from observatory.collectives.transport.open import open_transport
from observatory.errors import ModelError
from tests.collectives.cases import VARIANTS, WORLDS, backward, forward, gradients, models
from tests.collectives.forked import Forked
from tests.probes.routing.families import NOT_ROUTED, moe_families, tiny_model

_COLUMNS: tuple[tuple[Algorithm, bool], ...] = VARIANTS


def rank_work(made: dict[str, nn.Module], _rank: int, world: int) -> dict[str, list[Any]]:
    """Per model the relative differences of the columns and of the gradients, or why there are none."""
    outcome: dict[str, list[Any]] = {}
    with open_transport(timeout_s=120, ranks_per_node=2 if world > 1 else None) as transport:
        for name, model in made.items():
            try:
                logits = [forward(model, transport, *variant) for variant in _COLUMNS]
            except ModelError as error:
                outcome[name] = [str(error).partition(";")[0]]
                continue
            outcome[name] = [difference["relative"] for difference in logits]
            outcome[name] += [max(difference["absolute"] for difference in logits)]
            gradients.cache_clear()
            outcome[name] += [backward(model, transport, "flat", False)["relative"]]
    return outcome


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    families = sys.argv[1:] or [family for family in moe_families() if family not in NOT_ROUTED]
    made = models(()) if not sys.argv[1:] else {}
    made |= {family: tiny_model(family) for family in families}
    heads = [f"{algorithm}{', dedup.' if deduplicate else ''}" for algorithm, deduplicate in _COLUMNS]
    print("| model | P | " + " | ".join(heads) + " | largest absolute | gradients |")
    print("|---|---|" + "---|" * (len(heads) + 2))
    refused: dict[str, str] = {}
    rows: dict[str, list[str]] = {name: [] for name in made}
    for world in WORLDS:
        ranks = Forked(world, partial(rank_work, made, world=world)).collect(timeout_s=1200)
        assert all("value" in rank for rank in ranks), ranks
        for name in made:
            outcome = [rank["value"][name] for rank in ranks]
            if isinstance(outcome[0][0], str):
                refused[name] = outcome[0][0]
                continue
            worst = [max(column) for column in zip(*outcome, strict=True)]
            rows[name].append(f"| {name} | {world} | " + " | ".join(f"{value:.1e}" for value in worst) + " |")
    for lines in rows.values():
        for line in lines:
            print(line)
    print()
    for name, reason in refused.items():
        print(f"* {name}: {reason}")


if __name__ == "__main__":
    main()
