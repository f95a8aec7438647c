"""Every test starts from the same seed, on one thread, with the same hypothesis examples.

``pytest -m interpreter`` runs the tests of the loss on the Triton kernels, in Triton's interpreter; ``pytest -m gpu``
on a GPU's tensors. Each is a process of its own, because Triton decides once in a process how its kernels run.
"""

import os
from collections.abc import Iterator
from pathlib import Path
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

# Whatever backend computes it, the loss must pass these.
SUITE = {
    "test_accuracy.py",
    "test_autocast.py",
    "test_beta.py",
    "test_compile.py",
    "test_extreme_logits.py",
    "test_gradient_flow.py",
    "test_masks.py",
    "test_properties.py",
    "test_reductions.py",
    "test_second_derivatives.py",
    "test_small_kl.py",
    "test_transforms.py",
}
# What takes the interpreter, at some milliseconds a program, too long.
MANY_PROGRAMS = ("(40, 1000)", "(200, 100)", "(3, 21841)", "3000")
# What compiles many kernels at some tenths of a second each, or changes CPU tensors that have gone to the GPU.
MANY_VARIANTS = ("test_mixed_dtypes", "test_weights[", "test_changing_logits_in_place")


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
    # float64 and blocks are the closed form's.
    left_out = ("float64", "block", *(MANY_PROGRAMS if mode == "interpreter" else MANY_VARIANTS))
    for item in items:
        if Path(item.fspath).name in SUITE and not any(words in item.name for words in left_out):
            item.add_marker(mode)
        if mode == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))


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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    from cktat_loss.kernels import launch

    seen: list[str] = []
    run = launch.Plan.launch

    def counted(self: Any, kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        seen.extend([kernel.__name__] * bool(programs))
        with _disable_current_modes():  # the interpreter's own operations are nobody's business
            run(self, kernel, programs, *args, **meta)

    monkeypatch.setattr(launch.Plan, "launch", counted)
    return seen
