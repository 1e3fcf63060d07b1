"""A process of an engine that starts: prints which plugins it loaded, and whether its workers are watched."""

import torch  # noqa: F401  # as an engine does first

from vllm.plugins import LOADED, load_general_plugins
from vllm.v1.worker.worker_base import WorkerBase

load_general_plugins()
print(LOADED, hasattr(WorkerBase.__init__, "__wrapped__"))
