"""Looking things up as Python does, but without running anything: attributes, globals, closures. Every look-up is noted."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from . import harmless
from .modules import class_of
from .trace import (
    MISSING,
    Held,
    Kept,
    Node,
    Reads,
    Refused,
    Traced,
    as_nodes,
    holds_traced,
    is_plain,
    is_readable,
    own,
)


@dataclass
class Frame:
    """A function that is being followed. ``enclosing``: the frame around a function defined inside it."""

    name: str
    names: dict[str, Any]
    function: Any  # a FunctionType, whose attribute of an instance a type checker takes for a bound method
    enclosing: Frame | None = None
    local: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Bound:
    """A method of a module."""

    function: Any  # a FunctionType, as above
    module: nn.Module


@dataclass(frozen=True)
class Local:
    """A function defined inside the one that is being followed."""

    syntax: ast.FunctionDef | ast.Lambda
    frame: Frame
    defaults: tuple[Any, ...]


@dataclass(frozen=True)
class Super:
    """``super()``: the attributes of ``module`` behind those of the class ``after``."""

    after: type
    module: nn.Module


@dataclass(frozen=True)
class Method:
    """A method of a map, or of a container that was made on the way."""

    name: str
    owner: Any


@dataclass(frozen=True)
class Children:
    """``items``, ``values`` or ``keys`` of a ModuleDict, or its like."""

    kind: str
    module: nn.Module


#: the containers of torch's, whose iteration goes through their children
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ITERATIONS = {(cls, name): getattr(cls, name) for cls in CONTAINERS for name in ("__iter__", "__len__", "__getitem__")}
_ITERATIONS |= {(nn.ModuleDict, name): getattr(nn.ModuleDict, name) for name in ("items", "values", "keys")}


@dataclass
class Beside:
    """What a forward may do beside computing, where that is done in its place when the forward is run: ``stored`` are the paths of modules,
    each with the name of an attribute that the forward sets. ``grad``: whether it is called with gradients recorded; ``asks``: whether it
    asks for that."""

    grad: bool
    stored: set[tuple[str, str]]
    asks: bool = False


class Stores(Exception):
    """A forward sets an attribute that was not known to be set: what was read of it before counts no more."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(path, name)
        self.attribute = path, name


