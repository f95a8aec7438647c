"""Clean and adversarial training in one loop: CKTAT (arXiv 2504.00038), its teacher, TRADES and PGD-AT.

Phase 1, the teacher, and phase 2, the student:

    python examples/train.py --method clean --dataset cifar10 --download --out out/teacher
    python examples/train.py --teacher out/teacher --out out/student

The paper's Eq. 17 to the letter; a method to compare with; four GPUs, which split the images of a step:

    python examples/train.py --teacher out/teacher --recipe literal --out out/literal
    python examples/train.py --method trades --arch wrn-34-10 --out out/trades
    torchrun --nproc-per-node=4 examples/train.py ...

Every batch of CKTAT: attack the student with PGD, run the teacher T on the clean images x, and the student S on x and
on the adversarial images x'; then descend, with the recipe adaptive or literal, from the mean of

    KL(softmax(T(x) / tau) || softmax(S(x'))) + beta * KL(softmax(S(x)) || softmax(S(x')))
                     guidance                                consistency

evaluate.py attacks the result, plot_run.py draws the log. Ctrl-C and SIGTERM leave a run that --resume continues.
"""

from __future__ import annotations  # the options stand last

import importlib.util
import inspect
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import runtime
import torch
from awp import perturbed
from data import Data, MissingData, Name, load, loader
from methods import CKTAT, PGDAT, TRADES, Clean, Method, Terms
from models import build, from_checkpoint
from pgd import EPS, Norm, check_length, eval_mode, fraction, pgd
from runtime import EITHER, Ranks, Row, Terminated, UserError, default, number
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset, default_collate
from tqdm import tqdm

from cktat_loss import CKTATLoss, warm_start

# The loop.


def run(config: Config, ranks: Ranks, new_method: NewMethod | None = None) -> None:
    """Train, with a method of the caller's in the place of --method where one is given.

    Raises:
        UserError, MissingData: something that was asked for cannot be.
        Terminated: SIGTERM came; last.pt continues at the very step.
        Diverged: the loss is not finite.
    """
    data = open_data(config, ranks)
    torch.manual_seed(config.seed)
    teacher = None if config.teacher is None else open_teacher(config, data).to(ranks.device)
    state = State(config, data, new_student(config, data, teacher), ranks)
    torch.manual_seed(config.seed + ranks.rank)  # processes begin with the same weights, and draw their own attacks
    begin_or_resume(state)
    if state.epoch == config.epochs:
        ranks.say(f"{config.out} is finished: all {config.epochs} epochs are done")
        return
    method = (new_method or method_of)(config, teacher)
    attack = None
    if method.objective is not None:
        attack = partial(pgd, eps=config.eps, norm=config.norm, step=config.step_size, steps=config.steps)
    teacher_clean = None
    if teacher is not None and ranks.rank == 0:
        teacher_clean = validate(teacher, batches(state, train=False), None, ranks.device)["clean_accuracy"]
        ranks.say(f"teacher: clean {teacher_clean:.1%} on the validation images")
    events = None
    if config.tensorboard and ranks.rank == 0:
        from torch.utils.tensorboard import SummaryWriter  # optional

        events = SummaryWriter(config.out, purge_step=state.epoch + 1)

    with state.termination:
        while state.epoch < config.epochs:
            train_epoch(state, method)
            started = time.perf_counter()
            scores = None
            if ranks.rank == 0:
                images, stop = batches(state, train=False), partial(getattr, state.termination, "asked")
                scores = validate(state.evaluated, images, attack, ranks.device, stop=stop)
            leave_if_asked(state)
            end_epoch(state, scores, time.perf_counter() - started, events)
            if scores is not None and (why := collapse(scores, data.validation.labels, teacher_clean)):
                ranks.say(f"warning: epoch {state.epoch}: {why}: this may be a collapse")

    if config.apgd_check and attack is not None and ranks.rank == 0:
        best = from_checkpoint(config.out / "best.pt").to(ranks.device)
        some = default_collate([data.validation[i] for i in range(min(config.apgd_check, len(data.validation)))])
        x, y = (part.to(ranks.device) for part in some)
        ranks.say(compare_with_apgd(best, x, y, eps=config.eps, norm=config.norm, attack=attack))


