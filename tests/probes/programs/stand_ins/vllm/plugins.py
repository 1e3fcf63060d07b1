import os

LOADED = []


def load_general_plugins():
    """Those that ``VLLM_PLUGINS`` names."""
    LOADED.extend(os.environ.get("VLLM_PLUGINS", "").split(","))
