"""The class of a fused module: one mixin in front of the class it had, so that its children, parameters, hooks and names stay the very
objects they were.

The mixin has nothing on it but the one attribute ``_fusedres`` and what Python and torch call by themselves. The class made with it has a
``forward`` with the signature of the original. Anything else would hide a child, or a method, that a user has given the same name. What a
block computes stands in its :class:`~fusedres.blocks.state.BlockState`. A module of a mixed class without a state (a slice of a converted
Sequential, ``type(block)(...)``) behaves as one of the original class.
"""

from __future__ import annotations

import copyreg
import functools
import secrets
from abc import ABCMeta
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from .blocks.state import BlockState

KEY = "_fusedres"
#: what pickles call for an object that is made by its class
_NEW: Callable[..., object] = vars(copyreg)["__newobj__"]

_mixed: dict[type[nn.Module], type[nn.Module]] = {}
_scripted: dict[type[nn.Module], type[nn.Module]] = {}
#: by the mixed classes, under which torch.load(weights_only=True) may build them: no file can guess them, it has to name the original
_names: dict[type[nn.Module], str] = {}
#: classes that are fused from the start, and how their states are made
_fused_from_start: dict[type, Callable[[], BlockState]] = {}
#: the forwards of fused classes
_forwards: set[Callable[..., Any]] = set()


class FusedBlock:
    """What a fused module has in front of its original class."""

    _fusedres: BlockState | None = None

    def __init_subclass__(
        cls, *, mixed: bool = False, state: Callable[[], BlockState] | None = None, **arguments: Any
    ) -> None:
        if mixed or state is not None:
            module = cast(type[nn.Module], cls)
            module.forward = _fused_forward(_original_of(module))
            if state is not None:
                _fused_from_start[cls] = state
                module.__init__ = _with_state(module.__init__)
        if not mixed:  # what registers its subclasses has registered the original
            super().__init_subclass__(**arguments)

    def _get_name(self) -> str:
        module = cast(nn.Module, self)
        converted = is_converted(module) and state_of(module) is not None
        return f"Fused{original_class(module).__name__}" if converted else super()._get_name()  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        if KEY in replica.__dict__:
            replica.__dict__[KEY] = replica.__dict__[KEY].fresh().of(replica)
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and pickles have theirs from here
        super().__setstate__(state)  # type: ignore[misc]
        module = cast(nn.Module, self)
        if KEY in module.__dict__:
            module.__dict__[KEY].of(module)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script reads: the same module with its original forward, until its next call in Python."""
        module = cast(nn.Module, self)
        if state_of(module) is not None:
            module.__class__ = _scripted_class(type(module))
        return module

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # the mixed class is made at run time: a pickle says what it is made of
        make, arguments, *rest = super().__reduce_ex__(max(protocol, 2))  # type: ignore[misc]
        module = cast(nn.Module, self)
        state = rest[0] if rest else None
        if isinstance(state, dict) and KEY in state:
            rest[0] = {**state, KEY: state[KEY].fresh()}
        if make is _NEW and is_converted(module):
            original = original_class(module)
            fused = isinstance(state, dict) and KEY in state
            make, arguments = rebuild if fused else rebuild_plain, (original, *arguments[1:])
        return (make, arguments, *rest)


def _fused_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """A forward that runs fused, with the signature of the original one."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FusedBlock):  # a bound forward that somebody kept, of a module that was reverted since
            return type(self).forward(self, *args, **kwargs)
        plain = super(FusedBlock, self).forward  # type: ignore[misc]
        if torch.compiler.is_compiling():
            traced = self._fusedres
            # what is planned for a trace is the state's own module
            if traced is None or not traced.is_of(self):
                return plain(*args, **kwargs)
            return traced.kind.trace(self, plain, args, kwargs)
        state = state_of(self)
        if state is None:
            return plain(*args, **kwargs)
        return state.kind.forward(self, state, plain, args, kwargs)

    _forwards.add(forward)
    return forward


