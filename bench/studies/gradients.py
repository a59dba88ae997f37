"""Gradient flow: how much of the loss' gradient reaches the first block, and whether it says the same for neighbouring inputs.

With it the linear picture: a chain of factors w has gain w^n, one of residual steps (1 + w)^n, which is the sum over all paths. Shattered
gradients are those of Balduzzi et al. 2017: correlations of about 2^-L in plain networks of L layers, 1/sqrt(L) in residual ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..data import Images, epochs_of
from ..training import Recipe, assert_fused
from . import drawing
from .networks import KINDS, Network, of_blocks, plain, preact, residual
from .study import Advance, Result, Study, mean, trained

LINKS, FACTOR, SMALL = 99, 0.9, 0.01
#: kinds whose gradients are compared between inputs: what builds a block, and whether what comes out of it is activated
SHATTERED = {"plain": (plain, True), "residual": (residual, True), "pre-activation": (preact, False)}


@dataclass(frozen=True)
class Preset:
    """``depths`` of the networks whose gradients' norms are taken, before and after so many ``steps`` of training; ``layers`` of those
    whose gradients are compared between so many ``points``."""

    depths: tuple[int, ...]
    layers: tuple[int, ...]
    seeds: int
    width: int
    steps: int
    points: int
    recipe: Recipe = field(default_factory=Recipe)


PRESETS = {
    "toy": Preset((8, 14), (2, 4), 1, 4, 4, 16),
    "quick": Preset((20, 56, 110), (2, 4, 6, 10, 16, 24, 36, 54), 2, 8, 20, 128),
    "full": Preset((20, 32, 44, 56, 110), (2, 4, 6, 10, 16, 24, 36, 54, 80, 110), 5, 16, 400, 256, Recipe(batch=128)),
}


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """By kind and depth; those of one stage by their layers."""
    by_depth = {
        f"{kind}-{depth}": functools.partial(build, depth, preset.width, images.channels)
        for depth in preset.depths
        for kind, build in KINDS.items()
    }
    return by_depth | {
        f"{kind}, {layers} layers of one size": functools.partial(
            of_blocks, build, (layers // 2,), 2 * preset.width, images.channels, activated
        )
        for layers in preset.layers
        for kind, (build, activated) in SHATTERED.items()
    }


def steps(preset: Preset) -> int:
    """One per network and seed."""
    return preset.seeds * (len(preset.depths) * len(KINDS) + len(preset.layers) * len(SHATTERED))


def chain(factor: float, links: int, residual: bool) -> float:
    """d out / d in of a chain, by autograd: ``x -> factor * x`` or ``x -> x + factor * x``, so many times."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(links):
        y = y + factor * y if residual else factor * y
    (gain,) = torch.autograd.grad(y, x)
    return gain.item()


def over_paths(factor: float, links: int) -> float:
    """The same gain as the sum over the paths: binomial(links, k) of them pass k factors."""
    return math.fsum(math.comb(links, k) * factor**k for k in range(links + 1))


def norms(network: Network, images: Images, batch: int) -> list[float]:
    """Norm of the loss' gradient with respect to the parameters of every block, or layer of a dense block, in a training step."""
    network.zero_grad()
    F.cross_entropy(network.train()(images.train_images[:batch]), images.train_labels[:batch]).backward()
    assert_fused(network)
    return [
        math.sqrt(sum(p.grad.square().sum().item() for p in unit.parameters() if p.grad is not None))
        for unit in network.units()
    ]


