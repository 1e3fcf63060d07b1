"""Settings are kept by an allow-list, in bounds, and a secret never, whatever its name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observatory.host.environment import kept_environment
from observatory.run.provenance import LONGEST_VALUE, MOST_VARIABLES, RankProvenance


def test_settings_of_libraries_and_launchers_are_kept_and_nothing_else() -> None:
    kept = {
        "OMP_NUM_THREADS": "8",
        "NCCL_IB_HCA": "mlx5_0:1,mlx5_1:1",
        "UCX_TLS": "rc,cuda_copy",
        "FI_PROVIDER": "cxi",
        "MASTER_ADDR": "node001",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMPI_MCA_btl": "^openib",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x0000FFFF",
    }
    others = {"HOME": "/home/me", "USER": "me", "SLURM_JOB_USER": "me", "PATH": "/bin", "omp_x": "1"}
    others["OMPI_MCA_orte_hnp_uri"] = "1.0;tcp://10.0.0.1:5"
    assert kept_environment({**others, **kept}) == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_API_KEY", "x"),
        ("MASTER_PASSWORD", "x"),
        ("UCX_AUTH_TOKEN", "x"),
        ("FI_SECRET", "x"),
        ("OMP_TOOLKEYS", "x"),
        ("I_MPI_HYDRA_CREDENTIALS", "x"),
        ("OMPI_MCA_oob_tcp_cookie", "x"),
        ("NCCL_CONF_FILE", "https://me:hunter2@example.org/nccl.conf"),
        ("NCCL_NET", "https://hunter2@example.org"),
        ("MASTER_ADDR", "ssh://me@example.org/"),
        ("NCCL_DEBUG_FILE", "/tmp/log?password=hunter2"),
        ("LD_PRELOAD", "ghp_" + "a1B2" * 9),
        ("CUDA_VISIBLE_DEVICES", "--api-key hunter22"),
        ("OMP_DISPLAY_ENV", "Authorization: Bearer abcDEF123456"),
        ("FI_LOG_LEVEL", "-----BEGIN RSA PRIVATE KEY-----\nMIIE"),
    ],
)
def test_what_looks_like_a_secret_is_left_out_although_it_is_listed(name: str, value: str) -> None:
    assert kept_environment({name: value, "OMP_NUM_THREADS": "2"}) == {"OMP_NUM_THREADS": "2"}


@given(st.text(max_size=30), st.text(max_size=1500))
def test_any_environment_fits_the_record(name: str, value: str) -> None:
    kept = kept_environment({name: value, f"NCCL_{name}": value, "FI_PROVIDER": f"\udcff\x1b[2J\n{value}"})
    assert all(len(text) <= LONGEST_VALUE and text.isprintable() for text in kept.values())
    record = RankProvenance.model_validate({"machine": {"name": "m"}, "environment": kept})
    json.dumps(record.model_dump(mode="json")).encode("utf-8")


def test_no_more_variables_are_kept_than_the_record_takes() -> None:
    assert len(kept_environment({f"OMP_V{number}": "1" for number in range(300)})) == MOST_VARIABLES


def test_a_value_that_is_too_long_to_be_looked_through_is_left_out() -> None:
    assert kept_environment({"NCCL_CONF_FILE": "https://me:" + "p" * 2000 + "@example.org"}) == {}
