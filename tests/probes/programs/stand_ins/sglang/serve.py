"""A server that has answered its requests: prints which experts it chose for the tokens of each phase."""

import json
import sys
from types import SimpleNamespace

import torch

from sglang.srt.model_executor import model_runner
from sglang.srt.model_executor.model_runner import ForwardBatch, ForwardMode, ModelRunner

if "another-interface" in sys.argv:
    ModelRunner.attn_tp_sequence_sharded = ModelRunner.load_model

runner, draft = ModelRunner(), ModelRunner(is_draft_worker=True)
counted = {
    phase: [[0] * model_runner.EXPERTS for _ in range(model_runner.LAYERS)] for phase in ("prefill", "decode")
}


def serve(mode, lengths, decoding=()):
    """One batch; of its requests some decode."""
    ids = torch.arange(sum(lengths)) * 7 % 64
    requests = [object() for _ in lengths]
    batch = SimpleNamespace(
        forward_mode=mode, reqs=requests, input_ids=ids, extend_lens=list(lengths),
        decoding_reqs=[requests[one] for one in decoding] or None,
    )  # fmt: skip
    draft.forward(ForwardBatch.init_new(batch, draft))
    runner.forward(ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False))
    row = 0
    for number, length in enumerate(lengths):
        decodes = mode == ForwardMode.DECODE or number in decoding
        for _ in range(length):
            for layer, block in enumerate(runner.model.model["layers"]):
                for expert in block.gate(ids[row]).topk(model_runner.TOP_K).indices.tolist():
                    counted["decode" if decodes else "prefill"][layer][expert] += 1
            row += 1


serve(ForwardMode.EXTEND, [5, 1])
serve(ForwardMode.MIXED, [6, 1, 1, 1], decoding=(2, 3))  # a prompt's last token is no decoded one
serve(ForwardMode.IDLE, [])
serve(ForwardMode.DECODE, [1, 1, 1])
print(json.dumps(counted))
