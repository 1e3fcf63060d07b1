"""The cases of megatron_cases.py that need four ranks, as a program of its own."""

from tests.probes.routing.megatron_cases import main

if __name__ == "__main__":
    main(4)
