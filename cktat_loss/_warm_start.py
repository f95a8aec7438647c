"""Warm start: a clean teacher's weights copied into a student in place, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from cktat_loss import _checks
from cktat_loss._state_dicts import find_weights, pair


@dataclass(frozen=True)
class WarmStartReport:
    """What ``warm_start`` did, in names of parameters and buffers without wrappers."""

    copied: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        counts = ", ".join(f"{group} {len(names)}" for group, names in vars(self).items())
        return f"{counts} (non-persistent buffers are never copied)" + _listed(
            missing=self.missing, unexpected=self.unexpected, mismatched=self.mismatched
        )


def warm_start(
    student: nn.Module,
    teacher: nn.Module | Mapping[str, object] | str | os.PathLike[str],
    *,
    strict: bool = True,
) -> WarmStartReport:
    """Copy the teacher's parameters and buffers into the student in place, all of them or none.

    An optimizer made before stays valid: values are cast to the student's dtype and device and written into its own
    tensors; train/eval modes and ``requires_grad`` stay as they are. DataParallel, DistributedDataParallel,
    torch.compile and AveragedModel are seen through on both sides, nested in any order. Weights tied in the student
    stay tied, and one of their names in the teacher is enough. ``n_averaged`` and ``_extra_state`` aren't weights and
    are left out. Load hooks don't run.

    Only what is in a state_dict is copied. Non-persistent buffers are in none: the student keeps its own, and the
    report doesn't list them. A BatchNorm's ``num_batches_tracked`` may be absent from the teacher, as in files made
    before PyTorch 0.4.1: the student keeps its own and the report doesn't list it. The names of the old ``weight_norm``
    fit a student that has ``torch.nn.utils.parametrizations.weight_norm``.

    Under DistributedDataParallel every rank calls it. A model to be sharded is warm-started before wrapping.

    Args:
        student: the model to write into.
        teacher: the model to read from; or its state_dict; or a checkpoint with either under exactly one of
            ``state_dict``, ``model_state_dict``, ``model_state``, ``model``, ``net``, ``network``, ``weights``,
            ``teacher``, ``ema``, ``model_ema``, ``ema_state_dict``, ``state_dict_ema``; or the path of one of these in
            a ``.pt`` or ``.pth`` (read with ``weights_only=True``) or ``.safetensors`` file.
        strict: raise unless names, shapes and kinds of dtype all agree; False copies what matches.

    Returns:
        The names copied, missing from the teacher, unexpected in it, and mismatched in shape or kind of dtype.

    Raises:
        TypeError: an argument of the wrong type, a sharded model, an entry that isn't a tensor.
        ValueError: weights that don't agree (strict) or of which none does; memory that both share; lazy, meta or
            unwritable tensors; a file or checkpoint without weights, or with several sets of them.
        FileNotFoundError: no file at that path.
        ImportError: a ``.safetensors`` file, but no safetensors package.

    Examples:
        >>> import torch
        >>> from cktat_loss import warm_start
        >>> teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> print(warm_start(student, torch.nn.DataParallel(teacher)))
        copied 2, missing 0, unexpected 0, mismatched 0 (non-persistent buffers are never copied)
        >>> torch.equal(student.weight, teacher.weight)
        True

    Source: CKTAT (arXiv 2504.00038), the initialisation of section 4.2.
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
    _checks.flag("strict", strict)
    targets, sources = find_weights("student", student), find_weights("teacher", teacher)
    written = {_memory(target) for target in targets.values()}
    shared = [name for name, source in sources.items() if _memory(source) in written]
    if student is teacher or shared:
        raise ValueError(f"teacher must share no memory with student, but shares {', '.join(shared) or 'all'}")

    pairs, unexpected = pair(targets, sources)
    values: dict[Hashable, tuple[str, Tensor]] = {}  # by place, since tied weights have one
    mismatched: dict[str, str] = {}
    for name, source in pairs.items():
        target = targets[name]
        if _form(target) != _form(source):
            mismatched[name] = f"{name} (teacher {_described(source)}, student {_described(target)})"
            continue
        value = source.detach().to(target.device, target.dtype)  # here, since it can fail, and a write must not
        first, other = values.setdefault(_place(target), (name, value))
        if other is not value and not torch.allclose(other, value, rtol=0, atol=0, equal_nan=True):
            mismatched[name] = f"{name} (tied to {first} in the student, different in the teacher)"

    fed = {name for name, target in targets.items() if _place(target) in values}
    missing = tuple(name for name in targets if name not in pairs and name not in fed and not _spare(name, pairs))
    copied = tuple(name for name in targets if name in fed and name not in mismatched)
    if (strict or not copied) and (missing or unexpected or mismatched):
        misfits = _listed(missing=missing, unexpected=unexpected, mismatched=mismatched.values())
        raise ValueError(f"teacher doesn't fit student, nothing was copied:{misfits}")
    _check_writable(student, {first: (targets[first], value) for first, value in values.values()})
    with torch.no_grad():
        for first, value in values.values():
            targets[first].copy_(value)
    return WarmStartReport(copied, missing, unexpected, tuple(mismatched))


def _check_writable(student: nn.Module, writes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise if a write would fail or be lost. Writes nothing into the student.

    Args:
        writes: each target with the value that it is to get, by name.
    """
    own = {_place(tensor) for tensor in chain(student.parameters(), student.buffers())}
    for name, (target, value) in writes.items():
        if _place(target) not in own and target.numel():
            raise TypeError(f"student: {name} in its state_dict must be one of its parameters or buffers")
        why = ""
        if target.is_inference() and not torch.is_inference_mode_enabled():
            why = "it was made in inference mode"
        elif target.layout is torch.strided and _overlaps(target):
            why = "several of its elements share memory"
        else:
            try:
                target.detach().clone().copy_(value)
            except Exception as error:  # A tensor subclass may raise anything.
                why = str(error)
        if why:
            raise ValueError(f"student: {name} must be writable: {why}")


def _overlaps(tensor: Tensor) -> bool:
    """True if an expanded dimension makes elements share memory, which PyTorch refuses to write to."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _spare(name: str, pairs: Mapping[str, Tensor]) -> bool:
    """True for the counter of a BatchNorm of which the teacher has the statistics."""
    owner, dot, kind = name.rpartition(".")
    return kind == "num_batches_tracked" and f"{owner}{dot}running_mean" in pairs


def _form(tensor: Tensor) -> tuple[object, ...]:
    """Shape, and what no cast may bridge: complex to real, float to integer, quantised to plain, sparse to dense."""
    return tensor.shape, tensor.layout, tensor.is_quantized, tensor.is_complex(), tensor.is_floating_point()


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout}".replace("torch.", "")


def _memory(tensor: Tensor) -> int:
    """Equal for tensors that share a storage."""
    pointer = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    return pointer or id(tensor)


def _place(tensor: Tensor) -> Hashable:
    """Equal for tied tensors; different for the views of one storage that an LSTM's weights are on a GPU."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return _memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _listed(**groups: Iterable[str]) -> str:
    lists = {group: ", ".join(names) for group, names in groups.items()}
    return "".join(f"\n  {group}: {names}" for group, names in lists.items() if names)
