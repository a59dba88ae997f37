"""Studies, one after the other or several at a time, each in a process of its own."""

from __future__ import annotations

import functools
import json
import multiprocessing
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import data, environment
from ..data import Images
from .registry import STUDIES
from .study import Advance, Result

#: where ``--data cifar10`` looks
CIFAR_FOLDER = Path("data")


@dataclass(frozen=True)
class Order:
    """What is to be run, as the command line says it: a preset's name, data, threads of a study, and the command itself."""

    preset: str
    data: str
    threads: int
    command: str

    def images(self, download: bool = False) -> Images:
        """The data. Raises DataError where they are not there."""
        if self.data == "digits":
            return data.digits(data.Crop(1, -1.0))
        return data.cifar10(CIFAR_FOLDER if self.data == "cifar10" else Path(self.data), download)


def record(name: str, order: Order, images: Images, advance: Advance) -> dict:
    """Run a study; what its JSON holds."""
    study = STUDIES[name]
    settings = study.presets[order.preset]
    result: Result = study.run(settings, images, lambda what: advance(f"{name}: {what}"))
    # plots and sentences see what a file would give them
    result = json.loads(json.dumps(result))
    return {
        "study": name,
        "preset": order.preset,
        "data": {"name": images.name, "training": len(images.train_labels), "test": len(images.test_labels)},
        "settings": asdict(settings),
        "environment": environment.describe(torch.device("cpu"), order.command),
        "sentences": list(study.sentences(result)),
        "result": result,
    }


def _apart(name: str, order: Order, told: queue.Queue[str]) -> dict:
    torch.set_num_threads(order.threads)
    return record(name, order, order.images(), told.put)


def run(names: list[str], order: Order, images: Images, jobs: int, advance: Advance) -> Iterator[dict]:
    """The records of the studies as they are ready, ``jobs`` of them at a time."""
    if jobs == 1:
        torch.set_num_threads(order.threads)
        yield from (record(name, order, images, advance) for name in names)
        return
    # a fresh process: one that is forked has none of the threads that its parent's libraries count on
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context) as pool:
        told = manager.Queue()
        left = {pool.submit(_apart, name, order, told) for name in names}
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            _drain(told, advance)
            yield from (future.result() for future in done)


def _drain(told: queue.Queue[str], advance: Callable[[str], None]) -> None:
    for what in iter(functools.partial(_next, told), None):
        advance(what)


def _next(told: queue.Queue[str]) -> str | None:
    try:
        return told.get_nowait()
    except queue.Empty:
        return None
