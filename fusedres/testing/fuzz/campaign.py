"""Many cases in a row: progress, the faults that were found, each in its smallest form, and a summary."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import fusedres

from .actions import check_session
from .build import Built
from .check import Result, check
from .description import Case, Description, Residual, Session
from .generate import Generator
from .shrink import shrink
from .twins import Difference

#: seconds between two lines of progress where there is no terminal
PAUSE = 10.0
#: what a number of cases is far below, so that no two seeds share one
_STRIDE = 10_000_000


def run(description: Case | Session, backend: str | None = None) -> Result:
    """What converting does to a case or a session, on a backend or on that which is chosen automatically."""
    if isinstance(description, Session):
        return check_session(description, backend)
    with fusedres.use_backend(backend):
        return check(description)


def explain(description: Case | Session, differences: list[Difference] | None = None) -> tuple[str, bool]:
    """What a person needs to see of a case: its description, its source and what differs; and whether anything does."""
    case = description if isinstance(description, Case) else description.case
    with Built(case.network) as built:
        source = built.text.split("COUNTS = {}\n", 1)[1].strip("\n")
    if differences is None:
        result = run(description)
        differences = result.differences
        if result.invalid:
            return f"{description!r}\n\n{source}\n\nno case: {result.invalid}", False
    lines = [repr(description), "", source, "", *(f"differs: {d}" for d in differences[:6])]
    return "\n".join(lines if differences else [*lines, "no difference"]), bool(differences)


@dataclass
class Fault:
    """A fault in its smallest form, and how often it was seen."""

    smallest: Case | Session
    differences: list[Difference]
    found: Case | Session
    count: int = 1

    @property
    def what(self) -> str:
        """The kind of its first difference."""
        return self.differences[0].what

    @property
    def features(self) -> frozenset[str]:
        """What is unusual in it, but for what says nothing of its kind."""
        return frozenset(
            f for f in self.smallest.features() if not f.startswith(("Case.seed", "Case.size", "Case.batch"))
        )


@dataclass
class Tally:
    """Counts of a part of a campaign."""

    done: int = 0
    fused: int = 0
    invalid: int = 0
    failed: int = 0
    families: Counter[str] = field(default_factory=Counter)
    joins: Counter[str] = field(default_factory=Counter)
    fused_joins: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Draws, checks and shrinks. ``without``: features that no case may have; ``ignored``: kinds of difference that do not count."""

    def __init__(
        self,
        seed: int = 0,
        most_faults: int = 30,
        backend: str | None = None,
        without: tuple[str, ...] = (),
        ignored: tuple[str, ...] = (),
        shrink_seconds: float = 30.0,
        quiet: bool = False,
    ) -> None:
        self.faults: list[Fault] = []
        self.networks, self.sessions = Tally(), Tally()
        self._seed, self._most, self._backend = seed, most_faults, backend
        self._without, self._ignored = without, ignored
        self._shrink_seconds, self._quiet = shrink_seconds, quiet
        self._started = time.monotonic()

    # ---- running -----------------------------------------------------------------------------------------------------

    def run_networks(self, count: int | None = None, seconds: float | None = None) -> None:
        """Random networks: ``count`` of them or as many as ``seconds`` allow."""
        self._run("networks", self.networks, lambda generator: generator.case(), count, seconds)

    def run_sessions(self, count: int | None = None, seconds: float | None = None) -> None:
        """Random sequences of actions, by number or by time."""
        self._run("sessions", self.sessions, lambda generator: generator.session(), count, seconds)

    def _run(
        self,
        title: str,
        tally: Tally,
        draw: Callable[[Generator], Case | Session],
        count: int | None,
        seconds: float | None,
    ) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        with self._progress(title, tally, count, seconds) as show:
            for number in itertools.count() if count is None else range(count):
                if end is not None and time.monotonic() > end or len(self.faults) >= self._most:
                    return
                description = draw(Generator(self._seed * _STRIDE + number))
                if not self._without or not self._excluded(description):
                    self._check(description, tally)
                show()

    def _excluded(self, description: Case | Session) -> bool:
        features = set(description.features())
        return any(feature in features for feature in self._without)

    def _result(self, description: Case | Session) -> Result:
        result = run(description, self._backend)
        result.differences = [d for d in result.differences if d.what not in self._ignored]
        return result

    def _check(self, description: Case | Session, tally: Tally) -> None:
        result = self._result(description)
        tally.done += 1
        tally.invalid += result.invalid is not None
        tally.fused += bool(result.fused)
        tally.families.update(result.fused)
        case = description if isinstance(description, Case) else description.case
        for block in case.network.blocks:
            key = f"{block.join.op} (join)" if isinstance(block, Residual) else type(block).__name__.lower()
            tally.joins[key] += 1
            tally.fused_joins[key] += bool(result.fused)
        if result.differences:
            tally.failed += 1
            self._fault(description, result.differences)

    def _fault(self, description: Case | Session, differences: list[Difference]) -> None:
        if isinstance(description, Case) and description.verify:
            # without the proof's warning the numbers say more
            bare = replace(description, verify=False)
            found = self._result(bare).differences
            if found:
                description, differences = bare, found
        what, features = differences[0].what, set(description.features())
        for fault in self.faults:
            if fault.what == what and type(fault.smallest) is type(description) and fault.features <= features:
                fault.count += 1
                return

        def fails(other: Description) -> bool:
            assert isinstance(other, Case | Session)
            found = self._result(other).differences
            return bool(found) and found[0].what == what

        smallest = shrink(description, fails, self._shrink_seconds)
        fault = Fault(smallest, self._result(smallest).differences or differences, description)
        for known in self.faults:
            if known.what == fault.what and known.features == fault.features:
                known.count += 1
                return
        self.faults.append(fault)
        if not self._quiet:
            print(f"\n==== fault {len(self.faults)}\n{explain(smallest, fault.differences)[0]}\n", flush=True)

    # ---- progress ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _progress(
        self, title: str, tally: Tally, count: int | None, seconds: float | None
    ) -> Iterator[Callable[[], None]]:
        """A bar on a terminal, else a line now and then; none where the campaign is quiet."""
        if self._quiet:
            yield lambda: None
            return
        if sys.stderr.isatty():
            with self._bar(title, tally, count, seconds) as show:
                yield show
            return
        last = [time.monotonic()]

        def line() -> None:
            if time.monotonic() - last[0] >= PAUSE:
                last[0] = time.monotonic()
                print(f"{last[0] - self._started:6.0f} s  {self._line(title, tally)}", flush=True)

        yield line

    @contextmanager
    def _bar(self, title: str, tally: Tally, count: int | None, seconds: float | None) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import Progress

        started = time.monotonic()
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=count or seconds)

            def show() -> None:
                done = tally.done if seconds is None else time.monotonic() - started
                progress.update(task, completed=done, description=self._line(title, tally))

            yield show

    def _line(self, title: str, tally: Tally) -> str:
        share = 100 * tally.fused / max(tally.done, 1)
        return f"{tally.done} {title}, {share:.0f} % fused, {len(self.faults)} faults"

    def summary(self) -> str:
        """What was run and what was found."""
        lines = []
        for title, tally in (("networks", self.networks), ("sessions", self.sessions)):
            if not tally.done:
                continue
            lines.append(
                f"{self._line(title, tally)} ({tally.failed} cases failed, {tally.invalid} were none: eager raises), "
                f"{time.monotonic() - self._started:.0f} s"
            )
            lines += [f"    {tally.families[key]:6d}  {key}" for key in sorted(tally.families)]
            lines.append("  with a block that joins by ...: networks, of which something was fused")
            lines += [f"    {n:6d} {tally.fused_joins[key]:6d}  {key}" for key, n in sorted(tally.joins.items())]
        for i, fault in enumerate(self.faults, 1):
            lines.append(f"fault {i}, {fault.count} times: {fault.differences[0]}\n    {fault.smallest!r}")
        return "\n".join([*lines, f"{len(self.faults)} faults"])
