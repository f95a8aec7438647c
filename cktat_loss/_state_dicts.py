"""Find the weights of a module, state_dict, checkpoint or file, and pair them by name.

Wrappers such as DistributedDataParallel put a prefix before the names. The functions here remove it.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

T = TypeVar("T")

# These wrappers keep the model as their child `module`. torch.compile keeps the model as `_orig_mod`.
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)

# The keys under which training scripts keep the weights in a checkpoint.
ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "teacher"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema"),
)


def find_weights(argument: str, source: object) -> dict[str, Tensor]:
    """Return the weights of a module, state_dict, checkpoint or file by name, without copying.

    The names of a module's weights have no wrappers' prefixes. The names in a state_dict are left as they are.

    Args:
        argument: the name of ``source`` in error messages.
        source: whatever ``warm_start`` takes as ``teacher``.

    Raises:
        TypeError, ValueError, OSError, ImportError: as ``warm_start`` does. Lazy and meta tensors are a ValueError.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read(argument, Path(source))
    if isinstance(source, nn.Module):
        if any(map(_is_sharded, source.modules())):
            raise TypeError(f"{argument} must not be sharded: call warm_start before wrapping")
        return _checked(argument, _unwrapped(_state(argument, source), source))
    if not isinstance(source, Mapping):
        kinds = "an nn.Module, a state_dict, a checkpoint or a path"
        raise TypeError(f"{argument} must be {kinds}, got {type(source).__name__}")
    others = {name: value for name, value in source.items() if not _is_entry(name, value)}
    if not others:
        return _checked(argument, source)
    found = [name for name in ENTRIES if _holds_weights(source.get(name))]
    # Tensors with names as in a state_dict are another set of weights. Others may be a state of the random generator.
    beside = [name for name, value in source.items() if isinstance(value, Tensor) and "." in str(name)]
    if len(found) == 1 and not beside:
        return find_weights(argument, source[found[0]])
    if found:  # Do not guess.
        found += beside[:1]
        raise ValueError(f"{argument} must hold one set of weights, got {', '.join(found)}: pass the one you mean")
    wanted, got = ", ".join(ENTRIES), ", ".join(f"{name} ({type(value).__name__})" for name, value in others.items())
    raise ValueError(f"{argument} must hold only tensors, or weights under one of {wanted}, got {got}")


