"""The layers of docs/architecture.md hold: nothing imports upwards, nothing in a circle, and the kernels import nothing of the package."""

from __future__ import annotations

import graphlib
import importlib
import importlib.util
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parent.parent


def _drawing():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawing = _drawing()
GRAPH = drawing.graph()
MODULES = sorted(GRAPH)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_is_there_and_nothing_above_it(module):
    own = drawing.place(module)
    for imported in GRAPH[module]:
        assert imported in GRAPH, f"fusedres.{module} imports fusedres.{imported}, which is not there"
        assert drawing.place(imported).depth >= own.depth, f"fusedres.{module} imports upwards: fusedres.{imported}"


def test_no_module_imports_itself_by_way_of_others():
    list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_no_room_imports_itself_by_way_of_others():
    list(graphlib.TopologicalSorter(drawing.room_graph(GRAPH)).static_order())


def test_every_room_of_the_picture_has_a_module():
    rooms = {room.name for layer in drawing.LAYERS for room in layer.rooms}
    assert rooms == {drawing.place(module).room.name for module in MODULES}


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "kernels"])
def test_kernels_import_only_kernels(module):
    assert {imported.split(".")[0] for imported in GRAPH[module]} <= {"kernels"}


def test_the_folder_of_the_kernels_can_be_imported_as_it_lies(tmp_path):
    pytest.importorskip("triton")
    code = (
        "import importlib, pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for path in sorted(pathlib.Path({str(ROOT / 'kernels')!r}).glob('*.py')):\n"
        "    importlib.import_module('kernels' if path.stem == '__init__' else f'kernels.{path.stem}')\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'fusedres'))\n"
    )
    done = forked.python(["-c", code], cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_picture_can_be_drawn():
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().add_axes((0, 0, 1, 1))
    drawing.draw(axes)
    written = {text.get_text() for text in axes.texts}
    assert {room.name for layer in drawing.LAYERS for room in layer.rooms} <= written
