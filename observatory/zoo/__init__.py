"""The zoo: five tiny trained MoE checkpoints, real texts, and the recipes that made both.

Nothing heavy is imported here. `models` finds and loads checkpoints, `data` turns texts into token ids,
`train`, `tokenizer` and `prepare_texts` remake what is bundled (docs/zoo.md).
"""

__all__: list[str] = []
