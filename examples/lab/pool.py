"""Runs side by side, each on its own process; a failure stops that run and no other."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Stopped(Exception):
    """What the work raises when it was sent SIGTERM, and has saved itself."""


def run_all(
    work: Callable[[Item], None], stages: Sequence[Sequence[Item]], *, jobs: int, label: str, done: Callable[[], None]
) -> dict[Item, str]:
    """Do the work on every item, `jobs` at a time; return what failed, and why.

    Args:
        work: a picklable function.
        stages: one after the other, the items of each in their order and side by side.
        jobs: processes.
        label: of the progress bar.
        done: called here after every item.

    Ctrl-C and SIGTERM end the processes by SIGTERM, upon which a training saves itself.
    """
    failed: dict[Item, str] = {}
    # Spawned, since a fork of a process that has used torch's threads may hang.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _ignore_interrupts)
    bar = tqdm(total=sum(map(len, stages)), desc=label, unit="run")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for items in stages:
            futures = {pool.submit(_work, work, item): item for item in items}
            for future in as_completed(futures):
                if error := future.exception():
                    failed[futures[future]] = f"{type(error).__name__}: {error}"
                done()
                bar.update()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        bar.close()
    pool.shutdown()
    return failed


def _work(work: Callable[[Item], None], item: Item) -> None:
    try:
        work(item)
    except Stopped:
        os._exit(128 + signal.SIGTERM)  # or this process would begin with the next item, which it holds already


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
