"""Every registered backend, every primitive that sees maps, by the contract (:mod:`fusedres.backends.contract`): as right as eager, against
definitions in float64, wherever its words leave a backend room to go wrong.

    pytest tests/backends/test_contract*.py --backend NAME          one backend alone, for instance a new one

Maps are channel slices of wider buffers and per-channel tensors column slices; what is written holds NaN before; what lies beside a slice
has to hold it afterwards, and what is only read has to be as it was. Which cases a backend sees: :mod:`contract`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contract import (
    CONVOLUTIONS,
    OWN,
    SHAPES,
    SMALL,
    Table,
    conforms,
    each,
    exact_and_fused,
    fresh,
    moments,
    parametrize,
    poolings,
    sums_of,
)
from definition import ACTIVATIONS
from support import Draw

from fusedres.operands import FRESH, Epilogue, GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry, Pool

# masked lanes of interpreted kernels may compute inf - inf, which NumPy reports
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
pytest_generate_tests = parametrize
POINT = Geometry((1, 1), (0, 0), (1, 1), 1)


@pytest.fixture(autouse=True)
def as_promised() -> Iterator[None]:
    with exact_and_fused():
        yield


# ---- convolutions ----------------------------------------------------------------------------------------------------


@each(CONVOLUTIONS.turn(0))
def test_conv_forward_in_training(config, case):
    """Pending BatchNorm and ReLU, a bias, statistics, into a slice."""

    def step(backend, draw):
        x, bias = draw.lazy(*case.shape, act="relu"), draw.parameter(case.outputs)
        weight = case.draw_weight(draw)
        out, stats = draw.hole(*case.out), draw.room(2, case.outputs)
        y = backend.conv_forward(x, weight, bias, case.geometry, Epilogue(out, stats))
        assert y is out
        return {"out": y, **moments(stats, y.numel())}

    conforms(config, step, values=case.values)


def _epilogue(draw, case, out=False, stats=False, normalised=False, residual=None, act="none"):
    """``residual``: None, "plain" or "normalised"."""
    c = case.outputs
    return Epilogue(
        draw.hole(*case.out) if out else None,
        draw.room(2, c) if stats else None,
        draw.scale_shift(c) if normalised else None,
        None if residual is None else draw.lazy(*case.out, normalised=residual == "normalised"),
        act,
    )


@each(CONVOLUTIONS.turn(1).interpreting("1x1", "3x3 odd", "groups"))
def test_conv_forward_in_inference(config, case):
    """Everything in the epilogue: BatchNorm, a normalised residual, ReLU."""

    def step(backend, draw):
        epilogue = _epilogue(draw, case, normalised=True, residual="normalised", act="relu")
        weight = case.draw_weight(draw)
        return {"out": fresh(backend.conv_forward(draw.lazy(*case.shape), weight, None, case.geometry, epilogue))}

    conforms(config, step, values=case.values)


# what x is, whether there is a bias, and the epilogue
EPILOGUES = {
    "bare": ({"normalised": False}, False, {}),
    "relu before": ({"normalised": False, "act": "relu"}, False, {}),
    "normalised before": ({}, True, {}),
    "normalised behind": ({"normalised": False}, False, {"out": True, "normalised": True, "act": "relu"}),
    "identity shortcut": ({"act": "relu"}, False, {"normalised": True, "residual": "plain", "act": "relu"}),
    "projection": (
        {"normalised": False},
        True,
        {"out": True, "normalised": True, "residual": "normalised", "act": "relu"},
    ),
    "sum": ({"act": "relu"}, False, {"residual": "plain"}),
    "sum with statistics": ({"act": "relu"}, False, {"out": True, "stats": True, "residual": "plain"}),
    "copied into a slice": ({"normalised": False}, False, {"out": True}),
    "statistics of a fresh map": ({"normalised": False}, False, {"stats": True}),
}
EPILOGUES = Table(EPILOGUES, tuple(EPILOGUES), tuple(EPILOGUES))


@each(EPILOGUES)
def test_conv_forward_epilogues(config, case):
    operand, has_bias, behind = case
    conv = SMALL["3x3 odd"]

    def step(backend, draw):
        x, weight = draw.lazy(*conv.shape, **operand), conv.draw_weight(draw)
        bias, epilogue = draw.parameter(conv.outputs) if has_bias else None, _epilogue(draw, conv, **behind)
        y = backend.conv_forward(x, weight, bias, conv.geometry, epilogue)
        assert y is epilogue.out or (epilogue.out is None and fresh(y) is y)
        return {"out": y, **({} if epilogue.stats is None else moments(epilogue.stats, y.numel()))}

    conforms(config, step, values=conv.values)


def _backward(
    backend, draw, case, *, pending="raw", x=None, into="fresh", scaled=False, sums=True, need=(True, True)
):  # fmt: skip
    """One conv_backward as results. ``into``: a fresh map, a slice, a slice that is accumulated to, or a slice behind a base."""
    grad, operand = draw.gradient(*case.out, pending=pending), draw.lazy(*case.shape, **(x or {"act": "relu"}))
    dx = {"fresh": None, "accumulate": draw.filled}.get(into, draw.hole)
    dx = dx and dx(*case.shape)
    base = draw.map(*case.shape) if into.startswith("base") else None
    room = draw.room(2, case.shape[1]) if sums else None
    target = GradTarget(None if into == "base, fresh" else dx, base, into == "accumulate", scaled, room)
    weight = case.draw_weight(draw)
    found, dw = backend.conv_backward(grad, operand, weight, case.geometry, target if need[0] else None, need[1])
    assert (found is not None, dw is not None) == need
    if need[0]:
        assert found is target.dx or (target.dx is None and fresh(found) is found)
    assert dw is None or (dw.shape, dw.dtype) == (weight.shape, weight.dtype)
    return {"dx": found, "dw": dw, **sums_of(room)}


@each(CONVOLUTIONS.turn(0).interpreting("1x1", "3x3 odd", "3x3 stride 2"))
def test_conv_backward_of_a_chain(config, case):
    """Both operands pending, sums, into a slice."""
    conforms(config, lambda b, d: _backward(b, d, case, into="slice"), values=case.values)


@each(CONVOLUTIONS.turn(1))
def test_conv_backward_of_a_dense_layer(config, case):
    """Both operands pending, sums, scaled and accumulated into a slice."""
    conforms(config, lambda b, d: _backward(b, d, case, into="accumulate", scaled=True), values=case.values)


PLAIN_X = {"normalised": False}
TARGETS = {
    "bare": {"pending": "none", "x": PLAIN_X, "sums": False},
    "bare, base": {"pending": "none", "x": PLAIN_X, "sums": False, "into": "base"},
    "bare, base into a fresh map": {"pending": "none", "x": PLAIN_X, "sums": False, "into": "base, fresh"},
    "bare, accumulated": {"pending": "none", "x": PLAIN_X, "sums": False, "into": "accumulate"},
    "relu of a plain map": {"pending": "none", "x": {"normalised": False, "act": "relu"}, "sums": False},
    "frozen": {"pending": "coeff"},  # a BatchNorm by running statistics: raw is None, only p and r count
    "no activation": {"x": {"act": "none"}},
    "no sums": {"sums": False},
    "slice": {"into": "slice"},
    "base, scaled": {"into": "base", "scaled": True},
    "scaled alone": {"x": {"act": "none"}, "sums": False, "scaled": True},
    "sums of a plain map": {"x": PLAIN_X},
    "dx alone": {"need": (True, False)},
    "dw alone": {"need": (False, True), "sums": False},
    "accumulated without raw": {"pending": "coeff", "into": "accumulate", "scaled": True, "sums": False},
}
TARGETS = Table(TARGETS, tuple(TARGETS), tuple(TARGETS))


@each(TARGETS)
def test_conv_backward_targets(config, case):
    conv = SMALL["3x3 odd"]
    conforms(config, lambda b, d: _backward(b, d, conv, **case), values=conv.values)


@each()
def test_the_base_of_a_gradient_may_be_the_gradient_above(config):
    """An identity shortcut: dx = grad + dz, while grad is being read."""
    conv = SMALL["3x3"]

    def step(backend, draw):
        grad, x = draw.gradient(*conv.out, pending="none"), draw.lazy(*conv.shape, act="relu")
        dx, _ = backend.conv_backward(grad, x, conv.draw_weight(draw), conv.geometry, GradTarget(base=grad.grad))
        return {"dx": dx}

    conforms(config, step, values=conv.values)


@each(CONVOLUTIONS)
def test_routes_say_which_way_a_convolution_runs(config, case):
    """By kind of kernel, for what is asked for alone, and without values; nothing where a backend has no choice."""
    draw = Draw(config.dtype, device="meta")
    x, weight, grad = draw.lazy(*case.shape), case.draw_weight(draw), draw.gradient(*case.out)
    routes, known = config.backend.routes, {"fused", "library"}
    forward = routes("conv_forward", x, weight, None, case.geometry)
    both = routes("conv_backward", grad, x, weight, case.geometry)
    dgrad = routes("conv_backward", grad, x, weight, case.geometry, FRESH, False)
    wgrad = routes("conv_backward", grad, x, weight, case.geometry, None)
    assert set(forward) <= {"forward"} and {*forward.values(), *both.values()} <= known
    assert bool(forward) == bool(both)
    if both:
        assert (set(both), set(dgrad), set(wgrad)) == ({"dgrad", "wgrad"}, {"dgrad"}, {"wgrad"})
    assert routes("statistics", x.raw, draw.room(2, case.shape[1])) == {}


# ---- passes ----------------------------------------------------------------------------------------------------------


@each(SHAPES)
def test_statistics(config, case):
    def step(backend, draw):
        stats = draw.room(2, case.shape[1])
        assert backend.statistics(draw.map(*case.shape, mean=0.5), stats) is None
        return moments(stats, case.values)

    conforms(config, step, values=case.values, pad=case.pad)


# whether x is normalised, what the residual is, the activation, and the sums that backward reduces
ADDITIONS = {
    "copy": (False, None, "none", 1),
    "normalise": (True, None, "none", 1),
    "relu": (False, None, "relu", 0),
    "normalise, relu": (True, None, "relu", 1),
    "normalise, relu, without sums": (True, None, "relu", 0),
    "sum": (False, "plain", "none", 2),
    "identity shortcut": (True, "plain", "relu", 1),
    "identity shortcut, both sums": (True, "plain", "relu", 2),
    "projection": (True, "normalised", "relu", 2),
    "projection, one frozen": (True, "normalised", "relu", 1),
    "projection, without sums": (True, "normalised", "relu", 0),
    "projection without activation": (True, "normalised", "none", 2),
}


@each(SHAPES.crossed(ADDITIONS, ("copy", "normalise, relu", "sum", "identity shortcut", "projection")))
def test_add_act(config, case):
    """Forward with statistics, into a slice and into a fresh map, and backward with the sums of both BatchNorms."""
    maps, (normalised, residual, act, count) = case
    shape, c = maps.shape, maps.shape[1]

    def step(backend, draw):
        x, added = draw.lazy(*shape, normalised=normalised), None
        if residual is not None:
            added = draw.lazy(*shape, normalised=residual == "normalised")
        stats, out, grad = draw.room(2, c), draw.hole(*shape), draw.map(*shape)
        assert backend.add_act_forward(x, added, act, out=out, stats=stats) is out
        fresh_out = out if config.interpreted else fresh(backend.add_act_forward(x, added, act))
        sums, more = (draw.room(2, c) if count > i and (i == 0 or residual) else None for i in range(2))
        dz = backend.add_act_backward(grad, x, added, act, sums=sums, residual_sums=more)
        assert dz is grad if act == "none" else fresh(dz) is dz
        found = {"out": out, "fresh": fresh_out, "dz": dz, **moments(stats, out.numel())}
        return found | sums_of(sums) | sums_of(more, "residual ")

    conforms(config, step, values=maps.values, pad=maps.pad)


@each()
def test_add_act_backward_with_the_residual_sums_alone(config):
    def step(backend, draw):
        x, added, sums = draw.lazy(2, 5, 3, 7, normalised=False), draw.lazy(2, 5, 3, 7), draw.room(2, 5)
        dz = backend.add_act_backward(draw.map(2, 5, 3, 7), x, added, "relu", residual_sums=sums)
        return {"dz": dz, **sums_of(sums)}

    conforms(config, step, values=210)


@each()
def test_materialize(config):
    def step(backend, draw):
        x, out, stats = draw.lazy(2, 5, 3, 7, act="relu"), draw.hole(2, 5, 3, 7), draw.room(2, 5)
        assert backend.materialize(x, out=out, stats=stats) is out
        copy = backend.materialize(LazyMap(x.raw))
        assert torch.equal(copy, x.raw) and copy.data_ptr() != x.raw.data_ptr(), "it is no copy"
        return {"out": out, **moments(stats, 210)}

    conforms(config, step, values=210)
    conforms(config, step, values=210, pad=OWN)


@each(SHAPES.crossed({"training": "raw", "frozen": "coeff"}, ("training", "frozen")))
def test_apply_grad_coeff(config, case):
    """Into a fresh map, into a slice and in place."""
    maps, pending = case

    def step(backend, draw):
        grad = draw.gradient(*maps.shape, pending=pending)
        own, out = draw.filled(*maps.shape), draw.hole(*maps.shape)
        own.copy_(grad.grad)
        assert backend.apply_grad_coeff(grad, out=out) is out
        assert backend.apply_grad_coeff(grad._replace(grad=own), out=own) is own
        return {"fresh": fresh(backend.apply_grad_coeff(grad)), "out": out, "in place": own}

    conforms(config, step, values=maps.values, pad=maps.pad)


# where dx goes, the activation, whether x is normalised, whether dx is scaled, whether sums are reduced
GRADIENTS = {
    "chain": ("fresh", "relu", True, False, True),
    "dense layer": ("accumulate", "relu", True, True, True),
    "base, scaled": ("base", "relu", True, True, True),
    "slice, scaled": ("slice", "relu", True, True, True),
    "fresh, scaled, no activation": ("fresh", "none", True, True, True),
    "accumulated, no activation": ("accumulate", "none", True, True, True),
    "relu of a plain map": ("fresh", "relu", False, False, False),
    "relu of a plain map, accumulated": ("accumulate", "relu", False, False, False),
    "target alone": ("slice", "none", False, False, False),
    "identity shortcut": ("base, fresh", "none", False, False, False),
}


@each(SHAPES.crossed(GRADIENTS, ("chain", "dense layer", "base, scaled")))
def test_dgrad_epilogue(config, case):
    maps, (into, act, normalised, scaled, reduces) = case
    shape = maps.shape

    def step(backend, draw):
        # a library's, which the pass may write over
        da = draw.filled(*shape).contiguous(memory_format=torch.channels_last)
        x = draw.lazy(*shape, act=act, normalised=normalised)
        before, base, hole = draw.filled(*shape), draw.map(*shape), draw.hole(*shape)
        dx = {"accumulate": before, "base": hole, "slice": hole}.get(into)
        sums = draw.room(2, shape[1]) if reduces else None
        target = GradTarget(dx, base if into.startswith("base") else None, into == "accumulate", scaled, sums)
        found = backend.dgrad_epilogue(da, x, target)
        assert found is dx or dx is None
        return {"dx": found, **sums_of(sums)}

    conforms(config, step, values=maps.values, pad=maps.pad)


@each(poolings())
def test_pool(config, case):
    """Forward into a slice and a fresh map, backward in its two calls; a max pool's first maximum wins, as in torch: after a ReLU ties
    are the rule."""
    c = case.shape[1]

    def step(backend, draw):
        x, plain = draw.lazy(*case.shape, act="relu"), LazyMap(draw.map(*case.shape))
        out, stats, coeff = draw.hole(*case.out), draw.room(2, c), draw.vectors(3, c)
        y, index = backend.pool_forward(x, case.pool, out=out, stats=stats)
        assert y is out and (index is None) == (case.pool.kind == "mean" or backend.name == "definition")
        bare, bare_index = backend.pool_forward(plain, case.pool)
        grad, sums, dx = draw.map(*case.out), draw.room(2, c), draw.hole(*case.shape)
        assert backend.pool_backward(grad, index, x, case.pool, sums=sums) is None
        assert backend.pool_backward(grad, index, x, case.pool, coeff=coeff, dx=dx) is dx
        again = fresh(backend.pool_backward(grad, index, x, case.pool, coeff=coeff))
        found = {"y": y, "bare": bare, "dx": dx, "fresh dx": again, **moments(stats, y.numel()), **sums_of(sums)}
        if index is not None:
            found |= {"index": fresh(index), "bare index": bare_index}
        if not config.interpreted:
            found["bare dx"] = backend.pool_backward(grad, bare_index, plain, case.pool, coeff=coeff)
        return found

    conforms(config, step, values=case.values, pad=case.pad)


HIGHWAYS = {
    f"{act}, {'normalised' if normalised else 'raw'}, {shape}": (act, normalised, shape)
    for act in ("relu", "none")
    for normalised in (True, False)
    for shape in ((2, 5, 7, 5), (2, 64, 9, 9), (1, 130, 4, 3), (1, 5, 3, 3), (1, 64, 3, 3))
}
HIGHWAYS = Table(HIGHWAYS, tuple(HIGHWAYS), tuple(name for name in HIGHWAYS if "3, 3)" in name))


@each(HIGHWAYS)
def test_highway(config, case):
    """The gate is wide enough to open and to shut."""
    act, normalised, shape = case

    def step(backend, draw):
        x, carry, grad = draw.lazy(*shape, act=act, normalised=normalised), draw.map(*shape), draw.map(*shape)
        gate = draw.lazy(*shape, normalised=normalised, spread=4.0)
        sums, gate_sums = (draw.room(2, shape[1]) if normalised else None for _ in range(2))
        out = draw.hole(*shape)
        assert backend.highway_forward(x, gate, carry, out=out) is out
        y = fresh(backend.highway_forward(x, gate, carry))
        found = backend.highway_backward(grad, x, gate, carry, sums=sums, gate_sums=gate_sums)
        maps = dict(zip(("dz", "dgate", "dcarry"), map(fresh, found), strict=True))
        return {"out": out, "y": y, **maps, **sums_of(sums), **sums_of(gate_sums, "gate ")}

    conforms(config, step, values=shape[0] * shape[1] * shape[2] * shape[3])


@each(Table({act: act for act in ACTIVATIONS}, tuple(ACTIVATIONS), tuple(ACTIVATIONS)))
def test_every_activation_in_every_place(config, case):
    act, shape, pool, weight_shape = case, (2, 12, 5, 7), Pool("max", (3, 3), (2, 2), (1, 1)), (12, 12, 1, 1)

    def step(backend, draw):
        x, residual, grad = draw.lazy(*shape, act=act), draw.lazy(*shape), draw.map(*shape)
        pending, weight = x._replace(act="none"), draw.weight(*weight_shape)
        dx, dw = backend.conv_backward(LazyGrad(grad), x, weight, POINT)
        pooled, index = backend.pool_forward(x, pool)
        unit = torch.eye(3, 1, dtype=draw.accum, device=draw.device).expand(3, 12).contiguous()
        return {
            "addition": backend.add_act_forward(pending, residual, act),
            "prologue": backend.conv_forward(x, weight, None, POINT),
            "epilogue": backend.conv_forward(LazyMap(x.raw), weight, None, POINT, Epilogue(act=act)),
            "pool": pooled,
            "addition's gradient": backend.add_act_backward(grad, pending, residual, act),
            "epilogue's gradient": backend.dgrad_epilogue(grad.clone(memory_format=torch.channels_last), x),
            "dx": dx,
            "dw": dw,
            "pool's gradient": backend.pool_backward(draw.map(*pooled.shape), index, x, pool, coeff=unit),
        }

    conforms(config, step, values=840)
