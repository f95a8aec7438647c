"""Deep copies of models that share nothing with the original, or an error.

``copy.deepcopy`` does not copy functions and weak references. If a function in a model refers to a module, the copy's
function goes on calling the original module, which may be trained. Such models are refused.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn

from cktat_loss._backends import has_own_forward, hooks, is_compiled
from cktat_loss._state_dicts import memory

SHARE_IT = "copy_teacher=False shares it instead"
# A deep copy of an exported module drops these attributes, which belong to its check of inputs.
OF_EXPORT = {"range_constraints", "validate_inputs"}
PLAIN_DATA = (bool, int, float, str, Tensor, list, tuple, dict)


def frozen_copy(original: nn.Module) -> nn.Module:
    """Return a deep copy in eval mode without gradients.

    Raises ValueError if there is no copy, if it shares something with the original, or if it lost something.
    """
    if kept := _reference_that_stays(original):
        raise ValueError(f"teacher cannot be deep-copied: {kept} would stay shared and unfrozen. {SHARE_IT}")
    try:
        made = copy.deepcopy(original).eval().requires_grad_(False)
    except Exception as error:
        raise ValueError(f"teacher ({name_of(original)}) cannot be deep-copied: {error}. {SHARE_IT}") from error
    _check_copy(original, made)
    return made


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def name_of(thing: object) -> str:
    return type(thing).__name__


def _reference_that_stays(original: nn.Module) -> str | None:
    """Describe a module or trainable tensor that a function or weak reference in the model refers to, or return None.

    Modules, containers, partials, bound methods and callable objects are searched for functions. Functions are searched
    for whatever they hold, in turn.
    """
    # Each with True if a function holds it: a module may be both a part of the model and held by a function.
    seen: set[tuple[int, bool]] = set()
    todo: list[tuple[Any, str]] = [(original, "")]  # each with the name of the function that holds it
    while todo:
        thing, holder = todo.pop()
        key = id(thing), bool(holder)
        if key in seen:
            continue
        seen.add(key)
        if holder and (isinstance(thing, nn.Module) or (isinstance(thing, Tensor) and thing.requires_grad)):
            return f"{holder} refers to a {name_of(thing)}, which"
        if isinstance(thing, FunctionType):
            if not thing.__module__ or not thing.__module__.startswith("torch.export."):  # a copy drops these
                todo += [(held, holder or thing.__qualname__) for held in _held(thing)]
        elif isinstance(thing, weakref.ref):
            if not isinstance(thing(), Tensor):  # torch's recurrent layers make theirs anew in a copy
                todo.append((thing(), holder or "a weak reference"))
        else:
            todo += [(part, holder) for part in _parts(thing, bool(holder))]
    return None


def _parts(thing: Any, of_function: bool) -> Iterable[Any]:
    """Return what is copied with an object that is no function."""
    if isinstance(thing, nn.Module):
        if is_compiled(thing):  # the wrapper makes its functions anew in a copy
            return [thing._orig_mod]
        # A module that was compiled in place loses this function in a copy, and runs without it.
        return [value for name, value in vars(thing).items() if name != "_compiled_call_impl"]
    if isinstance(thing, Mapping):
        return thing.values()
    if isinstance(thing, (list, tuple, set, frozenset)):
        return thing
    if isinstance(thing, MethodType):
        return thing.__func__, thing.__self__
    if isinstance(thing, partial):
        return thing.func, thing.args, thing.keywords
    if isinstance(thing, (type, Tensor, fx.Graph)) or not hasattr(thing, "__dict__"):
        return ()
    # Other objects may be as large as a trainer. Of these only callable ones can take part in a forward pass.
    return vars(thing).values() if callable(thing) or isinstance(thing, SimpleNamespace) or of_function else ()


def _held(function: FunctionType) -> Iterator[Any]:
    """Yield what a function holds: default arguments, variables of its closure, and modules among its globals."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (nn.Module, nn.Parameter)):
            yield value
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            yield value.__self__


def _check_copy(original: nn.Module, made: nn.Module) -> None:
    """Refuse a copy that shares memory with the original, or that lost modules, hooks or attributes."""
    own = {memory(tensor) for _, tensor in tensors(original)}
    shared = [name for name, tensor in tensors(made) if memory(tensor) in own]
    if made is original or shared:
        raise ValueError(f"teacher cannot be deep-copied: its copy shares {', '.join(shared) or 'all'}. {SHARE_IT}")
    copies = dict(made.named_modules())
    for name, module in original.named_modules():
        lost = ""
        if name not in copies:
            lost = name
        elif _count_hooks(module) != _count_hooks(copies[name]):
            lost = f"the hooks of {name or name_of(module)}"
        elif is_compiled(module) and has_own_forward(module):
            lost = f"the forward of {name or name_of(module)}"
        elif attributes := _lost_attributes(module, copies[name]):
            lost = f"{', '.join(sorted(attributes))} of {name or name_of(module)}"
        if lost:
            raise ValueError(f"teacher cannot be deep-copied: its copy loses {lost}. {SHARE_IT}")


def _lost_attributes(module: nn.Module, made: nn.Module) -> set[str]:
    """Return attributes that a copy lacks and a forward pass may use: a ``forward`` of its own, and public data."""
    lost = {name for name in vars(module).keys() - vars(made).keys() - OF_EXPORT if not name.startswith("_")}
    return {name for name in lost if name == "forward" or isinstance(vars(module)[name], PLAIN_DATA)}


def _count_hooks(module: nn.Module) -> int:
    """Count the hooks of a module, without those by which torch.export checks inputs: no deep copy has these."""
    return sum(not str(getattr(hook, "__module__", "")).startswith("torch.export.") for hook in hooks(module))