class Lookup:
    """What is found by name in the modules of ``root`` and in what its code refers to, each in ``training`` or not. ``beside``: what the
    forward does beside computing, None where it must not do anything."""

    def __init__(self, root: nn.Module, training: bool, beside: Beside | None = None) -> None:
        self.root, self.training, self.beside = root, training, beside
        #: whether gradients are recorded, None as the forward is called
        self.recording: bool | None = None
        #: what is known to stand under a name at the moment
        self.stand: dict[tuple[str, str], Any] = {}
        self.reads = Reads()
        self.nodes: list[Node] = []
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.depth = 0
        self._tensors: dict[int, dict[Held, Tensor]] = {}

    def record(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool = False
    ) -> Traced:
        """A new node; returns what stands for its result."""
        given, by_name = self._noted(args), {k: self._noted(v) for k, v in kwargs.items()}
        node = Node(op, target, given, by_name, self.depth > 0, in_place, self.recording)
        self.nodes.append(node)
        if in_place:
            if not args or not isinstance(args[0], Traced):
                raise Refused("its forward overwrites what is not its first argument")
            if not args[0].node.is_map:
                raise Refused(f"its forward overwrites, by {target}, what may be no tensor")
            args[0].node = node
            return args[0]
        return Traced(node)

    def _noted(self, value: Any) -> Any:
        """``value`` as a node keeps it: nodes in the places of maps, and :class:`~.trace.Held` in those of tensors that a module holds,
        which may be another at the next call. Raises Refused."""
        if isinstance(value, Tensor) and id(value) in self._tensors:
            known = self._tensors[id(value)]
            if len(known) > 1:
                raise Refused("its forward reads one tensor by several names")
            return next(iter(known))
        if isinstance(value, slice):
            return slice(*map(self._noted, (value.start, value.stop, value.step)))
        return type(value)(map(self._noted, value)) if type(value) in (tuple, list) else as_nodes(value)

    def path_of(self, module: nn.Module) -> str:
        """Where ``module`` stands; raises Refused where that is not inside the root."""
        if id(module) not in self.paths:
            raise Refused(f"its forward uses a {type(module).__name__} that is no part of it")
        return self.paths[id(module)]

    # ---- names ---------------------------------------------------------------------------------------------------

    def name(self, frame: Frame, name: str) -> Any:
        """What ``name`` stands for in ``frame``."""
        at: Frame | None = frame
        while at is not None:
            if name in at.names:
                return at.names[name]
            if name in at.local:
                raise Refused(f"{at.name} reads {name} before it is set")
            at = at.enclosing
        function = frame.function
        if name in function.__code__.co_freevars:
            cells: Any = function.__closure__ or ()
            try:
                value = self.reads.outside.cell(cells[function.__code__.co_freevars.index(name)])
            except ValueError:
                raise Refused(f"{frame.name} reads {name}, which is not set") from None
        else:
            value = self.reads.outside.item(function.__globals__, name)
            if value is MISSING:
                value = self.reads.outside.item(builtins.__dict__, name)
        return self._readable(value, f"{frame.name} reads {name}")

    @staticmethod
    def _readable(value: Any, what: str) -> Any:
        if value is MISSING:
            raise Refused(f"{what}, which is not there")
        if not is_readable(value):
            raise Refused(f"{what}, a {type(value).__name__} that may change unseen")
        return value

    # ---- attributes ------------------------------------------------------------------------------------------------

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``, MISSING for what is not there; raises Refused where that cannot be told."""
        if name.startswith("__") and not name.endswith("__"):
            raise Refused(f"its forward reads .{name}, whose name Python mangles")
        if isinstance(owner, Traced):
            return self._of_map(owner, name)
        if isinstance(owner, nn.Module):
            return self._of_module(owner, name)
        if isinstance(owner, Super):
            return self._of_super(owner, name)
        if isinstance(owner, ModuleType):
            value = self.reads.outside.item(owner.__dict__, name)
            return value if value is MISSING else self._readable(value, f"its forward reads {owner.__name__}.{name}")
        if isinstance(owner, type):
            value = owner.__name__ if name == "__name__" else self.reads.outside.attribute(owner, name)
            return self._readable(value, f"its forward reads {owner.__name__}.{name}")
        if isinstance(owner, Tensor) and self.beside is not None:
            return self._of_map(self.tensor(owner), name)
        if isinstance(owner, list) and name == "append" or isinstance(owner, str) and name in ("format", "startswith"):
            return Method(name, owner)
        if isinstance(owner, FunctionType) and name in ("__module__", "__name__", "__qualname__", "__class__"):
            return getattr(owner, name)
        raise Refused(f"its forward reads .{name} of a {type(owner).__name__}, which may change unseen")

    def _of_map(self, owner: Traced, name: str) -> Any:
        if is_list(owner.node) and name in harmless.OF_LISTS:
            return Method(name, owner)
        if name in harmless.ATTRIBUTES:
            return self.record("attribute", name, (owner,), {})
        if name in harmless.METHODS:
            return Method(name, owner)
        raise Refused(f"its forward uses .{name} of a map")

    def _of_module(self, module: nn.Module, name: str) -> Any:
        path, cls = self.path_of(module), class_of(module)
        if name == "training":
            self.reads.mode(path, self.training)
            return self.training
        if cls.__getattribute__ is not object.__getattribute__ or cls.__getattr__ is not nn.Module.__getattr__:
            raise Refused(f"{cls.__name__} looks its attributes up by itself")
        if self.beside is not None and (path, name) in self.beside.stored:
            return self._stands(path, module, name)
        on_class = self.reads.outside.attribute(cls, name)
        if isinstance(on_class, property):
            if not isinstance(on_class.fget, FunctionType):
                raise Refused(f"its forward reads the property {name} of {cls.__name__}")
            return self.call(Bound(on_class.fget, module), (), {})
        held = self.reads.own(path, module, name)
        if isinstance(held, Tensor):
            self._tensors.setdefault(id(held), {})[Held(path, name)] = held
        if type(held) in (list, dict) and self.beside is not None:
            return self._stands(path, module, name)
        if name in module.__dict__ or on_class is MISSING:
            return held if held is MISSING else self._readable(held, f"its forward reads {name} of {cls.__name__}")
        return self._on_class(module, name, on_class)

    def _stands(self, path: str, module: nn.Module, name: str) -> Any:
        """What stands under a name that is another at every call: what the forward has put there, else what is found when it comes
        to it."""
        if (path, name) not in self.stand:
            value = own(module, name)
            if value is MISSING:
                raise Refused(f"its forward reads {name} before it is set")
            if not (is_plain(value) or isinstance(value, Tensor) or type(value) in (list, dict)):
                raise Refused(f"its forward reads {name}, a {type(value).__name__} that may change unseen")
            kind = Tensor if isinstance(value, Tensor) else type(value)
            self.stand[path, name] = self.record("get", Kept(path, name, kind), (), {})
        return self.stand[path, name]

    def tensor(self, tensor: Tensor) -> Traced:
        """What stands for a tensor that a module holds; raises Refused."""
        held = self._noted(tensor)
        if self.beside is None or not isinstance(held, Held):
            raise Refused("its forward computes with what it holds")
        if (held.path, held.name) not in self.stand:
            kept = Kept(held.path, held.name, Tensor)
            self.stand[held.path, held.name] = self.record("get", kept, (), {})
        return self.stand[held.path, held.name]

    def symbols(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """``values`` with what stands for them in the places of tensors that modules hold, where no map is among them."""
        if self.beside is None or holds_traced(values):
            return values
        return tuple(self.tensor(value) if isinstance(value, Tensor) else value for value in values)

    def _on_class(self, module: nn.Module, name: str, found: Any) -> Any:
        cls = class_of(module)
        for container in CONTAINERS:
            if isinstance(module, container) and _ITERATIONS.get((container, name)) is found:
                return Children(name, module)
        if isinstance(found, FunctionType):
            return Bound(found, module)
        if isinstance(found, staticmethod):
            return self._readable(found.__func__, f"its forward reads {name} of the class {cls.__name__}")
        if is_plain(found) or isinstance(found, type):
            return found
        raise Refused(f"its forward reads {name} of the class {cls.__name__}, which may change unseen")

    def _of_super(self, owner: Super, name: str) -> Any:
        order = class_of(owner.module).__mro__
        if owner.after not in order:
            raise Refused("its forward calls super() of another class")
        for base in order[order.index(owner.after) + 1 :]:
            if name in base.__dict__:
                found = self.reads.outside.attribute(base, name)
                if isinstance(found, FunctionType):
                    return Bound(found, owner.module)
                break
        raise Refused(f"its forward reads {name} of super()")

    def children(self, module: nn.Module) -> list[nn.Module | None]:
        """The children that an iteration of ``module`` gives; raises Refused where it is none of torch's containers."""
        cls = class_of(module)
        for container in CONTAINERS:
            if isinstance(module, container) and getattr(cls, "__iter__", None) is _ITERATIONS[container, "__iter__"]:
                return self.reads.children(self.path_of(module), module)
        raise Refused(f"its forward goes through a {cls.__name__}")

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, see ``calls.py``."""
        raise NotImplementedError


def is_list(node: Node) -> bool:
    """Whether a value is a list that outlives the forward."""
    return node.op == "get" and node.target.kind is list or node.op == "function" and node.target is list


Callee = Callable[..., Any] | Bound | Local | Method | Children
