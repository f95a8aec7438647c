"""Runs side by side, each on its own process; a failure stops that run and no other."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
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
    bar = tqdm(total=sum(map(len, stages)), desc=label, unit="run")

    def settle(item: Item, error: BaseException | None) -> None:
        if error:
            failed[item] = f"{type(error).__name__}: {error}"
        done()
        bar.update()

    before = signal.signal(signal.SIGTERM, _interrupt)
    pool = _new_pool(jobs)
    try:
        for items in stages:
            left = dict.fromkeys(items)
            with contextlib.suppress(BrokenProcessPool):
                futures = {}
                for item in items:
                    futures[pool.submit(_work, work, item)] = item
                for future in as_completed(futures):
                    if isinstance(error := future.exception(), BrokenProcessPool):
                        raise error
                    del left[futures[future]]
                    settle(futures[future], error)
            # A process that dies takes the others along. Each of the rest gets its own, to see whose fault it was.
            for item in left:
                pool.shutdown()
                pool = _new_pool(1)
                settle(item, pool.submit(_work, work, item).exception())
            if left:
                pool.shutdown()
                pool = _new_pool(jobs)
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


def _new_pool(jobs: int) -> ProcessPoolExecutor:
    # Spawned, since a fork of a process that has used torch's threads may hang.
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))


def _begin(parent: int) -> None:
    """In a new process: Ctrl-C is the parent's to handle, and without a parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(work: Callable[[Item], None], item: Item) -> None:
    try:
        work(item)
    except Stopped:
        os._exit(128 + signal.SIGTERM)  # or this process would begin with the next item, which it holds already


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
