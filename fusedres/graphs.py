"""A model's forward and backward as CUDA graphs: one launch each, whatever the host does meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .autograd.steps import functorch_active
from .blocks.unchanged import Held, contents

#: steps before a capture: in the first kernels are compiled and plans chosen, in the second schedules are recorded
WARM_UP = 3

Results = Sequence[Tensor | None]


def graphed(model: nn.Module, *example: Tensor) -> Callable[..., Any]:
    """``model`` by CUDA graphs, for inputs like ``example``: a function of as many tensors that gives what ``model(*inputs)`` would,
    without the host's time for it.

    Captured is what ``model(*example)`` computes now, in its present modes and under the present autocast: with its backward where
    gradients are enabled, without one under ``torch.no_grad()``. The parameters are the model's own, so that an optimizer's steps count;
    running statistics and counters are updated at every call, and stand as before once this returns, as do random states. Of what it
    needs in memory nothing is shared with other graphs, and inputs and outputs are copied, so that both may be kept.

    ``model(*inputs)`` itself is called, as always, for inputs of another shape, strides, dtype or ``requires_grad``, where gradients are
    enabled and were not, or the reverse, under another autocast, and once anything in the model is not what it was: a parameter replaced,
    a module in another mode, a hook set.

    Raises TypeError for an example or an output that is no tensor; ValueError where the model or the example is not on one CUDA device,
    a hook is set or a forward sets attributes, whose Python no graph holds, or a BatchNorm in training has ``momentum=None``. A backward
    raises RuntimeError where the function has been called again since its forward.
    """
    _check(model, example)
    _check_devices(model, example)
    return _Graphed(model, example)


def _check(model: nn.Module, example: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed expects a torch.nn.Module, found {type(model).__name__}")
    for value in example:
        if not isinstance(value, Tensor):
            raise TypeError(f"graphed expects tensors as examples, found {type(value).__name__}")
    for name, module in model.named_modules():
        if any(hooks for hooks in _hooks(module)):
            raise ValueError(
                f"{name or 'the model'} has a hook, which would run at the capture alone: remove it before"
            )
        if isinstance(module, _BatchNorm) and module.training and module.momentum is None:
            raise ValueError(
                f"{name or 'the model'} has momentum=None: it asks for the number of batches, which a graph cannot"
            )


def _check_devices(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers(), example)}
    if len(devices) != 1 or not all(device.type == "cuda" for device in devices):
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"a CUDA graph wants the model and its example on one CUDA device, found {found}")


def _hooks(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


class Capture(NamedTuple):
    """What runs in a graph, and where it leaves its results."""

    replay: Callable[[], None]
    results: Results


@contextmanager
def _aside() -> Iterator[None]:
    """Work on a stream of its own, before and after which the current one waits."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def capture(run: Callable[[], Results], pool: Any) -> Capture:
    """``run``, captured into a graph with the memory of ``pool``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = run()
    return Capture(graph.replay, results)


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and the random states of the ``device`` back afterwards."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _form(t: Tensor) -> tuple[Any, ...]:
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad


class _Setting(NamedTuple):
    """What a call depends on besides the model and its inputs: whether gradients are enabled, and the dtype that autocast is on for."""

    grad: bool
    cast: torch.dtype | None


def _setting(kind: str) -> _Setting:
    """The present one, for devices of that kind."""
    return _Setting(
        torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    )


class _Graphed:
    """See :func:`graphed`."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        self._model = model
        self._inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in example]
        self._parameters = list(model.parameters())
        self._device = next(itertools.chain(self._inputs, self._parameters, model.buffers())).device
        self._forms, self._setting = [*map(_form, example)], _setting(self._device.type)
        self._tree: TreeSpec | None = None
        #: the number of the last forward, whose intermediate results are those in memory
        self.turn = 0
        cast = self._setting.cast
        # without autocast's cache: a graph that reads a weight cast before it would not see the weight move
        with (
            _as_it_was(model, self._device),
            torch.autocast(self._device.type, cast, enabled=cast is not None, cache_enabled=False),
        ):
            self._capture()
        self._places = self._addresses()

    # ---- capturing ---------------------------------------------------------------------------------------------------

    def _forward(self) -> list[Tensor]:
        self._made, self._tree = tree_flatten(self._model(*self._inputs))
        for value in self._made:
            if not isinstance(value, Tensor):
                raise TypeError(f"a graphed model has to return tensors, found {type(value).__name__}")
        # without the graph of autograd, which goes once the backward is captured
        return [y.detach() for y in self._made]

    def _backward(self) -> Results:
        """The gradients of inputs and parameters by what the last forward has made."""
        surface = [*self._inputs, *self._parameters]
        made = [(y, g) for y, g in zip(self._made, self.grads, strict=True) if g is not None]
        wanted = [t for t in surface if t.requires_grad]
        found = iter(torch.autograd.grad([y for y, _ in made], wanted, [g for _, g in made], allow_unused=True))
        return [next(found) if t.requires_grad else None for t in surface]

    def _capture(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        held = None
        with _aside():
            for _ in range(WARM_UP):
                self._forward()
                self.grads = [torch.zeros_like(y) if y.requires_grad else None for y in self._made]
                if self._differentiable:
                    self._backward()
                # what a module makes of itself at its first call is there
                held = held or _held(self._model)
        self._made = []
        self.forward = capture(self._forward, pool)
        self.backward = capture(self._backward, pool) if self._differentiable else None
        self._made = []
        assert held is not None
        if not held.is_unchanged():
            raise ValueError("its forward sets attributes of its modules, which a graph would not")
        self._held = held

    @property
    def _differentiable(self) -> bool:
        return any(g is not None for g in self.grads)

    # ---- running -----------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs or not self._fits(inputs):
            return self._model(*inputs, **kwargs)
        found: Sequence[Tensor] = (
            self.run(inputs) if self.backward is None else _Replay.apply(self, *inputs, *self._parameters)
        )
        assert self._tree is not None
        return tree_unflatten(found, self._tree)

    def _fits(self, inputs: tuple[Any, ...]) -> bool:
        return (
            len(inputs) == len(self._forms)
            and all(isinstance(x, Tensor) for x in inputs)
            and [*map(_form, inputs)] == self._forms
            and _setting(self._device.type) == self._setting
            and not functorch_active()
            and self._held.is_unchanged()
            and self._addresses() == self._places
        )

    def _addresses(self) -> list[tuple[int, bool]]:
        tensors = itertools.chain(self._parameters, self._model.buffers())
        return [(t.data_ptr(), t.requires_grad) for t in tensors]

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs for these inputs."""
        self.turn += 1
        with torch.no_grad():
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            self.forward.replay()
            return tuple(y.clone() for y in self.forward.results if y is not None)

    def differentiate(self, turn: int, grads: Results) -> list[Tensor | None]:
        """The gradients of inputs and parameters for those of the outputs of forward number ``turn``."""
        if turn != self.turn:
            raise RuntimeError(
                "a graphed model was called again before the backward of an earlier call, whose intermediate results are gone: call "
                "backward first, or the model itself"
            )
        assert self.backward is not None
        for mine, given in zip(self.grads, grads, strict=True):
            if mine is not None:
                mine.zero_() if given is None else mine.copy_(given)
        self.backward.replay()
        # copies, since autograd keeps or adds to what it is given
        return [None if t is None else t.clone() for t in self.backward.results]


class _Replay(torch.autograd.Function):
    """``apply(graphed, *inputs, *parameters)``."""

    @staticmethod
    def forward(ctx: Any, of: _Graphed, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = of.run(tensors[: len(of._inputs)])
        ctx.of, ctx.turn = of, of.turn
        ctx.mark_non_differentiable(*(y for y, g in zip(found, of.grads, strict=True) if g is None))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.of.differentiate(ctx.turn, grads))


def _held(model: nn.Module) -> Held:
    """Everything that the modules of a model hold."""
    modules = list(model.modules())
    return Held(modules, (held for m in modules for held in (m.__dict__, *contents(m.__dict__))))
