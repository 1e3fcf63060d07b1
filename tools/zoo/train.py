"""Train one bundled checkpoint again: `python -m tools.zoo.train tiny-gqa --out DIR`.

The order of a step: forward, loss (cross-entropy plus, in families that have it, the balancing loss),
backward, clip, in families with a score-correction bias the bias update from this step's loads, AdamW.
Progress goes to stderr. The weights are rounded to bfloat16 first and evaluated after:
`training.json` describes the shipped weights.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from observatory.errors import ObservatoryError
from observatory.zoo.data import REAL_CONDITIONS, load_token_ids, read_bundled_text
from observatory.zoo.tokenizer import VOCABULARY_SIZE, load_tokenizer
from tools.zoo.balancing import expert_loads, record_routing, switch_loss, update_bias
from tools.zoo.evaluation import evaluate, unigram_cross_entropies
from tools.zoo.recipes import RECIPES, Recipe, build_model, recipe_named

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SEED = 1
EVALUATED_TOKENS = 65_536  # of each condition
LOAD_TOKENS = 16_384  # of each condition, for the final loads on training text
_CURVE_POINTS = 60


def training_sequences(*, sequence_length: int) -> dict[str, NDArray[np.int64]]:
    """The four training texts as token ids, each cut to the length of the shortest: all weigh the same."""
    tokenizer = load_tokenizer()
    encoded = {}
    for name in REAL_CONDITIONS:
        ids = tokenizer(read_bundled_text(name, split="train"), verbose=False, add_special_tokens=False)[
            "input_ids"
        ]
        encoded[name] = np.asarray(ids, dtype=np.int64)
    shortest = min(len(ids) for ids in encoded.values()) // sequence_length * sequence_length
    return {name: ids[:shortest] for name, ids in encoded.items()}


def _mixed_batches(texts: dict[str, NDArray[np.int64]], recipe: Recipe, seed: int) -> NDArray[np.int64]:
    """Sequences of all texts in turn, each text in a new order every epoch, shape (steps, batch, sequence).

    Taking turns keeps the mixture of a small batch constant: a batch of one text alone would look unbalanced
    to the balancing, though its load is even over the mixture.
    """
    generator = np.random.default_rng(seed)
    wanted = -(-recipe.steps * recipe.batch_size // len(texts))
    columns = []
    for ids in texts.values():
        sequences = ids.reshape(-1, recipe.sequence_length)
        epochs = -(-wanted // len(sequences))
        order = np.concatenate([generator.permutation(len(sequences)) for _ in range(epochs)])[:wanted]
        columns.append(sequences[order])
    in_turn = np.stack(columns, axis=1).reshape(-1, recipe.sequence_length)
    steps: NDArray[np.int64] = in_turn[: recipe.steps * recipe.batch_size].reshape(
        recipe.steps, recipe.batch_size, recipe.sequence_length
    )
    return steps


def train(recipe: Recipe, *, seed: int = SEED) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Train a model by its recipe.

    Returns:
        The model, rounded to bfloat16 values but held in float32, and what `training.json` says of the run.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model: Any = build_model(recipe)
    model.set_experts_implementation("grouped_mm")
    model.config.use_cache = False
    model.train()
    texts = training_sequences(sequence_length=recipe.sequence_length)
    steps = _mixed_batches(texts, recipe, seed)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_then_down(step, recipe))
    curve: list[dict[str, float]] = []
    start_ns = time.monotonic_ns()
    with record_routing(model) as record:
        for step, ids in enumerate(steps):
            record.logits_TE.clear()
            record.experts_TK.clear()
            loss, balance = _step(model, record, torch.from_numpy(ids), recipe)
            optimizer.step()
            schedule.step()
            if step % max(1, recipe.steps // _CURVE_POINTS) == 0 or step == recipe.steps - 1:
                loads_LE = expert_loads(record).float()
                skew = (loads_LE.max(dim=-1).values / loads_LE.mean(dim=-1)).mean().item()
                elapsed_s = (time.monotonic_ns() - start_ns) / 1e9
                curve.append(
                    {"step": step, "loss_nats": round(loss, 4), "load_max_over_mean": round(skew, 3)}
                )
                print(
                    f"{recipe.name} step {step:5d} loss {loss:.3f} switch {balance:.3f} max/mean {skew:.2f} "
                    f"{elapsed_s:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    wall_time_s = (time.monotonic_ns() - start_ns) / 1e9
    _round_to_bfloat16(model)
    model.eval()
    model.config.use_cache = True
    facts = {
        "schema_version": "1.0",
        "recipe": {**asdict(recipe), "architecture": dict(recipe.architecture)},
        "seed": seed,
        "tokens_seen": int(steps.size),
        "train_tokens_available": int(sum(ids.size for ids in texts.values())),
        "wall_time_s": round(wall_time_s, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_held_out_facts(model, texts, recipe),
        "loss_curve": curve,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    return model, facts


def _step(model: Any, record: Any, ids: "torch.Tensor", recipe: Recipe) -> tuple[float, float]:
    """One forward and backward pass and the bias update; gives cross-entropy (nats) and mean Switch loss."""
    import torch

    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits
    loss: Any = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
    )
    balance = switch_loss(record)
    (loss + recipe.auxiliary_loss_coefficient * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
    if recipe.balancing == "bias_update":
        update_bias(model, record, rate=recipe.bias_update_rate)
    return loss.item(), balance.item() / len(record.logits_TE)


def _optimizer(model: Any, recipe: Recipe) -> "torch.optim.Optimizer":
    import torch

    matrices = [p for name, p in model.named_parameters() if p.dim() >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-8)


def _warm_then_down(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup_steps))


def _round_to_bfloat16(model: "torch.nn.Module") -> None:
    """Round weights to what is stored; the correction bias stays float32, as its families keep it."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


