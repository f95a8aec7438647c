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
    """The examples of these names, by the last part of each: lab.records is records.

    sys.path and sys.modules are afterwards as if they had never been.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        try:
            yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in names})
        finally:
            for path in EXAMPLES.rglob("*.py"):
                parts = path.relative_to(EXAMPLES).with_suffix("").parts
                sys.modules.pop(".".join(parts).removesuffix(".__init__"), None)
