"""Measure the robustness of a network: clean accuracy, PGD-20, CW-30, AutoAttack, and signs of masked gradients.

    python examples/evaluate.py out/student                          a run of train.py, on its data set, at its eps
    python examples/evaluate.py out/student --samples 1000           on 1000 test images, drawn by --seed
    python examples/evaluate.py package.module:load --dataset svhn   yours: load() returns a model of images in [0, 1]

Report AutoAttack, because PGD overstates distilled students. On your own data call evaluate(model, x, y, eps=8/255).
"""

import argparse
import importlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import images
import torch
import torch.nn.functional as F
from networks import from_checkpoint
from pgd import EPS, check, fraction, pgd
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate
from tqdm import tqdm


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the best wrong logit minus the label's. PGD that maximises this margin is usually reported as CW."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", batch: int = 250, seed: int = 0
) -> tuple[dict[str, float], list[str]]:
    """Return the accuracy per attack, with AutoAttack last, and warnings as sentences.

    Args:
        model: images (N, ...) in [0, 1] to logits (N, C), on the device to work on. It stays frozen in eval mode.
        x, y: images and their classes (N,), on any device.
        eps: radius of the ball in `norm` ("linf" or "l2"), where 1 is black to white.
    """
    model.eval().requires_grad_(False)
    device = next(model.parameters()).device
    warnings = inspect(model, x[:batch].to(device), y[:batch].to(device))
    started, accuracy = time.perf_counter(), {}

    @torch.no_grad()
    def attack(name: str, perturb: Callable[[Tensor, Tensor], Tensor], which: Tensor) -> Tensor:
        """Attack the images of the mask `which` (N,). Return the mask of those that stay right. Print a table row."""
        torch.manual_seed(seed)
        right = torch.zeros_like(which)
        for part in tqdm(which.nonzero().squeeze(1).split(batch), name, leave=False, disable=None):
            if len(part):  # split() of an empty tensor gives one empty part
                labels = y[part].to(device)
                right[part] = (model(perturb(x[part].to(device), labels)).argmax(1) == labels).to(right.device)
        accuracy[name] = share = right.double().mean().item()
        error, seconds = math.sqrt(share * (1 - share) / len(x)), time.perf_counter() - started
        print(f"{name:<10}{100 * share:8.1f} ± {100 * error:.1f} %{seconds:10.0f} s", flush=True)
        return right

    every, ball = torch.ones(len(x), dtype=torch.bool), {"eps": eps, "step": eps / 4, "norm": norm}
    right = attack("clean", lambda x, y: x, every)
    attack("PGD-20", partial(pgd, model, **ball, steps=20), every)
    attack("CW-30", partial(pgd, model, **ball, steps=30, loss=margin), every)

    # The standard version of AutoAttack (Croce and Hein 2020): each attack on the images that are still right.
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # it warns in every batch of what inspect() says once
    how = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed, "device": device}
    auto = images.need("pyautoattack", "pyautoattack").AutoAttack(model, **how)
    classes = model(x[:1].to(device)).shape[1]
    auto.apgd_targeted.n_target_classes = auto.fab.n_target_classes = min(9, classes - 1)
    auto.apgd.loss, auto.fab.targeted = "ce", True
    parts = {"APGD-CE": auto.apgd, "APGD-T": auto.apgd_targeted, "FAB-T": auto.fab, "Square": auto.square}
    if classes < 4:
        del parts["APGD-T"]  # its loss takes four classes
        warnings.append("This is AutoAttack without APGD-T, which needs four classes: not the standard version.")
    for name, part in parts.items():
        right = attack(name, part.perturb, right)
    accuracy["AutoAttack"] = accuracy["Square"]  # the last attack of the chain

    if (gap := accuracy["PGD-20"] - accuracy["AutoAttack"]) > 0.10:
        warnings.append(f"PGD-20 is {100 * gap:.0f} points above AutoAttack: it overstates the robustness.")
    if (gap := accuracy["FAB-T"] - accuracy["Square"]) > 0.01:
        warnings.append(f"Square, which sees no gradients, broke {gap:.1%} that the others left: gradients are masked.")
    return accuracy, warnings


