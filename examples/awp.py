"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884): train where the loss around the weights is worst.

    with perturbed(model, lambda: criterion(model(x_adv), y), gamma=0.005):
        criterion(model(x_adv), y).backward()
    optimizer.step()

Each weight W moves by gamma * |W| * g / |g| first, where g is the gradient of the loss at W. The gradient to train with
is taken there, and the step is made from W.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def perturbed(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """The weights of the model's layers, moved inside to where the loss is larger; the old ones again afterwards.

    What the authors' code (github.com/csdongxian/AWP) does with a copy of the model and an optimizer for it. Weight
    decay is the one difference: here it acts on the weights, there on the moved ones.

    Args:
        model: the plain module, in train mode, whatever it is wrapped in. Biases and BatchNorms stay as they are, and
            BatchNorm statistics do not notice the call of `loss`.
        loss: of the batch, to be computed with this model. Its scale does not matter, so a GradScaler's may stay in.
            Under DistributedDataParallel, that of this process's part of the batch.
        gamma: how far, as a share of each weight's norm; the authors' choice is 0.005.
    """
    weights = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "weight" in name]
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True, materialize_grads=True)
    if dist.is_available() and dist.is_initialized():
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)  # the sum: its direction is the mean's
        parts = together.split([weight.numel() for weight in weights])
        gradients = tuple(part.view_as(weight) for part, weight in zip(parts, weights, strict=True))
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for buffer, value in statistics:
            buffer.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            length = gradient.norm()
            change = gamma * weight.norm() / (length + 1e-20) * gradient
            weight.add_(torch.where(length.isfinite(), change, 0.0))  # float16 overflows: the scaler skips such a step
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)  # subtracting the change again would leave its rounding behind
