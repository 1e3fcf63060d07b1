"""``observatory site``: site files, written from Slurm, checked against it, and examples of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from observatory.cli.options import OUTPUT, ForceOption


def init(
    out: Annotated[
        Path, typer.Option("--out", metavar="TOML", rich_help_panel=OUTPUT, help="Site file to write.")
    ],
    partition: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Partition that jobs go to; by default the site's default one."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write a site file from what Slurm reports, to be edited."""
    from observatory.campaign.benchmark import check_out
    from observatory.cli.output import say
    from observatory.hpc.cluster import read_cluster, site_text
    from observatory.run.documents.writing import write_text

    check_out(out, force=force)
    text = site_text(read_cluster(), partition, program=shutil.which("observatory"))
    write_text(out, text)
    missing = text.count("# Not found: ")
    say(f"{out} written; {missing} values were not found, their lines say so; change what is wrong")
    say(f"next: observatory site check {out}")


def check(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="Site file (TOML), see docs/hpc.md.")],
) -> None:
    """Check a site file, against Slurm where there is one; exit code 1 when its jobs could not run."""
    from observatory.cli.output import complain, print_lines, say
    from observatory.errors import BatchError
    from observatory.hpc.cluster import complaints, read_cluster, refusal
    from observatory.hpc.site import load_site

    described = load_site(site)
    batch, node = described.batch, described.node
    per_rank = "" if node.cpus_per_task is None else f" of {node.cpus_per_task} CPUs"
    gpus = node.gres or (f"{node.gpus} GPUs" if node.gpus else "no GPUs")
    print_lines(
        [
            f"{described.name} ({described.scheduler}): partition {batch.partition or 'by default'}, "
            f"{batch.time} a job",
            f"a node: {node.tasks} ranks{per_rank}, {gpus}, whole nodes: {node.exclusive}",
        ]
    )
    if described.scheduler != "slurm":
        say(f"the file is valid; {described.scheduler} is not asked")
        return
    try:
        cluster = read_cluster()
    except BatchError as error:
        say(f"the file is valid; Slurm is not asked: {error.what}")
        return
    chosen = cluster.partition(batch.partition)
    if chosen is not None:
        nodes = min(chosen.nodes, chosen.most_nodes or chosen.nodes)
        print_lines([f"a job: {nodes * node.tasks} ranks on {nodes} nodes at most"])
    found = complaints(described, cluster)
    refused = refusal(described) if not found else None
    for line in [*found, *([] if refused is None else [f"a job that fills one node: {refused}"])]:
        complain(line)
    if found or refused is not None:
        raise typer.Exit(1)
    if not cluster.accounting:
        say("note: accounting is off, so that ended jobs are known by their folders only")
    say("Slurm takes such jobs")


def example(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="File to print; without it, all are listed.")
    ] = None,
) -> None:
    """Print an example: a site file, a campaign file, or the definition of a container."""
    from observatory.cli.output import print_lines, print_text
    from observatory.hpc.examples import example_about, example_names, example_text

    if name is None:
        print_text(f"{each}: {example_about(each)}" for each in example_names())
        return
    print_lines(example_text(name).splitlines())
