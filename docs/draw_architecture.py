"""Draws docs/architecture.png: the rooms of the package in layers, and who imports whom, read from the sources.

    python -m docs.draw_architecture

``LAYERS`` says which module stands in which room, and which room in which layer; everything else is read with
``ast``. Nothing of the package is imported. tests/test_layers.py holds the sources to the layers: what imports upwards, or in a circle, is
an error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent


class Room(NamedTuple):
    """Modules that are read together. ``modules``: patterns of names behind ``fusedres.`` (the package itself: ``""``). ``common``: so
    small and so much used that arrows to it would say nothing."""

    name: str
    modules: tuple[str, ...]
    common: bool = False


class Layer(NamedTuple):
    """Rooms of one height: a room imports from the layers below, and from its neighbours as long as that makes no circle."""

    name: str
    rooms: tuple[Room, ...]


#: from the top to the bottom
LAYERS = (
    Layer("commands", (Room("__main__", ("__main__",)),)),
    Layer(
        "aids",
        (Room("doctor", ("doctor",)), Room("trial", ("trial", "trial.*")), Room("testing", ("testing", "testing.*"))),
    ),
    Layer("entrance", (Room("fusedres", ("",)),)),
    Layer(
        "for users",
        (
            Room("ops", ("ops",)),
            Room("report", ("report", "dry_run")),
            Room("convert", ("convert", "verify")),
            Room("nn", ("nn",)),
            Room("concat", ("concat",)),
            Room("functional", ("functional",)),
            Room("serving, memory", ("serving", "prepack", "memory")),
            Room("graphs", ("graphs",)),
            Room("tuning", ("tuning", "tuning.tune", "tuning.precompile", "tuning.step")),
        ),
    ),
    Layer("modules", (Room("blocks", ("blocks", "blocks.*")),)),
    Layer("recognition", (Room("recognition", ("recognition", "recognition.*")),)),
    Layer("families", (Room("autograd", ("autograd", "autograd.*")), Room("checks", ("checks",)))),
    Layer("choice", (Room("select", ("backends.select",)),)),
    Layer(
        "backends",
        (
            Room("eager", ("backends.eager",)),
            Room("conv3d", ("backends.conv3d",)),
            Room("cpp", ("backends.cpp", "backends.tape")),
            Room("cuda", ("backends.cuda", "backends.cuda_check", "backends.cuda_launch", "backends.nvrtc")),
            Room(
                "triton",
                (
                    "backends.triton",
                    "tuning.convolutions",
                    "tuning.estimate",
                    "tuning.override",
                    "tuning.plans",
                    "tuning.selfcheck",
                ),
            ),
        ),
    ),
    Layer("shared", (Room("library_conv", ("backends.library_conv",)), Room("layout", ("backends.layout",)))),
    Layer("contract", (Room("contract", ("backends", "backends.contract")), Room("specs", ("specs",)))),
    Layer(
        "leaves",
        (
            Room("swap", ("swap",)),
            Room("accuracy", ("accuracy", "first_use")),
            Room("operands", ("operands",)),
            Room("activations", ("activations",)),
            Room("errors, version", ("errors", "version", "cache"), common=True),
            Room("csrc", ("_C",)),
            Room("kernels", ("kernels", "kernels.*")),
        ),
    ),
)


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its name behind ``fusedres.``."""
    found: dict[str, Path] = {}
    for top, prefix in ((root / "fusedres", ""), (root / "kernels", "kernels")):
        for path in sorted(top.rglob("*.py")):
            parts = (prefix, *path.relative_to(top).with_suffix("").parts)
            found[".".join(part for part in parts if part and part != "__init__")] = path
    return found


def _names(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, those that only a type checker reads left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):  # which holds no statement
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from _names(node)


def imports(module: str, path: Path, known: frozenset[str]) -> set[str]:
    """The modules of the package that ``module`` imports, at its head or inside a function; of ``from package import name`` the module
    ``package.name`` where there is one, else the package. That a package's ``__init__`` runs before its modules is not counted."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found: set[str] = set()
    for node in _names(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {".".join(name[1:]) for name in names if name[0] == "fusedres"}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif base[:1] == ["fusedres"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                full = ".".join([*base, alias.name])
                found.add(full if full in known else ".".join(base))
    return found - {module}


def loads(path: Path, known: frozenset[str]) -> set[str]:
    """The modules of the package that a source imports by names which it holds as strings."""
    source, prefix = path.read_text(), "fusedres."
    if "importlib.import_module" not in source:
        return set()
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {
        text.removeprefix(prefix) for text in constants if isinstance(text, str) and text.startswith(prefix)
    } & known


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Who imports whom; the extension ``_C`` imports nobody."""
    modules = sources(root)
    known = frozenset((*modules, "_C"))
    return {"_C": set(), **{module: imports(module, path, known) for module, path in modules.items()}}


class Place(NamedTuple):
    """Where a module stands: in which layer, 0 for the highest, and in which room."""

    depth: int
    room: Room


def place(module: str) -> Place:
    """Where ``module`` stands. Raises KeyError for one that stands in no room, or in two."""
    found = [
        Place(depth, room)
        for depth, layer in enumerate(LAYERS)
        for room in layer.rooms
        if any(fnmatchcase(module, pattern) for pattern in room.modules)
    ]
    if len(found) != 1:
        raise KeyError(f"module {module!r} stands in {len(found)} rooms of docs/draw_architecture.py, not in one")
    return found[0]


