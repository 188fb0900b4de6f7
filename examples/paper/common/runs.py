"""A grid of training runs: those that are finished are read, the rest is trained, some side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import data as data_sets
from .recipes import Settings
from .train import RESULT, Record, Run, load_result

_QUEUE: Any = None


class Runs:
    """The runs of an output folder. ``runs[settings]`` is the result of a run that :meth:`train` has finished.

    Args:
        folder: where the runs are kept, a folder for each.
        root: where the files of the data set are.
        jobs: how many runs are trained side by side, each in a process of its own; 1 trains in this process.
    """

    def __init__(self, folder: Path, root: Path | None, jobs: int) -> None:
        self.folder, self.root, self.jobs = folder / "runs", root, jobs
        self._found: dict[Settings, Record] = {}

    def __getitem__(self, settings: Settings) -> Record:
        if settings not in self._found:
            self._found[settings] = load_result(self.folder / settings.name / RESULT)
        return self._found[settings]

    def final(self, settings: Settings, figure: str = "test") -> float:
        """The last figure of a run: ``test`` or ``val``, accuracies in percent."""
        return self[settings]["epochs"][-1][figure]

    def train(self, grid: Sequence[Settings], title: str) -> None:
        """Trains what is not finished yet. What was interrupted goes on where it was.

        Raises:
            ValueError: a file of a run is damaged; the message names it.
        """
        todo = [settings for settings in dict.fromkeys(grid) if not self._finished(settings)]
        longest_first = sorted(todo, key=lambda s: s.network != "wrn28-10")  # so that no core waits for long at the end
        with tqdm(total=sum(s.epochs for s in todo), desc=title, unit="epoch", disable=not todo) as bar:
            if self.jobs == 1 or len(todo) == 1:
                for settings in longest_first:
                    train_one(settings, self.folder, self.root, bar.update)
                    bar.refresh()
            elif todo:
                self._side_by_side(longest_first, bar)

    def _finished(self, settings: Settings) -> bool:
        """Whether there is a result. It is read at once, so that a damaged one is found before others are trained."""
        return (self.folder / settings.name / RESULT).exists() and bool(self[settings])

    def _side_by_side(self, todo: list[Settings], bar: tqdm) -> None:
        # Not fork: threads and a GPU that this process uses already would be lost in the children.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "fastwrs", "sklearn.datasets"])  # imported once for all
        queue = context.SimpleQueue()
        with ProcessPoolExecutor(self.jobs, context, initializer=_start, initargs=(queue,)) as pool:
            pending = {pool.submit(_in_process, settings, self.folder, self.root) for settings in todo}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not queue.empty():
                        bar.update(queue.get())
                    for future in done:
                        future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            while not queue.empty():
                bar.update(queue.get())


def train_one(settings: Settings, folder: Path, root: Path | None, progress: Callable[[], Any]) -> None:
    """Trains one run in this process. On a CPU with one thread, so that the bits are the same however many run."""
    if settings.device == "cpu":
        torch.set_num_threads(1)
    # On a GPU, so that a resumed run gives what an uninterrupted one gives.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        Run(settings, data_of(settings, root), folder).train(progress)


def data_of(settings: Settings, root: Path | None) -> data_sets.Data:
    """The data of a run, all classes."""
    return data_sets.load(settings.data, root, settings.train_images, settings.test_images)


def _start(queue: Any) -> None:
    global _QUEUE
    _QUEUE = queue
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed takes no leave: its workers would train on, beside the script that is started next."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(settings: Settings, folder: Path, root: Path | None) -> None:
    train_one(settings, folder, root, lambda: _QUEUE.put(1))
