"""Modules, names and calls of TensorRT-LLM's PyTorch backend as far as they are used, written anew."""

__version__ = "1.2.1"
