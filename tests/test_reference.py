"""The reference that is made of docstrings: every public name has its place, and what is wrong in it is found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("pdoc")
SCRIPT = Path(__file__).parents[1] / "docs" / "reference.py"


@pytest.fixture(scope="module")
def reference() -> types.ModuleType:
    """``docs/reference.py`` as a module."""
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_a_place(reference, tmp_path):
    reference.write(tmp_path)
    for name in reference.PAGES:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        module = importlib.import_module(name)
        public = [n for n in getattr(module, "__all__", ()) if not isinstance(getattr(module, n), types.ModuleType)]
        assert not [n for n in public if f'id="{n}"' not in page], name
    assert (tmp_path / "index.html").exists() and "export_cpp" in (tmp_path / "search.js").read_text()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ('def known():\n    """See :func:`unknown`."""', "example.known: no unknown is known"),
        ('def known():\n    """See :class:`fusedres.nn.Unknown`."""', "no fusedres.nn.Unknown is known"),
        ("def bare():\n    pass", "example.bare has no docstring"),
        ('def typed(x: "Unknown"):\n    """One argument."""', "Error parsing type annotation"),
    ],
    ids=["reference", "reference to another module", "no docstring", "annotation"],
)
def test_what_is_wrong_ends_it(reference, tmp_path, monkeypatch, code, sentence):
    (tmp_path / "example.py").write_text(f'"""An example."""\n\n\n{code}\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "example", raising=False)
    monkeypatch.setattr(reference, "PAGES", ("example",))
    with pytest.raises(UserWarning, match=sentence):
        reference.write(tmp_path / "out")
    sys.modules.pop("example")
