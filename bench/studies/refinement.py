"""Iterative refinement (Greff et al. 2017; Jastrzebski et al. 2018): do later blocks make small steps that lower the loss?

For every pre-activation block, x -> x + F(x): how large F(x) is beside x, whether it points down the loss' gradient at x, and how right the
classifier is when it reads what the block gives, with all later blocks' convolutions left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ..data import Images
from ..training import HE_2015, Recipe, assert_fused
from . import drawing
from .networks import KINDS, Network
from .study import Advance, Result, Study, mean, trained

PROBE, BEFORE = "#e69f00", "#a8a8a8"


@dataclass(frozen=True)
class Preset:
    """A pre-activation network, how it is trained, and from how many seeds; so many test images are looked at."""

    depth: int
    width: int
    seeds: int
    inputs: int
    recipe: Recipe = field(default_factory=Recipe)


PRESETS = {
    "toy": Preset(14, 4, 1, 64, Recipe(epochs=2)),
    "quick": Preset(56, 8, 2, 450, Recipe(epochs=12)),
    "full": Preset(110, 16, 3, 500, HE_2015),
}


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """The one."""
    build = functools.partial(KINDS["pre-activation"], preset.depth, preset.width, images.channels)
    return {f"pre-activation-{preset.depth}": build}


def steps(preset: Preset) -> int:
    """Epochs and measurements."""
    return preset.seeds * (preset.recipe.epochs + 2)


def refinements(network: Network, inputs: Tensor, labels: Tensor) -> dict:
    """By block: |F(x)| / |x| and the cosine of F(x) with the negative gradient of the loss at x, means over the inputs; None for a block
    that changes the size."""
    network.eval()
    maps = network.states(inputs)
    for x in maps:
        x.retain_grad()
    F.cross_entropy(network.head(maps[-1]), labels, reduction="sum").backward()
    ratios, cosines = [], []
    for same, x, y in zip(network.same, maps, maps[1:], strict=False):
        if not same:
            ratios.append(None)
            cosines.append(None)
            continue
        assert x.grad is not None
        step, before, down = ((t.detach() if t.grad_fn else t).flatten(1) for t in (y - x, x, -x.grad))
        ratios.append((step.norm(dim=1) / before.norm(dim=1)).mean().item())
        cosines.append(F.cosine_similarity(step, down, dim=1).mean().item())
    network.zero_grad()
    return {"ratio": ratios, "cosine": cosines}


def means(network: Network, images: Tensor, batch: int = 250) -> list[Tensor]:
    """Means over the pixels of the maps in front of every block and behind the last, images x channels each."""
    parts = [[x.mean((2, 3)) for x in network.states(some)] for some in images.split(batch)]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def read_out(network: Network, images: Images, inputs: int) -> dict:
    """Percent that are right when the map in front of block i goes through all later blocks' shortcuts to the network's own classifier, and
    when a logistic regression reads its means over the pixels."""
    network.eval()
    own, probe = [], []
    labels, wanted = images.test_labels[:inputs], images.train_labels[: 4 * inputs]
    with torch.inference_mode():
        learnt, asked = (means(network, x) for x in (images.train_images[: 4 * inputs], images.test_images[:inputs]))
        maps = network.states(images.test_images[:inputs])
        for i, x in enumerate(maps):
            regression = LogisticRegression(max_iter=200).fit(learnt[i].numpy(), wanted.numpy())
            probe.append(100 * float(regression.score(asked[i].numpy(), labels.numpy())))
            for shortcut in network.shortcuts[i:]:
                assert shortcut is not None
                x = shortcut(x)
            own.append(100 * (network.head(x).argmax(1) == labels).double().mean().item())
    assert_fused(network)
    return {"own": own, "probe": probe}


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Look at the network before and after training."""
    ((name, build),) = networks(preset, images).items()
    inputs, labels = images.test_images[: preset.inputs], images.test_labels[: preset.inputs]
    runs = []
    for seed in range(preset.seeds):
        network, epochs = trained(build, images, preset.recipe, seed, lambda seed=seed: advance(f"{name}, seed {seed}"))
        assert isinstance(network, Network)
        advance(f"blocks after training, seed {seed}")
        found = {"seed": seed, "trained": refinements(network, inputs, labels), "same": network.same}
        found["accuracy"] = read_out(network, images, preset.inputs)
        found["test_error"] = 100 * epochs[-1].test_error
        advance(f"blocks before training, seed {seed}")
        torch.manual_seed(seed)
        network = build()
        assert isinstance(network, Network)
        with torch.no_grad():
            for _ in range(20):
                network.train()(inputs)  # running statistics
        found["untrained"] = refinements(network, inputs, labels)
        runs.append(found)
    return {"depth": preset.depth, "runs": runs}


