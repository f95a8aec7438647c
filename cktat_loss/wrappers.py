"""The modules that people wrap models in."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Each of them keeps the model as its child `module`; torch.compile keeps it as `_orig_mod`.
WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrap(module: nn.Module) -> nn.Module:
    """The model itself, without the wrappers around it, nested in any order."""
    while True:
        if isinstance(module, WRAPPERS):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = cast(nn.Module, module._modules["_orig_mod"])
        else:
            return module
