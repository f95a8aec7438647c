"""What a run needs around its loop: processes, files, randomness, SIGTERM, a clock, the log, the command line."""

import csv
import io
import json
import math
import os
import random
import signal
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")


class UserError(Exception):
    """What was asked for cannot be done; the message says why in one sentence."""


class Terminated(Exception):
    """SIGTERM came, and the run has been saved."""


# Processes.


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device it works on: `torchrun --nproc-per-node=K` starts K."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this machine

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process. On the CPU, through gloo: no wait for a GPU."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in process 0; an empty list in the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def say(self, text: str) -> None:
        """Print in process 0."""
        if self.rank == 0:
            print(text, flush=True)

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """Process 0 goes first, then the first of each other machine, then the rest: what one fetches, others find."""
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.any(False)  # waits for all
        try:
            yield
        finally:  # also when it fails: the others wait
            for _ in range(turn, 2):
                self.any(False)


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, this is the only one.

    Args:
        device: as asked for; with CUDA and torchrun each process gets the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Two backends: flags and checkpoints travel between CPUs, gradients between GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(device, dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()


# Files.


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` in one move, when it is complete and on the disk.

    Whatever happens meanwhile, a power cut too, `path` is the old file or the new one.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of these: what `load` reads without running code."""
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer says so where the disk is full
            raise OSError(f"is the disk of {path.parent} full? ({str(error).splitlines()[0]})") from error


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, with its tensors on the CPU.

    The file is a zip with a checksum for each tensor, which torch writes and does not look at: a flipped bit would be
    loaded as another weight.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a checkpoint, or not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of its {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a broken file makes its reader raise nearly anything, OSError too
        reason = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(f"{path} cannot be read as a checkpoint: it is broken, or something else{reason}") from error


# Randomness.


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


# SIGTERM.


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


# The time of each phase.


class Clock:
    """Adds up the seconds of named phases.

    On CUDA by events on its stream: the CPU, which runs ahead of the GPU, neither waits for it nor is what is timed.
    Elsewhere by `now`, the wall clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._on_cuda, self._now = device.type == "cuda", now
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is done inside."""
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            started = self._now()
            yield
            self._seconds[phase] += self._now() - started

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call of this."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
        taken = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return taken


# The log.

# Percentiles, over the validation images, of the label's probability under attack: adaptive weights over beta.
QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
LABEL_PROBABILITY = tuple(f"label_probability_p{100 * share:02.0f}" for share in QUANTILES)

# One line an epoch. lr, eps and beta are those of its last step; the terms are means over its steps, before beta;
# accuracies and shares are of the validation images, in [0, 1]. Empty: does not apply.
COLUMNS = (
    *("epoch", "lr", "eps", "beta", "loss", "guidance", "consistency"),
    *("clean_accuracy", "pgd_accuracy", "most_predicted_share", *LABEL_PROBABILITY),
    "train_seconds",  # all of the epoch's training, waiting for images too; of which:
    *("attack_seconds", "teacher_seconds", "student_seconds"),  # the last: forward, loss, backward, optimizer step
    "validation_seconds",
)

Row = dict[str, float | None]


def write_log(path: Path, rows: list[Row]) -> None:
    """The whole CSV: a process that is killed and resumed leaves no line twice and none out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in row.items()})
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def read_log(path: Path) -> list[Row]:
    """The rows of a log.csv."""
    with open(path, newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


# The command line, by tyro. What that does not have is here: ranges, switches of three states, one dataclass whose
# options stand in several parts of --help, and options from a file.


def number(
    kind: Callable[[str], float], low: float, high: float, *, above: bool = False, several: bool = False
) -> PrimitiveConstructorSpec[Any]:
    """For a field's type: Annotated[float, number(float, 0, 1)] is in [0, 1], or in (0, 1] with `above`.

    With `several`, a tuple of such numbers, separated by commas.
    """
    wanted = f"{'(' if above else '['}{low:.10g}, {high:.10g}]"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise ValueError(f"got {text!r}, wanted a {'whole ' if kind is int else ''}number in {wanted}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,N,..." if several else wanted,
        instance_from_str=lambda words: tuple(map(read, words[0].split(","))) if several else read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [f"{value:g}" if isinstance(value, float) else str(value)],
    )


# For a field's type: --option, --no-option (its alias), or neither, which is None.
EITHER = PrimitiveConstructorSpec[bool | None](
    nargs=(0, 1),
    metavar="",
    instance_from_str=lambda words: words != ["no"],
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(value)],
)


def default(text: str, **more: Any) -> Any:
    """For a field's type: what --help says of a default that takes more words than its value."""
    return arg(help_behavior_hint=f"(default: {text})", **more)


def parse(options: type[T], argv: Sequence[str], *, about: str | None) -> T:
    """A dataclass from a command line. Its bases have the fields, and each is a part of --help.

    A field `config` names a JSON file of options, which those of the command line come after.

    Raises:
        UserError: there is no such file. Other mistakes are told, and end the process with code 2.
    """
    together = make_dataclass(
        "Parts",
        [
            (kind.__name__.removesuffix("Options").lower(), OmitArgPrefixes[kind], field(default_factory=kind))
            for kind in options.__bases__
        ],
    )

    def read(words: Sequence[str]) -> T:
        given = [part for word in words for part in _negated(word, options)]
        found = tyro.cli(together, args=given, description=about, config=(FlagCreatePairsOff,))
        return options(**{name: value for part in vars(found).values() for name, value in vars(part).items()})

    found = read(argv)
    file = getattr(found, "config", None)
    return found if file is None else read([*_from_file(file, options), *argv])


def _negated(word: str, options: type) -> tuple[str, ...]:
    """--no-option of EITHER is an alias of --option, which takes a value that says so."""
    opposite = word.removeprefix("--no-").replace("-", "_")
    return (word, "no") if word.startswith("--no-") and getattr(options, opposite, False) is None else (word,)


def _from_file(path: Path, options: type) -> list[str]:
    """The command line that a JSON file stands for."""
    try:
        content = json.loads(path.read_text()).items()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--config: {path} is not a JSON file of options ({error})") from None
    words: list[str] = []
    for name, value in content:
        flag = name.replace("_", "-")
        if isinstance(value, bool):  # a switch is off anyway
            words += [f"--{flag}"] if value else [f"--no-{flag}"] if getattr(options, name, False) is None else []
        elif value is not None:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def device_of(text: str) -> torch.device:
    """auto (an accelerator where there is one), or a torch device that works here.

    Raises:
        UserError: it does not work.
    """
    if text == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.zeros(1, device=text).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: got {text!r}, wanted auto, or a device that works ({reason})") from None
    return torch.device(text)
