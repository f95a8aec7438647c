"""The options that both training commands have, group by group."""

import argparse
import importlib.util
from pathlib import Path

import torch
from data import DATASETS
from options import Group, Number, device_name

VALIDATION = {"digits": 200, "mnist5k": 500, "fake": 128}  # images held out; 1000 of the others, as Rice et al. 2020


def drop_epochs(text: str) -> tuple[float, ...]:
    """An argparse type: epochs, separated by commas."""
    return tuple(Number(float, 0, 100_000, above=True)(part) for part in text.split(","))


def add_data(parser: argparse.ArgumentParser) -> None:
    group = Group(parser, "data")
    group.choice(
        "--dataset", DATASETS, "cifar10", "imagefolder has ImageNet's layout; digits, mnist5k and fake need no files"
    )
    group.option("--data", Path, Path("data"), "folder of the data set's files", metavar="FOLDER")
    group.switch("--download", "fetch what is missing into --data")
    group.option(
        "--validation",
        Number(int, 1, 1_000_000),
        None,
        "training images held out to choose best.pt, the guard against robust overfitting (Rice et al. 2020); the same "
        "ones for teacher and student, whatever --seed is",
        shown="1000; mnist5k 500, digits 200, fake 128",
        metavar="IMAGES",
    )
    group.option(
        "--split-seed",
        Number(int, 0, 2**32 - 1),
        0,
        "draws the images that are held out, for teacher and student alike: those for validation, and of digits and "
        "mnist5k those for the final test",
        metavar="N",
    )
    group.switch("--no-augmentation", "train on the images without random crops and flips, as digits always are")
    group.option(
        "--train-samples",
        Number(int, 2, 100_000_000),
        None,
        "train on the first so many images only, for a trial",
        shown="all",
        metavar="IMAGES",
    )


def add_optimisation(parser: argparse.ArgumentParser, *, epochs: int, drops: tuple[int, ...]) -> None:
    """SGD and its schedule. `drops`: of the default piecewise schedule, in epochs of `epochs`."""
    group = Group(
        parser,
        "optimisation",
        "SGD with momentum. The defaults are the field's usual recipe, not the paper's: the summary of it that we have "
        "gives none.",
    )
    group.option(
        "--epochs",
        Number(int, 1, 100_000),
        epochs,
        "passes over the training images; the field's usual number",
        metavar="N",
    )
    group.option(
        "--batch-size",
        Number(int, 2, 1_000_000),
        128,
        "images a step, of all processes together, so that --lr need not follow their number",
        metavar="IMAGES",
    )
    group.option("--lr", Number(float, 0, 100, above=True), 0.1, "learning rate at the start", metavar="RATE")
    group.choice(
        "--schedule",
        ("piecewise", "cosine"),
        "piecewise",
        "of the learning rate: a tenth of it from each of --lr-drops on, or half a cosine down to 0",
    )
    usual = " and ".join(map(str, drops))
    group.option(
        "--lr-drops",
        drop_epochs,
        None,
        "epochs of the piecewise drops, separated by commas",
        shown=f"{usual} of {epochs}, in proportion to --epochs",
        metavar="EPOCHS",
    )
    group.option(
        "--lr-warmup",
        Number(float, 0, 1),
        0.0,
        "share of the training in which the learning rate rises from 0; short runs from a warm start need some 0.2",
        metavar="FRACTION",
    )
    group.option("--momentum", Number(float, 0, 0.9999), 0.9, "share of the last step kept in the next", metavar="M")
    group.switch("--nesterov", "Nesterov's form of momentum, which needs --momentum above 0")
    group.option(
        "--weight-decay",
        Number(float, 0, 1),
        5e-4,
        "weight decay of every parameter; the field's value on CIFAR",
        metavar="D",
    )
    group.option(
        "--ema",
        Number(float, 0, 0.99999),
        0.0,
        "keep a moving average of the weights that forgets 1 - DECAY of itself with each step, 0.999 for instance; "
        "it is what is validated and saved for use. 0 keeps none",
        metavar="DECAY",
    )
    parser.set_defaults(usual_drops=tuple(drop / epochs for drop in drops))


def add_hardware(parser: argparse.ArgumentParser) -> None:
    group = Group(parser, "hardware")
    group.option(
        "--device", device_name, "auto", "auto (an accelerator if there is one), cpu, cuda, mps, ...", metavar="D"
    )
    group.choice(
        "--amp",
        ("none", "bf16", "fp16"),
        "none",
        "mixed precision in attack and training: bf16 on recent GPUs; fp16, with loss scaling, on older ones. "
        "Validation stays in float32",
    )
    group.switch("--compile", "torch.compile the model: minutes at the start, faster steps after")
    group.switch("--channels-last", "NHWC memory format, faster for convolutions in mixed precision")
    group.option(
        "--workers",
        Number(int, 0, 1024),
        0,
        "processes that load images; a GPU waits without some. 0: none but this",
        metavar="N",
    )
    group.option(
        "--threads", Number(int, 1, 1024), None, "CPU threads of each process", shown="torch's own", metavar="N"
    )


def add_run(parser: argparse.ArgumentParser, *, out: str) -> None:
    group = Group(
        parser,
        "run",
        "The folder gets config.json, log.csv (a line an epoch), last.pt (to resume) and best.pt (to use).",
    )
    group.option("--out", Path, Path(out), "folder of the run, made if missing", metavar="FOLDER")
    group.switch(
        "--resume",
        "continue from last.pt in --out, where there is one, with the other options as they were: on a CPU the weights "
        "are, to the bit, those of a run never stopped, on a GPU as far as its kernels are deterministic",
    )
    group.option(
        "--save-every",
        Number(int, 0, 1_000_000_000),
        0,
        "write last.pt also every so many steps; 0: after each epoch only. SIGTERM saves in any case",
        metavar="STEPS",
    )
    group.option("--seed", Number(int, 0, 2**32 - 1), 0, "draws weights, order, augmentation and attacks", metavar="N")
    group.switch("--tensorboard", "write the log for TensorBoard too, into --out")


def finish(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse; fill in the defaults that depend on other options; refuse what cannot work before hours are spent."""
    args = parser.parse_args(argv)
    if args.validation is None:
        args.validation = VALIDATION.get(args.dataset, 1000)
    if args.lr_drops is None:
        args.lr_drops = tuple(drop * args.epochs for drop in args.usual_drops)
    del args.usual_drops
    if args.nesterov and args.momentum == 0:
        parser.error("argument --nesterov: needs --momentum above 0")
    if args.amp != "none" and not torch.amp.is_autocast_available(args.device.type):
        parser.error(f"argument --amp: got {args.amp!r}, but {args.device.type} has no mixed precision")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("argument --tensorboard: its package is not installed: pip install 'cktat-loss[tensorboard]'")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args
