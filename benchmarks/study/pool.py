"""Runs side by side, each in a process of its own: one that fails or dies stops no other."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item", bound=Hashable)


def run_all(
    work: Callable[[Item], None],
    stages: Sequence[Sequence[Item]],
    *,
    logs: Mapping[Item, Path],
    jobs: int,
    label: str,
    done: Callable[[], None],
) -> dict[Item, str]:
    """Do the picklable work on every item, `jobs` at a time; return what failed, and why.

    Stage follows stage; the items of each begin in their order. What the work prints goes to the item's log. `done` is
    called here after every item. Ctrl-C and SIGTERM end the processes by SIGTERM, upon which a training saves itself.
    """
    # Not forked from this process, where torch and tqdm run threads: a fork may hang then. From a server that has
    # imported all and started nothing: runs need not import torch again, which takes some seconds.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["benchmarks.study.one_run"])
    running: dict[BaseProcess, Item] = {}
    failed: dict[Item, str] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with tqdm(total=sum(map(len, stages)), desc=label, unit="run") as bar:
            for items in stages:
                waiting = [*reversed(items)]
                while waiting or running:
                    while waiting and len(running) < jobs:
                        item = waiting.pop()
                        process = context.Process(target=_work, args=(work, item, logs[item]))
                        process.start()
                        running[process] = item
                    wait(process.sentinel for process in running)
                    for process in [process for process in running if process.exitcode is not None]:
                        item = running.pop(process)
                        if process.exitcode:
                            failed[item] = _last_words(process.exitcode, logs[item])
                        done()
                        bar.update()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
        signal.signal(signal.SIGTERM, before)
    return failed


def _work(work: Callable[[Item], None], item: Item, path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(path, "a", buffering=1)  # noqa: SIM115 (as long as the process)
    work(item)


def _end_with_parent() -> None:
    """A study that was killed may be begun again at once: no run of it is left to get in the way."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _last_words(exit_code: int, path: Path) -> str:
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return f"{text.splitlines()[-1] if text else 'it died'} (exit code {exit_code}, see {path})"
