"""From the study's CSVs to its figures and to the tables of the documentation."""

from collections.abc import Sequence
from pathlib import Path

from checkpoint import replacing
from matplotlib.figure import Figure

from lab import figures, runs, tables
from lab.claims import CLAIMS, Claim
from lab.records import Epoch, Record, read_curves, read_runs

ROOT = Path(__file__).parents[2]
STUDY, README = ROOT / "docs" / "study.md", ROOT / "README.md"
NOT_RUN = "Not run yet.\n"


def report(runs_csv: Path, curves_csv: Path, folder: Path, *, study: Path = STUDY, readme: Path = README) -> list[Path]:
    """Draw all figures that there is data for, and rewrite all tables: where there is no data, they say so.

    Args:
        runs_csv, curves_csv: of lab.records.
        folder: of the figures, made if missing.
        study, readme: Markdown files, with the markers of all blocks.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no such CSV.
        ValueError: a CSV has other columns, a run is there twice, or a Markdown file lacks a marker.
    """
    records, curves = read_runs(runs_csv), read_curves(curves_csv)
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in all_figures(records, curves).items():
        save(figure, folder / f"{name}.png")
        written.append(folder / f"{name}.png")
    for path, blocks in ((study, study_blocks(records)), (readme, readme_blocks(records))):
        tables.write_blocks(path, blocks)
        written.append(path)
    return written


def save(figure: Figure, path: Path) -> None:
    """A PNG whose bytes follow from the data alone: no date and no version in it."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def all_figures(
    records: Sequence[Record], curves: Sequence[Epoch], claims: Sequence[Claim] = CLAIMS
) -> dict[str, Figure]:
    """Those that can be drawn, by name of file."""
    drawn = {"sweeps": figures.sweeps(records), "trade_off": figures.trade_off(records, claims)}
    for dataset, setting in runs.SETTINGS.items():
        eps = setting.eps[0]
        drawn[f"collapse_and_rescue-{dataset}"] = figures.collapse_and_rescue(curves, dataset, eps)
        drawn[f"errors_per_epoch-{dataset}"] = figures.errors_per_epoch(curves, dataset, eps)
        drawn[f"weights-{dataset}"] = figures.weights(curves, dataset, eps)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def study_blocks(records: Sequence[Record], claims: Sequence[Claim] = CLAIMS) -> dict[str, str]:
    """The blocks of docs/study.md. One without data says so, unless it stands below another of the same runs."""
    blocks = {"methods": tables.methods_table(records)}
    for dataset, setting in runs.SETTINGS.items():
        here = [record for record in records if (record.dataset, record.arch) == (dataset, setting.arch)]
        for name, table in (("main", tables.main_table), ("differences", tables.difference_table)):
            blocks[f"{name}-{dataset}"] = tables.each_radius(table, records, dataset)
        blocks[f"controls-{dataset}"] = tables.difference_table(records, dataset, setting.eps[0], "adaptive")
        blocks[f"search-{dataset}"] = tables.search_table(records, dataset)
        if blocks[f"main-{dataset}"]:
            blocks[f"main-{dataset}"] += f"\n{setting.validation} validation images; {tables.provenance(here)}"
    blocks |= {
        "ablation": tables.ablation_table(records),
        "tau": tables.tau_table(records),
        "beta": tables.beta_table(records),
        "capacity": tables.captioned(
            {
                f"{dataset}, eps {tables.radius(setting.eps[0])}": tables.capacity_table(records, dataset)
                for dataset, setting in runs.SETTINGS.items()
            }
        ),
        "test": tables.captioned(
            {
                f"{dataset}, eps {tables.radius(eps)}": tables.test_table(records, dataset, eps)
                for dataset, setting in runs.SETTINGS.items()
                for eps in setting.eps
            }
        ),
        "claims": tables.claims_table(records, claims),
    }
    below = ("differences-", "controls-", "search-")
    return {name: text or ("" if name.startswith(below) else NOT_RUN) for name, text in blocks.items()}


def readme_blocks(records: Sequence[Record], claims: Sequence[Claim] = CLAIMS) -> dict[str, str]:
    """The block of README.md."""
    return {"study": tables.compact_table(records, claims) or NOT_RUN}