def pair(student: Collection[str], teacher: Mapping[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """Return the teacher's value for each name of the student, and the teacher's names that the student doesn't have.

    Names alone cannot tell the ``module`` of a wrapper from a child module of that name, and a wrapper may be a class
    that is not known here. So the names of student and teacher are read twice, once with ``module`` as a prefix and
    once as a child. The reading in which more names agree is used.

    Args:
        student: the student's names.
        teacher: the teacher's values by name.

    Returns:
        The teacher's values by the student's names, and the unexpected names without wrappers' prefixes.
    """
    names = {name: name for name in student}
    readings = [(_unwrapped(names, by_name=way), _unwrapped(teacher, by_name=way)) for way in (False, True)]
    readings = [(ours, _with_new_names(theirs, ours)) for ours, theirs in readings]
    ours, theirs = max(readings, key=lambda reading: len(reading[0].keys() & reading[1].keys()))
    pairs = {name: theirs[clean] for clean, name in ours.items() if clean in theirs}
    return pairs, tuple(clean for clean in theirs if clean not in ours)


def _unwrapped(state: Mapping[str, T], owner: object = None, *, by_name: bool = False) -> dict[str, T]:
    """Remove the prefixes of wrappers from the names of a state_dict.

    ``_orig_mod`` is always a prefix. ``module`` is a prefix if the owner is a wrapper, or if ``by_name``. A prefix is
    removed only if every other name at its level shares it (``n_averaged`` aside), so two names never become equal.

    Args:
        owner: the module whose state_dict it is. None if only the names are known.
        by_name: treat every ``module`` as a wrapper's.
    """
    children: defaultdict[str, dict[str, T]] = defaultdict(dict)
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        children[first + dot][rest] = value
    for child in children:
        if child.endswith("."):
            # Not getattr: a module may pass unknown names on to another one. A ScriptModule's _modules has no get().
            inner = dict(owner._modules.items()).get(child[:-1]) if isinstance(owner, nn.Module) else None
            children[child] = _unwrapped(children[child], inner, by_name=by_name)
    match sorted(children):
        case ["_orig_mod."]:
            return children["_orig_mod."]
        case ["module."] | ["module.", "n_averaged"] if by_name or isinstance(owner, WRAPPERS):
            return children["module."]
    return {child + name: value for child, inside in children.items() for name, value in inside.items()}


def _with_new_names(theirs: Mapping[str, T], ours: Collection[str]) -> dict[str, T]:
    """Rename the ``weight_g`` and ``weight_v`` of the old ``weight_norm`` if the student has the new one's names."""
    renamed = {}
    for name, value in theirs.items():
        new = re.sub(r"(\w+)_([gv])$", lambda old: f"parametrizations.{old[1]}.original{'gv'.index(old[2])}", name)
        renamed[new if new in ours and new not in theirs and name not in ours else name] = value
    return renamed


def _state(argument: str, module: nn.Module) -> Mapping[str, object]:
    """Return the module's state_dict, if possible with the parameters and buffers themselves.

    A user's own ``state_dict`` may not take ``keep_vars``. Its tensors are then usually detached ones that share memory
    with the parameters.
    """
    try:
        state = module.state_dict(keep_vars=True)
    except TypeError:
        try:
            state = module.state_dict()
        except TypeError as error:
            wanted = "a state_dict that can be called as nn.Module's (destination, prefix, keep_vars)"
            raise TypeError(f"{argument}: each of its modules must have {wanted}: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"{argument}: its state_dict() must return tensors by name, got {type(state).__name__}")
    return state


def _holds_weights(value: object) -> bool:
    """True for a module, and for a mapping that holds a tensor or a module at any depth."""
    if isinstance(value, Mapping):
        return any(isinstance(entry, Tensor) or _holds_weights(entry) for entry in value.values())
    return isinstance(value, nn.Module)


def _read(argument: str, path: Path) -> object:
    """Load the contents of a file to the CPU. Runs no code from the file."""
    place = repr(str(path))
    if not path.is_file():
        why = f"{place} is a directory" if path.is_dir() else f"there is none at {place}"
        raise FileNotFoundError(f"{argument} must be a file, but {why}")
    suffix = path.suffix.lower()
    hint = f"got {place}: load it yourself and pass the dict"
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{argument} must be a .pt, .pth or .safetensors file, {hint}")
    with path.open("rb") as file:  # If this fails, the OSError names the path.
        zipped = file.read(4) == b"PK\x03\x04"
    if suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"pip install safetensors to read {argument} {place}") from error
    elif zipped and (damage := _damage(path)):
        raise ValueError(f"{argument} must be a complete and undamaged file, got {place}: {damage}")
    try:
        if suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A broken file makes its reader raise nearly anything, OSError and MemoryError too.
        wanted = "a state_dict or checkpoint that can be read (.pt and .pth: with weights_only=True)"
        raise ValueError(f"{argument} must be {wanted}, {hint}") from error


def _damage(path: Path) -> str:
    """Describe the first damage to a zip file. The description of a sound file is empty.

    ``torch.load`` doesn't verify checksums. After ``torch.serialization.set_crc32_options(False)``, ``torch.save``
    writes zeros in their place, and there is nothing to verify.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
            # torch.load takes an entry with this attribute for a directory, and leaves the memory uninitialised.
            directories = [entry.filename for entry in entries if entry.external_attr & 0x10 and not entry.is_dir()]
    except Exception as error:  # A damaged archive makes zipfile raise more than BadZipFile.
        return f"it is cut off or damaged ({error})"
    if directories:
        return f"{directories[0]} is marked as a directory"
    return f"{damaged} doesn't have its checksum" if damaged else ""


def _checked(argument: str, state: Mapping[str, object]) -> dict[str, Tensor]:
    """Return the state without extra state. Raise if an entry is not a tensor with values of its own."""
    weights = {}
    for name, tensor in state.items():
        if _is_extra(name):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}: {name} must be a tensor, got {type(tensor).__name__}")
        if _is_sharded(tensor):
            raise TypeError(f"{argument}: {name} must not be sharded: call warm_start before wrapping")
        if is_lazy(tensor):
            raise ValueError(f"{argument}: {name} must have values, but is lazy: run a forward pass first")
        if tensor.is_meta:
            raise ValueError(f"{argument}: {name} must have values, but is on the meta device")
        if not _has_memory(tensor):
            raise TypeError(f"{argument}: {name} must be a tensor with memory of its own, got {type(tensor).__name__}")
        weights[name] = tensor
    return weights


def _is_entry(name: object, value: object) -> bool:
    """True if a state_dict may have this entry: a tensor or a module's extra state under a string."""
    return isinstance(name, str) and (isinstance(value, Tensor) or _is_extra(name))


def _is_extra(name: str) -> bool:
    """True if the name is that of a module's extra state, which may be any object and is no weight."""
    return name.rpartition(".")[2] == "_extra_state"


def memory(tensor: Tensor) -> int:
    """Return a number that is equal for tensors of one storage. A tensor without a storage of its own has its id."""
    pointer = 0
    if tensor.layout is torch.strided and _has_memory(tensor):
        pointer = tensor.untyped_storage().data_ptr()
    return pointer or id(tensor)


def _has_memory(tensor: Tensor) -> bool:
    """False for a tensor subclass made of other tensors, for instance a quantised one of torchao's."""
    if tensor.layout is torch.strided:
        try:
            tensor.untyped_storage().data_ptr()
        except RuntimeError:
            return False
    return True


def _is_sharded(thing: object) -> bool:
    """True for a module or tensor that is sharded over several processes."""
    # Compare names, because importing these classes takes a second.
    names = ("DTensor", "ShardedTensor", "FSDPModule", "FullyShardedDataParallel")
    kinds = type(thing).__mro__
    return any(kind.__name__ in names and kind.__module__.startswith("torch.distributed") for kind in kinds)
