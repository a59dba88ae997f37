"""Training on real data, eager and converted: do the loss curves and the final accuracy agree within run-to-run noise?

    python -m bench.equivalence --out results

A ResNet-20 and a DenseNet-BC-40 (k = 12) learn scikit-learn's handwritten digits (1797 images of 8 x 8 pixels) in float32, from several
seeds. From each seed three runs start with the same parameters, batches and augmentation: *eager*; *nudged*, eager with every parameter
moved by one rounding of float32; *converted*. Training magnifies roundings until the runs part, so that what nudged is away from eager is
the noise with which converted has to be compared. Converted is equivalent where, for the logarithms of training and test loss and for the
final accuracy,

- its mean square distance from eager is not larger than nudged's by more than chance (F test over the seeds), and
- its mean difference from eager over the last third of the epochs is zero as far as the seeds tell (paired t interval).

Both at a level of 5 % over all tests together (Bonferroni). Writes equivalence.json, equivalence.md and equivalence.png; returns 1 where
a test fails or a block of the converted model did not run fused.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.swap import FusedBlock

from . import data, environment, models, report, training
from .data import CLASSES, Images
from .progress import progress

#: of all tests of a run together
LEVEL = 0.05
ARMS = ("eager", "nudged", "converted")
#: the quantities that are compared, as their curves are called
CURVES = {"training loss": "train_loss", "test loss": "test_loss", "final accuracy": "accuracy"}


def resnet20() -> nn.Module:
    """He et al. 2015, section 4.2, with n = 3: three stages of three basic blocks; where a stage begins the shortcut is a projection."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    channels = 16
    for width in (16, 32, 64):
        for i in range(3):
            first = i == 0 and width != channels
            shortcut = None
            if first:
                shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(channels, width, 2 if first else 1, shortcut))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def densenet40() -> nn.Module:
    """Huang et al. 2016, DenseNet-BC with 40 layers: three blocks of six layers with bottleneck, k = 12, compression 0.5."""
    growth = 12
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1, bias=False)]
    for i in range(3):
        layers.append(_DenseBlock(6, channels, bn_size=4, growth_rate=growth, drop_rate=0.0))
        channels += 6 * growth
        if i < 2:
            layers.append(_Transition(channels, channels // 2))
            channels //= 2
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-20": resnet20, "DenseNet-BC-40": densenet40}


@dataclass(frozen=True)
class Settings:
    """How every run trains."""

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Run:
    """One training: its losses and test accuracy by epoch."""

    model: str
    arm: str
    seed: int
    train_loss: list[float]
    test_loss: list[float]
    accuracy: list[float]


@dataclass(frozen=True)
class Verdict:
    """One quantity of one model: how far converted is from eager, in units of how far nudged is, and the mean difference's interval."""

    model: str
    quantity: str
    distance: float
    noise: float
    limit: float
    difference: float
    interval: float

    @property
    def ratio(self) -> float:
        """The distance over the noise."""
        return self.distance / self.noise if self.noise else math.inf if self.distance else 0.0

    @property
    def passed(self) -> bool:
        """Whether the quantity is within noise."""
        return self.ratio <= self.limit and abs(self.difference) <= self.interval


def nudge(model: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter by one rounding, up or down."""
    with torch.no_grad():
        for parameter in model.parameters():
            sign = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + sign * torch.finfo(parameter.dtype).eps)


def train(name: str, arm: str, seed: int, digits: Images, settings: Settings, advance: Callable[[], None]) -> Run:
    """One run. Raises RuntimeError where a block of the converted model did not run fused."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(memory_format=torch.channels_last)
    if arm == "nudged":
        nudge(model, torch.Generator().manual_seed(seed))
    elif arm == "converted":
        fusedres.convert(model)
    generator = torch.Generator().manual_seed(seed)
    run = Run(name, arm, seed, [], [], [])
    recipe = training.Recipe(**asdict(settings))
    for epoch in training.train(model, digits, recipe, generator, fused=arm == "converted"):
        if arm != "converted" and any(isinstance(module, FusedBlock) for module in model.modules()):
            raise RuntimeError(f"the {arm} model has fused blocks")
        run.train_loss.append(epoch.train_loss)
        run.test_loss.append(epoch.test_loss)
        run.accuracy.append(1 - epoch.test_error)
        advance()
    return run


def judge(runs: Sequence[Run]) -> list[Verdict]:
    """The verdicts on all quantities of all models of ``runs``."""
    names = list(dict.fromkeys(run.model for run in runs))
    level = LEVEL / (2 * len(names) * len(CURVES))
    verdicts = []
    for name in names:
        for quantity, curve in CURVES.items():

            def table(arm: str, name=name, quantity=quantity, curve=curve) -> Tensor:
                """Seeds x epochs."""
                found = sorted((r for r in runs if r.model == name and r.arm == arm), key=lambda r: r.seed)
                values = torch.tensor([getattr(r, curve) for r in found], dtype=torch.float64)
                return values[:, -1:] if quantity == "final accuracy" else values.log()

            eager, nudged, converted = map(table, ARMS)
            seeds, epochs = eager.shape
            late = (converted - eager)[:, -math.ceil(epochs / 3) :].mean(1)
            # equal in every seed: an interval of no width around zero
            interval = float(stats.t.ppf(1 - level / 2, seeds - 1)) * late.std().item() / math.sqrt(seeds)
            verdicts.append(
                Verdict(
                    name,
                    quantity,
                    (converted - eager).square().mean().sqrt().item(),
                    (nudged - eager).square().mean().sqrt().item(),
                    math.sqrt(stats.f.ppf(1 - level, seeds, seeds)),
                    late.mean().item(),
                    interval,
                )
            )
    return verdicts


def wilson(hits: int, of: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share."""
    z = float(stats.norm.ppf(1 - level / 2))
    middle, half = hits / of + z * z / (2 * of), z * math.sqrt(hits / of * (1 - hits / of) / of + (z / (2 * of)) ** 2)
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def accuracies(runs: Sequence[Run], images: int) -> list[dict[str, str]]:
    """A row per model and arm: the final losses and accuracy, with the interval of the accuracy."""
    rows = []
    for (model, arm), same in report.by_key(runs, lambda r: (r.model, r.arm)).items():
        hits = sum(round(r.accuracy[-1] * images) for r in same)
        low, high = wilson(hits, images * len(same))
        rows.append(
            {
                "model": model,
                "run": arm,
                "final training loss": f"{sum(r.train_loss[-1] for r in same) / len(same):.4f}",
                "final test loss": f"{sum(r.test_loss[-1] for r in same) / len(same):.4f}",
                "final accuracy": f"{100 * hits / (images * len(same)):.2f} %",
                "95 % interval": f"{100 * low:.2f} to {100 * high:.2f} %",
            }
        )
    return rows


def judgements(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """A row per verdict."""
    return [
        {
            "model": v.model,
            "quantity": v.quantity if v.quantity == "final accuracy" else f"log {v.quantity}",
            "converted - eager": f"{v.distance:.3g}",
            "nudged - eager": f"{v.noise:.3g}",
            "ratio": f"{v.ratio:.2f}",
            "limit": f"{v.limit:.2f}",
            "mean difference": f"{v.difference:+.3g} ± {v.interval:.2g}",
            "within noise": "yes" if v.passed else "NO",
        }
        for v in verdicts
    ]


def page(runs: Sequence[Run], verdicts: Sequence[Verdict], settings: Settings, where: dict, images: int) -> str:
    """The result as Markdown."""
    seeds = len({run.seed for run in runs})
    passed = all(v.passed for v in verdicts)
    parts = [
        "# Training equivalence on scikit-learn's digits",
        f"The loss curves and the final accuracy of converted models {'lie' if passed else '**do NOT lie**'} within the run-to-run "
        "noise of eager ones.",
        "![loss curves](equivalence.png)",
        report.markdown_table(judgements(verdicts)),
        "Distances are root mean squares over epochs and seeds. Nudged is eager with every initial parameter moved by one rounding of "
        "float32: the noise. The limit of the ratio is the F test's, the interval of the mean difference over the last third of the "
        f"epochs the paired t test's, both at {100 * LEVEL:g} % over all tests together.",
        report.markdown_table(accuracies(runs, images)),
        f"{seeds} seeds, {settings.epochs} epochs, batch {settings.batch}, SGD with Nesterov momentum 0.9, learning rate "
        f"{settings.learning_rate:g} decayed by a cosine, weight decay {settings.weight_decay:g}, float32. Intervals are Wilson's over "
        f"the {images} test images of all seeds.",
        "## How it was measured",
        report.environment_list(where),
    ]
    return "\n\n".join(parts) + "\n"


def draw(runs: Sequence[Run]) -> Figure:
    """A row per model: training loss, test loss, and how far the runs are from eager."""
    names = list(dict.fromkeys(run.model for run in runs))
    figure = Figure(figsize=(12, 3.4 * len(names)), dpi=130, layout="constrained")
    grid = figure.subplots(len(names), 3, squeeze=False)
    colours = {
        "eager": report.COLOURS["eager"],
        "nudged": report.OTHER_COLOURS[0],
        "converted": report.COLOURS["fused"],
    }
    for name, (*curves, distances) in zip(names, grid, strict=True):
        tables = {
            (arm, curve): torch.tensor([getattr(r, curve) for r in runs if (r.model, r.arm) == (name, arm)])
            for arm in ARMS
            for curve in ("train_loss", "test_loss")
        }
        epochs = range(1, tables["eager", "train_loss"].shape[1] + 1)
        for axes, curve, words in zip(curves, ("train_loss", "test_loss"), ("training loss", "test loss"), strict=True):
            axes.set_title(f"{name}: {words}, mean and range", loc="left", fontsize=9.5, color=report.INK)
            for arm, style in (("eager", "-"), ("converted", "--")):
                values = tables[arm, curve]
                low, high = values.amin(0).tolist(), values.amax(0).tolist()
                axes.fill_between(epochs, low, high, color=colours[arm], alpha=0.25, linewidth=0)
                axes.plot(epochs, values.mean(0).tolist(), style, color=colours[arm], linewidth=1.8, label=arm)
        distances.set_title(f"{name}: training loss, away from eager's", loc="left", fontsize=9.5, color=report.INK)
        for arm in ("nudged", "converted"):
            away = (tables[arm, "train_loss"].log() - tables["eager", "train_loss"].log()).abs()
            # a run that is equal to eager's to the last bit has no place on a logarithmic axis
            away = away.clamp_min(1e-9)
            for i, values in enumerate(away.tolist()):
                label = arm if i == 0 else None
                distances.plot(epochs, values, color=colours[arm], linewidth=1, alpha=0.75, label=label)
        distances.set_ylabel("|log ratio|, a line per seed", fontsize=8, color=report.FAINT)
        for axes in (*curves, distances):
            axes.set_yscale("log")
            axes.set_xlabel("epoch", fontsize=8, color=report.FAINT)
            axes.tick_params(labelsize=8, colors=report.FAINT)
            axes.grid(color="#e4e4e4", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    return figure


def measure(names: Sequence[str], seeds: int, settings: Settings, digits: Images, console: Console) -> list[Run]:
    """All runs, the three arms of a seed one after the other."""
    runs = []
    with progress(console, len(names) * seeds * len(ARMS) * settings.epochs) as advance:
        for name, seed, arm in itertools.product(names, range(seeds), ARMS):
            begin = functools.partial(advance, f"{name}, seed {seed}, {arm}")
            runs.append(train(name, arm, seed, digits, settings, begin))
    return runs


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=5, help="three runs from each; at least 2")
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of equivalence.json, .md and .png")
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error("one seed has no spread: --seeds has to be 2 or more")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    console, digits = models.new_console(), data.digits()
    where = environment.describe(torch.device("cpu"), environment.command("bench.equivalence", arguments))
    runs = measure(args.models, args.seeds, settings, digits, console)
    verdicts, images = judge(runs), len(digits.test_labels)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / "equivalence"
    content = {"environment": where, "settings": asdict(settings), "test_images": images}
    content |= {"verdicts": [asdict(v) | {"passed": v.passed} for v in verdicts], "runs": [asdict(run) for run in runs]}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(page(runs, verdicts, settings, where, images))
    draw(runs).savefig(stem.with_suffix(".png"))
    for rows in (judgements(verdicts), accuracies(runs, images)):
        console.print(report.markdown_table(rows), highlight=False)
    console.print(f"curves: {stem.with_suffix('.png')}; tables: {stem.with_suffix('.md')}")
    return 0 if all(v.passed for v in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
