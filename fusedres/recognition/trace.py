"""What following a forward leaves: its calls on maps (:class:`Node`), and everything that was read on the way (:class:`Reads`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, KeysView, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .modules import class_of


class Refused(Unsupported):
    """A forward that does what is not known to be harmless: the module is left alone, and ``report`` says so."""


class Missing:
    """Stands for what is not there."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()
#: functions and methods of maps whose result is not one tensor
_NO_TENSOR = frozenset({"chunk", "split", "tensor_split", "unbind", "item", "list", "tuple"})
#: what a module of torch's own counts as: what it computes is looked up when it is run
TORCH_MODULE = "a module of torch.nn"


@dataclass(eq=False)
class Node:
    """A call on maps. ``op``: input, module (``target`` is its path), function, method or attribute (``target`` is its name), get or set
    (``target`` is a :class:`Kept`: what stands there is read, or becomes the argument); ``args`` and ``kwargs`` hold nodes where the call
    had maps. ``inside``: whether a module inside the one that is read made it. ``in_place``: whether it overwrites its first argument.
    ``grad``: whether it is made with gradients recorded or without, None as the forward is called."""

    op: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inside: bool = False
    in_place: bool = False
    grad: bool | None = None

    @property
    def is_map(self) -> bool:
        """Whether it is made of a map's values, and not of its shape or dtype alone."""
        if self.op == "function":
            return any(source.is_map for source in self.sources)
        if self.op == "get":
            return self.target.kind is Tensor
        return self.op not in ("attribute", "set")

    @property
    def is_tensor(self) -> bool:
        """Whether it is known to be one tensor: not what a module of the user's may return, nor several."""
        if self.op == "function" or self.op == "method":
            return self.is_map and getattr(self.target, "__name__", self.target) not in _NO_TENSOR
        return self.op == "input" or self.op == "get" and self.is_map

    @property
    def sources(self) -> list[Node]:
        """The nodes that this one reads, each as often as it is read."""
        return [*_nodes(self.args), *_nodes(tuple(self.kwargs.values()))]


def _nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    return [node for item in value for node in _nodes(item)] if isinstance(value, tuple | list) else []


@dataclass(frozen=True)
class Held:
    """Stands for the tensor that the module at ``path`` holds as ``name``, whichever that is when the call is made."""

    path: str
    name: str


@dataclass(frozen=True)
class Kept:
    """Where the module at ``path`` keeps something under ``name``, whatever that is when a forward comes to it; of what is read there
    ``kind`` is the type, Tensor for all tensors."""

    path: str
    name: str
    kind: type | None = None


class Traced:
    """A map, or what was made of one, in the place of its value. One that is overwritten in place gets the node that did so, which all its
    names then see."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node


def holds_traced(value: Any) -> bool:
    """Whether a map is in ``value``."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    return isinstance(value, Traced) or isinstance(value, tuple | list) and any(map(holds_traced, value))


def as_nodes(value: Any) -> Any:
    """``value`` with the nodes that its maps are at the moment."""
    if isinstance(value, Traced):
        return value.node
    if isinstance(value, slice):
        return slice(*map(as_nodes, (value.start, value.stop, value.step)))
    return type(value)(map(as_nodes, value)) if type(value) in (tuple, list) else value


