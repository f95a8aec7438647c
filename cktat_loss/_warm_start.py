"""Copy a clean teacher's weights into a student in place."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from cktat_loss import _checks
from cktat_loss._backends import ORDINARY_TYPES
from cktat_loss._state_dicts import find_weights, memory, pair


@dataclass(frozen=True)
class WarmStartReport:
    """The result of ``warm_start``: names of parameters and buffers, without the prefixes of wrappers.

    Attributes:
        copied: the names in the student that now have the teacher's values.
        missing: the names in the student that the teacher doesn't have.
        unexpected: the names in the teacher that the student doesn't have.
        mismatched: the names in both that weren't copied, because the shapes differ, because only one of the tensors
            is complex, floating, quantised or sparse, or because the student ties what is different in the teacher.
    """

    copied: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        counts = ", ".join(f"{group} {len(names)}" for group, names in vars(self).items())
        return f"{counts} (non-persistent buffers are never copied)" + _list(
            missing=self.missing, unexpected=self.unexpected, mismatched=self.mismatched
        )


def warm_start(
    student: nn.Module,
    teacher: nn.Module | Mapping[str, object] | str | os.PathLike[str],
    *,
    strict: bool = True,
) -> WarmStartReport:
    """Copy the teacher's parameters and buffers into the student in place, all of them or none.

    The values are cast to the student's dtype and device, and written into its own tensors. So an optimizer that was
    made before stays valid. Train/eval modes and ``requires_grad`` stay as they are. Load hooks don't run.

    DataParallel, DistributedDataParallel, torch.compile and AveragedModel may be around either model, nested in any
    order. Weights that are tied in the student stay tied, and the teacher needs only one of their names. Under
    DistributedDataParallel call it on every rank. Call it before a model is sharded.

    Only what is in a state_dict is copied:

    - Buffers that are not persistent are in no state_dict. The student keeps its own, and the report doesn't list them.
    - ``n_averaged`` and ``_extra_state`` are no weights and are left out.
    - A BatchNorm's ``num_batches_tracked`` may be absent from the teacher, as in files made before PyTorch 0.4.1. The
      student keeps its own, and the report doesn't list it.
    - ``weight_g`` and ``weight_v`` of the old ``weight_norm`` are copied into a student that uses
      ``torch.nn.utils.parametrizations.weight_norm``.

    Args:
        student: the model to write into.
        teacher: the model to read from, its state_dict, a checkpoint, or the path of a file with a state_dict or
            checkpoint. A checkpoint is a dict that has a model or state_dict under exactly one of ``state_dict``,
            ``model_state_dict``, ``model_state``, ``model``, ``net``, ``network``, ``weights``, ``teacher``, ``ema``,
            ``model_ema``, ``ema_state_dict``, ``state_dict_ema``. A file is a ``.pt`` or ``.pth``, which is read with
            ``weights_only=True``, or a ``.safetensors``.
        strict: raise if anything is missing, unexpected or mismatched. False copies what fits.

    Returns:
        The names that were copied, missing, unexpected and mismatched, as ``WarmStartReport`` defines them.

    Raises:
        TypeError: an argument has the wrong type, a model is sharded, or an entry of a state_dict is no tensor.
        ValueError: the weights don't fit (with ``strict``), or none of them does; or student and teacher share memory;
            or weights of the student overlap in memory and are different in the teacher;
            or a tensor is lazy, on the meta device or can't be written; or a file is damaged or of another kind; or a
            checkpoint has no weights, or several sets of them.
        FileNotFoundError: there is no file at that path.
        ImportError: the file is a ``.safetensors``, and the safetensors package is not installed.

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
    written = {memory(target) for target in targets.values()}
    shared = [name for name, source in sources.items() if memory(source) in written]
    if student is teacher or shared:
        raise ValueError(f"teacher must share no memory with student, but shares {', '.join(shared) or 'all'}")

    pairs, unexpected = pair(targets, sources)
    # The first name of each region, with the value to write there. Tied weights are one region.
    values: dict[Hashable, tuple[str, Tensor]] = {}
    mismatched: dict[str, str] = {}
    for name, source in pairs.items():
        target = targets[name]
        if _form(target) != _form(source):
            mismatched[name] = f"{name} (teacher {_describe(source)}, student {_describe(target)})"
            continue
        # Cast everything before the first write: a cast can fail, and a failure must leave the student unchanged.
        value = source.detach().to(target.device, target.dtype)
        first, other = values.setdefault(_region(target), (name, value))
        if other is not value and not _equal(other, value):
            mismatched[name] = f"{name} (tied to {first} in the student, different in the teacher)"

    filled = {name for name, target in targets.items() if _region(target) in values}
    unfilled = (name for name in targets if name not in pairs and name not in filled)
    missing = tuple(name for name in unfilled if not _is_optional(name, pairs))
    copied = tuple(name for name in targets if name in filled and name not in mismatched)
    if (strict or not copied) and (missing or unexpected or mismatched):
        misfits = _list(missing=missing, unexpected=unexpected, mismatched=mismatched.values())
        raise ValueError(f"teacher doesn't fit student, nothing was copied:{misfits}")
    writes = {first: (targets[first], value) for first, value in values.values()}
    _check_writable(student, writes)
    with torch.no_grad():
        for target, value in writes.values():
            target.copy_(value)
    return WarmStartReport(copied, missing, unexpected, tuple(mismatched))


