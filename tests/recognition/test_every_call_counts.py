"""Every activation, scale, order and repetition of a forward counts: what is fused equals eager in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from followed import C, assert_equal, draw, twins
from torch import Tensor, nn

import fusedres
from fusedres.report import why_not_fused
from fusedres.swap import FusedBlock, state_of

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


class Row(nn.Module):
    """Convolution, BatchNorm, activation."""

    def __init__(self, act: type[nn.Module] = nn.Identity, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(C, momentum=momentum)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Before(nn.Module):
    """BatchNorm, activation, convolution."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(C), act(), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.norm(x)))


def block(forward: Callable[..., Tensor], **parts: Callable[[], nn.Module]) -> nn.Module:
    """A block with these parts and that forward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part())

    Block.forward = forward
    return Block()


def relu_row() -> nn.Module:
    return Row(nn.ReLU)


def silu_row() -> nn.Module:
    return Row(nn.SiLU)


def cumulative() -> nn.Module:
    return Row(momentum=None)


JOINS: dict[str, Callable[[], nn.Module]] = {
    "act-on-both-sides-of-the-addition": lambda: block(lambda s, x: F.relu(x + s.v(s.u(x))), u=relu_row, v=relu_row),
    "act-in-front-alone": lambda: block(lambda s, x: s.v(s.u(x)) + x, u=relu_row, v=silu_row),
    "one-unit-with-act": lambda: block(lambda s, x: x + s.u(x), u=relu_row),
    "act-on-the-shortcut": lambda: block(lambda s, x: F.relu(s.w(x) + s.v(x)), v=Row, w=silu_row),
    "acts-on-both-paths": lambda: block(lambda s, x: s.w(x) + s.v(x), v=relu_row, w=silu_row),
    "act-of-the-projection": lambda: block(lambda s, x: F.relu(s.v(s.u(x)) + s.w(x)), u=relu_row, v=Row, w=relu_row),
    "functional-act-in-front": lambda: block(lambda s, x: F.relu(s.v(x)) + x, v=Row),
    "in-place-act-in-front": lambda: block(lambda s, x: F.relu(s.v(x), inplace=True).add(x), v=Row),
    "two-acts-in-a-row": lambda: block(lambda s, x: F.silu(F.relu(s.v(x))) + x, v=Row),
    "act-behind-a-lone-convolution": lambda: block(
        lambda s, x: F.relu(s.c(s.u(x))) + x, u=relu_row, c=lambda: nn.Conv2d(C, C, 1)
    ),
    "norm-alone-with-act-on-the-shortcut": lambda: block(
        lambda s, x: s.v(x) + F.relu(s.n(x)), v=Row, n=lambda: nn.BatchNorm2d(C)
    ),
    "pre-activation": lambda: block(lambda s, x: s.v(s.u(x)) + x, u=Before, v=Before),
    "pre-activation-then-act": lambda: block(lambda s, x: F.relu(s.v(s.u(x)) + x), u=Before, v=Before),
    "pre-activation-and-a-row": lambda: block(lambda s, x: s.v(s.u(x)) + x, u=Before, v=relu_row),
    "activated-projection-with-act": lambda: block(
        lambda s, x: (lambda h: F.relu(s.m(s.c(h))) + s.d(h))(F.relu(s.n(x))),
        n=lambda: nn.BatchNorm2d(C), m=lambda: nn.BatchNorm2d(C),
        c=lambda: nn.Conv2d(C, C, 3, 1, 1), d=lambda: nn.Conv2d(C, C, 1),
    ),
    "act-of-what-both-read": lambda: block(
        lambda s, x: (lambda h: s.v(h) + s.w(h))(F.relu(s.u(x))), u=Row, v=relu_row, w=Row
    ),
    "the-shortcut-first": lambda: block(lambda s, x: s.w(x) + s.v(s.u(x)), u=relu_row, v=Row, w=Row),
    "dropout-on-both-paths": lambda: block(
        lambda s, x: F.relu(F.dropout(s.v(s.u(x)), 0.4, s.training) + F.dropout(x, 0.3, s.training)), u=relu_row, v=Row
    ),
    "dropout-on-the-shortcut-first": lambda: block(
        lambda s, x: (lambda r: F.relu(F.dropout(s.v(x), 0.4, s.training) + r))(F.dropout(x, 0.3, s.training)), v=Row
    ),
    "doubled": lambda: block(lambda s, x: (lambda h: F.relu(h + h))(s.v(s.u(x))), u=relu_row, v=Row),
    "scaled": lambda: block(lambda s, x: F.relu(s.v(x) * 0.5 + x), v=Row),
    "scaled-shortcut": lambda: block(lambda s, x: F.relu(s.v(x) + x * 0.5), v=Row),
    "added-with-alpha": lambda: block(lambda s, x: F.relu(torch.add(s.v(x), x, alpha=2)), v=Row),
    "subtracted": lambda: block(lambda s, x: F.relu(s.v(x) - x), v=Row),
    "a-constant-behind": lambda: block(lambda s, x: s.v(x) + x + 1.0, v=Row),
    "a-row-called-twice": lambda: block(lambda s, x: F.relu(x + s.v(s.v(s.u(x)))), u=relu_row, v=Row),
    "a-row-with-act-called-twice": lambda: block(lambda s, x: F.relu(x + s.u(s.u(x))), u=relu_row),
    "a-row-on-both-paths": lambda: block(lambda s, x: F.relu(s.v(s.u(x)) + s.v(x)), u=relu_row, v=Row),
    "a-cumulative-norm-twice": lambda: block(lambda s, x: F.relu(x + s.v(s.v(s.u(x)))), u=relu_row, v=cumulative),
    "a-cumulative-norm-once": lambda: block(lambda s, x: F.relu(x + s.v(s.u(x))), u=relu_row, v=cumulative),
    "a-convolution-called-twice": lambda: block(
        lambda s, x: F.relu(s.n(s.c(F.relu(s.m(s.c(x))))) + x),
        c=lambda: nn.Conv2d(C, C, 3, 1, 1), n=lambda: nn.BatchNorm2d(C), m=lambda: nn.BatchNorm2d(C),
    ),
    "in-place-on-what-is-read-again": lambda: block(
        lambda s, x: (lambda h: F.relu(h, inplace=True) + h)(s.v(x)), v=Row
    ),
    "in-place-as-a-statement": lambda: InPlaceStatement(),
    "in-place-on-an-alias": lambda: block(
        lambda s, x: (lambda h: s.i(h).add_(s.v(x)))(x * 1.0), v=Row, i=nn.Identity
    ),
    "a-value-that-nobody-reads": lambda: block(lambda s, x: (s.w(x), F.relu(s.v(x) + x))[1], v=Row, w=Row),
}  # fmt: skip


class InPlaceStatement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = Row()

    def forward(self, x: Tensor) -> Tensor:
        h = self.row(x)
        F.relu_(h)
        return h + x


@pytest.mark.parametrize("name", JOINS)
def test_every_call_counts(name):
    assert_equal(*twins(JOINS[name]))


FUSED_JOINS = [
    "act-on-both-sides-of-the-addition", "act-in-front-alone", "one-unit-with-act", "act-on-the-shortcut", "acts-on-both-paths",
    "act-of-the-projection", "functional-act-in-front", "pre-activation-and-a-row", "activated-projection-with-act",
    "act-of-what-both-read", "the-shortcut-first", "dropout-on-both-paths", "doubled", "a-row-called-twice", "in-place-act-in-front",
    "a-cumulative-norm-once", "in-place-as-a-statement",
]  # fmt: skip


@pytest.mark.parametrize("name", FUSED_JOINS)
def test_what_is_split_still_runs_fused(name):
    _, twin = twins(JOINS[name])
    assert isinstance(twin, FusedBlock)
    twin(draw())
    assert state_of(twin).outcome.backend == "eager"


def test_a_cumulative_norm_that_stands_twice_is_left_to_its_modules_for_that_reason():
    _, twin = twins(JOINS["a-cumulative-norm-twice"])
    assert not isinstance(twin, FusedBlock) or "stands twice" in why_not_fused(twin)


def test_a_momentum_that_is_taken_away_after_conversion_counts():
    model, twin = twins(JOINS["a-row-called-twice"])
    for m in (model, twin):
        m.v.norm.momentum = None
    assert_equal(model, twin)
    assert "stands twice" in why_not_fused(twin)
