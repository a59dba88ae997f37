"""Dense connectivity (Huang et al. 2017): accuracy for parameters and FLOPs, which layers are read again, and what the concatenations cost.

The memory of a dense block is quadratic in its depth where every concatenation is a map of its own, and linear in one buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fusedres
from fusedres.nn import DenseBlock
from fusedres.trial import memory

from ..data import Images
from ..report import INK
from ..training import Recipe, assert_fused
from . import drawing
from .networks import KINDS, Network, of_dense
from .study import Advance, Result, Study, mean, trained

#: depth of the residual networks, whose width makes the FLOPs equal
RESIDUAL_DEPTH = 20
EAGER = "#8a8a8a"


@dataclass(frozen=True)
class Preset:
    """DenseNets of ``layers`` per block for each of the ``growth`` rates, residual ones beside; one of ``reuse`` layers per block whose
    weights are looked at; dense blocks of ``memory`` layers whose bytes are counted, on maps of ``side`` pixels."""

    layers: int
    growth: tuple[int, ...]
    reuse: int
    memory: tuple[int, ...]
    side: int
    seeds: int
    recipe: Recipe = field(default_factory=Recipe)


PRESETS = {
    "toy": Preset(2, (2, 4), 3, (2, 4, 8), 8, 1, Recipe(epochs=1)),
    "quick": Preset(3, (2, 4, 8, 12), 8, (4, 8, 16, 32, 64), 16, 2, Recipe(epochs=10)),
    "full": Preset(16, (4, 8, 12, 24), 16, (4, 8, 16, 32, 64), 32, 3, Recipe(300, 64, 0.1, 1e-4, True, (0.5, 0.75))),
}


def flops(network: nn.Module, images: Images) -> int:
    """Of an inference of one image, two per multiplication and addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fusedres.export_plain(network).eval()(images.test_images[:1])
    return counter.get_total_flops()


