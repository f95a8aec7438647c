"""Weights by name, wherever they are: in modules, state_dicts, checkpoints and files, with or without wrappers."""

from __future__ import annotations

import os
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

# Each of them keeps the model as its child `module`; torch.compile keeps it as `_orig_mod`.
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)

# Where training scripts keep the weights in a checkpoint.
ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "teacher"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema"),
)


def unwrap(module: nn.Module) -> nn.Module:
    """The model itself, without the wrappers around it, nested in any order."""
    inner = module.module if isinstance(module, WRAPPERS) else getattr(module, "_orig_mod", None)
    return module if inner is None else unwrap(inner)


def find_weights(argument: str, source: object) -> dict[str, Tensor]:
    """The tensors themselves in a module, a state_dict, a checkpoint or a file, all of them with values.

    A module's names are without wrappers; a state_dict's are as they are. Raises what ``warm_start``
    does, with ``argument`` in the message.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read(argument, Path(source))
    if isinstance(source, nn.Module):
        if any(map(_is_sharded, source.modules())):
            raise TypeError(f"{argument} must not be sharded: call warm_start before wrapping")
        return _checked(argument, _unwrapped(source.state_dict(keep_vars=True), source))
    if not isinstance(source, Mapping):
        kinds = "an nn.Module, a state_dict, a checkpoint or a path"
        raise TypeError(f"{argument} must be {kinds}, got {type(source).__name__}")
    if all(isinstance(name, str) and (isinstance(value, Tensor) or _is_extra(name)) for name, value in source.items()):
        return _checked(argument, source)
    found = [name for name in ENTRIES if isinstance(source.get(name), (Mapping, nn.Module))]
    if len(found) == 1:
        return find_weights(argument, source[found[0]])
    if found:  # which of them is meant is never guessed
        raise ValueError(f"{argument} must hold one set of weights, got {', '.join(found)}: pass the one you mean")
    wanted, got = ", ".join(ENTRIES), ", ".join(map(str, source))
    raise ValueError(f"{argument} must hold only tensors, or weights under one of {wanted}, got {got}")


def pair(student: Collection[str], teacher: Mapping[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """What the teacher has under each of the student's names, and the names that it has besides.

    Names alone can't tell a wrapper's ``module`` from a child that somebody called so. Both readings are tried, on both
    sides alike, and the one in which more names agree is taken.
    """
    names = {name: name for name in student}
    readings = [(_unwrapped(names, by_name=way), _unwrapped(teacher, by_name=way)) for way in (False, True)]
    ours, theirs = max(readings, key=lambda reading: len(reading[0].keys() & reading[1].keys()))
    pairs = {name: theirs[clean] for clean, name in ours.items() if clean in theirs}
    return pairs, tuple(clean for clean in theirs if clean not in ours)


def _unwrapped(state: Mapping[str, T], owner: object = None, *, by_name: bool = False) -> dict[str, T]:
    """The state under names without wrappers.

    ``_orig_mod`` is always a wrapper's name for the model; ``module`` is if its owner is a wrapper, or if ``by_name``
    says so for all. Only an only child is taken for one, so no two names become one.
    """
    children: defaultdict[str, dict[str, T]] = defaultdict(dict)
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        children[first + dot][rest] = value
    for child in children:
        if child.endswith("."):
            children[child] = _unwrapped(children[child], getattr(owner, child[:-1], None), by_name=by_name)
    match sorted(children):
        case ["_orig_mod."]:
            return children["_orig_mod."]
        case ["module."] | ["module.", "n_averaged"] if by_name or isinstance(owner, WRAPPERS):
            return children["module."]
    return {child + name: value for child, inside in children.items() for name, value in inside.items()}


def _read(argument: str, path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file, but there is none at {str(path)!r}")
    by_hand = f"got {str(path)!r}: load it yourself and pass the dict"
    try:
        match path.suffix.lower():
            case ".pt" | ".pth":
                return torch.load(path, map_location="cpu", weights_only=True)
            case ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
    except ImportError as error:
        raise ImportError(f"pip install safetensors to read {argument} {str(path)!r}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a broken file makes its reader raise nearly anything
        wanted = "a state_dict or checkpoint that can be read (.pt and .pth: with weights_only=True)"
        raise ValueError(f"{argument} must be {wanted}, {by_hand}") from error
    raise ValueError(f"{argument} must be a .pt, .pth or .safetensors file, {by_hand}")


def _checked(argument: str, state: Mapping[str, object]) -> dict[str, Tensor]:
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
        weights[name] = tensor
    return weights


def _is_extra(name: str) -> bool:
    """Whether it is a module's extra state: anything, but not weights."""
    return name.rpartition(".")[2] == "_extra_state"


def _is_sharded(thing: object) -> bool:
    # By name: importing these classes takes a second, and whoever has one has paid it.
    names = ("DTensor", "ShardedTensor", "FSDPModule", "FullyShardedDataParallel")
    kinds = type(thing).__mro__
    return any(kind.__name__ in names and kind.__module__.startswith("torch.distributed") for kind in kinds)