def by_block(result: Result, when: str, what: str) -> tuple[list[int], list[float]]:
    """The blocks that keep the size of a map, from 1, and their figure, mean over the seeds."""
    rows = [run[when][what] for run in result["runs"]]
    blocks = [i for i, value in enumerate(rows[0]) if value is not None]
    return [i + 1 for i in blocks], [mean([row[i] for row in rows]) for i in blocks]


def accuracy(result: Result, what: str) -> list[float]:
    """In front of every block and behind the last, mean over the seeds."""
    return [mean(list(values)) for values in zip(*(run["accuracy"][what] for run in result["runs"]), strict=True)]


def stages(blocks: list[int], values: list[float]) -> list[list[float]]:
    """The values by stage: blocks that follow each other."""
    found: list[list[float]] = []
    for i, value in enumerate(values):
        if i and blocks[i] == blocks[i - 1] + 1:
            found[-1].append(value)
        else:
            found.append([value])
    return found


def _mark_stages(axes: Axes, result: Result) -> None:
    for i, same in enumerate(result["runs"][0]["same"]):
        if not same:
            axes.axvline(i + 1, color="#888888", linewidth=1, linestyle=":")


def plot(result: Result) -> Figure:
    """Size and direction of the steps, and the accuracy after each."""
    figure, (size, direction, right) = drawing.panels(
        "Residual blocks refine: within a stage the steps get smaller, and they go downhill",
        f"A pre-activation network of {result['depth']} layers: block i adds F(x) to x. Dotted: where the map is halved",
        3,
    )
    colour = drawing.COLOURS["residual"]
    drawing.style(size, "How large is a step?", "block", "|F(x)| / |x|")
    drawing.style(direction, "Does it go down the loss?", "block", "cosine of F(x) and the negative gradient at x")
    drawing.style(right, "How right is the answer so far?", "blocks passed", "test accuracy, %")
    for panel, what in ((size, "ratio"), (direction, "cosine")):
        panel.plot(*by_block(result, "untrained", what), "o-", color=BEFORE, markersize=4, label="before training")
        panel.plot(*by_block(result, "trained", what), "o-", color=colour, markersize=4, linewidth=2, label="trained")
        drawing.legend(panel)
    size.set_ylim(bottom=0)
    direction.axhline(0, color="#888888", linewidth=1)
    for what, tone, words in (
        ("probe", PROBE, "a linear classifier of its own"),
        ("own", colour, "the network's classifier"),
    ):
        values = accuracy(result, what)
        right.plot(range(len(values)), values, "o-", color=tone, markersize=4, linewidth=2, label=words)
    right.set_ylim(0, 102)
    drawing.legend(right, loc=(0.04, 0.25))
    for panel in (size, direction, right):
        _mark_stages(panel, result)
    return figure


def sentences(result: Result) -> tuple[str, str, str]:
    """Size, direction, accuracy."""
    steps_ = ", ".join(f"{v[0]:.2f} to {v[-1]:.2f}" for v in stages(*by_block(result, "trained", "ratio")))
    _, cosines = by_block(result, "trained", "cosine")
    _, before = by_block(result, "untrained", "cosine")
    own, probe = accuracy(result, "own"), accuracy(result, "probe")
    third = len(cosines) // 3
    down = sum(value > 0 for value in cosines)
    half = next(i for i, value in enumerate(own) if value >= own[-1] / 2)
    return (
        f"|F(x)| / |x| goes from the first to the last block of each stage from {steps_}; Jastrzebski et al. see the large steps where "
        "a stage begins, too.",
        f"In {down} of {len(cosines)} blocks F(x) points down the loss' gradient, with a mean cosine of {mean(cosines):.3f} ("
        f"{mean(before):.3f} before training) and {mean(cosines[-third:]):.3f} in the last third; in the paper it does as well.",
        f"Read out early, the network's own classifier passes half of its final {own[-1]:.1f} % after {half} of {len(own) - 1} blocks, a "
        f"linear one of each block's own has {probe[0]:.1f} % before the first, {probe[len(probe) // 2]:.1f} % in the middle and "
        f"{probe[-1]:.1f} % at the end; in the paper accuracy rises block by block within the last stage.",
    )


STUDY = Study(
    "Iterative refinement",
    "Greff, Srivastava, Schmidhuber 2017, arXiv 1612.07771; Jastrzebski, Arpit, Ballas, Verma, Che, Bengio 2018, arXiv 1710.04773",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
