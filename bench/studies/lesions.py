"""Lesions (Veit et al. 2016): what is left of a trained network without some of its blocks, or with blocks in another order.

A residual network is a sum over paths: each block is passed or skipped. With n blocks binomial(n, k) paths pass k of them; how much
gradient comes by a path of length k is measured by letting it through k random blocks' convolutions and the others' shortcuts alone.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..data import Images
from ..report import INK
from ..training import HE_2015, Recipe, assert_fused, evaluate
from . import drawing
from .networks import KINDS, Network
from .study import Advance, Result, Study, mean, trained

CUT = ("plain", "pre-activation", "dense")
CALLED = {"plain": "plain", "pre-activation": "residual", "dense": "dense"}


@dataclass(frozen=True)
class Preset:
    """``depths`` of the plain, the residual and the dense network, in this order: a plain one has to be one that trains. ``draws`` of every
    number of lesions in ``counts``, ``paths`` of every length."""

    depths: tuple[int, int, int]
    width: int
    counts: tuple[int, ...]
    draws: int
    paths: int
    recipe: Recipe = field(default_factory=Recipe)


PRESETS = {
    "toy": Preset((8, 14, 14), 4, (1, 2), 2, 2, Recipe(epochs=2)),
    "quick": Preset((20, 56, 56), 8, (1, 2, 3, 5, 7, 10, 14, 20), 6, 12, Recipe(epochs=12)),
    "full": Preset((20, 110, 110), 16, (1, 2, 3, 5, 7, 10, 14, 20), 20, 20, HE_2015),
}


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """One of each kind."""
    return {
        kind: functools.partial(KINDS[kind], depth, preset.width, images.channels)
        for kind, depth in zip(CUT, preset.depths, strict=True)
    }


def steps(preset: Preset) -> int:
    """Epochs, and the lesions of each kind."""
    return len(CUT) * (preset.recipe.epochs + 1) + 1


Lesion = Callable[[Network], None]


def _bypass(network: Network, block: int) -> None:
    shortcut = network.shortcuts[block]
    assert shortcut is not None
    network.blocks[block] = shortcut


def _silence(network: Network, block: int, layer: int) -> None:
    nn.init.zeros_(network.layers[block][layer].conv2.weight)  # type: ignore[arg-type]


def removals(network: Network) -> list[Lesion]:
    """What can be taken out, from input to output: a block that has a shortcut, a layer of a dense block (what it adds becomes zero)."""
    found: list[Lesion] = []
    for i, (shortcut, layers) in enumerate(zip(network.shortcuts, network.layers, strict=True)):
        if shortcut is not None:
            found.append(functools.partial(_bypass, block=i))
        found += [functools.partial(_silence, block=i, layer=j) for j in range(len(layers))]
    return found


def swaps(network: Network) -> list[tuple[int, int]]:
    """Pairs of blocks that can stand in each other's place: they keep the size of a map, as all between them do."""
    pairs = []
    for same, group in itertools.groupby(range(len(network.same)), network.same.__getitem__):
        pairs += list(itertools.combinations(group, 2)) if same else []
    return pairs


def error_after(network: Network, lesions: Sequence[Lesion], images: Images) -> float:
    """Percent of the test images, of a copy of the network with the lesions."""
    hurt = copy.deepcopy(network)
    for lesion in lesions:
        lesion(hurt)
    _, wrong = evaluate(hurt, images.test_images, images.test_labels)
    assert_fused(hurt)
    return 100 * wrong


def _swap(network: Network, first: int, second: int) -> None:
    network.blocks[first], network.blocks[second] = network.blocks[second], network.blocks[first]


def disjoint(pairs: Sequence[tuple[int, int]], count: int, draw: random.Random) -> list[tuple[int, int]] | None:
    """``count`` random pairs that share no block; None where so many were not found."""
    chosen: list[tuple[int, int]] = []
    for pair in draw.sample(pairs, len(pairs)):
        if not set(pair) & {block for other in chosen for block in other}:
            chosen.append(pair)
        if len(chosen) == count:
            return chosen
    return None


