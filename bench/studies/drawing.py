"""How the studies' pictures look: one style, one colour for a kind of network in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .. import report

#: distinct also to the colour-blind (Okabe and Ito 2008)
COLOURS = {
    "plain": "#d55e00",
    "highway": "#cc79a7",
    "residual": "#0072b2",
    "pre-activation": "#56b4e9",
    "dense": "#009e73",
}
#: where kinds of networks are not what is compared
TONES = ("#56b4e9", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#7f5fa8", "#b2912f", "#4d4d4d", "#d55e00")
LIGHT = "#e4e4e4"


def panels(
    title: str, subtitle: str, count: int, width: float = 13, ratios: Sequence[float] = ()
) -> tuple[Figure, list[Axes]]:
    """A wide figure, as a slide has room for, with ``count`` panels side by side; ``width`` in inches,
    ``ratios`` of the panels' widths where they are not equal."""
    figure = Figure(figsize=(width, 5.2), dpi=100, layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0.01, 0.99, 0.86), w_pad=0.12)  # type: ignore[union-attr]
    figure.text(0.012, 0.975, title, fontsize=17, weight="bold", color=report.INK, va="top")
    figure.text(0.012, 0.907, subtitle, fontsize=11.5, color="#555555", va="top")
    return figure, list(figure.subplots(1, count, squeeze=False, width_ratios=ratios or None)[0])


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles and a light grid."""
    axes.set_title(title, loc="left", fontsize=12, color=report.INK)
    axes.set_xlabel(x, fontsize=11, color="#555555")
    axes.set_ylabel(y, fontsize=11, color="#555555")
    axes.tick_params(labelsize=10, colors="#555555")
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Axes, **options) -> None:
    """Without a frame."""
    axes.legend(**{"frameon": False, "fontsize": 10, "labelcolor": "linecolor"} | options)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, which is half the size and looks the same."""
    buffer = BytesIO()
    figure.savefig(buffer, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)
