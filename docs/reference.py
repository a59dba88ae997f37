"""The reference of what is public, as pages of HTML from the docstrings: ``python docs/reference.py OUT`` (``make docs``).

Ends with an error for whatever pdoc warns of, for a public function or class without a docstring, and for a reference (``:class:`Name```
and the like) that leads nowhere.
"""

from __future__ import annotations

import importlib
import pathlib
import re
import sys
import warnings
from types import ModuleType

import pdoc

#: what there is a page for: what users call, and what who writes a backend or a kernel reads
PAGES = (
    "fusedres", "fusedres.functional", "fusedres.nn", "fusedres.ops", "fusedres.testing", "fusedres.activations", "fusedres.specs",
    "fusedres.operands", "fusedres.backends.contract", "fusedres.backends.select",
)  # fmt: skip
REFERENCE = re.compile(r":(?:mod|class|func|meth|attr|data):`~?([\w.]+)(?:\(\))?`")


def leads_somewhere(name: str, module: ModuleType, owner: str) -> bool:
    """Whether ``name`` is what a reader finds: in the class ``owner`` or the module of a docstring, in its package where it begins with a
    dot, or from the top."""
    if name.startswith("."):
        return _exists(module.__package__ + name) or _exists(module.__name__ + name)
    return any(_exists(f"{scope}.{name}") for scope in (f"{module.__name__}.{owner}", module.__name__)) or _exists(name)


def _exists(path: str) -> bool:
    """Whether a dotted path is that of a module or of something in one; annotated fields have no value, and count."""
    parts = path.strip(".").split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            fields = getattr(found, "__annotations__", {})
            if not hasattr(found, part):
                return part in fields and part == parts[-1]
            found = getattr(found, part)
        return True
    return False


def prepare(doc: pdoc.doc.Doc, owner: str = "") -> None:
    """Check ``doc`` and all in it, and give pdoc what it understands. Warns of what is wrong."""
    owner = doc.qualname if isinstance(doc, pdoc.doc.Class) else owner
    if isinstance(doc, pdoc.doc.Function) and not doc.obj.__doc__:
        doc.docstring = ""  # it would be that of a base class, for instance of torch's
    if doc.docstring.startswith("Alias for field number"):
        doc.docstring = ""  # Python's own, of a NamedTuple
    # where it was written, which is not where it is shown
    module = sys.modules[doc.taken_from[0]]
    for name in REFERENCE.findall(doc.docstring):
        if not leads_somewhere(name, module, owner):
            warnings.warn(f"{doc.fullname}: no {name} is known", stacklevel=1)
    # a name as Sphinx shows it, without what stands before
    doc.docstring = doc.docstring.replace("`~", "`")
    if isinstance(doc, pdoc.doc.Class) and issubclass(doc.obj, tuple):
        # pdoc cannot read the annotations of the one that Python makes; the fields say it all
        doc.members.pop("__init__", None)
    if isinstance(doc, pdoc.doc.Class):
        members = doc.own_members
    else:
        members = [m for m in getattr(doc, "members", {}).values() if not isinstance(m, pdoc.doc.Module)]
    for member in members:
        is_named = not isinstance(member, pdoc.doc.Variable) and not member.name.startswith("_")
        if is_named and isinstance(doc, pdoc.doc.Module) and not member.docstring:
            warnings.warn(f"{member.fullname} has no docstring", stacklevel=1)
        prepare(member, owner)


def write(out: pathlib.Path) -> None:
    """All pages, a first one and what the search needs. Raises where a warning is given."""
    pdoc.render.configure(docformat="restructuredtext", footer_text="fusedres", search=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages = {name: pdoc.doc.Module(importlib.import_module(name)) for name in PAGES}
        for page in pages.values():
            prepare(page)
        out.mkdir(parents=True, exist_ok=True)
        for name, page in pages.items():
            path = out / f"{name.replace('.', '/')}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pdoc.render.html_module(page, pages))
        (out / "index.html").write_text(pdoc.render.html_index(pages))
        (out / "search.js").write_text(pdoc.render.search_index(pages))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
