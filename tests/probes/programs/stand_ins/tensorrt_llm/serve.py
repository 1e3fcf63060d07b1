"""A server that has answered its requests: prints which experts it chose for the tokens of each phase."""

import json
import sys
from types import SimpleNamespace

from tensorrt_llm._torch.pyexecutor import model_engine
from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine

engine = PyTorchModelEngine(
    model_path="models/tiny-moe", compiled="compiled" in sys.argv, routes_inside="routes-inside" in sys.argv
)
draft = PyTorchModelEngine(model_path="models/draft", is_draft_model=True)
counted = {
    phase: [[0] * model_engine.EXPERTS for _ in range(model_engine.LAYERS)] for phase in ("prefill", "decode")
}


def serve(prompts, generated, *, counts=True):
    made = [
        SimpleNamespace(py_request_id=number, is_dummy=False, tokens=tokens)
        for number, tokens in enumerate([*prompts, *generated])
    ]
    batch = SimpleNamespace(context_requests=made[: len(prompts)], generation_requests=made[len(prompts) :])
    draft.forward(batch, None)
    engine.forward(batch, None)
    layers = getattr(engine.model.model, "_orig_mod", engine.model.model).layers
    for number, request in enumerate(made if counts else ()):
        for token in request.tokens:
            for layer, block in enumerate(layers):
                for expert in block.gate.weight[token].topk(model_engine.TOP_K).indices.tolist():
                    counted["prefill" if number < len(prompts) else "decode"][layer][expert] += 1


engine.is_warmup = True
serve([[1, 2, 3]], [], counts=False)
engine.is_warmup = False
serve([[1, 2, 3, 4, 5], [6]], [])
serve([[7, 8, 9, 10, 11, 12]], [[13], [14, 15]])  # a chunk, one that decodes, one with a drafted token
serve([], [[16], [17]])
print(json.dumps(counted))
