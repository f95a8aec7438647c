"""Warm start: copy a clean teacher's weights into a student in place, whatever either is wrapped in."""

import os
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cktat_loss.wrappers import WRAPPERS

_Path = tuple[str, ...]

# Where training scripts keep the weights in a checkpoint.
_ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "teacher"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema"),
)


@dataclass(frozen=True)
class WarmStartReport:
    """What `warm_start` did, in names of parameters and buffers free of wrappers."""

    copied: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        counts = ", ".join(f"{group} {len(names)}" for group, names in vars(self).items())
        return counts + _listed(missing=self.missing, unexpected=self.unexpected, mismatched=self.mismatched)


def warm_start(
    student: nn.Module,
    teacher: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    *,
    strict: bool = True,
) -> WarmStartReport:
    """Copy the teacher's parameters and buffers into the student in place, all of them or none.

    An optimizer made before stays valid: values are cast to the student's dtype and device and written into
    its own tensors; train/eval modes and `requires_grad` stay as they are. DataParallel,
    DistributedDataParallel, torch.compile and AveragedModel are seen through on both sides, nested in any
    order. Weights tied in the student stay tied, and one of their names in the teacher is enough. Not
    weights, and so left out: `n_averaged` and `_extra_state`. Load hooks don't run.

    Under DistributedDataParallel every rank calls it. A model to be sharded is warm-started before wrapping.

    Args:
        student: the model to write into.
        teacher: the model to read from; or its state_dict; or a checkpoint with either under exactly one of
            `state_dict`, `model_state_dict`, `model_state`, `model`, `net`, `network`, `weights`, `teacher`,
            `ema`, `model_ema`, `ema_state_dict`, `state_dict_ema`; or the path of one of these in a `.pt` or
            `.pth` (read with `weights_only=True`) or `.safetensors` file.
        strict: raise unless names, shapes and kinds of dtype all agree; False copies what matches.

    Returns:
        The names copied, missing from the teacher, unexpected in it and mismatched.

    Raises:
        TypeError: an argument of the wrong type, a sharded model, an entry that isn't a tensor.
        ValueError: weights that don't agree (strict) or of which none does; memory that both share; lazy,
            meta or unwritable tensors; a file or checkpoint without weights, or with several sets of them.
        FileNotFoundError: no file at that path.
        ImportError: a `.safetensors` file, but no safetensors package.

    Example:
        >>> import torch
        >>> from cktat_loss import warm_start
        >>> teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> print(warm_start(student, torch.nn.DataParallel(teacher)))
        copied 2, missing 0, unexpected 0, mismatched 0
        >>> torch.equal(student.weight, teacher.weight)
        True

    Source: CKTAT (arXiv 2504.00038), the initialisation of section 4.2.
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False, got {strict!r}")
    targets, sources = _of_module("student", student), _of_teacher(teacher)
    _check_values("student", targets)
    _check_values("teacher", sources)
    _check_writable(student, targets)
    written = {_memory(target) for target in targets.values()}
    shared = [name for name, source in sources.items() if _memory(source) in written]
    if student is teacher or shared:
        raise ValueError(f"teacher must share no memory with student, but shares {', '.join(shared) or 'all'}")

    pairs, unexpected = _pair(targets, sources)
    plan: dict[Hashable, tuple[str, Tensor, Tensor]] = {}  # by place, so that tied weights are written once
    mismatched: dict[str, str] = {}
    for name, key in pairs.items():
        target, source = targets[name], sources[key].detach()
        if target.shape != source.shape or _kind(target) != _kind(source):
            mismatched[name] = f"{name} (teacher {_described(source)}, student {_described(target)})"
            continue
        source = source.to(target.device, target.dtype)  # here, since it can fail, and a write must not
        first, _, value = plan.setdefault(_place(target), (name, target, source))
        if value is not source and not torch.allclose(value, source, rtol=0, atol=0, equal_nan=True):
            mismatched[name] = f"{name} (tied to {first} in the student, different in the teacher)"

    fed = {name for name, target in targets.items() if _place(target) in plan}
    missing = tuple(name for name in targets if name not in pairs and name not in fed)
    copied = tuple(name for name in targets if name in fed and name not in mismatched)
    if (strict or not copied) and (missing or unexpected or mismatched):
        misfits = _listed(missing=missing, unexpected=unexpected, mismatched=mismatched.values())
        raise ValueError(f"teacher doesn't fit student, nothing was copied:{misfits}")
    with torch.no_grad():
        for _, target, value in plan.values():
            target.copy_(value)
    return WarmStartReport(copied, missing, unexpected, tuple(mismatched))


def _of_module(argument: str, module: nn.Module) -> dict[str, Any]:
    """The module's state_dict, its tensors themselves, under names without wrappers."""
    if any(map(_is_sharded, chain(module.modules(), module.parameters(), module.buffers()))):
        raise TypeError(f"{argument} must not be sharded (FSDP, DTensor): call warm_start before wrapping")
    wrappers = {
        tuple(path.split(".") if path else ())
        for path, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, WRAPPERS)
    }
    state = _weights(module.state_dict(keep_vars=True))
    return {clean: state[name] for clean, name in _unwrapped(state, wrappers).items()}


