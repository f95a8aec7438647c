"""Adversarial training with CKTAT (arXiv 2504.00038), its clean teacher, TRADES and PGD-AT, in one plain loop.

    python examples/train.py --method clean --download --out out/teacher      a teacher, on clean images
    python examples/train.py --teacher out/teacher --out out/student          its student
    python examples/train.py --method trades --out out/trades                 to compare with
    torchrun --nproc-per-node=4 examples/train.py ...                         four GPUs share each batch

--out receives log.csv, last.pt (for --resume) and best.pt, the epoch with the best robust accuracy on held-out images
(--method clean: clean accuracy). Report what `evaluate.py out/student` finds, not the PGD accuracy in the log.
"""

import argparse
import csv
import inspect
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from images import SETS, SMALL, UserError, load
from networks import ARCHS, build, from_checkpoint, read
from pgd import EPS, check, eval_mode, fraction, pgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from cktat_loss import CKTATLoss, warm_start

RECIPES = {  # arguments of CKTATLoss, whose defaults are those of the paper's Eq. 17
    "adaptive": {"tau": 2.0, "adaptive": True, "detach_clean": True},  # ours
    "literal": {"tau": 5.0},  # the paper's, which collapses in short runs
}
USED_BY = {  # the methods that use an option. parse() refuses it with others. Options left out fit every method.
    **dict.fromkeys(("recipe", "tau", "no_warm_start"), ("cktat",)),
    **dict.fromkeys(("beta", "beta_ramp"), ("cktat", "trades")),
    **dict.fromkeys(("teacher", "awp"), ("cktat", "trades", "pgd-at")),
}
LIMITS = {  # smallest and largest value of an option
    "tau": (0.01, 100), "beta": (0, 1000), "beta_ramp": (0, 1), "awp": (0, 1), "step_size": (1e-9, 100),
    "steps": (1, 1000), "epochs": (1, 100_000), "batch": (1, 1_000_000), "lr": (1e-9, 100), "warmup": (0, 1),
    "weight_decay": (0, 1), "ema": (0, 0.99999), "workers": (0, 1000), "seed": (0, 1_000_000),
}  # fmt: skip
MAY_CHANGE = ("data", "download", "device", "out", "resume")  # options that may differ when a run is resumed
AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options. Refuse those that the method does not use, and values out of range."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter): ...

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    option = parser.add_argument
    option("--method", default="cktat", choices=("clean", "cktat", "trades", "pgd-at"), help="clean trains a teacher")
    option("--teacher", help="clean run, or any weights with --arch. cktat needs it, trades and pgd-at can start there")
    option("--recipe", default="adaptive", choices=RECIPES, help="settings of cktat: ours, or the paper's")
    option("--tau", type=float, help="temperature of the teacher. None: the recipe's")
    option("--beta", type=float, default=6.0, help="weight of the consistency term")
    option("--beta-ramp", type=float, default=0.0, help="share of the training in which beta rises from 0")
    option("--no-warm-start", action="store_true", help="start from random weights, not from the teacher's")
    option("--awp", type=float, default=0.0, help="adversarial weight perturbation: 0.005 is usual, 0 is none")
    option("--arch", help=f"{ARCHS}. None: the teacher's, or without a teacher digits (small sets) or resnet18")
    option("--dataset", default="cifar10", choices=SETS, help="images to train on")
    option("--data", default="data", help="folder of the data set's files")
    option("--download", action="store_true", help="fetch missing files into --data")
    option("--norm", default="linf", choices=EPS, help="norm of the attack")
    option("--eps", type=fraction, help="radius of the attack, where 1 is black to white. None: 8/255, with l2 128/255")
    option("--step-size", type=fraction, help="length of a step of the attack. None: a quarter of eps")
    option("--steps", type=int, default=10, help="number of steps of the attack")
    option("--epochs", type=int, default=110, help="passes over the training images")
    option("--batch", type=int, default=128, help="images per step, over all GPUs")
    option("--lr", type=float, default=0.1, help="largest learning rate of SGD")
    option("--schedule", default="piecewise", choices=("piecewise", "cosine"), help="schedule of the learning rate")
    option("--warmup", type=float, default=0.0, help="share of the training in which lr rises from 0; short runs: 0.2")
    option("--weight-decay", type=float, default=5e-4, help="weight decay of all parameters")
    option("--ema", type=float, default=0.0, help="decay of averaged weights to validate: 0.999 is usual, 0 is none")
    option("--amp", default="none", choices=AMP, help="mixed precision of training and its attack")
    option("--compile", action="store_true", help="torch.compile the network")
    option("--channels-last", action="store_true", help="channels_last memory format, faster with --amp")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to train on")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that load images")
    option("--seed", type=int, default=0, help="seed of weights, batches and attacks")
    option("--out", default="out/student", help="folder of the run")
    option("--resume", action="store_true", help="continue after the last epoch in --out, on a CPU with equal bits")

    # Set the options of USED_BY to None first. argparse then leaves None if an option is not given.
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(USED_BY)))
    for name, methods in USED_BY.items():
        if getattr(args, name) is None:
            setattr(args, name, parser.get_default(name))
        elif args.method not in methods:
            parser.error(f"--{name.replace('_', '-')} is for {', '.join(methods)}: --method {args.method} ignores it")
    if args.method == "cktat" and not args.teacher:
        parser.error("--method cktat needs a --teacher, which --method clean trains")
    args.tau = RECIPES[args.recipe]["tau"] if args.tau is None else args.tau
    args.eps = EPS[args.norm] if args.eps is None else args.eps
    args.step_size = args.eps / 4 if args.step_size is None else args.step_size
    try:
        check(args.eps, args.norm)
        torch.empty(0, device=args.device)
    except (ValueError, RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        parser.error(str(error).partition("\n")[0])
    for name, (least, most) in LIMITS.items():
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be in [{least}, {most}], got {getattr(args, name)}")
    return args


def loss_of(
    method: str, net: nn.Module, criterion: CKTATLoss | None, x: Tensor, x_adv: Tensor | None, y: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch, and its terms for the log. clean has no x_adv, and only cktat a criterion."""
    if method in ("clean", "pgd-at"):
        return F.cross_entropy(net(x if method == "clean" else x_adv), y), {}
    # One forward for both: BatchNorm sees clean and adversarial images together, and DDP one forward per backward.
    clean, adv = net(torch.cat([x, x_adv])).chunk(2)
    if method == "trades":
        log_clean, log_adv = clean.float().log_softmax(1), adv.float().log_softmax(1)
        consistency = F.kl_div(log_adv, log_clean, log_target=True, reduction="batchmean")
        return F.cross_entropy(clean, y) + beta * consistency, {"consistency": consistency.detach()}
    labels = y if criterion.adaptive else None  # CKTATLoss refuses labels that it does not use
    loss, terms = criterion(clean_logits=clean, adv_logits=adv, x=x, y=labels, beta=beta, return_terms=True)
    return loss, {"guidance": terms.guidance.mean(), "consistency": terms.consistency.mean()}


@contextmanager
def awp(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Move each weight up the gradient of `loss` by gamma of its norm, and back after the block (AWP, Wu et al. 2020).

    Take the gradient to train with inside the block. `loss` runs without DDP. BatchNorm statistics stay as they were.
    """
    weights = [weight for name, weight in model.named_parameters() if "weight" in name and weight.dim() > 1]
    weights_before = [weight.detach().clone() for weight in weights]
    buffers_before = [buffer.clone() for buffer in model.buffers()]
    gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss(), weights)]
    if dist.is_initialized():  # all processes move alike, by the sum because only its direction counts
        for gradient in gradients:
            dist.all_reduce(gradient)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            change = gamma * weight.norm() / (gradient.norm() + 1e-20) * gradient
            weight += change.nan_to_num(0, 0, 0)  # 0 if float16 overflows: GradScaler skips such a step
        for buffer, before in zip(model.buffers(), buffers_before, strict=True):
            buffer.copy_(before)
    yield
    with torch.no_grad():
        for weight, before in zip(weights, weights_before, strict=True):
            weight.copy_(before)


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """Return the learning rate when `progress`, a share of the training in [0, 1), is done."""
    warm = min(1.0, progress / args.warmup) if args.warmup else 1.0
    if args.schedule == "cosine":
        return args.lr * warm * (1 + math.cos(math.pi * progress)) / 2
    drops = (0.75, 0.90) if args.method == "clean" else (100 / 110, 105 / 110)  # epochs 100 and 105 of 110 are usual
    return args.lr * warm * 0.1 ** sum(progress >= drop for drop in drops)


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader, attack: Callable[..., Tensor] | None) -> dict[str, float]:
    """Return the clean accuracy and, unless attack is None, the robust accuracy, in float32. Warn of a collapse."""
    torch.manual_seed(0)  # the attack starts at the same points in every epoch
    device, predicted, robust, labels = next(model.parameters()).device, [], [], []
    with eval_mode(model):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            labels.append(y)
            predicted.append(model(x).argmax(1))
            if attack:
                robust.append(model(attack(model, x, y)).argmax(1) == y)
    predicted, labels = torch.cat(predicted), torch.cat(labels)
    most, largest = (classes.bincount().max().item() / len(labels) for classes in (predicted, labels))
    if most > (1 + largest) / 2:  # one class is predicted far more often than the largest class occurs
        print(f"warning: {most:.0%} of the validation images are predicted to be of one class: this may be a collapse")
    scores = {"clean": (predicted == labels).float().mean().item()}
    return scores | ({"robust": torch.cat(robust).float().mean().item()} if attack else {})


