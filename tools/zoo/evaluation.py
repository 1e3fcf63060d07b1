"""Held-out loss, the unigram baseline it is compared with, and final expert loads.

Shapes: L MoE layers, E experts, V vocabulary. All losses are in nats per predicted token. A sequence of n
tokens has n - 1 predicted ones: its first token has no context and is left out, for the models and for the
baseline.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.zoo.balancing import expert_loads, record_routing

if TYPE_CHECKING:
    import torch

_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A model on some texts.

    Attributes:
        losses_nats: cross-entropy per predicted token, by condition.
        overall_nats: over all predicted tokens.
        load_facts: tokens counted, and per MoE layer max/mean and min/mean of the experts' loads and the
            number of experts that got less than a tenth of the mean.
    """

    losses_nats: dict[str, float]
    overall_nats: float
    load_facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnigramBaseline:
    """Cross-entropy of unigram models fitted on training tokens (add-one smoothing), on held-out tokens.

    Attributes:
        own_nats: by condition, from a model of that condition's training text alone (the harder baseline).
        overall_own_nats: over all predicted tokens, with those.
        overall_mix_nats: over all predicted tokens, with one model of the whole training mix.
    """

    own_nats: dict[str, float]
    overall_own_nats: float
    overall_mix_nats: float


def evaluate(
    model: "torch.nn.Module", texts: dict[str, NDArray[np.int64]], *, sequence_length: int
) -> Evaluation:
    """Loss and expert loads of a model on token ids, each condition of shape (tokens,)."""
    import torch

    losses: dict[str, float] = {}
    counts: dict[str, int] = {}
    total_LE = None
    with torch.inference_mode(), record_routing(model) as record:
        for name, ids in texts.items():
            sequences: Any = torch.from_numpy(_sequences(ids, sequence_length))
            total, predicted = 0.0, 0
            for batch in sequences.split(_BATCH_SIZE):
                record.logits_TE.clear()
                record.experts_TK.clear()
                logits = model(input_ids=batch, use_cache=False).logits
                targets = batch[:, 1:].reshape(-1)
                total += torch.nn.functional.cross_entropy(
                    logits[:, :-1].reshape(-1, logits.shape[-1]).float(), targets, reduction="sum"
                ).item()
                predicted += targets.numel()
                loads_LE = expert_loads(record)
                total_LE = loads_LE if total_LE is None else total_LE + loads_LE
            losses[name], counts[name] = total / predicted, predicted
    overall = sum(losses[name] * counts[name] for name in texts) / sum(counts.values())
    return Evaluation(
        losses_nats={name: round(loss, 4) for name, loss in losses.items()},
        overall_nats=round(overall, 4),
        load_facts=_load_facts(
            np.asarray(total_LE), tokens=sum(_sequences(i, sequence_length).size for i in texts.values())
        ),
    )


def unigram_cross_entropies(
    train: dict[str, NDArray[np.int64]],
    held_out: dict[str, NDArray[np.int64]],
    *,
    vocabulary_size: int,
    sequence_length: int,
) -> UnigramBaseline:
    """Fit unigram models on training tokens and evaluate them on held-out tokens; see `UnigramBaseline`."""
    mix_V = _log_probabilities(np.concatenate(list(train.values())), vocabulary_size)
    own_total, mix_total, count, own = 0.0, 0.0, 0, {}
    for name, ids in held_out.items():
        targets = _sequences(ids, sequence_length)[:, 1:].reshape(-1)
        nats = -_log_probabilities(train[name], vocabulary_size)[targets]
        own[name] = round(float(nats.mean()), 4)
        own_total += float(nats.sum())
        mix_total -= float(mix_V[targets].sum())
        count += targets.size
    return UnigramBaseline(
        own_nats=own,
        overall_own_nats=round(own_total / count, 4),
        overall_mix_nats=round(mix_total / count, 4),
    )


def _sequences(ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    whole = len(ids) // sequence_length
    return ids[: whole * sequence_length].reshape(whole, sequence_length)


def _log_probabilities(ids: NDArray[np.int64], vocabulary_size: int) -> NDArray[np.float64]:
    counts_V = np.bincount(ids, minlength=vocabulary_size) + 1.0
    log_V: NDArray[np.float64] = np.log(counts_V / counts_V.sum())
    return log_V


def _load_facts(loads_LE: NDArray[np.int64], *, tokens: int) -> dict[str, Any]:
    mean_L = loads_LE.mean(axis=1)
    return {
        "tokens": tokens,
        "max_over_mean_per_layer": [round(float(x), 3) for x in loads_LE.max(axis=1) / mean_L],
        "min_over_mean_per_layer": [round(float(x), 3) for x in loads_LE.min(axis=1) / mean_L],
        "experts_below_tenth_of_mean": [int(x) for x in (loads_LE < 0.1 * mean_L[:, None]).sum(axis=1)],
    }