def _held_out_facts(model: Any, texts: dict[str, NDArray[np.int64]], recipe: Recipe) -> dict[str, Any]:
    tokenizer = load_tokenizer()
    length = recipe.sequence_length
    held_out = {
        name: load_token_ids(name, tokenizer, vocabulary_size=VOCABULARY_SIZE, tokens=EVALUATED_TOKENS).ids
        for name in REAL_CONDITIONS
    }
    evaluated = evaluate(model, held_out, sequence_length=length)
    on_train = evaluate(
        model, {name: ids[:LOAD_TOKENS] for name, ids in texts.items()}, sequence_length=length
    )
    unigram = unigram_cross_entropies(
        texts, held_out, vocabulary_size=VOCABULARY_SIZE, sequence_length=length
    )
    return {
        "held_out_tokens_per_condition": EVALUATED_TOKENS,
        "held_out_loss_nats": evaluated.losses_nats,
        "held_out_loss_overall_nats": evaluated.overall_nats,
        "unigram_cross_entropy_nats": unigram.own_nats,
        "unigram_cross_entropy_overall_nats": unigram.overall_own_nats,
        "unigram_of_mix_cross_entropy_overall_nats": unigram.overall_mix_nats,
        "train_loss_nats": on_train.losses_nats,
        "load_on_train": on_train.load_facts,
        "load_on_held_out": evaluated.load_facts,
    }


def save_checkpoint(model: Any, facts: dict[str, Any], directory: Path) -> None:
    """Write config.json, model.safetensors (bfloat16, the correction bias float32) and training.json."""
    import copy

    import torch
    import transformers as library

    transformers: Any = library

    stored = copy.deepcopy(model).to(torch.bfloat16)
    for (name, buffer), (_, original) in zip(stored.named_buffers(), model.named_buffers(), strict=True):
        if name.endswith("e_score_correction_bias"):
            buffer.data = original.data.clone()
    stored.config.dtype = "bfloat16"
    transformers.utils.logging.disable_progress_bar()
    stored.save_pretrained(directory)
    text = json.dumps(facts, indent=1, sort_keys=False)
    (directory / "training.json").write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Train one model and save it; see the module docstring."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m tools.zoo.train", description=__doc__)
    parser.add_argument("name", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    recipe = recipe_named(arguments.name)
    if arguments.steps is not None:
        recipe = replace(
            recipe, steps=arguments.steps, warmup_steps=min(recipe.warmup_steps, arguments.steps)
        )
    try:
        model, facts = train(recipe, seed=arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, facts, arguments.out)
    except ObservatoryError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        f"{arguments.out}: held-out {facts['held_out_loss_overall_nats']:.3f} nats/token, "
        f"unigram {facts['unigram_cross_entropy_overall_nats']:.3f}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
