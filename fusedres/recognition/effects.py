"""What a forward does beside computing and that can be done in its place when it is run: it sets attributes of its modules, changes lists,
dictionaries and tensors that these keep, and records gradients or does not.

What is set, or changed, becomes a call of the flow, in the order of the forward. What stands under such a name is found when the forward
comes to it (:class:`~.trace.Kept`), since it is another at every call.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import harmless
from .calls import Calls
from .lookup import Stores
from .modules import class_of, computes_by
from .trace import MISSING, Kept, Refused, Traced, holds_traced, is_plain

#: what every module holds
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
#: the code of every function that a context of torch's decorates
_DECORATED = torch.no_grad()(lambda: None).__code__  # type: ignore[attr-defined]


class Effects(Calls):
    """What a forward does beside computing."""

    # ---- attributes --------------------------------------------------------------------------------------------------

    def stores(self, owner: Any, name: str, what: str) -> None:
        """Check that ``owner.name`` is an attribute that may be set; raises Refused, with ``what`` does it."""
        if not isinstance(owner, nn.Module) or self.beside is None:
            raise Refused(what)
        path, cls = self.path_of(owner), class_of(owner)
        if name in _OF_EVERY_MODULE or computes_by(name) or name.startswith("__"):
            raise Refused(what)
        if cls.__module__.startswith("torch.nn.modules"):
            raise Refused(f"{what}, of a module of torch's")
        if self.reads.outside.attribute(cls, "__setattr__") is not nn.Module.__setattr__:
            raise Refused(f"{cls.__name__} sets its attributes by itself")
        on_class = self.reads.outside.attribute(cls, name)
        if on_class is not MISSING and hasattr(type(on_class), "__set__"):
            raise Refused(f"{what}, a property")
        if name in owner._parameters or name in owner._modules:
            raise Refused(f"{what}, a parameter or a module")
        if (path, name) not in self.beside.stored:
            raise Stores(path, name)

    def set_attribute(self, owner: Any, name: str, value: Any, what: str) -> None:
        """``owner.name = value``; raises Refused."""
        self.stores(owner, name, what)
        path, kept = self.path_of(owner), self.keepable(value)
        self.record("set", Kept(path, name), (kept,), {})
        self.stand[path, name] = kept

    def set_item(self, owner: Any, at: Any, value: Any, what: str) -> None:
        """``owner[at] = value`` of a dictionary that a module keeps; raises Refused."""
        if not isinstance(owner, Traced) or owner.node.op != "get" or owner.node.target.kind is not dict:
            raise Refused(what)
        if not is_plain(at) or isinstance(at, slice):
            raise Refused(f"{what}, under what is no constant")
        self.record("function", operator.setitem, (owner, at, self.keepable(value)), {})

    def keepable(self, value: Any) -> Any:
        """``value`` as something that outlives the forward: a list becomes one that is made anew at every call. Raises Refused."""
        if type(value) is list:
            if any(value is given for given in self.given):
                raise Refused("its forward keeps a list that it is given, or keeps already")
            made = self.record("function", list, (tuple(map(self.keepable, value)),), {})
            self.given.append(value)  # what is done with it from here on is done to what was made
            return made
        if type(value) is tuple:
            return tuple(map(self.keepable, value))
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return self.tensor(value)
        if isinstance(value, Traced) or is_plain(value) and not holds_traced(value):
            return value
        raise Refused(f"its forward keeps a {type(value).__name__}")

    # ---- gradient modes ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_grad_mode(self, mode: bool) -> Iterator[None]:
        before, self.recording = self.recording, mode
        try:
            yield
        finally:
            self.recording = before

    @staticmethod
    def grad_mode(target: Any, args: list[Any]) -> bool | None:
        """Whether gradients are recorded in the context ``target(*args)``, None where that is no context of this kind."""
        if target is torch.set_grad_enabled:
            return args[0] if len(args) == 1 and type(args[0]) is bool else None
        return None if args or not isinstance(target, type) else harmless.GRAD_MODES.get(target)

    def grad_mode_around(self, function: FunctionType) -> tuple[bool, FunctionType] | None:
        if self.beside is None or function.__code__ is not _DECORATED:
            return None
        self.reads.outside.function(function)
        held = [self.reads.outside.cell(cell) for cell in function.__closure__ or ()]
        factory, inner = (dict(zip(_DECORATED.co_freevars, held, strict=True)).get(n) for n in ("ctx_factory", "func"))
        context = factory.__self__ if isinstance(factory, MethodType) else None
        args = [context.mode] if isinstance(context, torch.set_grad_enabled) else []
        mode = self.grad_mode(type(context), args)
        return None if mode is None or not isinstance(inner, FunctionType) else (mode, inner)
