"""Depth without fear: the deepest network that trains in a given memory, eager, fused, and fused with recomputation.

A depth is tried by a whole training step, with the optimizer's, whose allocations are followed: the most that was alive is its memory. The
deepest that stays within the budget then really trains for some steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import fusedres
from fusedres.trial import memory

from ..data import Images
from ..training import assert_fused
from . import drawing
from .networks import Network, bottleneck, of_blocks, of_dense
from .study import Advance, Result, Study

MIB = 2**20
COLOURS = {"eager": "#8a8a8a", "fused": "#0072b2", "fused, recompute": "#009e73"}


@dataclass(frozen=True)
class Preset:
    """The ``budget`` in MiB, images per step, width of the residual network, growth rate of the dense one, steps of training at the end."""

    budget: float
    batch: int
    width: int
    growth: int
    steps: int


PRESETS = {
    "toy": Preset(0.12, 8, 2, 2, 2),
    "quick": Preset(24, 64, 4, 8, 5),
    "full": Preset(1024, 128, 16, 12, 20),
}


def _residual(preset: Preset, channels: int, size: int) -> Network:
    return of_blocks(bottleneck, (size,), preset.width, channels)


def _dense(preset: Preset, channels: int, size: int) -> Network:
    return of_dense(size, preset.growth, channels, blocks=1)


#: of so many blocks or dense layers; and how many convolutions are in front of the classifier's layer and in a block
FAMILIES: dict[str, tuple[Callable[[Preset, int, int], Network], int]] = {
    "residual": (_residual, 3),
    "dense": (_dense, 2),
}
ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": fusedres.export_plain,
    "fused": lambda network: network,
    "fused, recompute": functools.partial(fusedres.convert, recompute=True),
}


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """A small one of each family."""
    return {name: functools.partial(build, preset, images.channels, 2) for name, (build, _) in FAMILIES.items()}


def steps(preset: Preset) -> int:
    """One per family and arm; the depths that are tried are not known before."""
    return len(FAMILIES) * len(ARMS)


def training_step(network: nn.Module, images: Images, batch: int) -> Callable[[], float]:
    """A step of SGD with momentum on one batch, that returns its loss."""
    optimizer = torch.optim.SGD(network.train().parameters(), 0.01, momentum=0.9)
    inputs, labels = images.train_images[:batch], images.train_labels[:batch]
    inputs = inputs.contiguous(memory_format=torch.channels_last)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def network_of(family: str, arm: str, size: int, preset: Preset, images: Images) -> nn.Module:
    """With the same weights for every arm."""
    torch.manual_seed(0)
    build, _ = FAMILIES[family]
    return ARMS[arm](build(preset, images.channels, size))


def peak(family: str, arm: str, size: int, preset: Preset, images: Images) -> float:
    """MiB of a training step: the most that was alive beyond the network and its images."""
    network = network_of(family, arm, size, preset, images)
    step = training_step(network, images, preset.batch)
    step()  # the optimizer's state, and what is prepared at a first call, are there
    found = memory.peak_bytes(step, torch.device("cpu")) / MIB
    if arm != "eager":
        assert_fused(network)
    return found


def deepest(measure: Callable[[int], float], budget: float) -> dict[int, float]:
    """All sizes that were tried, with their peaks; the largest of those within the budget is the largest there is.

    Doubled until the budget is exceeded, then halved in between. Raises ValueError where not even one block fits.
    """
    tried = {1: measure(1)}
    if tried[1] > budget:
        raise ValueError(f"a budget of {budget} MiB has no room for one block, which takes {tried[1]:.1f} MiB")
    fits, exceeds = 1, 2
    while tried.setdefault(exceeds, measure(exceeds)) <= budget:
        fits, exceeds = exceeds, 2 * exceeds
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        tried[middle] = measure(middle)
        fits, exceeds = (middle, exceeds) if tried[middle] <= budget else (fits, middle)
    return tried


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Search, and train what was found."""
    found = []
    for family, (_, convolutions) in FAMILIES.items():
        for arm in ARMS:
            advance(f"{family}, {arm}")
            tried = deepest(lambda size: peak(family, arm, size, preset, images), preset.budget)  # noqa: B023
            size = max(size for size, value in tried.items() if value <= preset.budget)
            step = training_step(network_of(family, arm, size, preset, images), images, preset.batch)
            found.append(
                {
                    "family": family,
                    "arm": arm,
                    "layers": convolutions * size + 2,
                    "tried": [[convolutions * n + 2, value] for n, value in sorted(tried.items())],
                    "losses": [step() for _ in range(preset.steps)],
                }
            )
    return {"budget": preset.budget, "batch": preset.batch, "found": found}


