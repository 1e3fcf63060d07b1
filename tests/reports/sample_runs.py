"""Run directories with plausible loads: Dirichlet-multinomial, seeded."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from observatory.reports.frames.report import ReportFrames
from observatory.reports.sections import findings
from observatory.run import RunWriter, routing_rows
from observatory.run.manifest import DataSpec, DeviceSpec, Manifest, ModelSpec, MoeLayerSpec, Phase, Topology
from observatory.run.provenance import HostSpec, SchedulerJob

MODELS: dict[str, tuple[str, float]] = {
    "mla-tiny": ("MLA", 2.2),
    "mha-tiny": ("MHA", 24.0),
    "gqa-tiny": ("GQA", 8.0),
    "mamba2-tiny": ("Mamba-2", 14.0),
    "gdn-tiny": ("GDN", 3.0),
}
CONDITIONS: dict[str, tuple[bool, float]] = {
    "prose": (True, 1.0),
    "code": (True, 0.75),
    "foreign": (True, 0.85),
    "structured": (True, 0.55),
    "shuffled": (False, 0.9),
    "mock": (False, 0.45),
}


def manifest(
    model: str = "gqa-tiny",
    condition: str = "prose",
    *,
    mixer: str | None = "GQA",
    real: bool | None = True,
    layers: int = 4,
    experts: int = 32,
    top_k: int = 4,
    ranks: int = 1,
) -> Manifest:
    """A manifest with every field filled."""
    return Manifest(
        run_id=f"{model}-{condition}"[:80],
        created_unix_s=1_790_000_000.0,
        argv=("observatory", "profile", model, "--data", condition, "--steps", "20"),
        config={"batch_size": 8, "sequence_length": 256, "seed": 0},
        git_sha="0123456789abcdef0123456789abcdef01234567",
        hosts=(HostSpec(name="node-a", platform="Linux", cpu="EPYC 9654", cpus=96, memory_bytes=2**38),),
        scheduler=SchedulerJob(kind="slurm", job_id="4711", nodes="node-a"),
        model=ModelSpec(
            name=model,
            family="Qwen3MoeForCausalLM",
            mixer=mixer,
            hidden_size=128,
            expert_bytes=98304,
            parameters=12_000_000,
            dtype="float32",
            moe_layers=tuple(
                MoeLayerSpec(layer=layer, module=f"model.layers.{layer}.mlp", experts=experts, top_k=top_k)
                for layer in range(layers)
            ),
        ),
        data=DataSpec(
            condition=condition, source="bundled text", real=real, batch_size=8, sequence_length=256
        ),
        topology=Topology(ranks=ranks, ep=1, gpus_per_node=4),
        devices=(DeviceSpec(kind="cpu", name="EPYC 9654"),),
        software={"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.0"},
    )


def loads(
    generator: np.random.Generator, *, steps: int, tokens: int, top_k: int, experts: int, evenness: float
) -> NDArray[np.int64]:
    """Loads of ``steps`` steps around one set of preferences, no expert above ``tokens``."""
    preference_E = generator.dirichlet(np.full(experts, evenness))
    load_SE = np.stack(
        [
            generator.multinomial(tokens * top_k, generator.dirichlet(preference_E * experts * 30 + 1e-6))
            for _ in range(steps)
        ]
    )
    return load_SE.astype(np.int64)


def write_run(
    path: Path,
    described: Manifest,
    *,
    evenness: float = 4.0,
    steps: int = 20,
    phases: tuple[tuple[Phase, int], ...] = (("prefill", 2048), ("decode", 8)),
    seed: int = 0,
) -> Path:
    """Write a run of every rank of the manifest's topology; ``phases`` gives tokens per step and rank."""
    generator = np.random.default_rng(seed)
    with ExitStack() as stack:
        writers = [stack.enter_context(RunWriter.create(path, described))]
        writers += [
            stack.enter_context(RunWriter.join(path, rank=rank))
            for rank in range(1, described.topology.ranks)
        ]
        for rank, writer in enumerate(writers):
            for spec in described.model.moe_layers:
                for index, (phase, tokens) in enumerate(phases):
                    load_SE = loads(
                        np.random.default_rng([seed, spec.layer, rank]) if index == 0 else generator,
                        steps=steps,
                        tokens=tokens,
                        top_k=spec.top_k or 1,
                        experts=spec.experts,
                        evenness=evenness,
                    )
                    writer.append(
                        "routing",
                        routing_rows(
                            step_N=np.arange(steps) + index * steps,
                            phase_N=phase,
                            layer_N=spec.layer,
                            source_rank=rank,
                            tokens_N=tokens,
                            load_NE=load_SE,
                        ),
                    )
    return path


def write_grid(
    folder: Path,
    *,
    models: dict[str, tuple[str, float]] = MODELS,
    conditions: dict[str, tuple[bool, float]] = CONDITIONS,
    **shape: int,
) -> list[Path]:
    """Runs of every model on every condition."""
    paths = []
    for model, (mixer, evenness) in models.items():
        for condition, (real, factor) in conditions.items():
            described = manifest(model, condition, mixer=mixer, real=real, **shape)
            path = folder / f"run-{len(paths):02d}"
            paths.append(write_run(path, described, evenness=evenness * factor, seed=len(paths)))
    return paths


def steady_run(
    path: Path, model: str, condition: str, load: list[int], *, steps: int = 8, ranks: int = 1
) -> Path:
    """Every step has the same loads, so that every interval has no width."""
    described = manifest(
        model, condition, real=condition != "mock", layers=1, experts=4, top_k=1, ranks=ranks
    )
    with RunWriter.create(path, described) as writer:
        writer.append(
            "routing",
            routing_rows(
                step_N=np.arange(steps),
                phase_N="prefill",
                layer_N=0,
                source_rank=0,
                tokens_N=sum(load),
                load_NE=np.tile(np.array(load), (steps, 1)),
            ),
        )
    return path


def stated(frames: ReportFrames) -> list[str]:
    """The sentences of all findings."""
    return [finding.text for finding in findings(frames)]
