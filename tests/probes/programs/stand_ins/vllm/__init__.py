"""Modules and names of vLLM 0.32.0 as far as a plugin meets them before an engine starts, written anew."""
