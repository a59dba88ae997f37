"""Progress of long work: a bar on a terminal; elsewhere (a log, CI) a line when it goes on, and at least every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: seconds between two lines
EVERY = 10.0


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show the progress of ``total`` steps inside the ``with``; what it gives is called with the name of each step as that begins."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda what: bar.update(task, description=what, advance=1)
            bar.update(task, completed=total)
        return
    lines = _Lines(console, total)
    try:
        yield lines.begin
    finally:
        lines.stop()


class _Lines:
    """Lines of progress, written by a thread: what takes minutes in one step, as a compiler does, says nothing by itself."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._begun = console, total, 0
        self._start, self._what = time.monotonic(), ""
        self._changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def begin(self, what: str) -> None:
        """A step begins."""
        self._begun, self._what = self._begun + 1, what
        self._changed.set()

    def stop(self) -> None:
        """Write nothing any more."""
        self._over.set()
        self._changed.set()
        self._thread.join()

    def _write(self) -> None:
        self._changed.wait()
        while not self._over.is_set():
            self._console.print(self._line(), highlight=False, markup=False)
            self._over.wait(EVERY)

    def _line(self) -> str:
        elapsed, done = time.monotonic() - self._start, self._begun - 1
        left = f", about {elapsed / done * (self._total - done):.0f} s left" if done > 0 else ""
        return f"[{elapsed:4.0f} s{left}] {self._begun} of {self._total}: {self._what}"
