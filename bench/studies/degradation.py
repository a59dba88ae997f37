"""Degradation (He et al. 2015, figures 4 and 6): of plain networks the deeper one has more *training* error; of residual ones not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from matplotlib.figure import Figure
from torch import nn

from ..data import Images
from ..training import HE_2015, Recipe
from . import drawing
from .networks import KINDS
from .study import Advance, Result, Study, mean, trained

COMPARED = ("plain", "residual")
#: test errors of residual networks on CIFAR-10, in percent, by depth (table 6)
PUBLISHED = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}


@dataclass(frozen=True)
class Preset:
    """Depths, seeds, width of the first stage, and how each network is trained."""

    depths: tuple[int, ...]
    seeds: int
    width: int
    recipe: Recipe = field(default_factory=Recipe)


PRESETS = {
    "toy": Preset((8, 14), 1, 4, Recipe(epochs=2)),
    "quick": Preset((20, 32, 44, 56), 2, 8, Recipe(epochs=12)),
    "full": Preset((20, 32, 44, 56, 110), 5, 16, HE_2015),
}


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """By kind and depth."""
    return {
        f"{kind}-{depth}": functools.partial(KINDS[kind], depth, preset.width, images.channels)
        for depth in preset.depths
        for kind in COMPARED
    }


def steps(preset: Preset) -> int:
    """Epochs of all runs."""
    return len(preset.depths) * len(COMPARED) * preset.seeds * preset.recipe.epochs


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Train every network from every seed."""
    builders = networks(preset, images)
    runs = []
    for seed in range(preset.seeds):
        for depth in preset.depths:
            for kind in COMPARED:
                begin = functools.partial(advance, f"{kind}-{depth}, seed {seed}")
                _, epochs = trained(builders[f"{kind}-{depth}"], images, preset.recipe, seed, begin)
                runs.append({"kind": kind, "depth": depth, "seed": seed, "epochs": [asdict(e) for e in epochs]})
    return {"runs": runs}


def curve(result: Result, kind: str, depth: int, quantity: str) -> list[list[float]]:
    """Percent by epoch, of every seed."""
    same = [r for r in result["runs"] if (r["kind"], r["depth"]) == (kind, depth)]
    return [[100 * epoch[quantity] for epoch in r["epochs"]] for r in same]


def final(result: Result, kind: str, depth: int, quantity: str) -> float:
    """Percent behind the last epoch, mean over the seeds."""
    return mean([values[-1] for values in curve(result, kind, depth, quantity)])


def depths(result: Result) -> list[int]:
    """In rising order."""
    return sorted({r["depth"] for r in result["runs"]})


def plot(result: Result) -> Figure:
    """Curves of training error, plain and residual, and the final error against depth."""
    found = depths(result)
    figure, axes = drawing.panels(
        "Deeper plain networks train worse; residual ones train alike",
        "Error on the images that the network learns from: a network of more layers could copy a shallow one, so worse is no overfitting",
        3,
    )
    for kind, panel in zip(COMPARED, axes, strict=False):
        name = "Plain: no shortcuts" if kind == "plain" else "Residual: the same layers with shortcuts"
        drawing.style(panel, name, "epoch", "training error, %")
        for i, depth in enumerate(found):
            curves = curve(result, kind, depth, "train_error")
            x = range(1, len(curves[0]) + 1)
            shade = 0.35 + 0.65 * i / max(1, len(found) - 1)
            for j, values in enumerate(curves):
                label = f"{depth} layers" if j == 0 else None
                panel.plot(x, values, color=drawing.COLOURS[kind], alpha=shade, linewidth=1 + 1.6 * shade, label=label)
        panel.set_ylim(0, 95)
        drawing.legend(panel, labelcolor=None, loc="upper right" if kind == "residual" else "lower left")
    drawing.style(axes[2], "When training is over", "layers", "error, %")
    for kind in COMPARED:
        for quantity, line, words in (("train_error", "-", "training"), ("test_error", ":", "test")):
            values = [final(result, kind, depth, quantity) for depth in found]
            axes[2].plot(found, values, line, marker="o", color=drawing.COLOURS[kind], label=f"{kind}, {words}")
    axes[2].set_xticks(found)
    axes[2].set_ylim(bottom=0)
    drawing.legend(axes[2], loc="upper left")
    return figure


def sentences(result: Result) -> tuple[str, str, str]:
    """Training error of both kinds at both ends of the depths, and the test error beside the published."""
    shallow, deep = depths(result)[0], depths(result)[-1]
    plain, residual = (
        [final(result, kind, depth, "train_error") for depth in (shallow, deep)] for kind in ("plain", "residual")
    )
    tests = ", ".join(f"{final(result, 'residual', depth, 'test_error'):.2f}" for depth in depths(result))
    published = ", ".join(f"{PUBLISHED[d]:.2f}" if d in PUBLISHED else "none" for d in depths(result))
    return (
        f"Plain: training error goes from {plain[0]:.1f} % with {shallow} layers to {plain[1]:.1f} % with {deep}; in the paper, on "
        "CIFAR-10, that of plain networks rises with depth likewise, and of 110 layers stays above 60 %.",
        f"Residual: it goes from {residual[0]:.1f} % with {shallow} layers to {residual[1]:.1f} % with {deep}; in the paper it falls.",
        f"Test errors of residual networks of {', '.join(map(str, depths(result)))} layers: {tests} %; published for CIFAR-10: "
        f"{published} %.",
    )


STUDY = Study(
    "Degradation",
    "He, Zhang, Ren, Sun 2015, Deep Residual Learning for Image Recognition, arXiv 1512.03385",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
