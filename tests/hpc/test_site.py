"""Site files: the examples, what Slurm reports, and what of a site file a cluster would not run."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from observatory.advice.capacity.site import load_site as load_hardware
from observatory.campaign.batch.campaign_file import campaign_points, load_campaign
from observatory.cli import main
from observatory.errors import BatchError
from observatory.hpc.cluster import Cluster, complaints, parse_cluster, site_text
from observatory.hpc.examples import example_about, example_names, example_text
from observatory.hpc.scripts import JobScript, command_script, job_script
from observatory.hpc.site import Site, load_site
from tests.cli.test_help import leaf

#: As Slurm 22.05 prints them, shortened.
_CONFIG = """
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = observatory
GpuFreqDef              = (null)
MaxArraySize            = 501
SLURM_VERSION           = 22.05.8
"""
_PARTITIONS = """
PartitionName=all Default=YES QoS=N/A DefaultTime=00:30:00 MaxNodes=4 MaxTime=1-00:00:00 Nodes=n[1-3] State=UP
PartitionName=short Default=NO DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=00:20:00 Nodes=n3 State=DRAIN
"""
_GPU_NODE = (
    "NodeName={name} CPUAlloc=0 CPUEfctv=126 CPUTot=128 AvailableFeatures=a100,nvlink ActiveFeatures=a100 "
    "Gres=gpu:a100:4(S:0-1) OS=Linux 6.1 #1 SMP RealMemory=512000 Sockets=2 State=IDLE Partitions=all"
)
_CPU_NODE = (
    "NodeName=n3 CPUTot=72 AvailableFeatures=(null) Gres=(null) RealMemory=256000 Sockets=2 "
    "Partitions=all,short"
)
_NODES = "\n".join((_GPU_NODE.format(name="n1"), _GPU_NODE.format(name="n2"), _CPU_NODE))


@pytest.fixture
def cluster() -> Cluster:
    return parse_cluster(_CONFIG, _PARTITIONS, _NODES, "ab12\n")


def written(text: str, folder: Path) -> Path:
    path = folder / "file.toml"
    path.write_text(text)
    return path


def test_a_site_file_has_the_nodes_and_limits_of_its_partition(cluster: Cluster, tmp_path: Path) -> None:
    text = site_text(cluster, None, program="/home/ab12/venv/bin/observatory")
    site = load_site(written(text, tmp_path))
    batch, node = site.batch, site.node
    assert (batch.partition, batch.account, batch.time, batch.max_array) == ("all", "ab12", "00:30:00", 500)
    assert (node.tasks, node.gpus, node.gres, node.cpus_per_task) == (4, 4, "gpu:a100:4", 31)
    assert site.environment.observatory == ("/home/ab12/venv/bin/observatory",)
    assert "short (takes no jobs): at most 00:20:00; 1 x 72 CPUs, 250 GiB" in text
    assert complaints(site, cluster) == []


def test_without_gpus_and_account_a_site_file_says_what_was_not_found(tmp_path: Path) -> None:
    text = site_text(parse_cluster(_CONFIG, _PARTITIONS, _NODES), "short", program=None)
    site = load_site(written(text, tmp_path))
    assert (site.node.tasks, site.node.cpus_per_task, site.node.gres) == (2, 36, None)
    assert (site.batch.time, site.batch.account) == ("00:20:00", None)
    for missing in ("your account", "GPUs", "where the observatory", "gpu-freq", "job monitor"):
        assert any(line.startswith("# Not found: ") and missing in line for line in text.splitlines()), (
            missing
        )


def test_an_answer_of_slurm_cannot_add_keys_to_a_site_file(tmp_path: Path) -> None:
    config = 'ClusterName = x"\nGpuFreqDef = high\tsetup = ["rm"]\nSLURM_VERSION = 1"\n'
    nodes = 'NodeName=n1 CPUTot=4 Gres=gpu:a"b:2 AvailableFeatures=a",b Sockets=1 Partitions=all'
    site = load_site(
        written(site_text(parse_cluster(config, _PARTITIONS, nodes), "all", program=None), tmp_path)
    )
    assert (site.name, site.environment.setup, site.node.gres) == ("site", (), None)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"batch": {"partition": "big"}}, "partition big does not exist; there are all, short"),
        ({"batch": {"time": "2-00:00:00"}}, "batch.time is 2-00:00:00, partition all allows 1-00:00:00"),
        ({"batch": {"max_array": 501, "time": "01:00:00"}}, "Slurm takes arrays of 500 at most"),
        ({"batch": {"partition": "short", "time": "00:10:00"}}, "partition short takes no jobs"),
        (
            {"node": {"tasks": 8, "cpus_per_task": 16}},
            "take 128 CPUs of a node, nodes of partition all have 126",
        ),
        ({"node": {"gpus": 8}}, "node.gpus is 8, nodes of partition all have 4"),
    ],
)
def test_what_cannot_run_is_named(
    keys: dict[str, dict[str, object]], complaint: str, cluster: Cluster
) -> None:
    keys = {**keys, "batch": {"max_array": 500, **keys.get("batch", {})}}
    found = complaints(Site.model_validate(keys), cluster)
    assert len(found) == 1
    assert complaint in found[0]


def test_a_site_without_slurm_is_shown_where_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qsub = tmp_path / "qsub"
    qsub.write_text("#!/bin/sh\n")
    qsub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["site", "init", "--out", str(tmp_path / "site.toml")]) == 1
    said = capsys.readouterr().err
    assert "no Slurm here, but PBS" in said
    assert "`observatory site example pbs.toml`" in said
    assert main(["site", "example", "pbs.toml"]) == 0
    site = written(capsys.readouterr().out, tmp_path)
    assert main(["site", "init", "--out", str(site)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["site", "check", str(site)]) == 0
    assert "pbs is not asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scheduler", "key", "message"),
    [
        ("pbs", "batch]\nqos='x'", "batch.qos has no meaning"),
        ("lsf", "node]\nmemory='64G'", "node.memory has no meaning"),
        ("pbs", "node]\nmemory='64'", "needs a unit"),
    ],
)
def test_a_key_that_a_scheduler_has_no_directive_for_is_refused(
    scheduler: str, key: str, message: str, tmp_path: Path
) -> None:
    text = f"scheduler='{scheduler}'\n[{key}\n[environment]\nlauncher='mpiexec'"
    with pytest.raises(BatchError, match=message):
        load_site(written(text, tmp_path))


SITES = [name for name in example_names() if example_about(name).startswith("Site: ")]
CAMPAIGNS = [name for name in example_names() if example_about(name).startswith("Campaign: ")]


def test_every_example_says_what_it_is() -> None:
    assert {*SITES, *CAMPAIGNS, "observatory.def"} == set(example_names())


@pytest.mark.parametrize(
    "option", ["--array=0-99", "--array 0-99", "--export=ALL", "--wrap=date", "-a0-9", "-o x"]
)
def test_a_directive_that_the_script_sets_by_itself_is_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "site.toml").write_text(f'[batch]\nextra = ["--mail-type=END", "{option}"]')
    with pytest.raises(BatchError, match="which the script sets by itself"):
        load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text('[batch]\nextra = ["--array-tasks-per-node=2", "--mail-type=END"]')
    assert load_site(tmp_path / "site.toml").batch.extra[1] == "--mail-type=END"


@pytest.mark.parametrize("site_name", SITES)
@pytest.mark.parametrize("campaign_name", CAMPAIGNS)
def test_examples_fit_together(site_name: str, campaign_name: str, tmp_path: Path) -> None:
    site = load_site(written(example_text(site_name), tmp_path))
    load_hardware(tmp_path / "file.toml")
    for point in campaign_points(load_campaign(written(example_text(campaign_name), tmp_path))):
        if point.argv[0] == "observatory":
            words = 2 if point.argv[1] in ("bench", "clocks") else 1
            path = " ".join(point.argv[1 : 1 + words])
            leaf(path).make_context(path, list(point.argv[1 + words :]))
        if point.clock_mhz is not None and not site.node.gpu_freq:
            continue
        job = JobScript(
            name="x",
            folder=tmp_path,
            points=(point.name,),
            tasks=point.ranks,
            time=site.batch.time,
            clock_mhz=point.clock_mhz,
            resumes=point.resumes,
        )
        for text in (
            job_script(site, job),
            command_script(site, point.argv, tmp_path, about=point.about),
        ):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_container_has_the_parts_that_jobs_need() -> None:
    text = example_text("observatory.def")
    sections = {line[1:] for line in text.splitlines() if line.startswith("%")}
    assert sections == {"arguments", "files", "post", "environment", "test", "runscript"}
    root = Path(__file__).parents[2]
    copied = text.partition("%files\n")[2].partition("\n\n")[0]
    assert all((root / shlex.split(line)[0]).exists() for line in copied.splitlines())
    post = text.partition("%post\n")[2].partition("\n%")[0]
    subprocess.run(["sh", "-n"], input=post, text=True, check=True)