def train_epoch(state: State, method: Method) -> None:
    """What is left of the running epoch."""
    config, device = state.config, state.ranks.device
    absent = torch.tensor(math.nan, device=device)  # a term that the method does not have
    bar = tqdm(
        total=state.steps,
        initial=state.batch,
        desc=f"epoch {state.epoch + 1}/{config.epochs}",
        unit="step",
        leave=False,
        disable=True if state.ranks.rank else None,  # None: unless a terminal shows it
    )
    state.model.train()
    since = time.perf_counter()
    with bar:
        for x, y in batches(state, train=True):
            settings = state.settings(state.batch)
            state.optimizer.param_groups[0]["lr"] = settings.pop("lr")
            x = x.to(device, non_blocking=True, memory_format=state.memory_format)
            terms = train_step(state, method, x, y.to(device, non_blocking=True), **settings)
            state.sums += torch.stack([absent if term is None else term.detach() for term in terms])
            state.batch += 1
            state.seconds["train"] += time.perf_counter() - since
            since = time.perf_counter()
            bar.update()
            if not bar.disable and (state.batch % 10 == 0 or state.batch == state.steps):
                bar.set_postfix({name: f"{value:.3f}" for name, value in state.means(state.sums).items()})
            leave_if_asked(state)
            if config.save_every and state.batch % config.save_every == 0:
                save_last(state)
    if state.ranks.any(not state.sums[0].isfinite().item()):
        raise Diverged(f"the loss is not a finite number in epoch {state.epoch + 1}: {advice(state, method)}")


@torch.no_grad()
def advice(state: State, method: Method) -> str:
    """Against a loss that is not finite. The teacher may be at fault: in float16 large logits overflow."""
    if isinstance(method, CKTAT):
        x, _ = next(iter(batches(state, train=False)))
        with state.autocast():
            logits = method.criterion.teacher(x.to(state.ranks.device))
        if not logits.isfinite().all():
            return "the teacher's logits are not finite either; look at --teacher, and at --amp"
    return "try a smaller --lr"


def train_step(state: State, method: Method, x: Tensor, y: Tensor, *, eps: float = 0.0, beta: float = 0.0) -> Terms:
    """Attack, forwards, loss, backward, and a step of the optimizer."""
    config, model, clock = state.config, state.model, state.clock
    x_adv = teacher_logits = None
    if method.objective is not None:
        size, start = config.step_size * eps / config.eps, method.attack_start(x)
        ball = {"eps": eps, "norm": config.norm, "step": size, "steps": config.steps}
        with clock("attack"), state.autocast(), images_only(model) if config.compile else nullcontext():
            x_adv = pgd(model, x, y, **ball, objective=method.objective, start=start)
    if isinstance(method, CKTAT):  # timed apart: it is what CKTAT costs above TRADES
        with clock("teacher"), state.autocast(), torch.no_grad():
            teacher_logits = method.criterion.teacher(x)

    def forward(network: nn.Module) -> Terms:
        clean_logits = adv_logits = None
        with state.autocast():
            if x_adv is None:
                clean_logits = network(x)
            elif not method.clean_forward:
                adv_logits = network(x_adv)
            elif config.two_forwards:
                clean_logits, adv_logits = network(x), network(x_adv)
            else:  # the BatchNorms see clean and adversarial images together
                clean_logits, adv_logits = network(torch.cat([x, x_adv])).chunk(2)
            return method(
                clean_logits=clean_logits, adv_logits=adv_logits, teacher_logits=teacher_logits, y=y, beta=beta
            )

    def scaled_loss() -> Tensor:
        return state.scaler.scale(forward(model).loss)

    with clock("student"):
        state.optimizer.zero_grad()
        with perturbed(model, scaled_loss, config.awp) if config.awp else nullcontext():
            terms = forward(state.network)
            state.scaler.scale(terms.loss).backward()
        update(state)
    return terms


@contextmanager
def images_only(model: nn.Module) -> Iterator[None]:
    """For the attack, which wants the gradient of the images: a compiled backward would compute the parameters' too."""
    model.requires_grad_(False)
    yield
    model.requires_grad_(True)


def update(state: State) -> None:
    """A step of the optimizer, one of the moving average."""
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.model)


