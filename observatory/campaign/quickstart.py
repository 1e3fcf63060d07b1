"""The quickstart: the bundled models on the bundled data, scanned and reported, with no arguments."""

from __future__ import annotations

from observatory.campaign.grid import GridConfig, ProfileOptions

__all__ = ["quickstart_grid"]


def quickstart_grid() -> GridConfig:
    """Five trained models on six data conditions, prefill and decode.

    The sizes are chosen for two CPU cores: 8 x 256 tokens a prefill step are enough for a sampling floor
    well below the Gini of the bundled models, and the held-out texts fill them without repeating.
    """
    from observatory.zoo.data import CONDITIONS
    from observatory.zoo.models import bundled_models

    return GridConfig(
        models=tuple(model.name for model in bundled_models()),
        data=CONDITIONS,
        ep=(4, 8, 16, 32),
        gpus_per_node=4,
        profile=ProfileOptions(batch_size=8, sequence_length=256, steps=16, phase="both"),
    )
