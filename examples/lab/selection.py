"""Which records belong together: those of a data set, a network and a radius."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lab import runs
from lab.records import Epoch, Record

Row = TypeVar("Row", Record, Epoch)


def same_eps(a: float, b: float) -> bool:
    """Whether two radii are one. A CSV holds six digits: 8/255 comes back as another float."""
    return f"{a:.6g}" == f"{b:.6g}"


def by_method(rows: Iterable[Row], dataset: str, eps: float, arch: str | None = None) -> dict[str, list[Row]]:
    """Those of a data set and a radius, by method.

    Args:
        rows: runs or epochs, in any order. A CSV's is that of text: epoch 10 comes before epoch 2.
        arch: the network, if not the data set's own.

    Returns:
        Lists by the method's name, sorted by seed, then by epoch. None of them is empty.
    """
    arch = arch or runs.SETTINGS[dataset].arch
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if (row.dataset, row.arch) == (dataset, arch) and same_eps(row.eps, eps):
            found[row.method].append(row)
    return {method: sorted(of, key=lambda row: (row.seed, getattr(row, "epoch", 0))) for method, of in found.items()}


def read_on_test(found: Mapping[str, Iterable[Record]]) -> dict[str, list[Record]]:
    """The runs whose test images have been read, by method; a method of which none has is left out."""
    read = {method: [record for record in of if record.test_natural is not None] for method, of in found.items()}
    return {method: of for method, of in read.items() if of}


def values(records: Iterable[Record], measure: str) -> list[float]:
    """A field of the records that have it, in their order."""
    return [value for record in records if (value := getattr(record, measure)) is not None]