def room_graph(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms, by name, a room imports from."""
    found: dict[str, set[str]] = {room.name: set() for layer in LAYERS for room in layer.rooms}
    for module, imported in modules.items():
        own = place(module).room.name
        found[own] |= {place(other).room.name for other in imported} - {own}
    return found


# ---- the picture -----------------------------------------------------------------------------------------------------

INK, FAINT, LINE, BOX, LEAF = "#222222", "#8a8a8a", "#0072b2", "#e8f1f8", "#fdf1dc"
WIDTH, HEIGHT, GAP = 150.0, 8.0, 6.5


class Box(NamedTuple):
    """Where a room is drawn: the middle of its lower edge, and its width."""

    x: float
    y: float
    width: float


def _without_shortcuts(rooms: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others: a to c is left out where a to b to c is there."""

    def reach(name: str) -> set[str]:
        return rooms[name].union(*(reach(below) for below in rooms[name]))

    return {name: {b for b in below if not any(b in reach(other) for other in below)} for name, below in rooms.items()}


def _sizes(modules: dict[str, Path], root: Path) -> dict[str, str]:
    """What is said of each room: its files and lines."""
    files: dict[str, list[Path]] = {room.name: [] for layer in LAYERS for room in layer.rooms}
    for module, path in modules.items():
        files[place(module).room.name].append(path)
    files["csrc"] = [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    lines = {name: sum(len(path.read_text().splitlines()) for path in paths) for name, paths in files.items()}
    return {name: f"{len(paths)} file{'s' * (len(paths) != 1)}, {lines[name]:,} lines" for name, paths in files.items()}


def _arrow(axes: Axes, start: Box, end: Box, style: str) -> None:
    from matplotlib.patches import FancyArrowPatch

    if start.y == end.y:
        side = 0.5 if end.x > start.x else -0.5
        points = (start.x + start.width * side, start.y + HEIGHT / 2), (end.x - end.width * side, end.y + HEIGHT / 2)
    else:
        lean = max(-0.4, min(0.4, 1.5 * (end.x - start.x) / WIDTH))
        points = (start.x + start.width * lean, start.y), (end.x - end.width * lean, end.y + HEIGHT)
    look = {"arrowstyle": "-|>", "mutation_scale": 8, "color": LINE, "lw": 0.9, "alpha": 0.8, "linestyle": style}
    axes.add_patch(FancyArrowPatch(*points, shrinkA=0, shrinkB=0, zorder=1, **look))


def draw(axes: Axes, root: Path = ROOT) -> None:
    """The layers as rows of boxes, the imports as arrows."""
    from matplotlib.patches import FancyBboxPatch

    modules = sources(root)
    sizes, boxes = _sizes(modules, root), dict[str, Box]()
    for depth, layer in enumerate(LAYERS):
        y, slot = (len(LAYERS) - 1 - depth) * (HEIGHT + GAP), WIDTH / len(layer.rooms)
        axes.text(-2, y + HEIGHT / 2, layer.name, ha="right", va="center", color=FAINT, fontsize=9, style="italic")
        for i, room in enumerate(layer.rooms):
            x, width = (i + 0.5) * slot, min(slot * 0.8, 26.0)
            boxes[room.name] = Box(x, y, width)
            colour = LEAF if layer is LAYERS[-1] else BOX
            style = "round,pad=0,rounding_size=1"
            axes.add_patch(
                FancyBboxPatch((x - width / 2, y), width, HEIGHT, style, fc=colour, ec=INK, lw=0.8, zorder=2)
            )
            axes.text(x, y + HEIGHT * 0.62, room.name, ha="center", va="center", color=INK, fontsize=9, weight="bold")
            axes.text(x, y + HEIGHT * 0.26, sizes[room.name], ha="center", va="center", color=INK, fontsize=6)
    common = {room.name for layer in LAYERS for room in layer.rooms if room.common}
    for name, below in _without_shortcuts(room_graph(graph(root))).items():
        for other in below - common:
            _arrow(axes, boxes[name], boxes[other], "-")
    for module, path in modules.items():
        for other in loads(path, frozenset(modules)):
            _arrow(axes, boxes[place(module).room.name], boxes[place(other).room.name], ":")
    axes.set_xlim(-22, WIDTH + 1)
    axes.set_ylim(-1, len(LAYERS) * (HEIGHT + GAP))
    axes.axis("off")


def main() -> None:
    """Draw the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), dpi=120)
    draw(figure.add_axes((0.01, 0.01, 0.98, 0.93)))
    figure.text(0.02, 0.965, "fusedres: who imports whom", fontsize=15, weight="bold", color=INK)
    said = (
        "An arrow leads from who imports to what is imported, a dotted one to what is imported by name when it is first used. Left out: "
        "arrows\nthat follow from others, those to errors and version, and imports for type checkers alone. Lines pass behind boxes."
    )
    figure.text(0.02, 0.92, said, fontsize=8.5, color=INK)
    figure.savefig(Path(__file__).with_name("architecture.png"))


if __name__ == "__main__":
    main()
