"""The loop around a training step, the same for teacher and student: epochs, schedules, saving, resuming, logging."""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint
import torch
from checkpoint import Terminated, Termination
from clock import Clock
from data import Data, MissingData, load, loader
from distributed import Ranks, ranks
from logbook import COLUMNS, LABEL_PROBABILITY, Logbook, Row, line
from methods import Terms
from models import build
from options import UserError
from schedules import cosine, piecewise, ramp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from validation import Attack, Scores, collapse, validate

# What a resumed run may change: no weight depends on it.
FREE = {"out", "resume", "data", "download", "workers", "threads", "save_every", "tensorboard", "apgd_check"}
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Settings = dict[str, float]  # what changes with progress, eps and beta, by name
Step = Callable[..., Terms]  # step(x, y, **settings)


class Diverged(Exception):
    """The loss is not a finite number any more."""


class Trainer:
    """Runs a step over all epochs. What it holds between two steps is what a checkpoint holds.

    Args:
        model: to train, with its first weights.
        data: what to train and to validate on.
        args: the options of the command.
        ranks: this process among how many, and its device.

    `model` is the plain module: attack, validate and save that. `network` is what to train: the same, or the same
    within DistributedDataParallel.
    """

    def __init__(self, model: nn.Module, data: Data, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.data, self.ranks, self.device = args, data, ranks, ranks.device
        self.train_set = data.train if args.train_samples is None else Subset(data.train, range(args.train_samples))
        self.steps = len(self.train_set) // args.batch_size
        if args.batch_size % ranks.world:
            raise UserError(f"--batch-size must be a multiple of the {ranks.world} processes, got {args.batch_size}")
        if not self.steps:
            images = len(self.train_set)
            raise UserError(f"--batch-size must be at most the {images} training images, got {args.batch_size}")

        self.memory_format = torch.channels_last if args.channels_last else torch.preserve_format
        self.model = model.to(self.device, memory_format=self.memory_format)
        if args.compile:
            self.model.compile()  # in place: no wrapper gets into the names of a checkpoint
        self.network = self.model
        if ranks.world > 1:
            # With broadcast_buffers, each forward first overwrites the BatchNorm statistics by those of rank 0. The
            # second of two train-mode forwards, S(x) and S(x'), so changes in place what the first one saved for its
            # backward, which autograd refuses wherever it notices. Here each process keeps its own statistics, and
            # rank 0's are validated.
            gpu = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=gpu, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            args.lr,
            momentum=args.momentum,
            nesterov=args.nesterov,
            weight_decay=args.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.ema: AveragedModel | None = None
        if args.ema:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)

        self.clock = Clock(self.device)
        self.termination = Termination()
        self.epoch = self.batch = 0  # how many are done
        self.best = -math.inf
        self.history: list[Row] = []
        self._begin_sums()
        torch.manual_seed(args.seed + ranks.rank)  # processes begin with the same weights, and draw their own attacks
        self._begin_or_resume()

    # For the step.

    def autocast(self) -> torch.autocast:
        """Mixed precision, if it was asked for."""
        return torch.autocast(self.device.type, AMP[self.args.amp], enabled=self.args.amp != "none")

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """For the attack, which wants the gradient of the images only.

        A compiled backward would compute those of the parameters too, unless they ask for none. An eager one does not.
        """
        with self.clock("attack"), self.autocast():
            if self.args.compile:
                self.model.requires_grad_(False)
            yield
            if self.args.compile:
                self.model.requires_grad_(True)

    def update(self, loss: Tensor) -> None:
        """Backward from the loss, a step of the optimizer, one of the moving average."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    # The loop.

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch == self.args.epochs

    def fit(
        self,
        step: Step,
        *,
        settings: Callable[[float], Settings] = lambda progress: {},
        attack: Attack | None = None,
        teacher_clean: float | None = None,
    ) -> None:
        """All epochs that are left.

        Args:
            step: `step(x, y, **settings)` trains on a batch and returns its terms.
            settings: from progress, the share of the training that is done, to the step's settings, which are logged.
            attack: for validation; None validates on clean images only.
            teacher_clean: the teacher's accuracy on the validation images, for the warning of a collapse.

        Raises:
            Terminated: SIGTERM came; last.pt continues at the very step.
            Diverged: the loss is not finite.
        """
        log = None
        if self.ranks.rank == 0:
            log = Logbook(self.args.out, tensorboard=self.args.tensorboard, epoch=self.epoch + 1)
        labels = torch.tensor(self.data.validation.labels)
        chance = labels.bincount().max().item() / len(labels)
        with self.termination:
            while not self.finished:
                self._train_epoch(step, settings)
                started = time.perf_counter()
                scores = self.validate(self.evaluated, attack) if self.ranks.rank == 0 else None
                self._leave_if_asked()
                self._end_epoch(scores, settings, time.perf_counter() - started, log)
                if log is not None:
                    tqdm.write(line(self.history[-1], self.args.epochs))
                    if why := collapse(scores, chance, teacher_clean):
                        tqdm.write(f"warning: epoch {self.epoch}: {why}: this may be a collapse")

    def _train_epoch(self, step: Step, settings: Callable[[float], Settings]) -> None:
        self.model.train()
        batches = self._batches(self.train_set, train=True)
        since = time.perf_counter()
        with self._progress_bar() as bar:
            for x, y in batches:
                progress = self._progress(self.batch)
                self.optimizer.param_groups[0]["lr"] = self._lr(progress)
                x = x.to(self.device, non_blocking=True, memory_format=self.memory_format)
                y = y.to(self.device, non_blocking=True)
                terms = step(x, y, **settings(progress))
                self.sums += torch.stack([self._absent if term is None else term.detach() for term in terms])
                self.batch += 1
                self.seconds["train"] += time.perf_counter() - since
                since = time.perf_counter()
                bar.update()
                if self.batch % 10 == 0 or self.batch == self.steps:
                    bar.set_postfix({name: f"{value:.3f}" for name, value in self._means(self.sums).items()})
                self._leave_if_asked()
                if self.args.save_every and self.batch % self.args.save_every == 0:
                    self._save()
        if self.ranks.any(not self.sums[0].isfinite().item()):
            raise Diverged(f"the loss is not a finite number in epoch {self.epoch + 1}: try a smaller --lr")

    def validate(self, model: nn.Module, attack: Attack | None) -> Scores | None:
        """The scores of any model on the validation images; None where SIGTERM came meanwhile."""
        batches = self._batches(self.data.validation, train=False)
        return validate(model, batches, attack, self.device, stop=lambda: self.termination.asked)

    def _end_epoch(
        self, scores: Scores | None, settings: Callable[[float], Settings], seconds: float, log: Logbook | None
    ) -> None:
        self._take_seconds()
        sums = self.ranks.gather(self.sums.cpu())
        last = self._progress(self.steps - 1)
        if scores is not None:
            row = {
                "epoch": self.epoch + 1,
                "lr": self._lr(last),
                **settings(last),
                **self._means(torch.stack(sums).mean(0)),
                "clean_accuracy": scores.clean,
                "pgd_accuracy": scores.pgd,
                "most_predicted_share": scores.most_predicted,
                **dict(zip(LABEL_PROBABILITY, scores.label_probability, strict=False)),
                **{f"{phase}_seconds": value for phase, value in self.seconds.items()},
                "validation_seconds": seconds,
            }
            self.history.append({name: row.get(name) for name in COLUMNS})
        self.epoch, self.batch = self.epoch + 1, 0
        self._begin_sums()
        if scores is not None and scores.deciding > self.best:
            self.best = scores.deciding
            checkpoint.save(self.args.out / "best.pt", self._usable())
        if log is not None:
            log.write(self.history)  # before the checkpoint: a run that stops between the two writes it again
        self._save()

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and used: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def _batches(self, dataset: Any, *, train: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        """Of the running epoch from where it stands, this process's share; or all of a data set to validate on."""
        place = {"start_batch": self.batch, "rank": self.ranks.rank, "world": self.ranks.world} if train else {}
        batches = loader(
            dataset,
            batch=self.args.batch_size // self.ranks.world,
            seed=self.args.seed,
            epoch=self.epoch,
            workers=self.args.workers,
            train=train,
            **place,
        )
        batches.worker_init_fn = checkpoint.ignore_sigterm
        return batches

    def _progress(self, batch: int) -> float:
        return (self.epoch + batch / self.steps) / self.args.epochs

    def _lr(self, progress: float) -> float:
        if self.args.schedule == "cosine":
            share = cosine(progress)
        else:
            share = piecewise(progress, [epoch / self.args.epochs for epoch in self.args.lr_drops])
        return self.args.lr * share * ramp(progress + 1 / (self.steps * self.args.epochs), self.args.lr_warmup)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.steps,
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.args.epochs}",
            unit="step",
            leave=False,
            disable=self.ranks.rank != 0,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file needs no more
        )

    # Sums over the running epoch, for the log.

    def _begin_sums(self) -> None:
        self._absent = torch.tensor(math.nan, device=self.device)  # a term that the method does not have
        self.sums = torch.zeros(len(Terms._fields), device=self.device)
        self.seconds: Counter[str] = Counter()

    def _take_seconds(self) -> None:
        self.seconds.update(self.clock.take())

    def _means(self, sums: Tensor) -> dict[str, float | None]:
        means = (sums / self.batch).tolist()
        return {name: mean for name, mean in zip(Terms._fields, means, strict=True) if not math.isnan(mean)}

    # Saving and resuming.

    def _usable(self) -> dict[str, Any]:
        """What models.from_checkpoint builds the model from."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "arch": self.args.arch,
            "dataset": self.args.dataset,
            "split_seed": self.args.split_seed,
            "epoch": self.epoch,
            **{name: getattr(self.data, name) for name in ("classes", "size", "channels", "mean", "std")},
        }

    def _save(self) -> None:
        """Write last.pt: all that the next step depends on. Every process has to call it."""
        self._take_seconds()
        own = {
            "rng": checkpoint.rng_state(self.device),
            "buffers": {name: value.cpu() for name, value in self.model.named_buffers()},  # BatchNorm statistics
            "sums": self.sums.cpu(),
        }
        by_rank = self.ranks.gather(own)
        if self.ranks.rank == 0:
            state = {
                **self._usable(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema_updates": 0 if self.ema is None else self.ema.n_averaged.item(),
                "batch": self.batch,  # with the epoch, the position of every schedule
                "best": self.best,
                "history": self.history,
                "seconds": dict(self.seconds),
                "by_rank": by_rank,
                "config": self._config(),
            }
            checkpoint.save(self.args.out / "last.pt", state)

    def _leave_if_asked(self) -> None:
        """Save and stop, if any process was sent SIGTERM."""
        if self.ranks.any(self.termination.asked):
            self._save()
            raise Terminated

    def _config(self) -> dict[str, Any]:
        """The options, and what else a resumed run must have in common with this one, in plain types."""
        plain = {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in vars(self.args).items()
        }
        return {**plain, "device": self.device.type, "processes": self.ranks.world}

    def _begin_or_resume(self) -> None:
        last = self.args.out / "last.pt"
        if last.exists():
            if not self.args.resume:
                raise UserError(f"--out: {self.args.out} holds a run; --resume continues it, or name another folder")
            self._restore(last)
        elif self.ranks.rank == 0:
            self.args.out.mkdir(parents=True, exist_ok=True)
            with checkpoint.replacing(self.args.out / "config.json") as file:
                file.write(json.dumps(self._config(), indent=2).encode())

    def _restore(self, path: Path) -> None:
        try:
            state = checkpoint.load(path)
        except ValueError as error:
            raise UserError(f"--resume: {error}") from None
        for name, now in self._config().items():
            before = state["config"].get(name)
            if name not in FREE and before != now:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} was {before} in the run in {path.parent} and is {now} now: --resume needs it equal"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.best, self.history = state["best"], state["history"]
        self.seconds.update(state["seconds"])
        own = state["by_rank"][self.ranks.rank]
        for name, buffer in self.model.named_buffers():
            buffer.copy_(own["buffers"][name])
        self.sums.copy_(own["sums"])
        checkpoint.set_rng_state(self.device, own["rng"])


def open_data(args: argparse.Namespace, ranks: Ranks) -> Data:
    """The data set. Its split follows --split-seed alone, so that no teacher saw what its student is validated on."""
    try:
        with ranks.in_turns():
            data = load(
                args.dataset, args.data, download=args.download, seed=args.split_seed, validation=args.validation
            )
    except ValueError as error:
        raise UserError(f"--validation does not fit: {error}") from None
    if args.no_augmentation:
        data.train.transform = data.validation.transform
    return data


def new_model(arch: str, data: Data) -> nn.Module:
    """A fresh model for the images of a data set."""
    try:
        return build(arch, data.classes, size=data.size, channels=data.channels, mean=data.mean, std=data.std)
    except ValueError as error:
        raise UserError(f"--arch does not fit: {error}") from None


def launch(run: Callable[[argparse.Namespace, Ranks], None], args: argparse.Namespace) -> int:
    """Run a command in this process, or in this one of many. Returns its exit code.

    0: done. 1: the loss diverged. 2: something that was asked for cannot be. 130: Ctrl-C. 143: SIGTERM, and saved.
    """
    try:
        with ranks(args.device) as own:
            run(args, own)
    except (UserError, MissingData) as error:
        return _say(f"error: {error}", 2)
    except Diverged as error:
        return _say(f"error: {error}", 1)
    except Terminated:
        return _say(f"stopped by SIGTERM: --resume continues {args.out} where it was", 143)
    except KeyboardInterrupt:
        return _say(f"interrupted: --resume continues {args.out} from its last checkpoint", 130)
    return 0


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