_PLAIN = (int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is constant and compares by value."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    return all(map(is_plain, value)) if type(value) in (tuple, torch.Size) else isinstance(value, _PLAIN)


def is_readable(value: Any) -> bool:
    """Whether a change of ``value`` would be noticed: it is constant, or replaced as a whole."""
    return is_plain(value) or isinstance(
        value, nn.Module | Tensor | FunctionType | BuiltinFunctionType | type | ModuleType
    )


def own(module: nn.Module, name: str) -> Any:
    """What ``module`` itself holds as ``name``, MISSING where that is nothing."""
    held = module.__dict__
    if name in held:
        return held[name]
    for store in ("_parameters", "_buffers", "_modules"):
        if name in held[store]:
            return held[store][name]
    return MISSING


def _counts_as(value: Any) -> Any:
    """What of a value a trace depends on: of a module its class, of a tensor that it is one."""
    if isinstance(value, nn.Module):
        cls = class_of(value)
        return TORCH_MODULE if cls.__module__.startswith("torch.nn.modules") else cls
    # of a list and of a dict, which are read when a forward comes to them, it is the type alone
    return Tensor if isinstance(value, Tensor) else type(value) if type(value) in (list, dict) else value


def children_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The names of the children of ``module``, and what they count as."""
    return tuple((name, _counts_as(child)) for name, child in module._modules.items())


def _same(a: Any, b: Any) -> bool:
    return a is b or is_plain(a) and type(a) is type(b) and bool(a == b)


_CHILDREN = "*"


class Outside:
    """What a trace has read outside of the modules: globals, what Python modules and classes hold, functions, closures."""

    def __init__(self) -> None:
        self._mappings: dict[int, Mapping[str, Any]] = {}
        self._present: dict[int, dict[str, None]] = {}
        self._absent: dict[int, dict[str, None]] = {}
        self._proxies: dict[type, Mapping[str, Any]] = {}
        self._functions: dict[FunctionType, None] = {}
        self._cells: dict[int, CellType] = {}
        self._getters: list[tuple[Callable[[Any], tuple[Any, ...]], Mapping[str, Any]]] = []
        self._absences: list[tuple[KeysView[str], frozenset[str]]] = []
        self._then: list[Any] = []

    def item(self, mapping: Mapping[str, Any], name: str) -> Any:
        """What ``mapping`` holds as ``name``, MISSING where it has none, noted."""
        self._mappings[id(mapping)] = mapping
        store = self._present if name in mapping else self._absent
        store.setdefault(id(mapping), {})[name] = None
        return mapping.get(name, MISSING)

    def attribute(self, cls: type, name: str) -> Any:
        """What stands under ``name`` in a class or one before it, MISSING where nothing does, noted; no descriptor is asked."""
        for base in cls.__mro__:
            value = MISSING if base is object else self.item(self._proxies.setdefault(base, base.__dict__), name)
            if value is not MISSING:
                return value
        return object.__dict__.get(name, MISSING)

    def function(self, function: FunctionType) -> None:
        """Note the code and the defaults of a function."""
        self._functions[function] = None

    def cell(self, cell: CellType) -> Any:
        """What a closure holds, noted; ValueError where that is nothing yet."""
        self._cells[id(cell)] = cell
        return cell.cell_contents

    def close(self) -> None:
        """Keep all of it as it is now."""
        for key, names in self._present.items():
            # of one name alone the getter would return the item, and not a tuple
            self._getters.append((operator.itemgetter(*names, *names), self._mappings[key]))
        for key, names in self._absent.items():
            self._absences.append((self._mappings[key].keys(), frozenset(names)))
        self._then = self.values()

    def values(self) -> list[Any]:
        """All of it, as it is now."""
        found: list[Any] = []
        try:
            for getter, mapping in self._getters:
                found += getter(mapping)
            for cell in self._cells.values():
                found.append(cell.cell_contents)
        except (KeyError, ValueError):  # one of them is gone
            return [object()]
        for keys, names in self._absences:
            found.append(keys.isdisjoint(names))
        for function in self._functions:
            found += _parts_of_function(function)
        return found

    def changed(self) -> bool:
        """Whether something is no longer as it was."""
        now = self.values()
        return len(now) != len(self._then) or not all(map(_same, now, self._then))


_parts_of_function = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")


def _overwrites(module: nn.Module) -> bool:
    return own(module, "inplace") not in (MISSING, False)


class Reads:
    """What a trace has read: ``outside`` of the modules that it went through, and of these themselves."""

    def __init__(self) -> None:
        self.outside = Outside()
        self._own: dict[tuple[str, str], Any] = {}
        self._not_in_place: set[str] = set()

    def own(self, path: str, module: nn.Module, name: str) -> Any:
        """What the module at ``path`` holds as ``name``, noted."""
        value = own(module, name)
        self._own[path, name] = _counts_as(value)
        return value

    @property
    def names(self) -> set[str]:
        """The names of what was read of modules."""
        return {name for _, name in self._own}

    @property
    def attributes(self) -> set[tuple[str, str]]:
        """The paths of modules, each with the name of something that was read of it."""
        return set(self._own)

    def mode(self, path: str, training: bool) -> None:
        """Note that the mode of the module at ``path`` was taken to be ``training``."""
        self._own[path, "training"] = training

    def in_place(self, path: str, module: nn.Module) -> bool:
        """Whether the module at ``path`` overwrites what it reads; noted where it does not."""
        if _overwrites(module):
            return True
        self._not_in_place.add(path)
        return False

    def children(self, path: str, module: nn.Module) -> list[nn.Module | None]:
        """The children of the module at ``path``, noted."""
        self._own[path, _CHILDREN] = children_of(module)
        return list(module._modules.values())

    def changed(self, block: nn.Module) -> str | None:
        """What of ``block`` is no longer as it was read, None where everything is."""
        for (path, name), value in self._own.items():
            module: Any = block
            for part in path.split(".") if path else ():
                module = None if module is None else module._modules.get(part)
            if module is None:
                return path
            now = children_of(module) if name == _CHILDREN else _counts_as(own(module, name))
            if now != value if name == _CHILDREN else not _same(now, value):
                return f"{path}.{name}" if path else name
        for path in self._not_in_place:
            if _overwrites(block.get_submodule(path)):
                return f"{path}.inplace"
        return "what its forward reads" if self.outside.changed() else None
