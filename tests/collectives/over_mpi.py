"""What ranks under ``mpiexec`` do in the tests: every algorithm, odd traffic too; rank 0 prints JSON."""

from __future__ import annotations

import json

import torch

from observatory.collectives.transport.open import open_transport
from tests.collectives.cases import VARIANTS, backward, forward, large_counts, traffic
from tests.probes.routing.families import tiny_model


def main() -> None:
    torch.set_num_threads(1)
    model = tiny_model("gpt_oss")
    with open_transport(ranks_per_node=1, timeout_s=60) as transport:
        outcome = [
            [call(model, transport, *variant)["relative"] for variant in VARIANTS]
            for call in (forward, backward)
        ]
        everybody = transport.gather_json(
            {
                "backend": transport.backend,
                "differences": outcome,
                "traffic": traffic(tiny_model("mixtral"), transport),
                "large counts": large_counts(transport),
            }
        )
    if everybody is not None:
        print(json.dumps(everybody))


if __name__ == "__main__":
    main()
