"""Every test starts from the same seed, on one thread, with the same hypothesis examples.

Tests marked ``kernels`` are run again on the Triton kernels: by ``pytest -m interpreter`` in Triton's interpreter, by
``pytest -m gpu`` on a GPU's tensors. Each is a process of its own, since Triton decides once how its kernels run.
Of their parameters, those marked ``torch_only`` (float64, the closed form's blocks) stay with the torch backends.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import _disable_current_modes

settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("interpreter", settings.get_profile("ci"), max_examples=20)
settings.register_profile("gpu", settings.get_profile("ci"), max_examples=10)
settings.load_profile("ci")

DESELECTED: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    mode = config.option.markexpr
    if mode == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
        # NumPy's, about lanes of a tile that do not exist.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    if mode == "interpreter" or (mode == "gpu" and torch.cuda.is_available()):
        from tests import where

        settings.load_profile(mode)
        where.to_triton(mode)
        # NaN in new memory, so that what is never written shows.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mode = config.option.markexpr
    if mode not in ("interpreter", "gpu"):
        return
    too_long = "slow_in_the_interpreter" if mode == "interpreter" else "slow_on_a_gpu"
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "kernels" in marks and not marks & {"torch_only", too_long}:
            item.add_marker(mode)
        if mode == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash.setdefault(DESELECTED, []).extend(items)


@pytest.fixture
def deselected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    if request.config.option.keyword:
        pytest.skip("a part of the tests was asked for")
    return request.config.stash.get(DESELECTED, [])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    # The closed form's blocks grow with the threads: their number must not depend on the machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def true_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, the tiles of a GPU."""
    from cktat_loss.kernels import launch

    monkeypatch.setattr(launch, "rows_tile", launch.rows_tile.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "find_plan", launch.find_plan.__wrapped__)  # none that was made for other tiles


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    from cktat_loss.kernels import launch

    seen: list[str] = []
    run = launch.Plan.launch

    def counted(self: Any, *args: Any) -> None:
        seen.append(self.kernel.__name__)
        with _disable_current_modes():  # the interpreter's own operations are nobody's business
            run(self, *args)

    monkeypatch.setattr(launch.Plan, "launch", counted)
    return seen
