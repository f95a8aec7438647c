"""Projected gradient descent (Madry et al. 2018) in Linf and L2, on the cross-entropy, TRADES' KL, or a loss of yours.

It leaves no trace on the model: modes, BatchNorm statistics, `.grad` and `requires_grad` are as before.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (N, C) and classes (N,), an image or their sum
Objective = Literal["ce", "kl"] | Loss

EPS = {"linf": 8 / 255, "l2": 128 / 255}  # the radii that the field reports on CIFAR, norm by norm
LARGEST = {"linf": 1.0, "l2": 100.0}  # images are in [0, 1]: no pixel can change by more than 1


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: Norm = "linf",
    objective: Objective = "ce",
    start: Tensor | None = None,
) -> Tensor:
    """Adversarial examples for `x`: within eps of it, and within [0, 1].

    Args:
        model: images to logits (N, C), in eval mode meanwhile; compiled or wrapped in DDP too, and under autocast.
        x: images (N, ...) in [0, 1].
        y: classes (N,). "kl" does not look at them.
        eps: radius of the ball, in pixel values where 1 is black to white: of each pixel ("linf", usually 8/255) or
            of the whole image ("l2", usually 128/255). 0 gives x.
        step: how far a step goes, in the same norm and units.
        steps: how many; each costs one forward and one backward.
        norm: of the ball and of the steps: the gradient's sign ("linf") or its direction ("l2").
        objective: what to maximise: "ce", the cross-entropy with y; "kl", KL(softmax S(x) || softmax S(x')), which
            costs one forward more; or a function of logits and y. The gradient of "kl" is zero at x' = x.
        start: begin at these images, (N, ...), brought into the ball first; TRADES': x + 0.001 * randn. None draws a
            point of the ball uniformly, from torch's global generator.

    Returns:
        x', shaped as x, detached; float32, or float64 for float64 images.

    Raises:
        ValueError: a bad argument; the message names it, what came and what was wanted.
    """
    _check(x, eps, step, steps, norm, start)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # no gradients to exchange here, and DDP would broadcast buffers at every forward
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    with eval_mode(model), torch.enable_grad():
        loss = _loss(objective, model, x)
        x_adv = project(x + _random_in_ball(x, eps, norm) if start is None else start.to(x), x, eps, norm)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            total = loss(model(x_adv).to(x.dtype), y).sum()
            (gradient,) = torch.autograd.grad(total, x_adv)  # of x' alone: parameters get no .grad
            x_adv = project(x_adv.detach() + step * direction(gradient, norm), x, eps, norm)
    return x_adv.detach()


def _loss(objective: Objective, model: nn.Module, x: Tensor) -> Loss:
    if callable(objective):
        return objective
    if objective == "ce":
        return partial(F.cross_entropy, reduction="sum")
    if objective != "kl":
        raise ValueError(f"objective must be 'ce', 'kl' or a function of logits and classes, got {objective!r}")
    # Not under no_grad: in older torch, an autocast around all of a training step would then keep casts of the weights
    # that its later forwards get no gradients through.
    clean = F.log_softmax(model(x).detach().to(x.dtype), dim=1)
    return lambda logits, _: F.kl_div(F.log_softmax(logits, dim=1), clean, log_target=True, reduction="sum")


def project(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """The nearest point of the eps-ball around x, then of [0, 1]; x lies in both, so the second keeps the first."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    change = x_adv - x
    return (x + change * (eps / _length(change).clamp_min(eps + _tiny(x)))).clamp(0, 1)


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of length 1 that raises the loss most; zero where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    # Scaled first: the squares of a saturated model's gradients would underflow.
    largest = gradient.abs().flatten(1).amax(1).clamp_min(_tiny(gradient))
    scaled = gradient / _per_image(largest, gradient)
    return scaled / _length(scaled).clamp_min(_tiny(gradient))


def _random_in_ball(x: Tensor, eps: float, norm: Norm) -> Tensor:
    """Changes drawn uniformly from the eps-ball, shaped as x."""
    if norm == "linf":
        return eps * (2 * torch.rand_like(x) - 1)
    radius = torch.rand(len(x), dtype=x.dtype, device=x.device) ** (1 / math.prod(x.shape[1:]))
    return eps * _per_image(radius, x) * direction(torch.randn_like(x), norm)


def fraction(text: str) -> float:
    """A number, or two with a slash between them, as eps is usually written: 8/255."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


def check_length(name: str, value: float, norm: Norm) -> None:
    """Refuse an eps or a step that no image in [0, 1] has room for, such as 8 where 8/255 was meant."""
    if not 0 <= value <= LARGEST[norm]:
        hint = f": pixels are in [0, 1], so write {value:g}/255" if 1 < value <= 255 and norm == "linf" else ""
        raise ValueError(f"{name} must be in [0, {LARGEST[norm]:g}] for norm {norm}, got {value:g}{hint}")


def _length(images: Tensor) -> Tensor:
    """L2 norms of images (N, ...), as (N, 1, ...)."""
    return _per_image(images.flatten(1).norm(dim=1), images)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values (N,) as (N, 1, ...), to multiply images with."""
    return values.view(len(images), *(1 for _ in images.shape[1:]))


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _check(x: Tensor, eps: float, step: float, steps: int, norm: str, start: Tensor | None) -> None:
    if norm not in LARGEST:
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    check_length("eps", eps, norm)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be a finite number above 0, got {step}")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be an int from 1, got {steps!r}")
    # One wait for the device an attack; normalised images passed by mistake would weaken it without a word.
    low, high = (limit.item() for limit in x.aminmax()) if x.numel() else (0.0, 1.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"x must be images in [0, 1] (normalise inside the model), got values in [{low:g}, {high:g}]")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must be shaped as x, {tuple(x.shape)}, got {tuple(start.shape)}")
