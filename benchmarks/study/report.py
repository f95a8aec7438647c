"""From the study's CSVs to its figures and to the tables of docs/study.md and README.md."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import markdown
from benchmarks.study import figures, grid, records, tables
from benchmarks.study.cells import radius
from benchmarks.study.claims import CLAIMS, FIRST, SECOND, Claim
from benchmarks.study.replication import replication_tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "study"
NOT_RUN = "Not run yet.\n"
CSVS = {"runs": records.RUN, "curves": records.EPOCH}
LATER = "-0.2"  # in the names of the CSVs of what 0.2 ran


@dataclass(frozen=True)
class Results:
    """What the page is made of.

    Args:
        runs, curves: of the study as 0.1.0 made it.
        again: runs of later versions: the second round of claims, and a repetition of the first runs.
        replication: runs of 0.1.0 with another split and other seeds.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    again: pd.DataFrame
    replication: pd.DataFrame


def load(folder: Path = RESULTS) -> Results:
    """The CSVs of a folder. The tables of a data set are of the runs of one version: of 0.1.0, where it has any.

    Raises:
        FileNotFoundError, ValueError: one is missing or has other columns.
    """
    first, again = (
        [records.read(folder / f"{name}{suffix}.csv", columns) for name, columns in CSVS.items()]
        for suffix in ("", LATER)
    )
    runs, curves = (
        pd.concat([old, new[~new["dataset"].isin(old["dataset"])]], ignore_index=True)
        for old, new in zip(first, again, strict=True)
    )
    replication = records.read(folder / "replication.csv", records.REPLICATION)
    return Results(runs, curves, again[0], replication)


def take_in(folder: Path, into: Path = RESULTS) -> None:
    """Add the CSVs that the study's command left in a folder to those of later versions than 0.1.0; no run is lost."""
    merged = {}
    for name, columns in CSVS.items():
        path = into / f"{name}{LATER}.csv"
        both = [records.read(path, columns), records.read(folder / f"{name}.csv", columns)]
        key = [column for column in (*records.WHICH, "epoch") if column in columns]
        merged[path] = pd.concat(both).drop_duplicates(key, keep="last").sort_values(key, ignore_index=True)
    for path, table in merged.items():
        records.write(path, table)


def report(results: Results, folder: Path = RESULTS, *, root: Path = ROOT) -> list[Path]:
    """Draw all figures that there is data for, and rewrite all tables: where there is no data, they say so.

    Args:
        folder: of the figures, made if missing.
        root: has README.md and docs/study.md, with the markers of all blocks.

    Returns:
        The files written.

    Raises:
        ValueError: a run is there twice, or a Markdown file lacks a marker.
    """
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in all_figures(results.runs, results.curves).items():
        content = io.BytesIO()
        # The bytes follow from the data alone: no date and no version in them.
        figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
        written.append(folder / f"{name}.png")
        records.replace_file(written[-1], content.getvalue())
    pages = {"docs/study.md": study_blocks(results), "README.md": readme_blocks(results.runs)}
    for name, blocks in pages.items():
        written.append(root / name)
        write_blocks(written[-1], blocks)
    return written


def all_figures(runs: pd.DataFrame, curves: pd.DataFrame, claims: Sequence[Claim] = FIRST) -> dict[str, Figure]:
    """Those that can be drawn, by name of file."""
    drawn = {"sweeps": figures.sweeps(runs), "trade_off": figures.trade_off(runs, claims)}
    for dataset in grid.SETTINGS:
        for draw in (figures.collapse_and_rescue, figures.errors_per_epoch, figures.weights):
            drawn[f"{draw.__name__}-{dataset}"] = draw(curves, dataset)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def study_blocks(results: Results) -> dict[str, str]:
    """The blocks of docs/study.md. One without data says so, unless it stands below another of the same runs."""
    runs = results.runs
    blocks = {"methods": tables.methods_table(runs)}
    for dataset, setting in grid.SETTINGS.items():
        for name, table in (("main", tables.main_table), ("differences", tables.difference_table)):
            blocks[f"{name}-{dataset}"] = tables.each_radius(table, runs, dataset)
        blocks[f"controls-{dataset}"] = tables.difference_table(runs, dataset, setting.eps[0], "adaptive")
        blocks[f"search-{dataset}"] = tables.search_table(runs, dataset)
        if blocks[f"main-{dataset}"]:
            own = runs[(runs["dataset"] == dataset) & (runs["arch"] == setting.arch)]
            blocks[f"main-{dataset}"] += f"\n{setting.validation} validation images; {tables.provenance(own)}"
    blocks |= {
        "ablation": tables.paper_table(runs, {name: name for name in grid.ABLATION}, "method", tables.ABOUT),
        "tau": tables.paper_table(runs, grid.TAU_SWEEP, "tau"),
        "beta": tables.paper_table(runs, grid.BETA_SWEEP, "beta"),
        "capacity": _captioned(lambda dataset, _: tables.capacity_table(runs, dataset), radii=1),
        "test": _captioned(lambda dataset, eps: tables.test_table(runs, dataset, eps)),
        "claims": tables.claims_table(runs, FIRST, len(FIRST)),
        "test-again": _captioned(lambda dataset, eps: tables.test_table(results.again, dataset, eps)),
        "claims-again": tables.claims_table(results.again, SECOND, len(CLAIMS)),
        "agreement": _captioned(
            lambda dataset, eps: tables.agreement_table(results.again, runs, dataset, eps, "0.1.0")
        ),
        **replication_tables(results.replication, runs),
    }
    below = ("differences-", "controls-", "search-", "test-again")
    return {name: text or ("" if name.startswith(below) else NOT_RUN) for name, text in blocks.items()}


def readme_blocks(runs: pd.DataFrame, claims: Sequence[Claim] = FIRST) -> dict[str, str]:
    """The block of README.md."""
    return {"study": tables.compact_table(runs, claims) or NOT_RUN}


def _captioned(table: Callable[[str, float], str], radii: int | None = None) -> str:
    """A table of each data set and radius; of the first so many radii."""
    return tables.captioned(
        {
            f"{dataset}, eps {radius(eps)}": table(dataset, eps)
            for dataset, setting in grid.SETTINGS.items()
            for eps in setting.eps[:radii]
        }
    )


def write_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Put each content between the markers of its name in a Markdown file: all of them, or on an error none.

    Raises:
        ValueError: a marker is missing.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        try:
            text = markdown.replaced(text, name, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    records.replace_file(path, text.encode())
