"""Projected gradient descent (Madry et al. 2018) in Linf and L2, on the cross-entropy or on TRADES' KL.

It leaves no trace on the model: modes, BatchNorm statistics, `.grad` and `requires_grad` are as before.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Norm = Literal["linf", "l2"]
Objective = Literal["ce", "kl"]

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
    clean_logits: Tensor | None = None,
    random_start: bool = True,
    start: Tensor | None = None,
    bn_eval: bool = True,
) -> Tensor:
    """Adversarial examples for `x`: within eps of it, and within [0, 1].

    Args:
        model: images to logits (N, C); compiled or wrapped in DDP too, and under autocast.
        x: images (N, ...) in [0, 1].
        y: classes (N,). Only "ce" looks at them.
        eps: radius of the ball, in pixel values where 1 is black to white: of each pixel ("linf", usually 8/255) or
            of the whole image ("l2", usually 128/255). 0 gives x.
        step: how far a step goes, in the same norm and units.
        steps: how many; each costs one forward and one backward.
        norm: of the ball and of the steps: the gradient's sign ("linf") or its direction ("l2").
        objective: what to maximise: "ce", the cross-entropy with y, or "kl", KL(softmax S(x) || softmax S(x')).
            The gradient of "kl" is zero at x' = x, so it needs a random start, or TRADES' small noise as `start`.
        clean_logits: S(x), (N, C), for "kl"; one forward more where it is not given. "ce" has no use for it.
        random_start: start at a uniformly drawn point of the ball, from torch's global generator; else at x.
        start: begin at these images instead, (N, ...), brought into the ball first; TRADES': x + 0.001 * randn.
        bn_eval: the model in eval mode meanwhile (BatchNorm, Dropout); False leaves its modes alone, and BatchNorms
            in train mode then update their statistics with every step.

    Returns:
        x', shaped as x, detached; float32, or float64 for float64 images.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what came and what was wanted.
    """
    _check(x, eps=eps, step=step, steps=steps, norm=norm, objective=objective, clean_logits=clean_logits, start=start)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # no gradients to exchange here, and DDP would broadcast buffers at every forward
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    with eval_mode(model) if bn_eval else nullcontext(), torch.enable_grad():
        if objective == "kl":
            if clean_logits is None:
                # Not under no_grad: in older torch, an autocast around all of a training step would then keep casts of
                # the weights that its later forwards get no gradients through.
                clean_logits = model(x)
            clean = F.log_softmax(clean_logits.detach().to(x.dtype), dim=1)
        if start is None:
            start = x + random_in_ball(x, eps, norm) if random_start else x
        x_adv = project(start.to(x), x, eps, norm)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv).to(x.dtype)
            if objective == "ce":
                loss = F.cross_entropy(logits, y, reduction="sum")
            else:
                loss = F.kl_div(F.log_softmax(logits, dim=1), clean, log_target=True, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)  # of x' alone: parameters get no .grad
            x_adv = project(x_adv.detach() + step * direction(gradient, norm), x, eps, norm)
    return x_adv.detach()


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


def random_in_ball(x: Tensor, eps: float, norm: Norm) -> Tensor:
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


def _check(
    x: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    norm: str,
    objective: str,
    clean_logits: Tensor | None,
    start: Tensor | None,
) -> None:
    if norm not in LARGEST:
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if objective not in ("ce", "kl"):
        raise ValueError(f"objective must be 'ce' or 'kl', got {objective!r}")
    check_length("eps", eps, norm)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be a finite number above 0, got {step}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, in [0, 1], got {x.dtype}")
    # One wait for the device an attack; normalised images passed by mistake would weaken it without a word.
    low, high = (limit.item() for limit in x.aminmax()) if x.numel() else (0.0, 1.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"x must be images in [0, 1] (normalise inside the model), got values in [{low:g}, {high:g}]")
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must be shaped as x, {tuple(x.shape)}, got {tuple(start.shape)}")
    if clean_logits is not None and (clean_logits.dim() != 2 or len(clean_logits) != len(x)):
        raise ValueError(f"clean_logits must be ({len(x)}, classes), got {tuple(clean_logits.shape)}")
