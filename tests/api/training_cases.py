"""A tiny model and texts that tests of the trainers' callbacks train with, and an independent count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import observatory

EXPERTS, VOCABULARY, LENGTH = 4, 32, 6

Found = dict[tuple[int, str, int], Counter[int]]


class Texts(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, texts: int) -> None:
        self._ids = torch.randint(0, VOCABULARY, (texts, LENGTH), generator=torch.manual_seed(1))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, num_local_experts=EXPERTS,
            num_experts_per_tok=2, output_router_logits=True, max_position_embeddings=16,
        )
    )  # fmt: skip


def phase_of(module: Any) -> str:
    return "train_forward" if module.training else "prefill"


class Counted:
    """Expert ids that the experts were called with, by the trainer's step, phase and layer."""

    def __init__(self, model: Any, phase: Callable[[Any], str] = phase_of) -> None:
        self.step = 0
        self.phase = phase
        self.losses: dict[tuple[int, str], list[float]] = {}
        self.found: Found = {}
        if model.config.model_type != "mixtral":
            return
        model.register_forward_hook(self.add_loss)
        for layer, block in enumerate(model.model.layers):
            block.mlp.experts.register_forward_pre_hook(lambda m, args, layer=layer: self.add(m, args, layer))

    def add(self, experts: Any, args: tuple[torch.Tensor, ...], layer: int) -> None:
        key = (self.step, self.phase(experts), layer)
        self.found.setdefault(key, Counter()).update(args[1].flatten().tolist())

    def add_loss(self, model: Any, _args: Any, output: Any) -> None:
        self.losses.setdefault((self.step, self.phase(model)), []).append(output.aux_loss.item())


def loads(path: Path, rank: int = 0) -> Found:
    frame = observatory.open_run(path).expert_load()
    found: Found = {}
    for row in frame[(frame.load > 0) & (frame.source_rank == rank)].itertuples():
        found.setdefault((row.step, row.phase, row.layer), Counter())[row.expert] = row.load
    return found


def trainer(model: Any, folder: Path, callbacks: list[Any], *, steps: int = 4, **options: Any) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Follow(TrainerCallback):
        def on_step_end(self, *given: Any, **_: Any) -> None:
            counted.step = given[1].global_step

        on_train_begin = on_step_end

    counted = Counted(model)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=3, eval_strategy="steps", eval_steps=2, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        save_only_model=False, **options,
    )  # fmt: skip
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(32),
        eval_dataset=Texts(3),
        callbacks=[*callbacks, Follow()],
    )
    made.counted = counted
    return made
