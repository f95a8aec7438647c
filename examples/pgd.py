"""Projected gradient descent (Madry et al. 2018) in Linf and L2. Copy this file if you have no attack of your own."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = {"linf": 8 / 255, "l2": 128 / 255}  # the radii that the field reports on CIFAR
LARGEST = {"linf": 1.0, "l2": 100.0}  # pixels are in [0, 1]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, C) and classes (N,) to one number per image, or to their sum


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: str = "linf",
    loss: Loss | str = "ce",
    start: Tensor | None = None,
) -> Tensor:
    """Return adversarial images within eps of x and within [0, 1].

    Args:
        model: images to logits (N, C), without DistributedDataParallel around it. It runs in eval mode with frozen
            weights, and is afterwards as before.
        x, y: images (N, ...) in [0, 1] and their classes (N,).
        eps: radius of the ball, where 1 is black to white. Norm "linf" bounds each pixel (usually 8/255), "l2" the
            whole image (usually 128/255).
        step, steps: length of a step in the same norm, usually eps / 4, and number of steps.
        loss: the function to maximise. "ce" is the cross-entropy, "kl" is TRADES' KL(S(x) || S(x')).
        start: images to begin at. None draws a uniform point of the ball. TRADES: x + 0.001 * torch.randn_like(x).
    """
    check(eps, norm)
    if steps < 1 or not (step > 0 and math.isfinite(step)):
        raise ValueError(f"steps must be at least 1 and step a finite number above 0, got {steps} and {step}")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x must be images in [0, 1], got [{x.min():g}, {x.max():g}]: normalise inside the model")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    with eval_mode(model), torch.enable_grad():
        if loss == "kl":
            clean = model(x).detach().to(x.dtype).log_softmax(1)
            loss = lambda z, _: F.kl_div(z.log_softmax(1), clean, log_target=True, reduction="sum")  # noqa: E731
        elif loss == "ce":
            loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
        x_adv = project(uniform(x, eps, norm) if start is None else start.to(x), x, eps, norm)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            # The sum, not the mean: an image's gradient must not depend on the size of its batch.
            (gradient,) = torch.autograd.grad(loss(model(x_adv).to(x.dtype), y).sum(), x_adv)
            x_adv = project(x_adv.detach() + step * direction(gradient, norm), x, eps, norm)
    return x_adv.detach()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and freeze its weights, because their gradients cost time. Undo both afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight in trained:
            weight.requires_grad_(True)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Return the nearest point of the eps-ball around x, clipped to [0, 1]."""
    change = (x_adv - x).clamp(-eps, eps) if norm == "linf" else (x_adv - x).renorm(2, 0, eps)
    return (x + change).clamp(0, 1)


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the step of length 1 that raises the loss most."""
    if norm == "linf":
        return gradient.sign()
    flat = gradient.flatten(1)
    # Scale first: the squares of tiny gradients would underflow to 0.
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)
    return F.normalize(flat).view_as(gradient)


def uniform(x: Tensor, eps: float, norm: str) -> Tensor:
    """Draw a uniform point of the eps-ball around each image."""
    if norm == "linf":
        return x + eps * (2 * torch.rand_like(x) - 1)
    radius = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) ** (1 / math.prod(x.shape[1:]))
    return x + eps * radius * direction(torch.randn_like(x), norm)


def fraction(text: str) -> float:
    """Read a number from the command line: 0.03, or 8/255 as eps is usually written."""
    above, slash, below = text.partition("/")
    return float(above) / (float(below) or math.nan) if slash else float(above)  # check() refuses nan


def check(eps: float, norm: str) -> None:
    """Refuse an eps that images in [0, 1] have no room for, such as 8 where 8/255 was meant."""
    if norm not in LARGEST or not 0 < eps <= LARGEST[norm]:
        hint = f": pixels are in [0, 1], so write {eps:g}/255" if 1 < eps <= 255 else ""
        wanted = "eps must be above 0 and at most 1 with norm linf, 100 with norm l2"
        raise ValueError(f"{wanted}; got {eps:g} with norm {norm}{hint}")
