"""From the study's CSVs to its figures and to the tables of docs/study.md and README.md."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from runtime import replacing

from benchmarks import markdown
from benchmarks.study import figures, grid, records, tables
from benchmarks.study.claims import CLAIMS, FIRST, SECOND
from benchmarks.study.replication import replication_tables

ROOT = Path(__file__).parents[2]
FOLDER = Path("docs/study")  # of CSVs and figures
RESULTS = ROOT / FOLDER
NOT_RUN = "Not run yet.\n"
CSVS = {"runs": records.RUN, "curves": records.EPOCH}
LATER = "-0.2"  # in the names of the CSVs of what 0.2 ran


@dataclass(frozen=True)
class Results:
    """What the page is made of."""

    runs: pd.DataFrame  # of the study as 0.1.0 made it
    curves: pd.DataFrame  # their epochs
    again: pd.DataFrame  # runs of later versions: the second round of claims, and a repetition of the first runs
    replication: pd.DataFrame  # runs of 0.1.0 with another split and other seeds


def csvs(folder: Path, suffix: str = "") -> dict[str, pd.DataFrame]:
    """The runs and the curves that are in a folder."""
    return {name: records.read(folder / f"{name}{suffix}.csv", columns) for name, columns in CSVS.items()}


def load() -> Results:
    """The published CSVs. The tables of a data set are of the runs of one version: of 0.1.0, where it has any."""
    first, later = csvs(RESULTS), csvs(RESULTS, LATER)
    runs, curves = (
        pd.concat([first[name], later[name][~later[name]["dataset"].isin(first[name]["dataset"])]], ignore_index=True)
        for name in CSVS
    )
    return Results(runs, curves, later["runs"], records.read(RESULTS / "replication.csv", records.REPLICATION))


def take_in(folder: Path, into: Path = RESULTS) -> None:
    """Add the CSVs that the study's command left in a folder to those of later versions than 0.1.0; no run is lost."""
    ours, theirs = csvs(into, LATER), csvs(folder)
    for name, columns in CSVS.items():
        key = records.key(columns)
        both = pd.concat([ours[name], theirs[name]]).drop_duplicates(key, keep="last")
        records.write(into / f"{name}{LATER}.csv", both.sort_values(key))


def report(results: Results, root: Path = ROOT) -> list[Path]:
    """Draw all figures that there is data for, and rewrite all tables; return the files.

    Args:
        root: has README.md and docs/study.md, with the markers of all blocks.

    Raises:
        ValueError: a run is there twice, or a Markdown file lacks a marker. Nothing has been written then.
    """
    contents = {}
    for name, figure in all_figures(results.runs, results.curves).items():
        picture = io.BytesIO()
        # The bytes follow from the data alone: no date and no version in them.
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
        contents[root / FOLDER / f"{name}.png"] = picture.getvalue()
    for name, blocks in pages(results).items():
        contents[root / name] = with_blocks(root / name, blocks).encode()
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    return [*contents]


def all_figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Those that can be drawn, by name of file."""
    drawn = {"sweeps": figures.sweeps(runs), "trade_off": figures.trade_off(runs, FIRST)}
    for dataset in grid.SETTINGS:
        for draw in (figures.collapse_and_rescue, figures.errors_per_epoch, figures.weights):
            drawn[f"{draw.__name__}-{dataset}"] = draw(curves, dataset)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def pages(results: Results) -> dict[str, dict[str, str]]:
    """The blocks of each Markdown file. One without data says so, unless it stands below another of the same runs."""
    runs, again = results.runs, results.again
    blocks = {"methods": tables.methods_table(runs)}
    for dataset, setting in grid.SETTINGS.items():
        blocks[f"main-{dataset}"] = tables.captioned(tables.main_table, runs, dataset)
        if blocks[f"main-{dataset}"]:
            own = runs[(runs["dataset"] == dataset) & (runs["arch"] == setting.arch)]
            blocks[f"main-{dataset}"] += f"\n{setting.validation} validation images; {tables.provenance(own)}"
        blocks[f"differences-{dataset}"] = tables.captioned(tables.difference_table, runs, dataset)
        blocks[f"controls-{dataset}"] = tables.difference_table(runs, dataset, setting.eps[0], "adaptive")
        blocks[f"search-{dataset}"] = tables.search_table(runs, dataset)
    blocks |= {
        "ablation": tables.paper_table(runs, {name: name for name in grid.ABLATION}, "method", tables.ABOUT),
        "tau": tables.paper_table(runs, grid.TAU_SWEEP, "tau"),
        "beta": tables.paper_table(runs, grid.BETA_SWEEP, "beta"),
        "capacity": tables.captioned(tables.capacity_table, runs),
        "test": tables.captioned(tables.test_table, runs),
        "claims": tables.claims_table(runs, FIRST, len(FIRST)),
        "test-again": tables.captioned(tables.test_table, again),
        "claims-again": tables.claims_table(again, SECOND, len(CLAIMS)),
        "agreement": tables.captioned(partial(tables.agreement_table, again), runs),
        **replication_tables(results.replication, runs),
    }
    below = ("differences-", "controls-", "search-", "test-again")
    study = {name: text or ("" if name.startswith(below) else NOT_RUN) for name, text in blocks.items()}
    return {"docs/study.md": study, "README.md": {"study": tables.compact_table(runs, FIRST) or NOT_RUN}}


def with_blocks(path: Path, blocks: Mapping[str, str]) -> str:
    """A Markdown file's text, each content between the markers of its name.

    Raises:
        ValueError: a marker is missing.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        try:
            text = markdown.replaced(text, name, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return text