def input_gradients(network: nn.Module, inputs: Tensor) -> Tensor:
    """The gradient of the first output with respect to each input, inputs x values.

    BatchNorm uses the statistics of all inputs, and is differentiated as what it then is, a scale and a shift: an input's gradient is of
    its own output alone.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # one batch's statistics
    with torch.no_grad():
        network.train()(inputs)
    inputs = inputs.detach().requires_grad_()
    network.eval()(inputs)[:, 0].sum().backward()
    assert_fused(network)
    assert inputs.grad is not None
    return inputs.grad.flatten(1).double()


def correlation(gradients: Tensor) -> float:
    """Mean cosine of an input's gradient and the next one's."""
    return F.cosine_similarity(gradients[1:], gradients[:-1], dim=1).mean().item()


def line(images: Images, points: int) -> Tensor:
    """Images from one test image to another, in equal steps."""
    t = torch.linspace(0, 1, points).view(-1, 1, 1, 1)
    begin, end = images.test_images[:2]
    return ((1 - t) * begin + t * end).contiguous(memory_format=torch.channels_last)


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Norms by block, before and after some training; correlations by depth; the linear chain."""
    builders = networks(preset, images)
    epochs = epochs_of(preset.steps, images, preset.recipe.batch)
    recipe = Recipe(epochs, preset.recipe.batch, preset.recipe.learning_rate)
    flow, shattered = [], []
    for seed in range(preset.seeds):
        for depth in preset.depths:
            for kind in KINDS:
                advance(f"gradients of {kind}-{depth}, seed {seed}")
                torch.manual_seed(seed)
                build = builders[f"{kind}-{depth}"]
                before = norms(build(), images, recipe.batch)
                network, _ = trained(build, images, recipe, seed, lambda: None)
                after = norms(network, images, recipe.batch)
                flow.append({"kind": kind, "depth": depth, "seed": seed, "before": before, "after": after})
        for layers in preset.layers:
            for kind in SHATTERED:
                advance(f"gradients of neighbours, {kind}, {layers} layers, seed {seed}")
                found = {"kind": kind, "layers": layers, "seed": seed}
                for what, inputs in (
                    ("neighbours", line(images, preset.points)),
                    ("strangers", images.test_images[: preset.points]),
                ):
                    torch.manual_seed(seed)
                    network = builders[f"{kind}, {layers} layers of one size"]()
                    found[what] = correlation(input_gradients(network, inputs))
                shattered.append(found)
    chains = {
        "links": LINKS,
        "factor": FACTOR,
        "plain": chain(FACTOR, LINKS, residual=False),
        "small": SMALL,
        "residual": chain(SMALL, LINKS, residual=True),
        "over_paths": over_paths(SMALL, LINKS),
    }
    return {"flow": flow, "shattered": shattered, "chain": chains, "trained_steps": preset.steps}


def ratio(result: Result, kind: str, depth: int, when: str) -> float:
    """The first block's norm over the last one's, geometric mean over the seeds."""
    same = [r[when] for r in result["flow"] if (r["kind"], r["depth"]) == (kind, depth)]
    return math.exp(mean([math.log(values[0] / values[-1]) for values in same]))


def correlated(result: Result, kind: str, what: str) -> tuple[list[int], list[float]]:
    """Layers, and the correlation, mean over the seeds."""
    same = [r for r in result["shattered"] if r["kind"] == kind]
    layers = sorted({r["layers"] for r in same})
    return layers, [mean([r[what] for r in same if r["layers"] == n]) for n in layers]


def _of(result: Result, key: str) -> list:
    return list(dict.fromkeys(r[key] for r in result["flow"]))


