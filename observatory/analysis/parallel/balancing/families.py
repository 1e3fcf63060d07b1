"""Generated loads whose difficulty is known: popularity of many shapes, drift, and topics.

Shapes: S steps, L layers, E experts, T tokens, K experts of a token.

No load is measured: the families stand for what a model may do.
"""

from __future__ import annotations

import numpy as np

from observatory.analysis.parallel.balancing.layouts import Float64, Int64

#: Families of popularity, by name.
POPULARITIES = (
    "zipf 0.6", "zipf 0.8", "zipf 1.0", "zipf 1.2", "log-normal 0.5", "log-normal 1.0", "dirichlet 0.3",
)  # fmt: skip
_TOPICS, _CORRELATION_STEPS = 8, 50


def popularity(name: str, *, layers: int = 58, experts: int = 256, seed: int = 0) -> Float64:
    """Loads of one of `POPULARITIES`, (L, E): a Zipf law in random order, log-normal, or Dirichlet."""
    generator = np.random.default_rng(seed)
    family, number = name.split()
    if family == "zipf":
        load_E = 1.0 / np.arange(1, experts + 1) ** float(number)
        return np.stack([generator.permutation(load_E) for _ in range(layers)])
    if family == "log-normal":
        return np.exp(float(number) * generator.standard_normal((layers, experts)))
    return generator.dirichlet([float(number)] * experts, layers)


def drifting_loads(
    drift: float, *, steps: int = 64, experts: int = 128, tokens: int = 2048, top_k: int = 8, seed: int = 0
) -> Int64:
    """Loads of one layer, (S, E): popularity walks, and topics move experts together.

    Args:
        drift: standard deviation of the logarithm of popularity, of which topics have 0.7 times as much.
        steps: S, with a correlation time of 50 steps.
        experts: E.
        tokens: of each step; each has K distinct experts.
        top_k: K.
        seed: of everything.
    """
    generator = np.random.default_rng(seed)
    keep = np.exp(-1 / _CORRELATION_STEPS)
    base_E, walk_E = 0.5 * generator.standard_normal(experts), generator.standard_normal(experts)
    topic_T, topic_E = generator.standard_normal(_TOPICS), generator.integers(_TOPICS, size=experts)
    load_SE = np.empty((steps, experts), dtype=np.int64)
    for step in range(steps):
        walk_E = keep * walk_E + np.sqrt(1 - keep**2) * generator.standard_normal(experts)
        topic_T = keep * topic_T + np.sqrt(1 - keep**2) * generator.standard_normal(_TOPICS)
        score_E = base_E + drift * (walk_E + 0.7 * topic_T[topic_E])
        load_SE[step] = np.bincount(_chosen(score_E, tokens, top_k, generator).ravel(), minlength=experts)
    return load_SE


def still_loads(
    sd: float, *, steps: int = 64, experts: int = 128, tokens: int = 16, top_k: int = 8, seed: int = 0
) -> Int64:
    """Loads of one layer, (S, E), of log-normal popularity that stays."""
    generator = np.random.default_rng(seed)
    score_E = sd * generator.standard_normal(experts)
    chosen_STK = _chosen(score_E, steps * tokens, top_k, generator).reshape(steps, -1)
    return np.stack([np.bincount(chosen, minlength=experts) for chosen in chosen_STK])


def topic_tokens(
    strength: float, *, steps: int = 64, tokens: int = 96, experts: int = 128, top_k: int = 8, seed: int = 0
) -> tuple[Int64, Int64]:
    """Experts of tokens of 8 topics, (S * T, K), and the step of each.

    Args:
        strength: added to the logarithm of the popularity that the experts of a token's topic have for it.
        steps: S.
        tokens: T of each step.
        experts: E.
        top_k: K.
        seed: of everything.
    """
    generator = np.random.default_rng(seed)
    base_E, topic_E = 0.5 * generator.standard_normal(experts), generator.integers(_TOPICS, size=experts)
    topic_T = generator.integers(_TOPICS, size=steps * tokens)
    score_TE = base_E + strength * (topic_T[:, None] == topic_E)
    return _chosen(score_TE, steps * tokens, top_k, generator), np.arange(steps).repeat(tokens)


def _chosen(score: Float64, tokens: int, top_k: int, generator: np.random.Generator) -> Int64:
    """K distinct experts of each token, drawn by the exponentials of their scores, (T, K)."""
    gumbel_TE = generator.gumbel(size=(tokens, score.shape[-1])) + score
    return np.argpartition(-gumbel_TE, top_k, axis=1)[:, :top_k].astype(np.int64)