def of_arm(result: Result, family: str, arm: str) -> dict:
    """What was found for it."""
    return next(r for r in result["found"] if (r["family"], r["arm"]) == (family, arm))


def plot(result: Result) -> Figure:
    """Memory against depth, and the deepest of each arm."""
    figure, (residual, dense, bars) = drawing.panels(
        f"What trains in {result['budget']:g} MiB? The same networks, deeper",
        f"Memory that a training step of {result['batch']} images takes at its peak, against depth: plain PyTorch, fused blocks, and fused "
        "blocks that compute their 1x1 convolutions again",
        3,
        width=14,
    )
    titles = {"residual": "ResNet of bottlenecks", "dense": "DenseNet, one dense block"}
    for panel, family in ((residual, "residual"), (dense, "dense")):
        drawing.style(panel, titles[family], "layers", "peak of a training step, MiB")
        reach = 0.0
        for arm, colour in COLOURS.items():
            found = of_arm(result, family, arm)
            x, y = zip(*found["tried"], strict=True)
            panel.plot(x, y, "o-", color=colour, linewidth=2, markersize=4, label=arm)
            panel.plot(found["layers"], dict(found["tried"])[found["layers"]], "D", color=colour, markersize=10)
            reach = max(reach, found["layers"])
        panel.axhline(result["budget"], color="#c1121f", linewidth=1.5)
        panel.text(0.02 * reach, result["budget"] * 1.02, "budget", color="#c1121f", fontsize=10, va="bottom")
        panel.set_xlim(0, reach * 1.12)
        panel.set_ylim(0, result["budget"] * 1.35)
        drawing.legend(panel, loc="lower right")
    drawing.style(bars, "Deepest that fits", "", "layers")
    for i, family in enumerate(titles):
        for j, (arm, colour) in enumerate(COLOURS.items()):
            layers = of_arm(result, family, arm)["layers"]
            bars.bar(i + 0.27 * (j - 1), layers, 0.25, color=colour)
            bars.text(i + 0.27 * (j - 1), layers, f"{layers}", ha="center", va="bottom", fontsize=11, color=colour)
    bars.margins(y=0.12)
    bars.set_xticks([0, 1], ["ResNet", "DenseNet"])
    bars.tick_params(axis="x", labelsize=12)
    return figure


def sentences(result: Result) -> tuple[str, str, str]:
    """The deepest of both families, and that they train."""

    def said(family: str) -> str:
        eager, fused, again = (of_arm(result, family, arm)["layers"] for arm in ARMS)
        return f"{eager} layers in eager, {fused} fused and {again} with recomputation"

    fell = sum(r["losses"][-1] < r["losses"][0] for r in result["found"])
    return (
        f"Within {result['budget']:g} MiB, {result['batch']} images a step, a ResNet of bottlenecks has {said('residual')}.",
        f"A DenseNet of one dense block has {said('dense')}; Pleiss et al. 2017 go from 4 to 14 million parameters on one GPU, by sharing "
        "the memory of concatenations and computing them again.",
        f"Each of these was trained at its deepest for {len(result['found'][0]['losses'])} steps; the loss fell in {fell} of "
        f"{len(result['found'])}.",
    )


STUDY = Study(
    "Depth without fear",
    "Pleiss, Chen, Huang, Li, van der Maaten, Weinberger 2017, Memory-Efficient Implementation of DenseNets, arXiv 1707.06990",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
