"""Calls: of functions that are followed, of modules that are steps or are gone through, and of what is known to be harmless."""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from . import harmless
from .lookup import Beside, Bound, Children, Frame, Local, Lookup, Method, is_list
from .modules import CONVOLUTIONS, call_is_plain, class_of, holds, norm_types
from .source import syntax
from .trace import MISSING, Refused, Traced, holds_traced, is_plain

#: calls inside of calls, further than any forward that is a block's goes
DEEPEST = 24
_NOT_PLAIN_FUNCTIONS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
SEQUENTIAL_FORWARD = nn.Sequential.forward


def is_sequential(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is that of a Sequential."""
    cls: Any = class_of(module)
    return (
        isinstance(module, nn.Sequential)
        and cls.forward is SEQUENTIAL_FORWARD
        and cls.__iter__ is nn.Sequential.__iter__
        and "forward" not in module.__dict__
    )


def bind(
    name: str,
    parameters: ast.arguments,
    defaults: tuple[Any, ...],
    keyword_defaults: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters; raises Refused where they do not fit."""
    places = [a.arg for a in (*parameters.posonlyargs, *parameters.args)]
    names = dict(zip(places[len(places) - len(defaults) :], defaults, strict=True)) | keyword_defaults
    given = dict(zip(places, args, strict=False))
    if parameters.vararg is not None:
        given[parameters.vararg.arg] = args[len(places) :]
    elif len(args) > len(places):
        raise Refused(f"{name} gets {len(args)} arguments")
    known = {*places, *(a.arg for a in parameters.kwonlyargs)}
    if not kwargs.keys() <= known or not given.keys().isdisjoint(kwargs):
        raise Refused(f"{name} is called with other keywords than its own")
    names |= given | kwargs
    if not known <= names.keys() or parameters.kwarg is not None:
        raise Refused(f"the arguments of {name} cannot be told")
    return names


class Calls(Lookup):
    """What a call gives."""

    def __init__(self, root: nn.Module, training: bool, deep: bool, beside: Beside | None = None) -> None:
        """``deep``: go through modules that hold a BatchNorm even where they are no rows."""
        super().__init__(root, training, beside)
        #: the paths of the modules that were gone through
        self.through: list[str] = []
        #: lists that the caller of the forward has made
        self.given: list[list[Any]] = []
        self._deep, self._frames = deep, 0

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of ``target(*args, **kwargs)``; raises Refused."""
        if isinstance(target, nn.Module):
            return self.module(target, args, kwargs)
        if isinstance(target, Bound):
            if target.function is SEQUENTIAL_FORWARD and isinstance(target.module, nn.Sequential):
                return self._in_a_row(target.module, args, kwargs)
            return self.function(target.function, (target.module, *args), kwargs)
        if isinstance(target, Local):
            return self._local(target, args, kwargs)
        if isinstance(target, Method):
            return self._method(target, args, kwargs)
        if isinstance(target, Children):
            return self._children(target, args, kwargs)
        return self._global(target, args, kwargs)

    # ---- functions -------------------------------------------------------------------------------------------------

    def function(self, function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow a Python function."""
        decorated = self.grad_mode_around(function)
        if decorated is not None:
            mode, inner = decorated
            with self.in_grad_mode(mode):
                return self.function(inner, args, kwargs)
        module = function.__module__ or ""
        if module == "torch" or module.startswith("torch."):
            raise Refused(f"its forward calls {function.__qualname__} of {module}")
        if function.__code__.co_flags & _NOT_PLAIN_FUNCTIONS:
            raise Refused(f"{function.__qualname__} is a generator or a coroutine")
        self.reads.outside.function(function)
        defaults, keyword_defaults = function.__defaults__ or (), function.__kwdefaults__ or {}
        node = syntax(function)
        names = bind(function.__qualname__, node.args, defaults, keyword_defaults, args, kwargs)
        if not all(is_plain(value) for value in (*defaults, *keyword_defaults.values())):
            raise Refused(f"a default of {function.__qualname__} may change unseen")
        local = frozenset(function.__code__.co_varnames) | frozenset(function.__code__.co_cellvars)
        return self._follow(node, Frame(function.__qualname__, names, function, None, local))

    def grad_mode_around(self, function: FunctionType) -> tuple[bool, FunctionType] | None:
        """``(whether gradients are recorded in it, the function inside)`` of a function decorated by that; None of others."""
        raise NotImplementedError

    def keepable(self, value: Any) -> Any:
        """``value`` as something that outlives the forward; raises Refused."""
        raise NotImplementedError

    def in_grad_mode(self, mode: bool) -> AbstractContextManager[None]:
        """A context in which calls are made with gradients recorded, or without."""
        raise NotImplementedError

    def _local(self, target: Local, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around = target.frame
        name = f"{around.name}.{getattr(target.syntax, 'name', '<lambda>')}"
        names = bind(name, target.syntax.args, target.defaults, {}, args, kwargs)
        return self._follow(target.syntax, Frame(name, names, around.function, around))

    def _follow(self, node: ast.FunctionDef | ast.Lambda, frame: Frame) -> Any:
        if self._frames >= DEEPEST:
            raise Refused("its forward goes through more calls than a block has")
        self._frames += 1
        try:
            return self.body(node, frame)
        finally:
            self._frames -= 1

    def body(self, node: ast.FunctionDef | ast.Lambda, frame: Frame) -> Any:
        """What the body of a function returns, see ``evaluate.py``."""
        raise NotImplementedError

    # ---- modules ---------------------------------------------------------------------------------------------------

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Go through a module, or take it as a step."""
        path = self.path_of(module)
        if not call_is_plain(module):
            raise Refused(f"the call of its {type(module).__name__} is overridden")
        cls = class_of(module)
        if self._goes_through(module):
            self.through.append(path)
            self.depth += 1
            try:
                self.reads.own(path, module, "forward")
                forward = self.reads.outside.attribute(cls, "forward")
                return self.call(Bound(forward, module), args, kwargs)
            finally:
                self.depth -= 1
        if not holds_traced(args):
            raise Refused(f"its {cls.__name__} reads no map")
        return self.record("module", path, args, kwargs, self.reads.in_place(path, module))

    def _goes_through(self, module: nn.Module) -> bool:
        if "forward" in module.__dict__ or not isinstance(class_of(module).forward, FunctionType):
            return False
        return is_sequential(module) or self._deep and holds(module, *norm_types()) or self.is_row(module)

    def is_row(self, module: nn.Module) -> bool:
        """Whether a module inside another is a row of steps itself: one that holds a convolution, or one that holds nothing and computes by
        calls alone (a lambda of slices and pads, a drop path at rest). Anything else is a step."""
        if class_of(module).__module__.startswith("torch.nn.modules"):
            return False
        if not holds(module, *CONVOLUTIONS[:1]):
            for inside in (module.children(), module.parameters(), module.buffers()):
                if next(inside, None) is not None:
                    return False
        return self.reads_as_row(module)

    def reads_as_row(self, module: nn.Module) -> bool:
        """Whether ``module``, read by itself, is one row of steps, see ``graph.py``."""
        raise NotImplementedError

    def _in_a_row(self, module: nn.Sequential, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs:
            raise Refused(f"its {type(module).__name__} is called with more than one map")
        x = args[0]
        for child in self.children(module):
            if child is None:
                raise Refused(f"its {type(module).__name__} holds None")
            x = self.module(child, (x,), {})
        return x

    def _children(self, target: Children, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.children(target.module)
        names = list(target.module._modules)
        if args or kwargs:
            raise Refused(f"its forward calls {target.kind} of a {type(target.module).__name__}")
        if target.kind == "keys":
            return names
        return [*zip(names, found, strict=True)] if target.kind == "items" else found

    # ---- what is known ---------------------------------------------------------------------------------------------

    def _method(self, target: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = target.owner
        if isinstance(owner, Traced):
            if is_list(owner.node):
                return self.record("method", target.name, (owner, *map(self.keepable, args)), kwargs)
            if target.name in harmless.MEASURES:
                return self.record("attribute", target.name, (owner, *args), kwargs)
            return self.record("method", target.name, (owner, *args), kwargs, harmless.overwrites(target.name, (), {}))
        if isinstance(owner, list) and target.name == "append" and len(args) == 1 and not kwargs:
            if any(owner is value for value in self.given):
                raise Refused("its forward changes a list that it is given")
            return owner.append(args[0])  # lists of other makers cannot be read
        if isinstance(owner, str) and is_plain(args) and not kwargs:
            return getattr(owner, target.name)(*args)
        raise Refused(f"its forward calls {target.name}")

    def _global(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is super:
            raise Refused("its forward calls super() with arguments")
        if not callable(target):
            raise Refused(f"its forward calls a {type(target).__name__}")
        if _among(target, harmless.ANSWERS):
            return harmless.ANSWERS[target]
        if target is torch.is_grad_enabled and self.beside is not None and not args:
            self.beside.asks = self.beside.asks or self.recording is None
            return self.beside.grad if self.recording is None else self.recording
        if target in (builtins.isinstance, builtins.hasattr, builtins.getattr, builtins.type, builtins.callable):
            return self._question(target, args)
        if target in (builtins.list, builtins.tuple) and len(args) == 1 and _is_shape(args[0]):
            return self.record("function", target, args, kwargs)
        if _among(target, harmless.CONTAINERS):
            return self._container(target, args, kwargs)
        if target is builtins.len and len(args) == 1 and isinstance(args[0], list | tuple | nn.Module):
            return len(self.items(args[0]))
        args, kwargs = self.symbols(args), dict(zip(kwargs, self.symbols(tuple(kwargs.values())), strict=True))
        if _among(target, harmless.FUNCTIONS) and holds_traced((*args, *kwargs.values())):
            return self.record("function", target, args, kwargs, harmless.overwrites(target, args, kwargs))
        if (
            _among(target, harmless.STATIC)
            or target in harmless.FUNCTIONS
            and target.__module__ == operator.add.__module__
        ):
            return self.static(target, args, kwargs)
        if isinstance(target, FunctionType):
            return self.function(target, args, kwargs)
        raise Refused(f"its forward calls {getattr(target, '__name__', type(target).__name__)}")

    def static(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on constants alone, made; raises Refused for others, and where it raises."""
        if not all(map(_is_constant, (*args, *kwargs.values()))):
            raise Refused(f"its forward calls {target.__name__} on what a map holds")
        return self.tried(target, *args, **kwargs)

    @staticmethod
    def tried(target: Any, *args: Any, **kwargs: Any) -> Any:
        """``target(*args, **kwargs)``; raises Refused where it raises."""
        try:
            return target(*args, **kwargs)
        except Exception as error:
            raise Refused(f"its forward raises {type(error).__name__}: {error}") from None

    def _question(self, target: Any, args: tuple[Any, ...]) -> Any:
        if target is builtins.isinstance and len(args) == 2:
            return self._is_instance(*args)
        if target is builtins.callable and len(args) == 1 and isinstance(args[0], nn.Module | FunctionType):
            return True
        if target in (builtins.hasattr, builtins.getattr) and len(args) >= 2 and isinstance(args[1], str):
            if isinstance(args[0], nn.Module):
                found = self.attribute(args[0], args[1])
                if target is builtins.hasattr:
                    return found is not MISSING
                if found is not MISSING:
                    return found
                if len(args) == 3:
                    return args[2]
        raise Refused(f"its forward calls {target.__name__} of a {type(args[0]).__name__ if args else 'nothing'}")

    def _is_instance(self, value: Any, kinds: Any) -> bool:
        of = kinds if isinstance(kinds, tuple) else (kinds,)
        if not all(isinstance(kind, type) for kind in of):
            raise Refused("its forward asks isinstance of what is no class")
        if isinstance(value, Traced):
            if not value.node.is_tensor or not set(of) <= {Tensor, list, tuple, dict, str, int, float}:
                raise Refused("its forward asks for the type of a map")
            return Tensor in of
        if isinstance(value, nn.Module):
            return issubclass(class_of(value), tuple(of))
        return isinstance(value, tuple(of))

    def _container(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_plain(tuple(kwargs.values())):
            raise Refused(f"its forward calls {target.__name__} with a map")
        found = target(
            *(self.items(value) if i == 0 or target is zip else value for i, value in enumerate(args)), **kwargs
        )
        return found if isinstance(found, tuple) else list(found)

    def items(self, value: Any) -> list[Any]:
        """What an iteration of ``value`` gives; raises Refused where that depends on a map's values."""
        if isinstance(value, nn.Module):
            return list(self.children(value))
        if isinstance(value, list | tuple | range | str):
            return list(value)
        raise Refused(f"its forward goes through a {'map' if isinstance(value, Traced) else type(value).__name__}")


def _among(target: Any, known: Any) -> bool:
    try:
        return target in known
    except TypeError:  # what cannot be hashed
        return False


def _is_shape(value: Any) -> bool:
    return isinstance(value, Traced) and (value.node.op, value.node.target) == ("attribute", "shape")


def _is_constant(value: Any) -> bool:
    return (
        all(map(_is_constant, value))
        if isinstance(value, list | tuple)
        else is_plain(value) or isinstance(value, range)
    )