def _check_writable(student: nn.Module, writes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise if a write would fail or be lost. Writes nothing into the student.

    Args:
        writes: each target with the value that it is to get, by name.
    """
    own = {_region(tensor) for tensor in chain(student.parameters(), student.buffers())}
    for name, (target, value) in writes.items():
        if _region(target) not in own and target.numel():
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
    if lost := _lost_write(writes):
        raise ValueError(f"teacher doesn't fit student, nothing was copied: {lost} shares elements with other weights")


def _lost_write(writes: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
    """Return the name of a target that another write would overwrite in part, because they share elements."""
    names_of = defaultdict(list)  # by storage
    for name, (target, _) in writes.items():
        if target.layout is torch.strided and type(target) in ORDINARY_TYPES and target.numel():
            names_of[memory(target)].append(name)
    for names in names_of.values():
        if len(names) == 1:
            continue
        # Write all values into a copy of the storage, then compare.
        storage = writes[names[0]][0].untyped_storage().clone()  # type: ignore[no-untyped-call]
        views = {}
        for name in names:
            target, value = writes[name]
            place = target.storage_offset(), target.shape, target.stride()
            views[name] = target.detach().new_empty(0).set_(storage, *place).copy_(value)
        for name, view in views.items():
            if not _equal(view, writes[name][1]):
                return name
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    """True if all elements are equal. NaN is equal to NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _overlaps(tensor: Tensor) -> bool:
    """True if an expanded dimension makes elements share memory, which PyTorch refuses to write to."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_optional(name: str, pairs: Mapping[str, Tensor]) -> bool:
    """True for a BatchNorm's ``num_batches_tracked``, if its ``running_mean`` is in ``pairs``: old files lack it."""
    owner, dot, kind = name.rpartition(".")
    return kind == "num_batches_tracked" and f"{owner}{dot}running_mean" in pairs


def _form(tensor: Tensor) -> tuple[object, ...]:
    """Return what must be equal for a copy: the shape, the layout, and the dtype as far as a cast may not change it.

    A cast from complex to real, from floating to integer or from quantised to plain would lose the meaning.
    """
    return tensor.shape, tensor.layout, tensor.is_quantized, tensor.is_complex(), tensor.is_floating_point()


def _describe(tensor: Tensor) -> str:
    """Describe shape, dtype and layout for an error message."""
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout}".replace("torch.", "")


def _region(tensor: Tensor) -> Hashable:
    """Return a key that is equal for tied tensors.

    Tensors of one storage are not always tied: on a GPU the weights of an LSTM are different views of one storage.
    """
    if tensor.layout is not torch.strided:
        return id(tensor)
    return memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _list(**groups: Iterable[str]) -> str:
    """List the names of each group that isn't empty, one group per line."""
    lists = {group: ", ".join(names) for group, names in groups.items()}
    return "".join(f"\n  {group}: {names}" for group, names in lists.items() if names)
