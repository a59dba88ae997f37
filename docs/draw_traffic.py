"""Draws docs/traffic.png: what a bottleneck and a dense layer read and write in a training step, eager against fused.

    python -m docs.draw_traffic

The passes are written down below, by the names of the maps that they read and write. Before anything is drawn their bytes are compared with
those that bench.roofline counts of the operators and primitives that really run; where they differ the script fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock
from torchvision.models.resnet import Bottleneck

import fusedres
from bench.launches import EagerTraffic
from bench.roofline import Call, Clock, Recorder
from fusedres.backends import select
from fusedres.backends.eager import BACKEND as EAGER

READ, WRITTEN, INK, FAINT = "#0072b2", "#e69f00", "#222222", "#8a8a8a"
SIZE = 56
SIDES = ("reads", "writes")


@dataclass(frozen=True)
class Pass:
    """A pass over maps, in the column of the picture that is called ``name``."""

    name: str
    reads: str
    writes: str = ""


@dataclass(frozen=True)
class Drawing:
    """A block: channels of each map by its name, and the passes of eager and fused; ``forward`` counts eager's forward passes.

    Fused passes stand below eager's passes of the same number, ``None`` where there is nothing to do.
    """

    title: str
    channels: dict[str, int]
    eager: tuple[Pass, ...]
    fused: tuple[Pass | None, ...]
    forward: int


BOTTLENECK = Drawing(
    "Bottleneck (256 to 64 to 256 channels)",
    {
        **dict.fromkeys(("x", "r3", "n3", "s", "y", "dy", "ds", "dr3", "dc", "dx"), 256),
        **dict.fromkeys(("r1", "n1", "a1", "r2", "n2", "a2", "da2", "dn2", "dr2", "da1", "dn1", "dr1"), 64),
    },
    eager=(
        Pass("conv1", "x", "r1"),
        Pass("BN", "r1 r1", "n1"),
        Pass("ReLU", "n1", "a1"),
        Pass("conv2", "a1", "r2"),
        Pass("BN", "r2 r2", "n2"),
        Pass("ReLU", "n2", "a2"),
        Pass("conv3", "a2", "r3"),
        Pass("BN", "r3 r3", "n3"),
        Pass("add", "n3 x", "s"),
        Pass("ReLU", "s", "y"),
        Pass("ReLU", "dy y", "ds"),
        Pass("BN", "ds r3 ds r3", "dr3"),
        Pass("conv3\ndata", "dr3", "da2"),
        Pass("conv3\nweight", "dr3 a2"),
        Pass("ReLU", "da2 a2", "dn2"),
        Pass("BN", "dn2 r2 dn2 r2", "dr2"),
        Pass("conv2\ndata", "dr2", "da1"),
        Pass("conv2\nweight", "dr2 a1"),
        Pass("ReLU", "da1 a1", "dn1"),
        Pass("BN", "dn1 r1 dn1 r1", "dr1"),
        Pass("conv1\ndata", "dr1", "dc"),
        Pass("conv1\nweight", "dr1 x"),
        Pass("add", "dc ds", "dx"),
    ),
    fused=(
        Pass("conv1", "x", "r1"),
        None,
        None,
        Pass("conv2", "r1", "r2"),
        None,
        None,
        Pass("conv3", "r2", "r3"),
        None,
        Pass("add, act", "r3 x", "y"),
        None,
        Pass("add, act", "dy r3 x", "ds"),
        None,
        Pass("conv3\ndata", "ds r3 r2", "dn2"),
        Pass("conv3\nweight", "ds r3 r2"),
        None,
        None,
        Pass("conv2\ndata", "dn2 r2 r1", "dn1"),
        Pass("conv2\nweight", "dn2 r2 r1"),
        None,
        None,
        Pass("conv1\ndata", "dn1 r1 ds", "dx"),
        Pass("conv1\nweight", "dn1 r1 x"),
        None,
    ),
    forward=10,
)

DENSE = Drawing(
    "Dense layer (160 channels in, 128 between, 32 added)",
    {
        **dict.fromkeys(("X", "cat", "n1", "a1", "da1", "dn1", "dcat", "dX"), 160),
        **dict.fromkeys(("r1", "n2", "a2", "da2", "dn2", "dr1"), 128),
        **dict.fromkeys(("new", "dnew"), 32),
    },
    eager=(
        Pass("cat", "X", "cat"),
        Pass("BN", "cat cat", "n1"),
        Pass("ReLU", "n1", "a1"),
        Pass("conv1", "a1", "r1"),
        Pass("BN", "r1 r1", "n2"),
        Pass("ReLU", "n2", "a2"),
        Pass("conv2", "a2", "new"),
        Pass("conv2\ndata", "dnew", "da2"),
        Pass("conv2\nweight", "dnew a2"),
        Pass("ReLU", "da2 a2", "dn2"),
        Pass("BN", "dn2 r1 dn2 r1", "dr1"),
        Pass("conv1\ndata", "dr1", "da1"),
        Pass("conv1\nweight", "dr1 a1"),
        Pass("ReLU", "da1 a1", "dn1"),
        Pass("BN", "dn1 cat dn1 cat", "dcat"),
        Pass("add", "dcat dX", "dX"),
    ),
    fused=(
        None,
        None,
        None,
        Pass("conv1", "X", "r1"),
        None,
        None,
        Pass("conv2", "r1", "new"),
        Pass("conv2\ndata", "dnew new r1", "dn2"),
        Pass("conv2\nweight", "dnew new r1"),
        None,
        None,
        Pass("conv1\ndata", "dn2 r1 X dX", "dX"),
        Pass("conv1\nweight", "dn2 r1 X"),
        None,
        None,
        None,
    ),
    forward=7,
)


def moved(drawing: Drawing, passes: tuple[Pass | None, ...]) -> int:
    """The channels that passes read and write."""
    return sum(drawing.channels[name] for p in passes if p for name in f"{p.reads} {p.writes}".split())


def counted(block: nn.Module, channels: int) -> tuple[int, int]:
    """The channels that a training step of ``block`` reads and writes in eager and fused, counted on meta tensors."""

    def step() -> None:
        x = torch.empty(1, channels, SIZE, SIZE, device="meta", memory_format=torch.channels_last)
        y: Tensor = model(x.requires_grad_())
        torch.autograd.grad(y, [x, *model.parameters()], torch.empty_like(y))

    model = nn.Sequential(block).to("meta", memory_format=torch.channels_last)
    with EagerTraffic() as eager:
        step()
    calls: list[Call] = []
    fusedres.convert(model)
    with select.observe(lambda inner: Recorder(EAGER, calls, Clock(torch.device("cpu")))):
        step()
    unit = SIZE * SIZE * torch.float32.itemsize
    return eager.total // unit, sum(call.read + call.written for call in calls) // unit


def check() -> None:
    """Raise AssertionError where what is drawn is not what is counted."""
    found = counted(Bottleneck(256, 64), 256)
    assert found == (moved(BOTTLENECK, BOTTLENECK.eager), moved(BOTTLENECK, BOTTLENECK.fused)), found
    # a layer's share of its block: what one layer more adds, but for its channels in eager's cat of the block's output
    longer, shorter = (counted(_DenseBlock(layers, 64, 4, 32, 0.0), 64) for layers in (4, 3))
    eager, fused = (a - b for a, b in zip(longer, shorter, strict=True))
    assert (eager - 2 * 32, fused) == (moved(DENSE, DENSE.eager), moved(DENSE, DENSE.fused)), (eager, fused)


def draw_passes(axes: Axes, drawing: Drawing, passes: tuple[Pass | None, ...]) -> None:
    """The passes as towers of maps: read upwards, written downwards."""
    for column, p in enumerate(passes):
        if p is None:
            axes.plot(column, 0, marker="o", markersize=3, color="#c4c4c4")
            continue
        for names, sign, colour in ((p.reads, 1, READ), (p.writes, -1, WRITTEN)):
            at = 0
            for name in names.split():
                height = sign * drawing.channels[name]
                axes.add_patch(Rectangle((column - 0.43, at), 0.86, height, facecolor=colour, edgecolor="white", lw=1))
                if abs(height) >= 64:
                    size = 8 if abs(height) > 100 else 6.5
                    axes.text(
                        column, at + height / 2, name, ha="center", va="center_baseline", fontsize=size, color="white"
                    )
                at += height
    axes.plot([-0.5, len(passes) - 0.5], [0, 0], color=FAINT, linewidth=0.8, zorder=0)


def summary(drawing: Drawing, passes: tuple[Pass | None, ...]) -> str:
    """Passes, maps and megabytes in words."""
    done = [p for p in passes if p]
    reads, writes = (sum(len(getattr(p, side).split()) for p in done) for side in SIDES)
    megabytes = moved(drawing, passes) * SIZE * SIZE * torch.bfloat16.itemsize / 1e6
    return f"{len(done)} passes\n{reads} maps read\n{writes} maps written\n{megabytes:.1f} MB"


def extent(drawing: Drawing, passes: tuple[Pass | None, ...]) -> tuple[int, int]:
    """The channels of the tallest tower above and below the line."""
    up, down = ([sum(drawing.channels[n] for n in getattr(p, side).split()) for p in passes if p] for side in SIDES)
    return max(up), max(down)


def draw() -> Figure:
    """The picture: eager above fused, pass above pass, all on one scale."""
    width, height, left = 12.0, 11.4, 0.75
    # inches: the heading, above each block, between eager and fused, below each block
    heading, above, between, below = 1.1, 0.62, 0.5, 0.32
    blocks = (BOTTLENECK, DENSE)
    extents = {(d.title, name): extent(d, getattr(d, name)) for d in blocks for name in ("eager", "fused")}
    inch = (height - heading - len(blocks) * (above + between + below)) / sum(map(sum, extents.values()))
    columns = max(len(d.eager) for d in blocks)
    figure = Figure(figsize=(width, height), dpi=110)

    def say(x: float, y: float, text: str, **style) -> None:
        figure.text(x / width, y / height, text, **{"color": INK, "va": "top", "linespacing": 1.35} | style)

    say(0.2, height - 0.15, "What a training step reads and writes", fontsize=15, weight="bold")
    say(
        0.2, height - 0.5, "A block is a feature map, as tall as it has channels. Grey dots: what fusing leaves nothing to do for. "
        f"MB are per image, for maps of {SIZE} x {SIZE} in bfloat16.\n"
        "x, X: input   r: written by a convolution   n: normalised   a: activated   s: sum   y, new: output   d...: its gradient",
        fontsize=9.5,
    )  # fmt: skip
    for x, colour, text in ((8.95, READ, "read (up)"), (10.2, WRITTEN, "written (down)")):
        say(x, height - 0.2, "\u25a0", color=colour, fontsize=13)
        say(x + 0.2, height - 0.21, text, fontsize=10)
    top = height - heading
    for d in blocks:
        say(0.2, top - 0.05, d.title, fontsize=12, weight="bold")
        top -= above
        step = (width - left - 1.75) / columns
        for x, text in ((0, "forward"), (d.forward, "backward")):
            say(left + (x + 0.12) * step, top + 0.24, text, fontsize=9.5, color=FAINT, style="italic")
        start = top
        for name in ("eager", "fused"):
            passes, (up, down) = getattr(d, name), extents[d.title, name]
            tall = (up + down) * inch
            axes = figure.add_axes(
                (left / width, (top - tall) / height, (width - left - 1.75) / width, tall / height),
                xlim=(-0.5, columns - 0.5), ylim=(-down, up),
            )  # fmt: skip
            axes.axis("off")
            draw_passes(axes, d, passes)
            zero = top - up * inch
            say(0.2, zero, name, fontsize=11, weight="bold", va="center")
            x = left + (len(passes) + 0.15) * step
            say(x, zero, summary(d, passes), fontsize=10, va="center")
            top -= tall
            if name == "eager":
                for column, p in enumerate(passes):
                    say(left + (column + 0.5) * step, top - 0.06, p.name, fontsize=8, ha="center", linespacing=1.1)
                top -= between
            else:
                ratio = moved(d, d.fused) / moved(d, d.eager)
                say(x, zero + 0.46, f"{ratio:.2f}x the bytes", fontsize=12, weight="bold", color=READ, va="bottom")
                for column, (p, theirs) in enumerate(zip(passes, d.eager, strict=True)):
                    if p and p.name != theirs.name:
                        say(left + (column + 0.5) * step, top - 0.05, p.name, fontsize=8, ha="center")
        x = (left + d.forward * step) / width
        figure.add_artist(Line2D([x, x], [(start + 0.2) / height, top / height], color=FAINT, lw=0.8, ls=(0, (3, 3))))
        top -= below
    return figure


def main() -> None:
    """Check and draw."""
    check()
    draw().savefig(Path(__file__).with_name("traffic.png"), facecolor="white", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
