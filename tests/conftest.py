"""Options of all tests: the run's backend, one thread, one seed, the same hypothesis examples.

``pytest`` runs every test with the backends in PyTorch. ``pytest --backend=interpreter`` and ``--backend=gpu`` run the
tests marked ``kernels`` with the Triton kernels, in Triton's interpreter or on a GPU. Each is a process of its own,
because Triton decides once per process how kernels run. ``not_on(backend, ...)`` excludes a test or a parameter.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import backends

# The interpreter takes milliseconds per program, and a GPU compiles every variant.
EXAMPLES = {"torch": 60, "interpreter": 20, "gpu": 10}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=[*EXAMPLES], default="torch", help="the backend that computes the loss")


def pytest_configure(config: pytest.Config) -> None:
    unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("run", derandomize=True, max_examples=EXAMPLES[config.option.backend], **unhurried)
    settings.load_profile("run")
    if config.option.backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        # NumPy warns about lanes outside the mask.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    torch.set_num_threads(1)  # the CPU backend's blocks grow with the number of threads
    if config.option.backend != "torch":
        backends.use(config.option.backend)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend, chosen = config.option.backend, []
    for item in items:
        excluded = {name for mark in item.iter_markers("not_on") for name in mark.args}
        if not excluded <= EXAMPLES.keys():
            raise pytest.UsageError(f"not_on takes {', '.join(EXAMPLES)}, got {excluded} at {item.nodeid}")
        if backend not in excluded and (backend == "torch" or item.get_closest_marker("kernels")):
            chosen.append(item)
        if backend == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))
    config.hook.pytest_deselected(items=[*set(items).difference(chosen)])
    items[:] = chosen


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)
