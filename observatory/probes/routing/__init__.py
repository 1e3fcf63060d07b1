"""The routing probe: which expert gets how many tokens, layer by layer, step by step."""