def hurt(kind: str, network: Network, images: Images, preset: Preset) -> dict:
    """Errors without lesions, without each part alone, without k random parts, and with k pairs swapped."""
    draw = random.Random(0)
    parts, pairs = removals(network), swaps(network)
    several, swapped = [], []
    for count in preset.counts:
        if count < len(parts):
            errors = [error_after(network, draw.sample(parts, count), images) for _ in range(preset.draws)]
            several.append({"removed": count, "errors": errors})
        errors = []
        for _ in range(preset.draws):
            chosen = disjoint(pairs, count, draw)
            if chosen is not None:
                lesions = [functools.partial(_swap, first=a, second=b) for a, b in chosen]
                errors.append(error_after(network, lesions, images))
        if errors:
            swapped.append({"pairs": count, "errors": errors})
    return {
        "kind": kind,
        "parts": len(parts),
        "whole": error_after(network, [], images),
        "single": [error_after(network, [part], images) for part in parts],
        "several": several,
        "swapped": swapped,
    }


def gradient_by_path(network: Network, passed: set[int], images: Images, batch: int) -> Tensor:
    """The loss' gradient at the first block's input, by way of the one path that passes these blocks and skips the others.

    Forward is the whole network's. A pre-activation block is shortcut plus residual function, so that the block without its shortcut is
    the latter.
    """
    images_, labels = images.test_images[:batch], images.test_labels[:batch]
    start = network.eval().stem(images_).detach().requires_grad_()
    x = start
    for i, (block, shortcut) in enumerate(zip(network.blocks, network.shortcuts, strict=True)):
        assert shortcut is not None
        whole, skipped = block(x), shortcut(x)
        way = whole - skipped if i in passed else skipped
        x = whole.detach() + (way - way.detach())
    loss = F.cross_entropy(network.head(x), labels)
    (gradient,) = torch.autograd.grad(loss, start)
    return gradient


def lengths(blocks: int) -> list[int]:
    """How many paths pass k of so many blocks, for k from 0 to all."""
    return [math.comb(blocks, k) for k in range(blocks + 1)]


