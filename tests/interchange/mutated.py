"""Small valid files of every format that is imported, and mutations of them."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.numpy import save

from tests.interchange import test_importers as files
from tests.interchange import test_kineto as traces

#: What hostile files have where a number, a text or a bracket should be.
TOKENS = (
    *(b"-1", b"0", b"NaN", b"1e999", b"inf", b"null", b"true", b"9" * 5000),
    *(b"99999999999999999999999", b"18446744073709551616", b"4294967296"),
    *(b"[", b"]", b"{", b"}", b'"', b",", b"\n", b" ", b"[" * 5000, b"\x00", b"\xff", b"\xe2\x80\xae"),
)


def samples() -> Iterator[tuple[str, str, bytes]]:
    """Format, file name and content of each file."""

    def arrays(**content: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.savez(out, **content)
        return out.getvalue()

    def array(content: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, content)
        return out.getvalue()

    def tensors(content: object) -> bytes:
        out = io.BytesIO()
        torch.save(content, out)
        return out.getvalue()

    count = torch.ones(2, 2, 4, dtype=torch.int32)
    record = files.record(1, 0, global_physical_count=count[0])
    stats = {"step": 9, "expert_load": [[5, 1, 2]], "p2l_map": [[0, 1, 0]]}
    trace = {
        "schemaVersion": 1,
        "distributedInfo": {"rank": 0, "world_size": 2},
        "baseTimeNanoseconds": traces.BASE_NS,
        "traceEvents": [traces.event("kernel", "k", 1, 1, correlation=3, **traces.stated())],
    }
    texts = {
        ("nccl-tests", "a.log"): files.LOG,
        ("nccl-tests", "a.json"): files.json_log(files.json_result()),
        ("counts", "c.csv"): "step,layer,expert,count,rank,phase\n5,1,0,3,0,prefill\n5,1,2,1,0,prefill\n",
        ("nvidia-smi", "s.csv"): "\n".join(files.SMI),
        ("kineto", "k.json"): json.dumps(trace),
        ("osu", "o.txt"): files.OSU,
        ("nccl-inspector", "i.jsonl"): files.lines(files.inspected(2)),
        ("megatron", "rank2.jsonl"): files.lines({"iter": 7, "layer": 1, "tpe": [[1, 2, 0], [3, 0, 0]]}),
        ("megatron", "router_trace_rank1.jsonl"): files.lines(
            {"step": 3, "layer": 2, "rank": 1, "num_tokens": 2, "topk": 2, "top_indices": [[0, 1], [3, 1]]}
        ),
        ("vllm", "v.json"): json.dumps({"choices": [{"routed_experts": files.encoded(files.ROUTED_TLK)}]}),
        ("vllm", "e.jsonl"): files.lines({"eplb_load_stats": stats}),
        ("clustercockpit", "m.txt"): "nv_temp,hostname=n,type=accelerator,type-id=0 value=51.5 1714557600\n",
        ("dcgm", "d.prom"): 'DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-1"} 1410 1714557601000\n',
        ("zeus", "z.csv"): "Time,Power\n2022-07-13 02:07:36.708783111,32402\n",
        ("sglang", "l.json"): json.dumps({"logical_count": [[[1, 2], [3, 4]]]}),
    }
    for (form, name), text in texts.items():
        yield form, name, text.encode()
    yield "nccl-tests", "a.log.gz", gzip.compress(files.LOG.encode(), mtime=0)
    yield "counts", "c.npz", arrays(load=files.LOAD_SLE)
    yield "counts", "c.npy", array(files.LOAD_SLE)
    yield "vllm", "r.npy", array(files.ROUTED_TLK)
    yield "sglang", "s.pt", tensors({"rank": 0, "logical_count": count})
    yield "sglang", "p.pt", tensors({"records": [record], "last_physical_to_logical_map": files.MAP_LQ})
    yield "tensorrt-llm", "rank0.safetensors", save({"4_3": np.array([1, 2, 3]), "4_5": np.array([2, 2, 2])})


def mutate(generator: random.Random, content: bytes) -> bytes:
    """One to six changes: bytes replaced, removed, repeated or cut, tokens put in."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 6))):
        place, other = (generator.randrange(len(changed) + 1) for _ in range(2))
        kind = generator.randrange(6)
        if kind == 0 and changed:
            changed[min(place, len(changed) - 1)] = generator.randrange(256)
        elif kind == 1:
            del changed[place : place + generator.choice((1, 2, 5, 50))]
        elif kind == 2:
            changed[place:place] = generator.choice(TOKENS)
        elif kind == 3:
            changed[place : place + generator.choice((1, 2, 4, 8))] = generator.choice(TOKENS)
        elif kind == 4:
            changed[place:place] = changed[min(place, other) : max(place, other)][:2000]
        else:
            del changed[place:]
    return bytes(changed)