def save(path: Path, content: dict[str, object]) -> None:
    """Replace a checkpoint atomically. A process that is killed leaves the old file or the new file."""
    try:
        torch.save(content, f"{path}.partial")
    except RuntimeError as error:  # torch's own writer met a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    os.replace(f"{path}.partial", path)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    # torchrun starts one process per GPU and sets these variables. Without torchrun there is a single process.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world, device = int(os.environ.get("WORLD_SIZE", 1)), torch.device(args.device)
    if args.batch % world:
        raise UserError(f"--batch must be a multiple of the {world} processes, got {args.batch}")
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # Begin a run or continue it: epochs done, best score, rows of the log, content of last.pt.
    out, done, best, rows, last = Path(args.out), 0, -1.0, [], None
    if (out / "last.pt").exists():
        if not args.resume:
            raise UserError(f"{out} holds a run: --resume continues it, or name another --out")
        last = read(out / "last.pt")
        for name, now in vars(args).items():
            if name not in MAY_CHANGE and (before := last.get("options", {}).get(name, "unknown")) != now:
                name = name.replace("_", "-")
                raise UserError(f"--{name} was {before} when {out} was begun, and cannot become {now} by --resume")
        done, best, rows = len(last["rows"]), last["best"], last["rows"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.csv").touch()  # fail now if it cannot be written

    # The images.
    if local_rank > 0:
        dist.barrier()  # until the first process of this machine has downloaded
    data = load(args.dataset, args.data, download=args.download)
    if local_rank == 0 and world > 1:
        dist.barrier()
    sampler = DistributedSampler(data.train, world, rank, seed=1000 * args.seed, drop_last=True)  # plus the epoch
    # Workers start anew in every epoch, because a resumed run could not restore persistent workers' random state.
    workers = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    loader = DataLoader(data.train, args.batch // world, sampler=sampler, drop_last=True, **workers)
    validation = DataLoader(data.validation, args.batch, **workers)
    if not len(loader):
        raise UserError(f"--batch must be at most the {len(data.train)} training images, got {args.batch}")

    # The teacher, and the student.
    teacher, arch = None, args.arch or ("digits" if args.dataset in SMALL else "resnet18")
    if args.teacher:
        teacher, saved = from_checkpoint(args.teacher, args.arch, args.dataset, data.classes)
        if (saved["dataset"], saved["classes"]) != (args.dataset, data.classes):
            theirs = f"{saved['classes']} classes of {saved['dataset']}"
            raise UserError(f"--teacher {args.teacher} was trained on {theirs}, not {data.classes} of {args.dataset}")
        arch = args.arch or saved["arch"]
        if arch != saved["arch"] and not args.no_warm_start:
            raise UserError(f"--arch {arch} cannot start from weights of {saved['arch']} (cktat: add --no-warm-start)")
    torch.manual_seed(args.seed)
    model = build(arch, args.dataset, data.classes)
    if teacher and not args.no_warm_start:
        warm_start(model, teacher)
    memory_format = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(device, memory_format=memory_format)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
    criterion = None
    if args.method == "cktat":  # without beta, which loss_of gives to every call
        criterion = CKTATLoss(teacher, **{**RECIPES[args.recipe], "tau": args.tau}).to(device)
    if args.compile:
        model.compile()  # in place, so that no wrapper gets into the names of the weights
    net = model
    if world > 1:
        # Each process keeps its own BatchNorm statistics during an epoch. At its end all take those of rank 0.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}  # floor: before torch 2.14
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None, **sync)

    # The optimizer, mixed precision, the attack.
    torch.backends.cudnn.benchmark = True
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "none")
    attack = None
    if args.method != "clean":  # which only stores norm and eps, for evaluate.py
        attack = partial(pgd, eps=args.eps, step=args.step_size, steps=args.steps, norm=args.norm)
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        if ema:
            ema.load_state_dict(last["ema"])
    if last and rank == 0:
        print(f"{out}: {done} of {args.epochs} epochs are done")

    def losses(network: nn.Module, *batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss times GradScaler's factor, for backward(), and what to log."""
        with autocast:
            loss, terms = loss_of(args.method, network, criterion, *batch)
        return scaler.scale(loss), {"loss": loss.detach(), **terms}

    for epoch in range(done, args.epochs):
        # All randomness of an epoch follows from these seeds, so that a resumed run repeats an unbroken one.
        torch.manual_seed(1_000_000 * args.seed + 1_000 * epoch + rank)
        sampler.set_epoch(epoch)
        sums, began = Counter(), time.perf_counter()
        model.train()
        # Show a progress bar on rank 0. tqdm's disable=None hides the bar unless the output is a terminal.
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=True if rank else None)
        for step, (x, y) in enumerate(bar):
            x, y = x.to(device, memory_format=memory_format, non_blocking=True), y.to(device, non_blocking=True)
            progress = (epoch + step / len(loader)) / args.epochs
            optimizer.param_groups[0]["lr"] = lr = learning_rate(args, progress)
            beta = args.beta * min(1.0, progress / args.beta_ramp) if args.beta_ramp else args.beta

            # pgd attacks the bare model in eval mode. TRADES starts beside x, because its KL has no gradient at x.
            x_adv = None
            if attack:
                how = {"loss": "kl", "start": x + 0.001 * torch.randn_like(x)} if args.method == "trades" else {}
                with autocast:
                    x_adv = attack(model, x, y, **how)

            # Compute the gradient, with --awp at perturbed weights. The optimizer's step starts from restored weights.
            batch = x, x_adv, y, beta
            optimizer.zero_grad()
            with awp(model, lambda batch=batch: losses(model, *batch)[0], args.awp) if args.awp else nullcontext():
                loss, terms = losses(net, *batch)
                loss.backward()
            scaler.step(optimizer)
            scaler.update()
            if ema:
                ema.update_parameters(model)
            sums.update(terms)  # adds tensors on the device, so that no step waits for the device

        # Average the log over steps and processes. Stop if the loss is not finite.
        if world > 1:
            for total in sums.values():
                dist.all_reduce(total)
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        means = {name: total.item() / len(loader) / world for name, total in sums.items()}
        if not math.isfinite(means["loss"]):
            hints = "try a smaller --lr or --amp none, look at --teacher"
            raise UserError(f"the loss of epoch {epoch + 1} is not finite: {hints}")
        if rank > 0:
            continue  # and wait for rank 0 in the next collective operation

        # Validate, log and save. Write last.pt at the end: a run that is killed earlier repeats this epoch on --resume.
        averaged = ema.module if ema else model
        scores = validate(averaged, validation, attack)
        row = {"epoch": epoch + 1, "lr": lr, **({"beta": beta} if "consistency" in means else {}), **means, **scores}
        rows.append({**row, "seconds": time.perf_counter() - began})
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
        facts = {"arch": arch, "dataset": args.dataset, "classes": data.classes, "norm": args.norm, "eps": args.eps}
        state = {"model": model.state_dict(), "ema": ema.state_dict() if ema else None, "rows": rows}
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "options": vars(args)}
        if (score := scores.get("robust", scores["clean"])) > best:
            best = score
            save(out / "best.pt", {**facts, "model": averaged.state_dict()})
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        save(out / "last.pt", {**facts, **state, "best": best})
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # an OSError names the file
        sys.exit(f"error: {error}")