def batches(state: State, *, train: bool) -> DataLoader[tuple[Tensor, Tensor]]:
    """Of the running epoch from where it stands, this process's share; or all of the validation images."""
    ranks, config = state.ranks, state.config
    how = {"batch": config.batch_size // ranks.world, "seed": config.seed, "workers": config.workers}
    if train:
        how |= {"start_batch": state.batch, "rank": ranks.rank, "world": ranks.world}
    found = loader(state.train_set if train else state.data.validation, epoch=state.epoch, train=train, **how)
    found.worker_init_fn = runtime.ignore_sigterm
    return found


def end_epoch(state: State, scores: Row | None, seconds: float, events: Any) -> None:
    """Log it, keep the best, save. Every process has to call it; process 0 has the scores."""
    config = state.config
    state.seconds.update(state.clock.take())
    sums = state.ranks.gather(state.sums.cpu())
    if scores is not None:
        row = {
            "epoch": state.epoch + 1,
            **state.settings(state.steps - 1),
            **state.means(torch.stack(sums).mean(0)),
            **scores,
            **{f"{phase}_seconds": value for phase, value in state.seconds.items()},
            "validation_seconds": seconds,
        }
        state.history.append({name: row.get(name) for name in runtime.COLUMNS})
    state.epoch, state.batch = state.epoch + 1, 0
    state.sums.zero_()
    state.seconds.clear()
    if scores is not None:
        if (score := scores.get("pgd_accuracy", scores["clean_accuracy"])) > state.best:
            state.best = score
            runtime.save(config.out / "best.pt", usable(state))
        runtime.write_log(config.out / "log.csv", state.history)  # a run that stops before save_last writes it again
        if events is not None:
            for name, value in state.history[-1].items():
                if value is not None:
                    events.add_scalar(name, value, state.epoch)
            events.flush()
        print(line(state.history[-1], config.epochs), flush=True)
    save_last(state)


def line(row: Row, epochs: int) -> str:
    """One epoch for the eye."""

    def part(style: str, **columns: str) -> str:
        return ", ".join(f"{name} {row[column]:{style}}" for name, column in columns.items() if row[column] is not None)

    return (
        f"epoch {row['epoch']}/{epochs}: {part('.3f', **{name: name for name in Terms._fields})}; "
        f"validation: {part('.1%', clean='clean_accuracy', PGD='pgd_accuracy')}; {row['train_seconds']:.1f} s "
        f"({part('.1f', attack='attack_seconds', teacher='teacher_seconds', student='student_seconds')}) "
        f"+ {row['validation_seconds']:.1f} s"
    )


# What it works with.

AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class State:
    """What a run works with, and all that its steps change, which last.pt holds.

    `model` is the plain module: attack, validate and save that. `network` is what to train: the same, or the same
    within DistributedDataParallel.
    """

    def __init__(self, config: Config, data: Data, model: nn.Module, ranks: Ranks) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        self.train_set = Subset(data.train, range(min(config.train_samples or sys.maxsize, len(data.train))))
        self.steps = len(self.train_set) // config.batch_size  # of an epoch
        if config.batch_size % ranks.world:
            raise UserError(f"--batch-size must be a multiple of the {ranks.world} processes, got {config.batch_size}")
        if not self.steps:
            images = len(self.train_set)
            raise UserError(f"--batch-size must be at most the {images} training images, got {config.batch_size}")
        self.memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        self.model = self.network = model.to(ranks.device, memory_format=self.memory_format)
        if config.compile:
            model.compile()  # in place: no wrapper gets into the names of a checkpoint
        if ranks.world > 1:
            # With broadcast_buffers, each forward first overwrites the BatchNorm statistics by those of rank 0. The
            # second of two train-mode forwards, S(x) and S(x'), so changes in place what the first one saved for its
            # backward, which autograd refuses wherever it notices. Here each process keeps its own statistics, and
            # rank 0's are validated.
            gpu = [ranks.device] if ranks.device.type == "cuda" else None
            name = "forward_sync_buffers"  # since torch 2.14
            if name not in inspect.signature(DistributedDataParallel).parameters:
                name = "broadcast_buffers"
            self.network = DistributedDataParallel(model, device_ids=gpu, **{name: False})
        momentum, decay = {"momentum": config.momentum, "nesterov": config.nesterov}, config.weight_decay
        self.optimizer = torch.optim.SGD(model.parameters(), config.lr, weight_decay=decay, **momentum)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16")
        self.ema: AveragedModel | None = None
        if config.ema:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.epoch = self.batch = 0  # how many are done
        self.best = -math.inf
        self.history: list[Row] = []
        self.sums = torch.zeros(len(Terms._fields), device=ranks.device)  # of the terms over the running epoch
        self.seconds: Counter[str] = Counter()  # of its phases
        self.clock = runtime.Clock(ranks.device)
        self.termination = runtime.Termination()

    @property
    def evaluated(self) -> nn.Module:
        """What is validated and used: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def settings(self, batch: int) -> dict[str, float]:
        """What changes with progress, for a batch of the running epoch, by its name in the log."""
        config = self.config
        progress = (self.epoch + batch / self.steps) / config.epochs
        settings = {"lr": learning_rate(config, progress, self.steps * config.epochs)}
        if config.method != "clean":
            settings["eps"] = config.eps * max(0.01, ramp(progress, config.eps_ramp))  # so that no step is 0
            settings["beta"] = (config.beta or 0.0) * ramp(progress, config.beta_ramp)
        return settings

    def autocast(self) -> torch.autocast:
        """Mixed precision, if it was asked for."""
        return torch.autocast(self.ranks.device.type, AMP[self.config.amp], enabled=self.config.amp != "none")

    def means(self, sums: Tensor) -> dict[str, float]:
        """Of the terms that the method has."""
        means = (sums / self.batch).tolist()
        return {name: mean for name, mean in zip(Terms._fields, means, strict=True) if not math.isnan(mean)}


# Schedules: functions of progress, the share of the training that is done, in [0, 1). They have no state, so a resumed
# run needs to know nothing but where it stopped.


def ramp(progress: float, fraction: float) -> float:
    """From 0 up to 1 along a line over the first `fraction` of the training; 1 throughout where that is 0."""
    return min(1.0, progress / fraction) if fraction > 0 else 1.0


def learning_rate(config: Config, progress: float, steps: int) -> float:
    """Of a training of so many steps."""
    if config.schedule == "cosine":  # Loshchilov and Hutter 2017, without restarts
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = 0.1 ** sum(progress >= drop / config.epochs for drop in config.lr_drops)
    return config.lr * share * ramp(progress + 1 / steps, config.lr_warmup)


# What is trained.


def open_data(config: Config, ranks: Ranks) -> Data:
    """The data set. Its split follows --split-seed alone, so that no teacher saw what its student is validated on."""
    how = {"download": config.download, "seed": config.split_seed, "validation": config.validation}
    try:
        with ranks.in_turns():
            data = load(config.dataset, config.data, **how)
    except ValueError as error:
        raise UserError(f"--validation does not fit: {error}") from None
    if config.no_augmentation:
        data.train.transform = data.validation.transform
    return data


def new_model(arch: str, data: Data) -> nn.Module:
    """A fresh model for the images of a data set."""
    try:
        return build(arch, data.classes, size=data.size, channels=data.channels, mean=data.mean, std=data.std)
    except ValueError as error:
        raise UserError(f"--arch does not fit: {error}") from None


def open_teacher(config: Config, data: Data) -> nn.Module:
    """The teacher, in eval mode. Its architecture becomes the student's, where --arch is not given."""
    path = config.teacher / "best.pt" if config.teacher.is_dir() else config.teacher
    if not path.is_file():
        raise UserError(f"--teacher: there is no file {path}; --method clean makes one")
    try:
        saved = runtime.load(path) if path.suffix in (".pt", ".pth") else {}
        if "arch" in saved:
            teacher = from_checkpoint(path)
            for name in ("classes", "size", "channels"):
                if saved[name] != (wanted := getattr(data, name)):
                    raise UserError(f"--teacher: {path} has {name} {saved[name]}, but {config.dataset} has {wanted}")
            split = saved.get("split_seed", 0)
            if saved.get("dataset") == config.dataset and split != config.split_seed:
                raise UserError(
                    f"--split-seed: {path} has {split}, got {config.split_seed}: it has seen images held out here"
                )
            config.arch = config.arch or saved["arch"]
        elif config.arch is None:
            raise UserError(f"--teacher: {path} does not name its architecture, so --arch must")
        else:
            teacher = new_model(config.arch, data)
            warm_start(teacher, path)
    except (ValueError, ImportError) as error:
        raise UserError(f"--teacher {path}: {str(error).splitlines()[0].rstrip(':')}") from None
    if not all(value.isfinite().all() for value in teacher.state_dict().values()):
        raise UserError(f"--teacher: {path} has weights that are not finite numbers")
    return teacher.eval()


def new_student(config: Config, data: Data, teacher: nn.Module | None) -> nn.Module:
    """A fresh model, with the teacher's weights unless --no-warm-start."""
    config.arch = config.arch or ("digits" if config.dataset in ("digits", "mnist5k") else "resnet18")
    student = new_model(config.arch, data)
    if teacher is not None and not config.no_warm_start:
        try:
            warm_start(student, teacher)
        except ValueError:
            raise UserError(
                f"--arch {config.arch} cannot take over the weights of another architecture: "
                "name the teacher's, or add --no-warm-start"
            ) from None
    return student


def method_of(config: Config, teacher: nn.Module | None) -> Method:
    """The loss to train with. CKTAT's criterion keeps its own frozen copy of the teacher."""
    if config.method != "cktat":
        return {"clean": Clean, "trades": TRADES, "pgd-at": PGDAT}[config.method]()
    criterion = CKTATLoss(
        teacher, config.tau, config.beta, adaptive=config.adaptive_beta, detach_clean=config.detach_clean
    )
    if config.channels_last:
        criterion.to(memory_format=torch.channels_last)
    if config.compile:
        criterion.teacher.compile()
    return CKTAT(criterion, guidance=not config.no_guidance)


# What the validation images say of a model, and when to distrust it.


Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, x, y -> x'


def validate(
    model: nn.Module,
    batches: DataLoader[tuple[Tensor, Tensor]],
    attack: Attack | None,
    device: torch.device,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Row | None:
    """Accuracies in float32, by their names in the log; None if `stop` became true meanwhile.

    The attack's random starts are the same in every call, and training's randomness is left as it was.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    with runtime.own_randomness(device, seed=0), eval_mode(model), torch.no_grad():
        for x, y in batches:
            if stop():
                return None
            x, y = x.to(device), y.to(device)
            predicted = model(x).argmax(1)
            found["predicted"].append(predicted)
            found["clean"].append(predicted == y)
            if attack is not None:
                logits = model(attack(model, x, y))
                found["pgd"].append(logits.argmax(1) == y)
                found["probability"].append(logits.softmax(1).gather(1, y[:, None]).squeeze(1).cpu())
    values = {name: torch.cat(parts) for name, parts in found.items()}
    scores = {
        "clean_accuracy": _share(values["clean"]),
        "most_predicted_share": values["predicted"].bincount().max().item() / len(values["predicted"]),
    }
    if attack is not None:
        quantiles = values["probability"].quantile(torch.tensor(runtime.QUANTILES)).tolist()
        scores |= {
            "pgd_accuracy": _share(values["pgd"]),
            **dict(zip(runtime.LABEL_PROBABILITY, quantiles, strict=True)),
        }
    return scores


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def collapse(scores: Row, labels: Sequence[int], teacher_clean: float | None) -> str | None:
    """What looks like a collapse towards a constant prediction, in a clause; None where nothing does."""
    chance = torch.tensor(labels).bincount().max().item() / len(labels)  # of the best constant prediction
    clean, most_predicted = scores["clean_accuracy"], scores["most_predicted_share"]
    if most_predicted > (1 + chance) / 2:
        return f"{most_predicted:.0%} of the validation images are given the same class"
    lead = 0.0 if teacher_clean is None else teacher_clean - chance
    if lead > chance and clean - chance < lead / 10:
        return f"clean accuracy is {clean:.1%}, near chance, and the teacher's is {teacher_clean:.1%}"
    return None


def compare_with_apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: Norm, attack: Attack) -> str:
    """Accuracy under PGD and under APGD-CE (Croce and Hein 2020) on the same images, with a warning where they part."""
    from pyautoattack.autopgd_base import APGDAttack

    # n_iter goes in here: APGD derives the checkpoints of its step size from it, so setting it later is too late.
    ball, quiet = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}, SimpleNamespace(warning=lambda _: None)
    apgd = APGDAttack(model, n_iter=50, loss="ce", logger=quiet, **ball)
    with runtime.own_randomness(x.device, seed=0), eval_mode(model), torch.no_grad():
        by_pgd = _share(model(attack(model, x, y)).argmax(1) == y)
        by_apgd = _share(model(apgd.perturb(x, y)).argmax(1) == y)
    found = f"best.pt on {len(x)} validation images: PGD {by_pgd:.1%}, APGD-CE (50 steps) {by_apgd:.1%}"
    if by_pgd - by_apgd <= 0.10:
        return found
    gap = f"PGD is {100 * (by_pgd - by_apgd):.1f} points above APGD: gradient masking is likely"
    return f"{found}\nwarning: {gap}. Trust AutoAttack only (evaluate.py)"


# Saving and resuming.


def usable(state: State) -> dict[str, Any]:
    """What models.from_checkpoint builds the model from."""
    return {
        "model": state.model.state_dict(),
        "ema": None if state.ema is None else state.ema.module.state_dict(),
        "arch": state.config.arch,
        "dataset": state.config.dataset,
        "split_seed": state.config.split_seed,
        "epoch": state.epoch,
        **{name: getattr(state.data, name) for name in ("classes", "size", "channels", "mean", "std")},
    }


def save_last(state: State) -> None:
    """Write last.pt: all that the next step depends on. Every process has to call it."""
    state.seconds.update(state.clock.take())
    own = {
        "rng": runtime.rng_state(state.ranks.device),
        "buffers": {name: value.cpu() for name, value in state.model.named_buffers()},  # BatchNorm statistics
        "sums": state.sums.cpu(),
    }
    by_rank = state.ranks.gather(own)
    if state.ranks.rank == 0:
        content = {
            **usable(state),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "ema_updates": 0 if state.ema is None else state.ema.n_averaged.item(),
            "batch": state.batch,  # with the epoch, the position of every schedule
            "best": state.best,
            "history": state.history,
            "seconds": dict(state.seconds),
            "by_rank": by_rank,
            "config": plain(state.config, state.ranks),
        }
        runtime.save(state.config.out / "last.pt", content)


def leave_if_asked(state: State) -> None:
    """Save and stop, if any process was sent SIGTERM."""
    if state.ranks.any(state.termination.asked):
        save_last(state)
        raise Terminated


def plain(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The options, and what else a resumed run must have in common with this one, in plain types."""
    options = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }
    return {**options, "device": ranks.device.type, "processes": ranks.world}


def begin_or_resume(state: State) -> None:
    """Make the folder of the run, or go on where last.pt in it stops."""
    config, last = state.config, state.config.out / "last.pt"
    if last.exists():
        if not config.resume:
            raise UserError(f"--out: {config.out} holds a run; --resume continues it, or name another folder")
        restore(state, last)
    elif state.ranks.rank == 0:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {config.out} cannot be made: {error.strerror}") from None
        options = {name: value for name, value in plain(config, state.ranks).items() if hasattr(config, name)}
        with runtime.replacing(config.out / "config.json") as file:
            file.write(json.dumps({**options, "resume": False, "config": None}, indent=2).encode())


def restore(state: State, path: Path) -> None:
    """Put everything where last.pt says."""
    try:
        saved = runtime.load(path)
    except ValueError as error:
        raise UserError(f"--resume: {error}") from None
    for name, now in plain(state.config, state.ranks).items():
        if name not in FREE and (before := saved["config"].get(name)) != now:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} was {before} in the run in {path.parent} and is {now} now: --resume needs it equal"
            )
    state.model.load_state_dict(saved["model"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    if state.ema is not None:
        state.ema.module.load_state_dict(saved["ema"])
        state.ema.n_averaged.fill_(saved["ema_updates"])
    state.epoch, state.batch = saved["epoch"], saved["batch"]
    state.best, state.history = saved["best"], saved["history"]
    state.seconds.update(saved["seconds"])
    own = saved["by_rank"][state.ranks.rank]
    for name, buffer in state.model.named_buffers():
        buffer.copy_(own["buffers"][name])
    state.sums.copy_(own["sums"])
    runtime.set_rng_state(state.ranks.device, own["rng"])


# Options: each class is a part of --help, each field an option, and its docstring what --help says of it.


@dataclass
class DataOptions:
    dataset: Name = "cifar10"
    """imagefolder has ImageNet's layout; digits, mnist5k and fake need no files"""
    data: Path = Path("data")
    """folder of the data set's files"""
    download: bool = False
    """fetch what is missing into --data"""
    validation: Annotated[int | None, number(int, 1, 1e6), default("1000; mnist5k 500, digits 200, fake 128")] = None
    """training images held out to choose best.pt, the guard against robust overfitting (Rice et al. 2020)"""
    split_seed: Annotated[int, number(int, 0, 2**32 - 1)] = 0
    """draws the images held out, for teacher and student alike; of digits and mnist5k the test images too"""
    no_augmentation: bool = False
    """train on the images without random crops and flips, as digits always are"""
    train_samples: Annotated[int | None, number(int, 2, 1e8), default("all")] = None
    """train on the first so many images only, for a trial"""


@dataclass
class MethodOptions:
    """The literal recipe can collapse to a constant prediction. Each ablation of the paper is a switch; a term that is
    left out of the loss is logged still."""

    method: Literal["clean", "cktat", "trades", "pgd-at"] = "cktat"
    """clean trains a teacher, cktat its student; trades (Zhang et al. 2019) and pgd-at (Madry et al. 2018) compare"""
    teacher: Annotated[Path | None, default("none")] = None
    """a run of --method clean or a file of weights; cktat needs one, trades and pgd-at start from it if given"""
    arch: Annotated[str | None, default("the teacher's; or digits for digits and mnist5k, else resnet18")] = None
    """resnet18, preact-resnet18, wrn-34-10, wrn-DEPTH-WIDTH, digits, digits-WIDTH, torchvision:NAME or timm:NAME"""
    recipe: Annotated[Literal["adaptive", "literal"] | None, default("adaptive")] = None
    """adaptive, ours: --tau 2 --beta 6 --detach-clean --adaptive-beta; literal, Eq. 17: --tau 5 --beta 6 and neither"""
    tau: Annotated[float | None, number(float, 0.01, 100), default("the recipe's")] = None
    """temperature, softens the teacher"""
    beta: Annotated[float | None, number(float, 0, 1000), default("the recipe's; trades 6")] = None
    """weight of the consistency term, which TRADES has too"""
    detach_clean: Annotated[bool | None, EITHER, default("the recipe's", aliases=["--no-detach-clean"])] = None
    """no gradient through S(x) in the consistency term: S(x') moves towards S(x), never the reverse"""
    adaptive_beta: Annotated[bool | None, EITHER, default("the recipe's", aliases=["--no-adaptive-beta"])] = None
    """weigh the consistency of each sample by beta times the probability of its label under attack"""
    beta_ramp: Annotated[float, number(float, 0, 1)] = 0.0
    """share of the training in which beta rises from 0, so that guidance comes first"""
    no_warm_start: bool = False
    """start the student from random weights, not the teacher's"""
    no_guidance: bool = False
    """leave the teacher's term out of the loss; a constant prediction is its optimum then"""
    no_consistency: bool = False
    """leave the second term out of the loss: beta is 0"""
    two_forwards: bool = False
    """run x and x' through S one after the other, as TRADES' code does; together was the more robust on small data"""
    awp: Annotated[float, number(float, 0, 1)] = 0.0
    """adversarial weight perturbation (Wu et al. 2020), a share of each weight's norm: 0.005 is usual, 0 is none"""


@dataclass
class AttackOptions:
    """PGD, in training and in validation, with the field's usual budget. Numbers can be given as 8/255."""

    norm: Norm = "linf"
    """what eps bounds: the change of each pixel (linf), or its length over the image (l2)"""
    eps: Annotated[float | None, number(fraction, 0, 100, above=True), default("8/255; with l2 128/255")] = None
    """largest change, in pixel values where 1 is black to white"""
    step_size: Annotated[float | None, number(fraction, 0, 100, above=True), default("a quarter of eps")] = None
    """how far a step goes, in the same units"""
    steps: Annotated[int, number(int, 1, 1000)] = 10
    """steps of the attack; each costs a forward and a backward"""
    eps_ramp: Annotated[float, number(float, 0, 1)] = 0.0
    """share of the training in which eps rises from a hundredth of it; validation attacks with all of it"""
    apgd_check: Annotated[int, number(int, 0, 1e6)] = 256
    """validation images on which best.pt meets APGD-CE at the end: a look for gradient masking. 0 is none"""


@dataclass
class OptimisationOptions:
    """SGD. The defaults are the field's usual recipe, not the paper's: the summary of it that we have gives none."""

    epochs: Annotated[int | None, number(int, 1, 100_000), default("110; clean 100")] = None
    """passes over the training images"""
    batch_size: Annotated[int, number(int, 2, 1e6)] = 128
    """images a step, of all processes together, so that --lr need not follow their number"""
    lr: Annotated[float, number(float, 0, 100, above=True)] = 0.1
    """learning rate at the start"""
    schedule: Literal["piecewise", "cosine"] = "piecewise"
    """of the learning rate: a tenth of it from each of --lr-drops on, or half a cosine down to 0"""
    lr_drops: Annotated[
        tuple[float, ...] | None,
        number(float, 0, 100_000, above=True, several=True),
        default("100,105 of 110; clean 75,90 of 100; in proportion to --epochs"),
    ] = None
    """epochs of the piecewise drops"""
    lr_warmup: Annotated[float, number(float, 0, 1)] = 0.0
    """share of the training in which the learning rate rises from 0; short runs from a warm start need some 0.2"""
    momentum: Annotated[float, number(float, 0, 0.9999)] = 0.9
    """share of the last step kept in the next"""
    nesterov: bool = False
    """Nesterov's form of momentum"""
    weight_decay: Annotated[float, number(float, 0, 1)] = 5e-4
    """weight decay of every parameter; the field's value on CIFAR"""
    ema: Annotated[float, number(float, 0, 0.99999)] = 0.0
    """decay of a moving average of the weights, which is then validated and used: 0.999 for instance, 0 is none"""


@dataclass
class HardwareOptions:
    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, mps, ..."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """mixed precision in attack and training; fp16 has loss scaling. Validation stays in float32"""
    compile: bool = False
    """torch.compile the model: minutes at the start, faster steps after"""
    channels_last: bool = False
    """NHWC memory format, faster for convolutions in mixed precision"""
    workers: Annotated[int, number(int, 0, 1024)] = 0
    """processes that load images; a GPU waits without some. 0: none but this"""
    threads: Annotated[int | None, number(int, 1, 1024), default("torch's own")] = None
    """CPU threads of each process"""


@dataclass
class RunOptions:
    """The folder gets config.json, log.csv (a line an epoch), last.pt (to resume) and best.pt (to use)."""

    out: Annotated[Path | None, default("out/student; clean out/teacher")] = None
    """folder of the run, made if missing"""
    resume: bool = False
    """continue from last.pt in --out, if there is one, with the other options as they were: on a CPU to the bit"""
    save_every: Annotated[int, number(int, 0, 1e9)] = 0
    """write last.pt also every so many steps; 0: after each epoch only. SIGTERM saves in any case"""
    seed: Annotated[int, number(int, 0, 2**32 - 1)] = 0
    """draws weights, order, augmentation and attacks"""
    tensorboard: bool = False
    """write the log for TensorBoard too, into --out"""
    config: Annotated[Path | None, default("none")] = None
    """JSON file of options, such as the config.json of a run; those given beside it come first"""


@dataclass
class Config(DataOptions, MethodOptions, AttackOptions, OptimisationOptions, HardwareOptions, RunOptions):
    """All options of a run, by the names that they have on the command line, with _ for -."""


RECIPES = {  # how the two terms of CKTAT are balanced
    "adaptive": {"tau": 2.0, "beta": 6.0, "detach_clean": True, "adaptive_beta": True},
    "literal": {"tau": 5.0, "beta": 6.0, "detach_clean": False, "adaptive_beta": False},
}
VALIDATION = {"digits": 200, "mnist5k": 500, "fake": 128}  # images held out; 1000 of the others, as Rice et al. 2020

_OF_CKTAT = ("recipe", "tau", "detach_clean", "adaptive_beta", "no_guidance", "no_consistency")
_OF_ATTACKS = ("eps", "step_size", "eps_ramp", "awp", "two_forwards", "beta", "beta_ramp")
NOT_FOR = {
    "clean": (*_OF_CKTAT, *_OF_ATTACKS, "teacher", "no_warm_start"),
    "cktat": (),
    "trades": _OF_CKTAT,
    "pgd-at": (*_OF_CKTAT, "beta", "beta_ramp", "two_forwards"),
}
INSTALL = "its package is not installed: pip install"
# What a resumed run may change: no weight depends on it.
FREE = {"out", "resume", "data", "download", "workers", "threads", "save_every", "tensorboard", "apgd_check", "config"}


def parse(argv: Sequence[str] | None = None) -> Config:
    """The options of a command line, resolved. A mistake in one ends the process, with code 2."""
    return resolved(runtime.parse(Config, sys.argv[1:] if argv is None else argv, about=__doc__))


def resolved(config: Config) -> Config:
    """The options with every default filled in that depends on others.

    Raises:
        UserError: they contradict each other, or need what is not here. Better now than after hours.
    """
    _check(config)
    clean, filled = config.method == "clean", replace(config)
    filled.validation = config.validation or VALIDATION.get(config.dataset, 1000)
    filled.epochs = config.epochs or (100 if clean else 110)
    filled.out = config.out or Path("out", "teacher" if clean else "student")
    if config.schedule == "piecewise" and config.lr_drops is None:
        filled.lr_drops = tuple(drop * filled.epochs for drop in ((0.75, 0.90) if clean else (100 / 110, 105 / 110)))
    if not clean:
        filled.eps = config.eps or EPS[config.norm]
        filled.step_size = config.step_size or filled.eps / 4  # the field's usual
    if config.method == "cktat":
        filled.recipe = config.recipe or "adaptive"
        for name, value in RECIPES[filled.recipe].items():
            if getattr(config, name) is None:
                setattr(filled, name, value)
    if config.method == "trades" and config.beta is None:
        filled.beta = 6.0  # its authors' choice
    if config.no_consistency:
        filled.beta = 0.0
    return filled


def _check(config: Config) -> None:
    def refuse(wrong: object, name: str, why: str) -> None:
        if wrong:
            raise UserError(f"--{name.replace('_', '-')}: {why}")

    given = {name for name, value in asdict(config).items() if value not in (None, False, 0)}
    for name in NOT_FOR[config.method]:
        refuse(name in given, name, f"is not for --method {config.method}")
    needs_teacher = config.method == "cktat" and not config.teacher
    refuse(needs_teacher, "teacher", "is needed by --method cktat; --method clean trains one")
    refuse(config.no_warm_start and not config.teacher, "no_warm_start", "needs --teacher, whose weights are not taken")
    refuse(config.no_consistency and config.no_guidance, "no_consistency", "leaves no loss together with --no-guidance")
    for name in {"beta", "beta_ramp"} & given:
        refuse(config.no_consistency, name, "weighs what --no-consistency leaves out: give one of them")
    refuse(config.schedule == "cosine" and config.lr_drops, "lr_drops", "is for --schedule piecewise, got cosine")
    refuse(config.nesterov and not config.momentum, "nesterov", "needs --momentum above 0")
    for name in {"eps", "step_size"} & given:
        try:
            check_length(name, getattr(config, name), config.norm)
        except ValueError as error:
            refuse(True, name, str(error))
    device = runtime.device_of(config.device).type
    mixed = config.amp == "none" or torch.amp.is_autocast_available(device)
    refuse(not mixed, "amp", f"got {config.amp!r}, but {device} has no mixed precision")
    missing = {name for name in ("tensorboard", "pyautoattack") if importlib.util.find_spec(name) is None}
    refuse(config.tensorboard and "tensorboard" in missing, "tensorboard", f"{INSTALL} 'cktat-loss[tensorboard]'")
    checked = config.apgd_check and config.method != "clean"
    refuse(checked and "pyautoattack" in missing, "apgd_check", f"{INSTALL} pyautoattack, or give 0")


# The command.

NewMethod = Callable[[Config, nn.Module | None], Method]


class Diverged(Exception):
    """The loss is not a finite number any more."""


def launch(config: Config, new_method: NewMethod | None = None) -> int:
    """Train in this process, or in this one of many. Returns its exit code.

    0: done. 1: the loss diverged. 2: something that was asked for cannot be. 130: Ctrl-C. 143: SIGTERM, and saved.
    """
    try:
        config = resolved(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with runtime.ranks(runtime.device_of(config.device)) as own:
            run(config, own, new_method)
    except (UserError, MissingData) as error:
        return complain(f"error: {error}", 2)
    except Diverged as error:
        return complain(f"error: {error}", 1)
    except Terminated:
        return complain(f"stopped by SIGTERM: --resume continues {config.out} where it was", 143)
    except KeyboardInterrupt:
        return complain(f"interrupted: --resume continues {config.out} from its last checkpoint", 130)
    return 0


def complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config = parse(argv)
    except UserError as error:
        return complain(f"error: {error}", 2)
    return launch(config)


if __name__ == "__main__":
    sys.exit(main())
