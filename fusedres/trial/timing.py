"""How long a step takes, by the clock of the device that it runs on."""

from __future__ import annotations

import random
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Step:
    """What is timed: ``call``, so many ``calls`` back to back in a round, and the ``seconds`` of one of them in each round so far."""

    call: Callable[[], None]
    calls: int = 1
    seconds: list[float] = field(default_factory=list)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_per_call(step: Callable[[], None], calls: int, device: torch.device) -> float:
    """The mean time of ``calls`` calls back to back, by the device's own clock where it is a GPU."""
    if device.type != "cuda":
        return timeit.timeit(step, number=calls) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


#: of quiet between two steps of a round on a CPU: thread pools go on waiting at full speed, some for tens of milliseconds
SETTLING = 0.06


def in_turns(steps: Sequence[Step], rounds: int, device: torch.device, advance: Callable[[int], None]) -> None:
    """Time every step once in each of ``rounds``, so that what happens on the machine happens to all; ``advance`` hears of each round.
    Each round has an order of its own, the same in every run, and on a CPU a pause in front of each step: nobody always runs in the wake of
    the same one."""
    shuffled = random.Random(0)
    for i in range(rounds):
        advance(i)
        for step in shuffled.sample(steps, len(steps)):
            if device.type == "cpu":
                time.sleep(SETTLING)
            step.seconds.append(seconds_per_call(step.call, step.calls, device))