def paths(network: Network, images: Images, preset: Preset) -> dict:
    """The distribution of path lengths and, by length, the mean gradient of a path and the share of all gradient."""
    draw = random.Random(0)
    blocks = len(network.blocks)
    each = [
        mean(
            [
                gradient_by_path(network, set(draw.sample(range(blocks), k)), images, preset.recipe.batch).norm().item()
                for _ in range(preset.paths)
            ]
        )
        for k in range(blocks + 1)
    ]
    counts = lengths(blocks)
    mass = [count * gradient for count, gradient in zip(counts, each, strict=True)]
    return {
        "blocks": blocks,
        "share": [count / 2**blocks for count in counts],
        "gradient": each,
        "mass": [value / sum(mass) for value in mass],
    }


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Train a network of each kind, and hurt it."""
    found = []
    result: Result = {}
    for kind, build in networks(preset, images).items():
        network, epochs = trained(build, images, preset.recipe, 0, functools.partial(advance, f"training {kind}"))
        assert isinstance(network, Network)
        advance(f"lesions of {kind}")
        found.append(hurt(kind, network, images, preset) | {"train_error": 100 * epochs[-1].train_error})
        if kind == "pre-activation":
            advance("paths")
            result["paths"] = paths(network, images, preset)
    return {"networks": found, "depths": preset.depths} | result


def of_kind(result: Result, kind: str) -> dict:
    """What was found for a kind."""
    return next(r for r in result["networks"] if r["kind"] == kind)


def interval(shares: Sequence[float], level: float) -> tuple[int, int]:
    """The lengths between which the middle ``level`` of the shares lies."""
    total = list(itertools.accumulate(shares))
    low = next(i for i, value in enumerate(total) if value >= (1 - level) / 2)
    high = next(i for i, value in enumerate(total) if value >= (1 + level) / 2)
    return low, high


def plot(result: Result) -> Figure:
    """Single lesions, several, swaps, and the two distributions over the length of paths."""
    figure, (single, several, swapped, by_length) = drawing.panels(
        "Most blocks of a residual network can be cut out, one at a time; none of a plain one",
        "Test error of trained networks after parts were cut out, without any retraining. Peaks: blocks that halve the map. Right: the "
        "paths of the residual network",
        4,
        width=16,
    )
    drawing.style(single, "One part removed", "which part: from input (0) to output (1)", "test error, %")
    drawing.style(several, "Several removed at random", "share of all parts removed", "test error, %")
    drawing.style(swapped, "Pairs of blocks swapped", "pairs", "test error, %")
    for found in result["networks"]:
        kind, depth = found["kind"], result["depths"][CUT.index(found["kind"])]
        looks = {"color": drawing.COLOURS[kind], "linewidth": 2, "label": f"{CALLED[kind]}, {depth} layers"}
        count = len(found["single"])
        single.plot([i / max(1, count - 1) for i in range(count)], found["single"], marker=".", **looks)
        rows = [{"removed": 0, "errors": [found["whole"]]}, *found["several"]]
        x = [row["removed"] / found["parts"] for row in rows]
        several.plot(x, [mean(row["errors"]) for row in rows], marker="o", **looks)
        several.fill_between(
            x, *([f(row["errors"]) for row in rows] for f in (min, max)), color=looks["color"], alpha=0.15, linewidth=0
        )
        if found["swapped"]:
            rows = [{"pairs": 0, "errors": [found["whole"]]}, *found["swapped"]]
            swapped.plot([row["pairs"] for row in rows], [mean(row["errors"]) for row in rows], marker="o", **looks)
    for panel in (single, several, swapped):
        panel.axhline(90, color="#888888", linewidth=1, linestyle=":")
        panel.set_ylim(-2, 100)
    single.text(0.0, 91.5, "guessing", fontsize=9.5, color="#666666")
    drawing.legend(several, loc="lower right")
    drawing.legend(swapped)
    lengths_ = range(result["paths"]["blocks"] + 1)
    drawing.style(by_length, "Paths by length", "blocks that a path passes", "share")
    by_length.bar(lengths_, result["paths"]["share"], color="#c4c4c4", label="of all paths")
    by_length.plot(
        lengths_,
        result["paths"]["mass"],
        color=drawing.COLOURS["pre-activation"],
        linewidth=2.5,
        label="of all gradient",
    )
    drawing.legend(by_length, labelcolor=INK)
    return figure


def _listed(rows: Sequence[dict], what: str) -> tuple[str, str]:
    """Numbers of lesions, and the mean errors behind them."""
    return ", ".join(str(row[what]) for row in rows), ", ".join(f"{mean(row['errors']):.1f}" for row in rows)


def sentences(result: Result) -> tuple[str, str, str]:
    """Single lesions, several and swaps, lengths of paths."""
    plain, residual, dense = (of_kind(result, kind) for kind in CUT)
    few = [row for row in residual["several"] if row["removed"] <= residual["parts"] / 2]
    removed, after = _listed(few, "removed")
    swapped, later = _listed(residual["swapped"], "pairs")
    found = result["paths"]
    low, high = interval(found["share"], 0.95)
    first, last = interval(found["mass"], 0.95)
    return (
        f"Without one part the test error goes, on average, from {plain['whole']:.1f} to {mean(plain['single']):.1f} % in the plain, from "
        f"{residual['whole']:.1f} to {mean(residual['single']):.1f} % in the residual and from {dense['whole']:.1f} to "
        f"{mean(dense['single']):.1f} % in the dense network; Veit et al. find no noticeable change for nearly every block of a ResNet of "
        "110 layers, and about 90 %, guessing, for VGG.",
        f"Without {removed} of its {residual['parts']} blocks the residual network errs in {after} %, with {swapped} pairs swapped in "
        f"{later} %; in the paper the error rises smoothly with both.",
        f"Of the {found['blocks']}-block network's paths 95 % pass {low} to {high} blocks, of its gradient 95 % comes by those that pass "
        f"{first} to {last}; the paper gives 19 to 35 and 5 to 17, of 54 blocks.",
    )


STUDY = Study(
    "Lesions",
    "Veit, Wilber, Belongie 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks, arXiv 1605.06431",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