def inspect(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return the signs of masked gradients in one batch (Athalye et al. 2018, Carlini et al. 2019)."""
    inputs, warnings = x.clone().requires_grad_(), []
    logits = model(inputs)
    if not logits.requires_grad or not logits.isfinite().all():
        raise images.UserError("the model must give finite logits that have a gradient with respect to the images")
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), inputs)
    useless = (gradient.flatten(1) == 0).all(1) | ~gradient.flatten(1).isfinite().all(1)
    if (share := useless.float().mean()) > 0.01:
        warnings.append(f"{share:.0%} of the images have a gradient of 0 or NaN: look for saturated or rounded logits.")
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        warnings.append("The outputs look like probabilities: take the softmax off, the attacks apply their own.")
    if not torch.allclose(model(x), logits, rtol=1e-3, atol=1e-3):
        warnings.append("Two forwards of the same images differ: attack the average (AutoAttack's version rand).")
    return warnings


def load(name: str) -> tuple[nn.Module, dict[str, Any], Path]:
    """Return a network, what train.py saved about it, and its folder. `module:function` has no such facts."""
    if not re.fullmatch(r"[\w.]+:\w+", name):
        return *from_checkpoint(name), Path(name) if Path(name).is_dir() else Path(name).parent
    sys.path.insert(0, "")  # find modules in the current folder
    module, function = name.split(":")
    try:
        return getattr(importlib.import_module(module), function)(), {}, Path()
    except (ImportError, AttributeError) as error:
        raise images.UserError(f"{name} cannot be called ({error})") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("model", metavar="MODEL", help="a run's folder, a checkpoint, or module:function")
    option("--dataset", choices=images.SETS, help="default: the checkpoint's")
    option("--data", default="data", help="folder of the data set's files")
    option("--download", action="store_true", help="fetch missing files into --data")
    option("--samples", type=int, help="number of test images, which are held in memory; default: all")
    option("--norm", choices=EPS, help="default: the training's, else linf")
    option("--eps", type=fraction, help="where 1 is black to white; default: the training's, else 8/255, l2 128/255")
    option("--batch", type=int, default=250, help="images per forward pass; default: %(default)s")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    option("--seed", type=int, default=0, help="default: %(default)s")
    option("--out", help="the report; default: evaluation-NORM-EPS.json beside the checkpoint, or here")
    args = parser.parse_args(argv)
    if args.batch < 1 or (args.samples is not None and args.samples < 1):
        parser.error("--batch and --samples must be at least 1")
    model, saved, folder = load(args.model)
    norm = args.norm or saved.get("norm", "linf")
    trained = saved.get("eps") if norm == saved.get("norm") else None  # an eps holds in its norm only
    eps = (trained or EPS[norm]) if args.eps is None else args.eps
    if not (dataset := args.dataset or saved.get("dataset")):
        parser.error("--dataset is needed for a model of yours")
    try:
        check(eps, norm)
        model.to(args.device)
    except (ValueError, RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        parser.error(str(error).partition("\n")[0])
    out = Path(args.out or folder / f"evaluation-{norm}-{eps:.4g}.json")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise images.UserError(f"--out {out} cannot be written")
    test = images.load(dataset, args.data, download=args.download).test
    drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))[: args.samples].tolist()
    x, y = default_collate([*Subset(test, drawn)])

    other = f", but trained with {saved['norm']}, eps {saved['eps']:.4g}" if saved and trained != eps else ""
    print(f"{args.model} on {len(x)} test images of {dataset}, {norm}, eps {eps:.4g}{other}")
    how = {"norm": norm, "eps": eps, "batch": args.batch, "seed": args.seed}
    accuracy, warnings = evaluate(model, x, y, **how)
    print(f"AutoAttack: {accuracy['AutoAttack']:.1%}", *warnings, sep="\nwarning: ")
    report = {"model": args.model, "dataset": dataset, "images": len(x), **how, "trained": [saved.get("norm"), trained]}
    report |= {"accuracy": accuracy, "warnings": warnings, "torch": torch.__version__}
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"saved {out}")


if __name__ == "__main__":
    try:
        main()
    except (images.UserError, OSError) as error:  # an OSError names the file
        sys.exit(f"error: {error}")