def _of_teacher(teacher: object) -> dict[str, Any]:
    if isinstance(teacher, (str, os.PathLike)):
        teacher = _load(Path(teacher))
    if isinstance(teacher, nn.Module):
        return _of_module("teacher", teacher)
    if not isinstance(teacher, Mapping):
        kinds = "an nn.Module, a state_dict, a checkpoint or a path"
        raise TypeError(f"teacher must be {kinds}, got {type(teacher).__name__}")
    if all(isinstance(name, str) for name in teacher):
        weights = _weights(teacher)
        if all(isinstance(value, Tensor) for value in weights.values()):
            return weights
    found = [name for name in _ENTRIES if isinstance(teacher.get(name), (Mapping, nn.Module))]
    if len(found) == 1:
        return _of_teacher(teacher[found[0]])
    if found:  # which of them is the teacher is never guessed
        raise ValueError(f"teacher must hold one set of weights, got {', '.join(found)}: pass the one you mean")
    wanted, got = ", ".join(_ENTRIES), ", ".join(map(str, teacher))
    raise ValueError(f"teacher must hold only tensors, or weights under one of {wanted}, got {got}")


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"teacher must be a file, but there is none at {str(path)!r}")
    try:
        match path.suffix.lower():
            case ".pt" | ".pth":
                return torch.load(path, map_location="cpu", weights_only=True)
            case ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
    except ImportError as error:
        raise ImportError(f'pip install "cktat-loss[safetensors]" to read teacher={str(path)!r}') from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a broken file makes its reader raise nearly anything
        wanted = "a state_dict or checkpoint that can be read (.pt and .pth: with weights_only=True)"
        raise ValueError(f"teacher must be {wanted}, got {str(path)!r}") from error
    raise ValueError(f"teacher must be a .pt, .pth or .safetensors file, got {str(path)!r}")


def _pair(student: Collection[str], teacher: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Student's names -> teacher's names of the same weights, and what is left over in the teacher.

    Names alone can't tell a wrapper's `module` from a child that somebody called so. Both readings are tried,
    on both sides alike, and the one that leaves fewer names over is taken.
    """
    as_they_are = _unwrapped(student, ()), _unwrapped(teacher, ())
    bare = _unwrapped(student, None), _unwrapped(teacher, None)
    ours, theirs = min(as_they_are, bare, key=lambda reading: len(reading[0].keys() ^ reading[1].keys()))
    pairs = {name: theirs[clean] for clean, name in ours.items() if clean in theirs}
    return pairs, tuple(clean for clean in theirs if clean not in ours)


def _unwrapped(names: Collection[str], wrappers: Collection[_Path] | None) -> dict[str, str]:
    """Names without wrappers -> names. `wrappers`: whose `module` is a wrapper's; None: everyone's.

    Only an only child is dropped, so no two names become one.
    """
    paths = {name: tuple(name.split(".")) for name in names}
    leaves = set(paths.values())
    children: defaultdict[_Path, set[str]] = defaultdict(set)
    for path in leaves:
        for depth, child in enumerate(path):
            children[path[:depth]].add(child)

    def is_dropped(path: _Path) -> bool:
        child = path[-1]
        inner = child == "_orig_mod" or (child == "module" and (wrappers is None or path[:-1] in wrappers))
        return inner and path not in leaves and children[path[:-1]] in ({child}, {"module", "n_averaged"})

    clean = {}
    for name, path in paths.items():
        steps = [path[: depth + 1] for depth in range(len(path))]
        if not any(step[-1] == "n_averaged" and is_dropped((*step[:-1], "module")) for step in steps):
            clean[".".join(step[-1] for step in steps if not is_dropped(step))] = name
    return clean


def _weights(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name.split(".")[-1] != "_extra_state"}


def _check_values(argument: str, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}: {name} must be a tensor, got {type(tensor).__name__}")
        if _is_sharded(tensor):
            raise TypeError(f"{argument}: {name} must not be sharded: call warm_start before wrapping")
        if is_lazy(tensor):
            raise ValueError(f"{argument}: {name} must have values, but is lazy: run a forward pass first")
        if tensor.is_meta:
            raise ValueError(f"{argument}: {name} must have values, but is on the meta device")


def _check_writable(student: nn.Module, targets: Mapping[str, Tensor]) -> None:
    """Refuse what would fail, or be lost, when half of the weights are written."""
    own = {id(tensor) for tensor in chain(student.parameters(), student.buffers())}
    for name, target in targets.items():
        if id(target) not in own:
            raise TypeError(f"student: {name} in its state_dict must be one of its parameters or buffers")
        if target.is_inference():
            raise ValueError(f"student: {name} must be writable, but is an inference tensor")
        dims = zip(target.shape, target.stride(), strict=True) if target.layout is torch.strided else ()
        if any(size > 1 and stride == 0 for size, stride in dims):
            raise ValueError(f"student: {name} must be writable, but is expanded: clone it")


def _is_sharded(thing: object) -> bool:
    # By name: importing these classes takes a second, and whoever has one has paid it.
    names = ("DTensor", "ShardedTensor", "FSDPModule", "FullyShardedDataParallel")
    kinds = type(thing).__mro__
    return any(kind.__name__ in names and kind.__module__.startswith("torch.distributed") for kind in kinds)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What no cast may bridge: complex to real, float to integer, quantised to plain, sparse to dense."""
    return tensor.layout, tensor.is_quantized, tensor.is_complex(), tensor.is_floating_point()


def _memory(tensor: Tensor) -> int:
    pointer = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    return pointer or id(tensor)


def _place(tensor: Tensor) -> Hashable:
    """Equal for tied tensors; different for the views of one storage that an LSTM's weights are on a GPU."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return _memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def _described(tensor: Tensor) -> str:
    kind = f"{tensor.dtype}" if tensor.layout is torch.strided else f"{tensor.dtype} {tensor.layout}"
    return f"{tuple(tensor.shape)} {kind.removeprefix('torch.')}"


def _listed(**groups: Iterable[str]) -> str:
    lists = {group: ", ".join(names) for group, names in groups.items()}
    return "".join(f"\n  {group}: {names}" for group, names in lists.items() if names)
