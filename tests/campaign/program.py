"""A program that knows nothing of the observatory: it trains, evaluates, and counts its routing itself."""

import collections
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch import nn

HIDDEN, EXPERTS, TOP_K = 8, 4, 2
counted: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)


class Moe(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.top_k = layer, TOP_K
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(hidden).softmax(-1).topk(self.top_k)
        counted[self.layer].update(ids.flatten().tolist())
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(ids == number)
            output[token] += expert(hidden[token]) * weights[token, place, None]
        return output


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Moe(0)])
        self.layers.append(Moe(1))

    def forward(self, inputs_embeds: torch.Tensor, past_key_values: object = None) -> torch.Tensor:
        assert past_key_values is None
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return inputs_embeds


class Model(nn.Module):
    """A head around a stack that takes a cache, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Stack()

    def forward(self, inputs_embeds: torch.Tensor, past_key_values: object = None) -> torch.Tensor:
        output: torch.Tensor = self.model(inputs_embeds=inputs_embeds, past_key_values=past_key_values)
        return output


def train(model: nn.Module, steps: int, micro_batches: int = 2) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        for _ in range(micro_batches):
            model(torch.randn(5, HIDDEN)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, steps: int) -> None:
    model.eval()
    for _ in range(steps):
        model(torch.randn(3, HIDDEN))


@torch.no_grad()
def serve(model: nn.Module) -> None:
    """All ranks step together until rank 0 reads a line; it prints how many steps there were."""
    model.eval()
    lines: list[str] = []
    if torch.distributed.get_rank() == 0:
        threading.Thread(target=lambda: lines.append(sys.stdin.readline()), daemon=True).start()
    steps, goes_on = 0, torch.ones(1)
    while goes_on:
        model(torch.randn(3, HIDDEN))
        goes_on.fill_(not lines)
        torch.distributed.broadcast(goes_on, 0)
        steps += 1
        time.sleep(0.001)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"steps": steps}), flush=True)


def main(what: str) -> Any:
    torch.manual_seed(0)
    if what == "nothing":
        nn.Sequential(nn.Linear(HIDDEN, HIDDEN))(torch.randn(1, HIDDEN))
        return 0
    if what == "ranks":
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=True)
        train(model, 4)
        torch.distributed.destroy_process_group()
        return 0
    if what == "serves":
        torch.distributed.init_process_group("gloo")
        serve(Model())
        torch.distributed.destroy_process_group()
        return 0
    model = Model()
    train(model, 3)
    evaluate(model, 2)
    print(json.dumps({"counted": counted, "path": sys.path, "argv": sys.argv}), flush=True)
    if what == "raises":
        evaluate(Model(), 2)
        raise RuntimeError("the program's own error")
    if what == "killed":
        time.sleep(4)  # what was captured is on disk after two seconds
        os.kill(os.getpid(), signal.SIGKILL)
    return 5


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
