"""Every description against its own definition in float64: output, first and second derivatives, on every backend that serves here."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.autograd.dense import Dense, Layer
from fusedres.autograd.residual import Residual, Shortcut, Subsample
from fusedres.autograd.transition import Transition
from fusedres.backends import select
from fusedres.specs import BlockSpec, Conv, Geometry, Norm, Pool, Unit
from fusedres.testing import assert_fused, assert_parity

DTYPE = torch.float64
BACKENDS = [name for name in select.names() if select.why_not(name, torch.device("cpu"), DTYPE) is None]
HALVES = Pool("mean", (2, 2), (2, 2), (0, 0))


def conv(inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False) -> Conv:
    weight = (torch.randn(outputs, inputs, size, size, dtype=DTYPE) / (inputs * size * size) ** 0.5).requires_grad_()
    added = torch.randn(outputs, dtype=DTYPE).requires_grad_() if bias else None
    return Conv(weight, added, Geometry((stride, stride), (size // 2, size // 2), (1, 1), 1))


def norm(channels: int, act: str = "relu", training: bool = True) -> Norm:
    weight = (torch.rand(channels, dtype=DTYPE) + 0.5).requires_grad_()
    running = torch.zeros(channels, dtype=DTYPE), torch.ones(channels, dtype=DTYPE)
    return Norm(weight, torch.randn(channels, dtype=DTYPE).requires_grad_(), *running, training, 0.1, 1e-5, act)


def unit(inputs: int, outputs: int, size: int, act: str = "relu", stride: int = 1, **more: bool) -> Unit:
    return Unit(
        conv(inputs, outputs, size, stride, more.get("bias", False)), norm(outputs, act, more.get("training", True))
    )


SPECS: dict[str, Callable[[], BlockSpec]] = {
    "basic": lambda: Residual((unit(8, 8, 3), unit(8, 8, 3, "none")), shortcut=Shortcut(), act="relu"),
    "projected bottleneck": lambda: Residual(
        (unit(8, 4, 1, "silu", bias=True), unit(4, 4, 3, stride=2), unit(4, 16, 1, "none")),
        shortcut=Shortcut(unit=unit(8, 16, 1, "none", 2, bias=True)),
        act="relu",
    ),
    "plain": lambda: Residual((unit(8, 8, 3), unit(8, 6, 3))),
    "stem": lambda: Residual((unit(8, 8, 3),), pool=Pool("max", (3, 3), (2, 2), (1, 1))),
    "pre-activation": lambda: Residual((unit(8, 8, 3), Unit(conv(8, 8, 3), None)), first=norm(8), shortcut=Shortcut()),
    "pre-activation, projecting the activated": lambda: Residual(
        (unit(8, 8, 3), Unit(conv(8, 12, 3, bias=True), None)),
        first=norm(8),
        shortcut=Shortcut(unit=Unit(conv(8, 12, 1), None), activated=True),
    ),
    "pooled projection": lambda: Residual(
        (unit(8, 8, 3, stride=2), unit(8, 12, 3, "none")),
        shortcut=Shortcut(pool=HALVES, unit=unit(8, 12, 1, "none")),
        act="relu",
    ),
    "zero-padded shortcut": lambda: Residual(
        (unit(8, 8, 3, stride=2), unit(8, 12, 3, "none")),
        shortcut=Shortcut(subsample=Subsample((2, 2), 2, 2)),
        act="relu",
    ),
    "highway": lambda: Residual(
        (unit(8, 8, 3),), shortcut=Shortcut(unit=Unit(conv(8, 8, 3, bias=True), None), gated=True)
    ),
    "by running statistics": lambda: Residual(
        (unit(8, 8, 3, training=False), unit(8, 8, 3, "none", training=False)), shortcut=Shortcut(), act="relu"
    ),
    "batch norm alone": lambda: Residual((), first=norm(8)),
    "a map added to itself": lambda: Residual((), shortcut=Shortcut(), act="silu"),
    "a normalised map added to itself": lambda: Residual((), first=norm(8, "none"), shortcut=Shortcut(), act="relu"),
    "a normalised map and its projection": lambda: Residual(
        (), first=norm(8, "none"), shortcut=Shortcut(unit=unit(8, 8, 1, "none")), act="relu"
    ),
    "dense": lambda: Dense(
        (
            Layer(norm(8), conv(8, 16, 1, bias=True), norm(16), conv(16, 4, 3)),
            Layer(norm(12), conv(12, 16, 1), norm(16), conv(16, 4, 3, bias=True)),
            Layer(norm(16), conv(16, 4, 3)),
        )
    ),
    "transition": lambda: Transition(norm(8), HALVES, conv(8, 4, 1, bias=True)),
}


def close(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert (found is None) == (expected is None), what
    if found is not None and expected is not None:
        # both are float64, where the rule of parity has no truth beside eager: a million roundings, far below any missing term
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_a_description_computes_its_definition_and_both_its_derivatives(name, backend, recompute):
    torch.manual_seed(0)
    spec, ran = SPECS[name](), select.get(backend)
    x = torch.randn(2, 8, 6, 5 if name != "pooled projection" else 6, dtype=DTYPE, requires_grad=True)
    spec.check(x)
    wanted = [x, *(t for t in spec.tensors if t is not None)]
    names = ["x", *(f"tensor {i}" for i, t in enumerate(spec.tensors) if t is not None)]
    y, _ = (spec.recomputing if recompute else spec).run(ran, x)
    truth = spec.reference(x, None, *spec.tensors)
    close(y, truth, "output")
    assert tuple(y.shape) == spec.out_shape(tuple(x.shape))
    grad = torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, wanted, grad), torch.autograd.grad(truth, wanted, grad), strict=True)
    for what, (found, expected) in zip(names, pairs, strict=True):
        close(found, expected, f"gradient of {what}")
    seconds = []
    for run in (
        lambda: (spec.recomputing if recompute else spec).run(ran, x)[0],
        lambda: spec.reference(x, None, *spec.tensors),
    ):
        (first,) = torch.autograd.grad(run().square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), wanted, allow_unused=True))
    for what, found, expected in zip(names, *seconds, strict=True):
        close(found, expected, f"second derivative of {what}")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_second_derivatives_are_as_right_as_eagers_in_its_layout(layout):
    """torch's BatchNorm has fewer right digits in channels_last, and second derivatives show it."""
    found: dict[str, list[list[Tensor]]] = {"fused": [], "eager": [], "truth": []}
    for seed in range(15):
        torch.manual_seed(seed)
        row = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Sigmoid(),
            nn.Conv2d(8, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )
        x, weight = torch.randn(2, 8, 6, 7).to(memory_format=layout), torch.randn(2, 4, 6, 7)
        twins = {"fused": fusedres.convert(copy.deepcopy(row)), "eager": row, "truth": copy.deepcopy(row).double()}
        for name, model in twins.items():
            leaf = x.to(model[0].weight.dtype).requires_grad_()
            y = model(leaf)
            (first,) = torch.autograd.grad((y * weight.to(y)).sum(), leaf, create_graph=True)
            found[name].append(list(torch.autograd.grad(first.square().sum(), [model[0].weight, model[3].weight])))
        assert_fused(twins["fused"], "cpp")
    for of in range(2):
        assert_parity(
            *([draw[of] for draw in found[name]] for name in ("fused", "eager", "truth")), "second derivative"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_count_once_where_one_input_was_computed_from_the_other(backend):
    torch.manual_seed(0)
    spec = Residual((unit(8, 8, 3, "none"),), shortcut=Shortcut(), act="relu")
    leaf = torch.randn(2, 8, 5, 5, dtype=DTYPE, requires_grad=True)
    found = []
    for run in (lambda x, s: spec.run(select.get(backend), x, s)[0], lambda x, s: spec.reference(x, s, *spec.tensors)):
        (first,) = torch.autograd.grad(run(leaf.sin(), leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    close(*found, "second derivative")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["residual", "dense"])
def test_the_gradient_of_a_bias_that_a_batch_norm_removes_is_zero_and_not_rounding(kind, backend):
    torch.manual_seed(0)
    removed = conv(8, 8, 3, bias=True)
    spec: BlockSpec = Residual((Unit(removed, norm(8, "silu")),))
    if kind == "dense":
        spec = Dense((Layer(norm(8), removed, norm(8, "silu"), conv(8, 4, 3)),))
    x = (torch.randn(2, 8, 5, 5, dtype=DTYPE) + 1000).requires_grad_()
    y, _ = spec.run(select.get(backend), x)
    for value, expected in ((1.0, 0.0), (float("nan"), float("nan"))):
        (found,) = torch.autograd.grad(y, removed.bias, torch.full_like(y, value), retain_graph=True)
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=0, equal_nan=True)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), removed.bias)
    assert torch.equal(second, torch.zeros_like(second))