def plot(result: Result) -> Figure:
    """Norms by block, their ratio against depth, correlations of neighbours and of different images."""
    depths = _of(result, "depth")
    shown = depths[len(depths) // 2]
    figure, (by_block, by_depth, near, far) = drawing.panels(
        "Shortcuts keep the gradient's size and its meaning",
        "Left: how large the loss' gradient is from block to block. Right: whether neighbouring inputs get similar gradients. "
        "All networks with BatchNorm, freshly initialised",
        4,
        width=16,
    )
    drawing.style(
        by_block, f"Gradient by block, {shown} layers", "block: from input (0) to output (1)", "norm of gradient"
    )
    drawing.style(by_depth, "First block over last block", "layers", "ratio of gradient norms")
    for kind in _of(result, "kind"):
        (values,) = (r["before"] for r in result["flow"] if (r["kind"], r["depth"], r["seed"]) == (kind, shown, 0))
        x = [i / (len(values) - 1) for i in range(len(values))]
        by_block.plot(x, values, color=drawing.COLOURS[kind], linewidth=2, label=kind)
        by_depth.plot(
            depths,
            [ratio(result, kind, depth, "before") for depth in depths],
            marker="o",
            color=drawing.COLOURS[kind],
            linewidth=2,
        )
    by_block.set_yscale("log")
    by_depth.set_yscale("log")
    by_depth.axhline(1, color="#888888", linewidth=1)
    by_depth.set_xticks(depths)
    drawing.legend(by_block)
    drawing.style(near, "Neighbouring inputs (a morph)", "layers", "correlation of gradients")
    drawing.style(far, "Different images", "layers", "correlation of gradients")
    for kind in SHATTERED:
        for panel, what in ((near, "neighbours"), (far, "strangers")):
            panel.plot(
                *correlated(result, kind, what), marker="o", color=drawing.COLOURS[kind], linewidth=2, label=kind
            )
    layers, _ = correlated(result, "plain", "strangers")
    fine = [layers[0] + (layers[-1] - layers[0]) * i / 200 for i in range(201)]
    far.plot(fine, [2.0**-n for n in fine], ":", color="#888888", linewidth=2, label="theory, plain: $2^{-L}$")
    begin = correlated(result, "residual", "strangers")[1][0] * math.sqrt(layers[0])
    words = "theory, residual: ~ $1/\\sqrt{L}$"
    far.plot(fine, [begin / math.sqrt(n) for n in fine], "--", color="#888888", linewidth=1.5, label=words)
    near.set_ylim(-0.05, 1.02)
    far.set_ylim(bottom=-0.02)
    drawing.legend(far)
    return figure


def sentences(result: Result) -> tuple[str, str, str]:
    """The chain; the ratio of norms; the correlations."""
    chains: dict[str, float] = result["chain"]
    deep = _of(result, "depth")[-1]
    plain, residual, preact = (ratio(result, kind, deep, "before") for kind in SHATTERED)
    later = ratio(result, "plain", deep, "after"), ratio(result, "residual", deep, "after")
    layers, of_plain = correlated(result, "plain", "neighbours")
    _, of_residual = correlated(result, "residual", "neighbours")
    first: Sequence[float] = correlated(result, "plain", "strangers")[1]
    theory = ", ".join(f"{2.0**-n:.3f}" for n in layers[:3])
    return (
        f"A chain of {chains['links']} factors {chains['factor']} has gain {chains['plain']:.2e} by autograd "
        f"({chains['factor']}^{chains['links']} = {chains['factor'] ** chains['links']:.2e}); {chains['links']} residual steps of "
        f"{chains['small']} have {chains['residual']:.4f}, which is the sum over all paths, {chains['over_paths']:.4f}.",
        f"With {deep} layers the first block's gradient is {plain:.3g} times the last one's in the plain network, {residual:.3g} in the "
        f"residual and {preact:.3g} in the pre-activation one (after {result['trained_steps']} steps: {later[0]:.3g} plain, "
        f"{later[1]:.3g} residual); He et al. 2015 say that BatchNorm keeps plain gradients from vanishing: at first they explode instead.",
        f"Gradients of neighbouring inputs correlate by {of_plain[-1]:.2f} in a plain and {of_residual[-1]:.2f} in a residual network of "
        f"{layers[-1]} layers; those of different images in plain ones of {', '.join(map(str, layers[:3]))} layers by "
        f"{', '.join(f'{value:.3f}' for value in first[:3])}, where Balduzzi et al. derive 2^-L: {theory}.",
    )


STUDY = Study(
    "Gradient flow",
    "Balduzzi, Frean, Leary, Lewis, Ma, McWilliams 2017, The Shattered Gradients Problem, arXiv 1702.08591",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