def _with_state(init: Callable[..., None]) -> Callable[..., None]:
    """``init`` of a class that is fused from the start: its modules have a state as soon as they are there, which compilers do not make."""

    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        state_of(self)

    return __init__


class _Scripted:
    """What a fused module has in front of its original class while torch.jit.script reads it."""

    def __init_subclass__(cls) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return resume(cast(nn.Module, self))(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:
        return resume(cast(nn.Module, self)).__reduce_ex__(protocol)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return cast(nn.Module, resume(cast(nn.Module, self))._replicate_for_data_parallel())


def _make_class(mixin: type, original: type[nn.Module], **arguments: Any) -> type[nn.Module]:
    """A class of ``mixin`` in front of ``original``, made past the metaclass of the original, which may register what it makes."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    meta = type(original)
    make: Callable[..., type[nn.Module]] = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__
    return make(meta, original.__name__, (mixin, original), names, **arguments)


def mixed_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of the fused modules whose class was ``original``. Raises TypeError where that is none of an ``nn.Module``."""
    if not (isinstance(original, type) and issubclass(original, nn.Module)):
        raise TypeError(f"expected a class of torch.nn.Module, found {original!r}")
    if original not in _mixed:
        _mixed[original] = _make_class(FusedBlock, original, mixed=True)
        _names[_mixed[original]] = f"{__name__}.{secrets.token_hex(16)}"
    made = _mixed[original]
    forward: Any = made.forward
    # that of the original may have been replaced since, or when the class was made
    if forward.__wrapped__ is not original.forward:
        functools.update_wrapper(forward, original.forward)
    torch.serialization.add_safe_globals([(made, _names[made])])
    return made


def _scripted_class(fused: type[nn.Module]) -> type[nn.Module]:
    if fused not in _scripted:
        _scripted[fused] = _make_class(_Scripted, _original_of(fused))
    return _scripted[fused]


def rebuild(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """A fused module of the class ``original`` without its contents, as copies and pickles make it."""
    made = mixed_class(original)
    return made.__new__(made, *arguments)


def rebuild_plain(original: type[nn.Module], *arguments: Any) -> nn.Module:
    """The same where the module was of a mixed class without being fused."""
    return original.__new__(original, *arguments)


def resume(module: nn.Module) -> nn.Module:
    """``module`` itself, fused again where torch.jit.script has read it."""
    if isinstance(module, _Scripted):
        fused = next(fused for fused, scripted in _scripted.items() if scripted is type(module))
        cast(Any, module).__class__ = fused
    return module


def _original_of(cls: type[nn.Module]) -> type[nn.Module]:
    # what stands before was put in front later, as FSDP does
    for mixin in (FusedBlock, _Scripted):
        if issubclass(cls, mixin):
            return cls.__mro__[cls.__mro__.index(mixin) + 1]
    return cls


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class whose forward is the original one: the module's own where it is not fused."""
    return _original_of(type(module))


def is_converted(module: nn.Module) -> bool:
    """Whether the class of ``module`` is a mixed one (and ``revert`` can take it back)."""
    return isinstance(module, FusedBlock) and any(cls in _names for cls in type(module).__mro__)


def runs_fused(cls: type) -> bool:
    """Whether the forward of a class is that of a fused module, which a class derived from one may override."""
    return cls.forward in _forwards  # type: ignore[attr-defined]


def state_of(module: nn.Module) -> BlockState | None:
    """The state of a fused module, of its own; None for a module that behaves as its class says. Where a module is of a class that is fused
    from the start, without having been made by it, its state comes into being here."""
    state = module.__dict__.get(KEY)
    if state is None:
        make = next((_fused_from_start[cls] for cls in type(module).__mro__ if cls in _fused_from_start), None)
        if make is not None:
            state = module.__dict__.setdefault(KEY, make().of(module))  # threads may come together
    elif not state.is_of(module):  # somebody has copied the attributes of a module by hand
        state = module.__dict__[KEY] = state.fresh().of(module)
    return state


torch.serialization.add_safe_globals([rebuild, rebuild_plain])
