"""Checkpoints that are whole or not there at all, and what else a run needs to go on to the bit."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` in one move, when it is complete and on the disk.

    Whatever happens meanwhile, a power cut too, `path` is the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of these: what `load` reads without running code."""
    with replacing(path) as file:
        torch.save(content, file)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, with its tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a checkpoint, or not a whole one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a broken file makes its reader raise nearly anything, OSError too
        raise ValueError(f"{path} cannot be read as a checkpoint: it is broken, or something else") from error


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of the generators that this process draws from: Python's, torch's on the CPU and on its own device.

    NumPy's is left out, since nothing here draws from it.
    """
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return {"python": random.getstate(), "cpu": torch.get_rng_state(), "device": on_device}


def set_rng_state(device: torch.device, state: dict[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from freshly seeded generators inside; afterwards all are where they were before."""
    before = rng_state(device)
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        set_rng_state(device, before)


class Terminated(Exception):
    """SIGTERM came, and the run has been saved."""


class Termination:
    """Notes SIGTERM instead of dying of it, so that the loop can save between two steps."""

    asked = False

    def __enter__(self) -> "Termination":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True


def ignore_sigterm(_: int) -> None:
    """For a DataLoader's workers: schedulers signal every process, and the last batches are still needed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
