"""Modules, names and calls of SGLang 0.5.23 as far as they are used, written anew; it computes nothing."""

__version__ = "0.5.23"
