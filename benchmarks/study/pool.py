"""Runs side by side, each in a process of its own: one that fails or dies stops no other."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item", bound=Hashable)


def run_all(
    work: Callable[[Item], None],
    stages: Sequence[Sequence[Item]],
    *,
    log: Callable[[Item], Path],
    jobs: int,
    label: str,
    done: Callable[[], None],
) -> dict[Item, str]:
    """Do the picklable work on every item, `jobs` at a time; return what failed, and why.

    Stage follows stage; the items of each begin in their order. What the work prints goes to the item's log. `done` is
    called here after every item. Ctrl-C and SIGTERM end the processes by SIGTERM, upon which a training saves itself.
    """
    # Not forked from this process, where threads run: a fork may hang then. From a server that has imported all and
    # started nothing: runs need not import torch again, which takes some seconds.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["benchmarks.study.one_run"])
    running: set[BaseProcess] = set()
    lock, stopping = threading.Lock(), False

    def in_process(item: Item) -> str:
        """What went wrong; "" if nothing did."""
        path = log(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_work, args=(work, item, path))
        with lock:  # so that a stop misses no process that is just beginning
            if stopping:
                return "stopped"
            process.start()
            running.add(process)
        process.join()
        running.discard(process)
        if process.exitcode == 0:
            return ""
        text = path.read_text(errors="replace").strip() if path.exists() else ""
        return f"{text.splitlines()[-1] if text else 'it died'} (exit code {process.exitcode}, see {path})"

    failed: dict[Item, str] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with tqdm(total=sum(map(len, stages)), desc=label, unit="run") as bar, ThreadPoolExecutor(jobs) as threads:
            try:
                for items in stages:
                    futures = {threads.submit(in_process, item): item for item in items}
                    for future in as_completed(futures):
                        if why := future.result():
                            failed[futures[future]] = why
                        done()
                        bar.update()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                with lock:
                    stopping = True
                    for process in running:
                        process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return failed


def _work(work: Callable[[Item], None], item: Item, path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(path, "a", buffering=1)  # noqa: SIM115 (as long as the process)
    work(item)


def _end_with_parent() -> None:
    """A study that was killed may be begun again at once: no run of it is left to get in the way."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
