"""The examples as modules, importing one another as they do for `python examples/...`."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@contextmanager
def imported(*names: str) -> Iterator[SimpleNamespace]:
    """The examples of these names; sys.path and sys.modules are afterwards as if they had never been."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        try:
            yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        finally:
            for path in EXAMPLES.glob("*.py"):
                sys.modules.pop(path.stem, None)
