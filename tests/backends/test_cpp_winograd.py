"""What the C++ backend promises of Winograd's algorithm: with which output tiles it runs is seen in how a weight is packed, results are as
right as eager's whatever rows and columns the tiles leave over, and weights are kept for the tiles that they were packed for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends import cpp
from fusedres.operands import GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry
from fusedres.testing import assert_parity

_C = pytest.importorskip("fusedres._C")

BACKEND = cpp.BACKEND
THREE = Geometry((1, 1), (1, 1), (1, 1), 1)
#: how many values a tap of a weight is packed into: its positions under tiles of 2 x 2 and of 3 x 3, or its taps
TWO_BY_TWO, THREE_BY_THREE, DIRECTLY = 16, 25, 9
#: rows and columns that fill tiles of 3 x 3, leave one over and leave two, none of them cheaper by 2 x 2
EDGES = [(h, w) for h in (15, 19, 17) for w in (15, 19, 17)]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weight_of(k: int, c: int) -> Tensor:
    return channels_last(torch.randn(k, c, 3, 3) * (2 / (9 * c)) ** 0.5)


def input_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, weight.to(x.dtype), padding=1), x, grad.to(x.dtype))[0]


class Kept:
    """A weight that stays packed within a ``with``."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __enter__(self) -> Kept:
        self._before = _C.packed_bytes()
        assert BACKEND.keep_packed(self.weight) is not None
        return self

    def __exit__(self, *error: object) -> None:
        _C.forget_packed(self.weight.data_ptr())

    def values(self) -> float:
        """For one input and one output channel, as they are packed now."""
        return (_C.packed_bytes() - self._before) / (4 * self.weight.shape[0] * self.weight.shape[1])


@pytest.mark.parametrize(
    "shape, k, values",
    [
        *(((2, 64, h, w), 64, THREE_BY_THREE) for h, w in EDGES),
        ((4, 64, 14, 14), 64, THREE_BY_THREE),
        ((2, 128, 9, 17), 80, THREE_BY_THREE),
        ((1, 96, 15, 15), 272, THREE_BY_THREE),
        ((1, 272, 16, 41), 64, THREE_BY_THREE),
        ((4, 80, 16, 17), 48, THREE_BY_THREE),
        ((2, 64, 10, 10), 64, TWO_BY_TWO),  # as many products by either tiles, and fewer values of a weight
        ((2, 64, 8, 8), 64, TWO_BY_TWO),
        ((2, 48, 15, 15), 64, TWO_BY_TWO),  # sums too short for the larger tiles
        ((1, 64, 15, 15), 64, TWO_BY_TWO),  # a single small image, of which eager sums are short, too
        ((1, 64, 5, 7), 64, DIRECTLY),  # too few pixels for what a weight's transform costs
        ((1, 64, 3, 200), 64, DIRECTLY),
    ],
    ids=str,
)
def test_the_tiles_follow_from_the_shape(shape: tuple[int, ...], k: int, values: int) -> None:
    x, weight = channels_last(torch.randn(shape)), weight_of(k, shape[1])
    expected = BACKEND.conv_forward(LazyMap(x), weight, None, THREE)
    with Kept(weight) as kept:
        for _ in range(2):
            assert torch.equal(BACKEND.conv_forward(LazyMap(x), weight, None, THREE), expected)
            assert kept.values() == values


@pytest.mark.parametrize("kind", ["normal", "behind a relu"])
@pytest.mark.parametrize("h, w", EDGES)
def test_tiles_of_three_by_three_are_right_where_they_fill_a_map_and_where_they_do_not(
    h: int, w: int, kind: str
) -> None:
    """At the fewest channels for which they are used: their transforms show most."""
    x, grad = (channels_last(torch.randn(2, 64, h, w)) for _ in range(2))
    weight = weight_of(64, 64)
    x = x if kind == "normal" else x.relu()
    y = BACKEND.conv_forward(LazyMap(x), weight, None, THREE)
    assert_parity(y, F.conv2d(x, weight, padding=1), F.conv2d(x.double(), weight.double(), padding=1), "y")
    dx, _ = BACKEND.conv_backward(LazyGrad(grad), LazyMap(x), weight, THREE, GradTarget(), False)
    assert dx is not None
    assert_parity(dx, input_gradient(x, weight, grad), input_gradient(x.double(), weight, grad), "dx")


def test_a_kept_weight_is_packed_anew_for_other_tiles() -> None:
    weight = weight_of(64, 64)
    maps = [channels_last(torch.randn(shape)) for shape in ((1, 64, 5, 7), (2, 64, 10, 10), (2, 64, 15, 15))]
    values = (DIRECTLY, TWO_BY_TWO, THREE_BY_THREE)
    alone = [BACKEND.conv_forward(LazyMap(x), weight, None, THREE) for x in maps]
    with Kept(weight) as kept:
        for i in (2, 1, 2, 0, 2, 0, 1, 1, 2):
            assert torch.equal(BACKEND.conv_forward(LazyMap(maps[i]), weight, None, THREE), alone[i])
            assert kept.values() == values[i]
