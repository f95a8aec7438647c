"""The frozen teacher of a criterion: copying it, running it in eval mode, moving it with its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from cktat_loss._backends import has_own_forward, hooks, is_compiled, named_arguments
from cktat_loss._deep_copy import frozen_copy, name_of, tensors
from cktat_loss._state_dicts import WRAPPERS


def freeze(teacher: nn.Module, *, copied: bool) -> nn.Module:
    """Return the module that a criterion runs: a deep copy in eval mode without gradients, or the teacher itself.

    Wrappers are taken off before copying. Raises TypeError for TorchScript, and ValueError for a teacher that has no
    values yet, that would not be frozen, or that cannot be copied.
    """
    _check_runnable(teacher)
    if not copied:
        return teacher
    return frozen_copy(unwrap(teacher))


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile's wrapper.

    A wrapper is kept if taking it off could lose something: if it is a subclass, has hooks, or has a ``forward`` of its
    own. Wrappers are recognised by their type and not by an attribute, because a module's ``__getattr__`` may pass
    attributes on.
    """
    if hooks(module):
        return module
    if type(module) in WRAPPERS and "forward" not in vars(module):
        return unwrap(module.module)  # type: ignore[arg-type]
    if is_compiled(module) and not has_own_forward(module):
        return unwrap(module._orig_mod)  # type: ignore[arg-type]
    return module


def run(teacher: nn.Module, x: Any) -> Any:
    """Return ``teacher(x)`` in eval mode under no_grad, with ``x`` as it is. Modes are restored afterwards."""
    training = [module for module in teacher.modules() if module.training]  # none in a copy, unless the user set it
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            return teacher(x)
    except Exception as error:
        if hint := _dtype_hint(teacher, x):
            error.args = (f"{error}\n{hint}", *error.args[1:])
        raise
    finally:
        for module in training:
            module.training = True


def move(teacher: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply ``fn`` of ``nn.Module._apply`` to the teacher's tensors and keep their values.

    ``.to()`` keeps values by itself. ``.to_empty()`` returns uninitialised memory, and the caller's ``load_state_dict``
    would not refill the teacher, because no state_dict holds it.
    """

    def keep_values(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved is not tensor:
            with torch.no_grad():
                moved.copy_(tensor)
        return moved

    teacher._apply(keep_values)  # type: ignore[no-untyped-call]


def _check_runnable(teacher: nn.Module) -> None:
    """Refuse a teacher that has no values, cannot be put into eval mode, or is TorchScript."""
    for name, tensor in tensors(teacher):
        if is_lazy(tensor):
            raise ValueError(f"teacher must have values, but {name} is lazy: run a forward pass first")
        if tensor.is_meta:
            raise ValueError(f"teacher must have values, but {name} is on the meta device")
    for module in teacher.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"teacher must not be TorchScript, got {name_of(module)}: pass teacher_logits= instead")
        if isinstance(module, fx.GraphModule) and (target := _train_mode_call(module)):
            raise ValueError(
                f"teacher must be in eval mode, but a graph has train mode built in ({target}): export it in eval mode"
            )


def _train_mode_call(module: fx.GraphModule) -> str | None:
    """Return the first call of a graph that behaves as in train mode whatever ``module.training`` says, or None."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        arguments = named_arguments(node)
        is_training = arguments.get("train") is True or arguments.get("training") is True
        # Without running statistics a BatchNorm is the same in both modes, and says that it trains.
        is_training = is_training and arguments.get("running_mean", ...) is not None
        # InstanceNorm with running statistics, and attention, have other arguments for the mode.
        updates_statistics = arguments.get("use_input_stats") is True and arguments.get("running_mean") is not None
        dropout_rate = arguments.get("dropout_p")
        if is_training or updates_statistics or (isinstance(dropout_rate, float) and dropout_rate > 0):
            return str(node.target)
    return None


def _dtype_hint(teacher: nn.Module, x: Any) -> str | None:
    """Describe how the dtype of ``x`` differs from all floating dtypes of the teacher, or return None.

    There is no hint for int32 and int64, because an embedding takes these as they are.
    """
    weights: list[Tensor] = [*teacher.parameters()] or [*teacher.buffers()]
    dtypes = {tensor.dtype for tensor in weights if tensor.is_floating_point()}
    if not isinstance(x, Tensor) or not dtypes or x.dtype in (*dtypes, torch.int32, torch.int64):
        return None
    has = ", ".join(sorted(map(str, dtypes))).replace("torch.", "")
    return f"x is {str(x.dtype).removeprefix('torch.')}, the teacher has {has}: cast x, or use autocast"
