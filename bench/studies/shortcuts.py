"""Shortcut variants (He et al. 2016, tables 1 and 2): what a shortcut may do to what it carries, and where the activation stands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from matplotlib.figure import Figure
from torch import Tensor, nn

from fusedres.nn import BasicBlock

from ..data import Images
from ..report import INK
from ..training import HE_2015, Recipe
from . import drawing
from .networks import Builder, Part, of_blocks, option_a, per_stage, plain, preact, projection, residual
from .study import Advance, Result, Study, mean, trained


class _Block(nn.Module):
    """The basic block's two convolutions, for a join of a subclass; the shortcut where the size changes is option A."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = option_a(before, width, stride) or nn.Identity()


class ScaledShortcut(_Block):
    """The shortcut times one half."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + x / 2)."""
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + 0.5 * self.shortcut(x))


class ScaledBoth(_Block):
    """Shortcut and residual function times one half."""

    def forward(self, x: Tensor) -> Tensor:
        """relu((F(x) + x) / 2)."""
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(0.5 * h + 0.5 * self.shortcut(x))


class DroppedShortcut(_Block):
    """Dropout of one half on the shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__(before, width, stride)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + dropout(x))."""
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + self.dropout(self.shortcut(x)))


class _Gated(_Block):
    """With a gate g = sigmoid(1x1 convolution of x), whose bias begins at -6, the paper's best: mostly carry."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__(before, width, stride)
        self.gate = nn.Conv2d(before, width, 1, stride)
        self.sigmoid = nn.Sigmoid()
        nn.init.constant_(self.gate.bias, -6.0)  # type: ignore[arg-type]


class ExclusiveGate(_Gated):
    """Gates of both, that add up to one."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(g F(x) + (1 - g) x)."""
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        g = self.sigmoid(self.gate(x))
        return self.relu(g * h + (1 - g) * self.shortcut(x))


class ShortcutGate(_Gated):
    """A gate of the shortcut alone."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + (1 - g) x)."""
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        g = self.sigmoid(self.gate(x))
        return self.relu(h + (1 - g) * self.shortcut(x))


def _of(block: Callable[[int, int, int], nn.Module]) -> Builder:
    return lambda before, width, stride: Part(block(before, width, stride))


def _projected(before: int, width: int, stride: int) -> Part:
    return Part(BasicBlock(before, width, stride, projection(before, width, stride)))


@dataclass(frozen=True)
class Variant:
    """How a block is built, and the paper's test error of 110 layers on CIFAR-10: percent, or None where it failed (more than 20 %)."""

    build: Builder
    published: float | None
    activated: bool = True


IDENTITY, PREACT = "identity (option A)", "identity, pre-activation"
VARIANTS = {
    PREACT: Variant(preact, 6.37, activated=False),
    IDENTITY: Variant(residual, 6.61),
    "gate on the shortcut": Variant(_of(ShortcutGate), 6.91),
    "exclusive gates": Variant(_of(ExclusiveGate), 8.70),
    "1x1 convolutions": Variant(_projected, 12.22),
    "half of both": Variant(_of(ScaledBoth), 12.35),
    "half of the shortcut": Variant(_of(ScaledShortcut), None),
    "dropout on the shortcut": Variant(_of(DroppedShortcut), None),
    "no shortcut": Variant(plain, None),
}


@dataclass(frozen=True)
class Preset:
    """All variants at one ``depth``; identity, post- and pre-activation, also at ``deep`` layers, for ``deep_epochs``."""

    depth: int
    deep: int
    width: int
    seeds: int
    deep_epochs: int
    recipe: Recipe = field(default_factory=Recipe)


PRESETS = {
    "toy": Preset(8, 14, 4, 1, 2, Recipe(epochs=2)),
    "quick": Preset(44, 110, 8, 2, 6, Recipe(epochs=9)),
    "full": Preset(110, 164, 16, 5, 164, HE_2015),
}


def _network(variant: Variant, depth: int, width: int, channels: int) -> nn.Module:
    return of_blocks(variant.build, (per_stage(depth),) * 3, width, channels, variant.activated)


def networks(preset: Preset, images: Images) -> dict[str, Callable[[], nn.Module]]:
    """By variant and depth."""
    cases = [(name, preset.depth) for name in VARIANTS] + [(name, preset.deep) for name in (IDENTITY, PREACT)]
    return {
        f"{name}, {depth} layers": functools.partial(_network, VARIANTS[name], depth, preset.width, images.channels)
        for name, depth in cases
    }


def steps(preset: Preset) -> int:
    """Epochs."""
    return preset.seeds * len(VARIANTS) * preset.recipe.epochs + 2 * preset.deep_epochs