def width_of(wanted: int, images: Images) -> int:
    """The width of the residual network whose FLOPs are nearest to those ``wanted``."""
    counted = {w: flops(KINDS["residual"](RESIDUAL_DEPTH, w, images.channels), images) for w in (4, 8)}
    # almost quadratic in the width: a first guess, and its neighbours
    guess = max(2, round(8 * math.sqrt(wanted / counted[8])))
    for w in range(max(1, guess - 1), guess + 2):
        counted[w] = flops(KINDS["residual"](RESIDUAL_DEPTH, w, images.channels), images)
    return min(counted, key=lambda w: abs(counted[w] - wanted))


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """By growth rate; beside each the residual network of as many FLOPs."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for growth in preset.growth:
        dense = functools.partial(of_dense, preset.layers, growth, images.channels)
        width = width_of(flops(dense(), images), images)
        found[f"dense, k = {growth}"] = dense
        found[f"residual, width {width}"] = functools.partial(KINDS["residual"], RESIDUAL_DEPTH, width, images.channels)
    return found | {"reuse": functools.partial(of_dense, preset.reuse, preset.growth[-1], images.channels)}


def steps(preset: Preset) -> int:
    """Epochs and depths."""
    return (2 * len(preset.growth) * preset.seeds + 1) * preset.recipe.epochs + len(preset.memory)


def connections(block: DenseBlock, growth: int) -> int:
    """How many maps all layers of a block read together, counted by the channels of their first convolutions."""
    first = [layer.conv1.in_channels for layer in block.values()]  # type: ignore[union-attr]
    return sum(1 + (channels - first[0]) // growth for channels in first)  # type: ignore[operator,misc]


def reuse(network: Network, growth: int) -> list[list[list[float]]]:
    """For every dense block, layer and map that it reads (0: the block's input): the mean absolute weight of its first convolution, beside
    the largest of the layer."""
    blocks = []
    for layers in network.layers:
        rows = []
        for layer in layers:
            weight = layer.conv1.weight.detach().abs().mean((0, 2, 3))  # type: ignore[union-attr,operator]
            start = len(weight) - len(rows) * growth
            pieces = [weight[:start], *weight[start:].split(growth)] if rows else [weight]
            values = [piece.mean().item() for piece in pieces]
            rows.append([value / max(values) for value in values])
        if rows:
            blocks.append(rows)
    return blocks


def kept(layers: int, growth: int, side: int, fused: bool) -> int:
    """Bytes that a dense block keeps for backward."""
    torch.manual_seed(0)
    block: nn.Module = DenseBlock(layers, 2 * growth, 4, growth, 0.0)
    if not fused:
        block = fusedres.export_plain(block)
    x = torch.randn(4, 2 * growth, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    with memory.count_kept(block, len(x)) as count:
        y = block.train()(x)
        found = count()
    del y
    if fused:
        assert_fused(block)
    return found


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Train, look at the weights, count."""
    builders = networks(preset, images)
    runs = []
    for seed in range(preset.seeds):
        for name, build in builders.items():
            if name == "reuse":
                continue
            model, epochs = trained(build, images, preset.recipe, seed, lambda: advance(f"{name}, seed {seed}"))  # noqa: B023
            runs.append(
                {
                    "network": name,
                    "kind": name.partition(",")[0],
                    "seed": seed,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "flops": flops(model, images),
                    "test_error": 100 * epochs[-1].test_error,
                    "train_error": 100 * epochs[-1].train_error,
                }
            )
    network, _ = trained(
        builders["reuse"], images, preset.recipe, 0, lambda: advance("the network whose weights are read")
    )
    assert isinstance(network, Network)
    growth = preset.growth[-1]
    counted = []
    for layers in preset.memory:
        advance(f"bytes of {layers} layers")
        block = DenseBlock(layers, 2 * growth, 4, growth, 0.0)
        counted.append(
            {
                "layers": layers,
                "connections": connections(block, growth),
                "eager": kept(layers, growth, preset.side, fused=False),
                "fused": kept(layers, growth, preset.side, fused=True),
            }
        )
    return {"runs": runs, "reuse": reuse(network, growth), "memory": counted, "growth": growth}


def points(result: Result, kind: str) -> list[dict]:
    """The networks of a kind, in the order of their FLOPs, means over the seeds."""
    names = dict.fromkeys(r["network"] for r in result["runs"] if r["kind"] == kind)
    found = []
    for name in names:
        same = [r for r in result["runs"] if r["network"] == name]
        found.append(same[0] | {"test_error": mean([r["test_error"] for r in same])})
    return sorted(found, key=lambda r: r["flops"])


def exponent(result: Result, arm: str) -> float:
    """Of the last two depths: 1 where memory is linear in the depth, 2 where it is quadratic."""
    a, b = result["memory"][-2:]
    return math.log(b[arm] / a[arm]) / math.log(b["layers"] / a["layers"])


def plot(result: Result) -> Figure:
    """Error for parameters and for FLOPs, reuse, memory."""
    figure, (parameters, work, weights, counted) = drawing.panels(
        "Dense layers read everything before them: fewer weights, but memory wants one buffer",
        "Left: each dense network beside a residual one of equal FLOPs. Right: which earlier layers a trained block reads, and what its "
        "concatenations keep for backward",
        4,
        width=16,
    )
    for panel, what, words in ((parameters, "parameters", "parameters"), (work, "flops", "FLOPs of an image")):
        drawing.style(panel, f"Error for {words}", words, "test error, %")
        for kind in ("residual", "dense"):
            found = points(result, kind)
            looks = {"color": drawing.COLOURS[kind], "linewidth": 2, "label": kind}
            panel.plot([r[what] for r in found], [r["test_error"] for r in found], "o-", **looks)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(bottom=0)
    drawing.legend(parameters)
    block = result["reuse"][1]
    size = len(block)
    least = math.floor(10 * min(value for row in block for value in row)) / 10
    grid = [[block[j][i] if i < len(block[j]) else math.nan for j in range(size)] for i in range(size)]
    drawing.style(
        weights, "Who reads whom? (second block)", "reading layer", "layer that is read; 0: the block's input"
    )
    weights.grid(False)
    shown = weights.imshow(
        grid,
        cmap="viridis",
        vmin=least,
        vmax=1,
        origin="upper",
        aspect="auto",
        extent=(0.5, size + 0.5, size - 0.5, -0.5),
    )
    figure.colorbar(shown, ax=weights, shrink=0.8).set_label(
        "mean |weight|, beside the largest", fontsize=10, color="#555555"
    )
    weights.set_xticks(range(1, size + 1))
    weights.set_yticks(range(size))
    drawing.style(counted, "Kept for backward by a dense block", "layers", "MiB")
    layers = [row["layers"] for row in result["memory"]]
    for arm, colour, words in (
        ("eager", EAGER, "eager: a map per concatenation"),
        ("fused", drawing.COLOURS["dense"], "fused: one buffer"),
    ):
        values = [row[arm] / 2**20 for row in result["memory"]]
        counted.plot(layers, values, "o-", color=colour, linewidth=2, label=words)
        counted.annotate(
            f"~ layers$^{{{exponent(result, arm):.1f}}}$", (layers[-1], values[-1]), (-16, 4), textcoords="offset points",
            ha="right", color=INK,
        )  # fmt: skip
    counted.set_ylim(top=1.35 * max(row["eager"] for row in result["memory"]) / 2**20)
    drawing.legend(counted, loc="upper left")
    return figure


def sentences(result: Result) -> tuple[str, str, str]:
    """Parameters and errors at equal FLOPs; connections and reuse; memory."""
    dense, residual = points(result, "dense"), points(result, "residual")
    pairs = "; ".join(
        f"{d['flops'] / 1e6:.2f} and {r['flops'] / 1e6:.2f} MFLOPs: {d['parameters']} and {r['parameters']} parameters, errors "
        f"{d['test_error']:.1f} and {r['test_error']:.1f} %"
        for d, r in zip(dense, residual, strict=True)
    )
    last = result["memory"][-1]
    rows = [row for block in result["reuse"] for row in block if len(row) > 1]
    early = mean([mean(row[:-1]) for row in rows])
    return (
        f"Dense beside residual networks of equal FLOPs, {pairs}; Huang et al. need a third of the parameters for a ResNet's accuracy.",
        f"A block of {last['layers']} layers has {last['connections']} connections, L (L + 1) / 2; layers read those before the previous "
        f"one with {early:.2f} of their largest mean weight, and in the paper, too, they spread their weights over many inputs.",
        f"For backward such a block keeps {last['eager'] / 2**20:.1f} MiB in eager and {last['fused'] / 2**20:.1f} MiB in one buffer, "
        f"growing as depth^{exponent(result, 'eager'):.2f} and depth^{exponent(result, 'fused'):.2f}; Pleiss et al. 2017 (arXiv "
        "1707.06990) derive 2 and 1.",
    )


STUDY = Study(
    "Dense connectivity",
    "Huang, Liu, van der Maaten, Weinberger 2017, Densely Connected Convolutional Networks, arXiv 1608.06993",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
