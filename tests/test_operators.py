"""The operators of whole blocks: schemas, fake implementations and layouts, by torch's own checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fusedres.autograd.dense import Dense, Layer
from fusedres.autograd.encoding import decode, encode
from fusedres.autograd.operators import FAMILIES, OPERATORS
from fusedres.autograd.residual import Residual, Shortcut
from fusedres.autograd.transition import Transition
from fusedres.errors import Unsupported
from fusedres.specs import BlockSpec, Conv, Geometry, Norm, Pool, Unit


def norm(channels: int, act: str = "relu", training: bool = True) -> Norm:
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.5
    return Norm(torch.rand(channels), torch.randn(channels), mean, variance, training, 0.1, 1e-5, act)


def conv(channels: int, out: int, kernel: int = 1, stride: int = 1) -> Conv:
    geometry = Geometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), 1)
    return Conv(torch.randn(out, channels, kernel, kernel) * 0.1, None, geometry)


def bottleneck(training: bool) -> Residual:
    units = [(8, 4, 1, 1), (4, 4, 3, 2), (4, 12, 1, 1)]
    acts = ["relu", "relu", "none"]
    found = tuple(Unit(conv(*u), norm(u[1], act, training)) for u, act in zip(units, acts, strict=True))
    aside = Unit(conv(8, 12, 1, 2), norm(12, "none", training))
    return Residual(found, shortcut=Shortcut(unit=aside), act="relu")


SPECS = {
    "bottleneck": bottleneck,
    "preactivation": lambda training: Residual(
        (Unit(conv(8, 4), norm(4, "relu", training)), Unit(conv(4, 8, 3), None)), norm(8, "relu", training), Shortcut()
    ),
    "stem": lambda training: Residual(
        (Unit(conv(8, 6, 3), norm(6, "silu", training)),), pool=Pool("max", (3, 3), (2, 2), (1, 1))
    ),
    "dense": lambda training: Dense(
        tuple(Layer(norm(c, training=training), conv(c, 6), norm(6, training=training), conv(6, 4, 3)) for c in (8, 12))
    ),
    "transition": lambda training: Transition(
        norm(8, training=training), Pool("mean", (2, 2), (2, 2), (0, 0)), conv(8, 4)
    ),
    "head": lambda training: Transition(norm(8, training=training), Pool("mean", (), (), ()), None),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
}


#: torch's checks of an operator as it runs; ``traced`` ones are compiled, too, at sizes that are symbols, which takes twenty times as long
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def checked(operator, *args, traced: bool) -> list[Tensor]:
    found = torch.library.opcheck(operator, args, test_utils=(*CHECKS, *["test_aot_dispatch_dynamic"] * traced))
    assert set(found.values()) == {"SUCCESS"}, found
    return operator(*args)


def assert_checked(spec: BlockSpec, x: Tensor, how: str) -> None:
    """``how``: called, traced as a model calls them, or traced thoroughly: forward without gradients, too, and expanded gradients."""
    traced, thoroughly = how != "called", how == "traced thoroughly"
    encoded, family = encode(spec, {}), OPERATORS[FAMILIES[type(spec)]]
    call = (encoded.text, x, None, None, encoded.weights, encoded.statistics)
    inferred = checked(family.infer, *call, traced=traced)
    found = checked(family.forward, *call, traced=thoroughly)
    weights = [t.detach().requires_grad_() for t in encoded.weights]
    checked(
        family.forward,
        encoded.text,
        x.detach().requires_grad_(),
        None,
        None,
        weights,
        encoded.statistics,
        traced=traced,
    )
    head = 2 + len(encoded.moves)
    for ours, recorded in zip(inferred, found[:head], strict=True):
        torch.testing.assert_close(ours, recorded)
    need = [True, False, *(True for _ in encoded.weights)]
    held = found[0] if spec.keeps_output else x
    for grad, trace in ((torch.randn_like(found[0]), traced), (torch.ones(()).expand(found[0].shape), thoroughly)):
        checked(family.backward, encoded.text, grad, held, None, encoded.weights, found[head:], need, traced=trace)


HOW = ("called", "traced", "traced thoroughly")


def checks(names: Iterable[str], others: Iterable[str], quick: set[tuple[str, str]]) -> list:
    """Every pair called, those of ``quick`` traced, and every one traced thoroughly, which is slow."""
    return [
        pytest.param(name, other, how, id=f"{name}-{other}-{how}", marks=[pytest.mark.slow] * (how == HOW[-1]))
        for name in names
        for other in others
        for how in HOW
        if how != "traced" or (name, other) in quick
    ]


@pytest.mark.parametrize(
    ("name", "layout", "how"),
    checks(
        ("bottleneck", "dense", "transition"),
        LAYOUTS,
        {("transition", "sliced")},
    ),
)
def test_operators_keep_their_promises_for_every_layout(name, layout, how):
    torch.manual_seed(0)
    assert_checked(SPECS[name](True), LAYOUTS[layout](torch.randn(2, 8, 6, 6)), how)


@pytest.mark.parametrize(
    ("name", "mode", "how"),
    checks(
        SPECS,
        ("training", "frozen"),
        # two families, and each kind of norm; the third by its layouts, and networks of every structure are traced in test_compiled*.py
        {("dense", "training"), ("preactivation", "frozen")},
    ),
)
def test_operators_keep_their_promises_for_every_structure(name, mode, how):
    torch.manual_seed(0)
    spec = SPECS[name](mode == "training")
    assert_checked(spec.recomputing, torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last), how)


@pytest.mark.parametrize("name", ["bottleneck", "preactivation", "stem", "dense", "transition"])
def test_a_description_comes_back_from_its_text(name):
    spec = SPECS[name](True)
    encoded = encode(spec, {})
    assert decode(encoded.text, (6, 6), encoded.weights, encoded.statistics) == spec


@pytest.mark.parametrize("name", ["bottleneck", "dense", "stem"])
def test_flop_counters_see_the_convolutions(name):
    spec, x = SPECS[name](True), torch.randn(2, 8, 6, 6)
    encoded, family = encode(spec, {}), OPERATORS[FAMILIES[type(spec)]]
    weights = [t.requires_grad_() for t in encoded.weights]
    with FlopCounterMode(display=False) as plain:
        spec.reference(x.requires_grad_(), None, *spec.tensors).sum().backward()
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        found = family.forward(encoded.text, x, None, None, weights, encoded.statistics)
        held, kept = found[0] if spec.keeps_output else x, found[2 + len(encoded.moves) :]
        need = [True, False, *(True for _ in weights)]
        family.backward(encoded.text, torch.randn_like(found[0]), held, None, weights, kept, need)
    assert ours.get_total_flops() == plain.get_total_flops() > 0


def test_a_norm_over_several_processes_has_no_second_derivative():
    spec = SPECS["transition"](True)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        spec = replace(spec, norm=replace(spec.norm, group=dist.group.WORLD))
        encoded, x = encode(spec, {}), torch.randn(2, 8, 6, 6, requires_grad=True)
        y = OPERATORS["transition"].forward(encoded.text, x, None, None, encoded.weights, encoded.statistics)[0]
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)
    finally:
        dist.destroy_process_group()


def test_an_operator_checks_what_it_is_given():
    spec = SPECS["bottleneck"](True)
    encoded = encode(spec, {})
    with pytest.raises(Unsupported, match="expects 8 channels"):
        torch.ops.fusedres.residual_infer(
            encoded.text, torch.randn(2, 9, 6, 6), None, None, encoded.weights, encoded.statistics
        )


def test_arguments_stay_what_they_were():
    spec = SPECS["bottleneck"](True)
    encoded = encode(spec, {})
    before = [t.clone() for t in encoded.statistics]
    found = torch.ops.fusedres.residual_forward(
        encoded.text, torch.randn(2, 8, 6, 6), None, None, encoded.weights, encoded.statistics
    )
    assert all(map(torch.equal, before, encoded.statistics))
    moved = found[2 : 2 + len(encoded.moves)]
    assert not any(torch.equal(new, encoded.statistics[at]) for new, at in zip(moved, encoded.moves, strict=True))