def run(preset: Preset, images: Images, advance: Advance) -> Result:
    """Train them all."""
    builders = networks(preset, images)

    def one(name: str, depth: int, seed: int, recipe: Recipe) -> dict:
        what = f"{name}, {depth} layers"
        _, epochs = trained(builders[what], images, recipe, seed, lambda: advance(f"{what}, seed {seed}"))
        return {
            "variant": name,
            "seed": seed,
            "train_error": [100 * e.train_error for e in epochs],
            "test_error": 100 * epochs[-1].test_error,
        }

    deep = Recipe(**{**vars(preset.recipe), "epochs": preset.deep_epochs})
    return {
        "depth": preset.depth,
        "runs": [one(name, preset.depth, s, preset.recipe) for s in range(preset.seeds) for name in VARIANTS],
        "deep": preset.deep,
        "deep_runs": [one(name, preset.deep, 0, deep) for name in (IDENTITY, PREACT)],
    }


def final(result: Result, name: str, quantity: str) -> list[float]:
    """Percent of every seed at the end."""
    found = [r[quantity] for r in result["runs"] if r["variant"] == name]
    return [values[-1] for values in found] if quantity == "train_error" else found


def plot(result: Result) -> Figure:
    """Errors by variant, training curves, and both activations at depth."""
    figure, (bars, curves, deep) = drawing.panels(
        "The best thing a shortcut can do is nothing",
        f"The same {result['depth']} layers, with shortcuts that change what they carry. In brackets: the published test error of 110 "
        "layers on CIFAR-10. Marks: single seeds",
        3,
        width=15,
        ratios=(1.5, 1, 1),
    )
    names = sorted(VARIANTS, key=lambda name: mean(final(result, name, "train_error")))
    drawing.style(bars, "When training is over: training error, %", "", "")
    tones = {name: drawing.TONES[i] for i, name in enumerate(VARIANTS)}
    for row, name in enumerate(names):
        values = final(result, name, "train_error")
        bars.barh(row, mean(values), color=tones[name], height=0.7)
        bars.plot(values, [row] * len(values), "|", color=INK, markersize=9)
        bars.text(max(values) + 1.5, row, f"{mean(values):.1f}", va="center", fontsize=10, color=INK)
    published = {name: "fails" if v.published is None else f"{v.published:.2f} %" for name, v in VARIANTS.items()}
    bars.set_yticks(range(len(names)), [f"{name}  ({published[name]})" for name in names])
    bars.tick_params(axis="y", labelsize=11, labelcolor=INK)
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    drawing.style(curves, "On the way there", "epoch", "training error, %")
    for name in VARIANTS:
        seeds = [r["train_error"] for r in result["runs"] if r["variant"] == name]
        values = [mean(list(v)) for v in zip(*seeds, strict=True)]
        curves.plot(range(1, len(values) + 1), values, color=tones[name], linewidth=2)
    curves.set_ylim(0, 95)
    drawing.style(deep, f"Deeper: {result['deep']} layers", "epoch", "training error, %")
    for found in result["deep_runs"]:
        values = found["train_error"]
        words = "activation before (pre)" if found["variant"] == PREACT else "activation after the sum"
        deep.plot(range(1, len(values) + 1), values, "o-", color=tones[found["variant"]], linewidth=2, label=words)
    deep.set_ylim(0, 95)
    drawing.legend(deep)
    return figure


def sentences(result: Result) -> tuple[str, str, str]:
    """Identity against the variants, those that fail, and pre-activation at depth."""

    def said(name: str) -> str:
        published = VARIANTS[name].published
        theirs = "fails" if published is None else f"{published:.2f}"
        return f"{name} {mean(final(result, name, 'test_error')):.1f} % (published {theirs})"

    worst = [name for name, variant in VARIANTS.items() if variant.published is None]
    trains = ", ".join(f"{name} {mean(final(result, name, 'train_error')):.1f} %" for name in (IDENTITY, *worst))
    post, pre = (
        next(r for r in result["deep_runs"] if r["variant"] == name)["train_error"][-1] for name in (IDENTITY, PREACT)
    )
    return (
        f"Test errors with {result['depth']} layers: {'; '.join(said(name) for name in VARIANTS if name not in worst)}.",
        f"Training errors, of the identity and of those which fail in the paper: {trains}.",
        f"With {result['deep']} layers the training error after {len(result['deep_runs'][0]['train_error'])} epochs is {post:.1f} % with "
        f"the activation after the sum and {pre:.1f} % with it before; published test errors are 6.61 and 6.37 % with 110 layers, 7.61 and "
        "4.92 % with 1001.",
    )


STUDY = Study(
    "Shortcut variants",
    "He, Zhang, Ren, Sun 2016, Identity Mappings in Deep Residual Networks, arXiv 1603.05027",
    PRESETS,
    networks,
    steps,
    run,
    plot,
    sentences,
)
