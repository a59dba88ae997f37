"""What the C++ backend promises of Winograd's algorithm: with which output tiles it runs is seen in how a weight is packed, results are as
right as eager's whatever rows and columns the tiles leave over and however large the numbers are, and weights are kept for the tiles that
they were packed for."""

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
#: how many floats the taps of a weight are packed into: its positions under tiles of 2 x 2, 3 x 3 and 4 x 4, or its taps, of which a float
#: holds two in bfloat16
TWO_BY_TWO, THREE_BY_THREE, FOUR_BY_FOUR, DIRECTLY, IN_PAIRS = 16, 25, 36, 9, 4.5
#: rows and columns that fill tiles of 3 x 3, leave one over and leave two, none of them cheaper by 2 x 2
EDGES = [(h, w) for h in (15, 19, 17) for w in (15, 19, 17)]
#: rows and columns that fill tiles of 4 x 4, and leave one, two and three over
EDGES_OF_FOUR = [(h, w) for h in (24, 25, 26, 23) for w in (24, 25, 26, 23)]
needs_pairs = pytest.mark.skipif(cpp.cpu_capability() != "avx512_bf16", reason="bfloat16 convolutions need AVX512_BF16")


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weight_of(k: int, c: int) -> Tensor:
    return channels_last(torch.randn(k, c, 3, 3) * (2 / (9 * c)) ** 0.5)


def input_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return gradients(x, weight.to(x.dtype), grad.to(x.dtype))[0]


def gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), grad)


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


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@needs_pairs
@pytest.mark.parametrize(
    "shape, k, values",
    [
        *(((2, 64, h, w), 64, FOUR_BY_FOUR) for h, w in EDGES_OF_FOUR),
        ((2, 32, 24, 24), 32, FOUR_BY_FOUR),
        ((1, 272, 24, 41), 64, FOUR_BY_FOUR),  # several chunks of channels
        ((4, 64, 15, 15), 272, THREE_BY_THREE),  # tiles of 4 x 4 would be a seventh more products than outputs
        ((2, 64, 10, 10), 64, IN_PAIRS),
        ((2, 24, 24, 24), 64, IN_PAIRS),  # channels that are no whole vectors
    ],
    ids=str,
)
def test_the_tiles_in_bfloat16_follow_from_the_shape(shape: tuple[int, ...], k: int, values: float) -> None:
    x, weight = channels_last(torch.randn(shape)).bfloat16(), weight_of(k, shape[1]).bfloat16()
    expected = BACKEND.conv_forward(LazyMap(x), weight, None, THREE)
    with Kept(weight) as kept:
        for _ in range(2):
            assert torch.equal(BACKEND.conv_forward(LazyMap(x), weight, None, THREE), expected)
            assert kept.values() == values


@needs_pairs
@pytest.mark.parametrize(
    "n, c, h, w, k", [(2, 64, h, w, 64) for h, w in EDGES_OF_FOUR] + [(2, 80, 24, 23, 50), (1, 272, 24, 41, 64)]
)
def test_bfloat16_is_as_right_as_by_pairs(n: int, c: int, h: int, w: int, k: int) -> None:
    """Forward and both gradients, with what is pending on the operands, whose roundings are the same."""
    x, raw, grad = (channels_last(torch.randn(n, size, h, w).bfloat16()) for size in (c, k, k))
    weight, scale_shift, coeff = weight_of(k, c).bfloat16(), torch.randn(2, c), torch.randn(3, k)
    operand = (scale_shift[0, :, None, None] * x + scale_shift[1, :, None, None]).relu().bfloat16()
    pending = (coeff[0, :, None, None] * grad + (coeff[1, :, None, None] * raw + coeff[2, :, None, None])).bfloat16()
    y = BACKEND.conv_forward(LazyMap(x, scale_shift, "relu"), weight, None, THREE)
    dx, dweight = BACKEND.conv_backward(
        LazyGrad(grad, raw, coeff), LazyMap(x, scale_shift, "relu"), weight, THREE, GradTarget()
    )
    exactly = [t.double() for t in (operand, weight, pending)]
    eager = [F.conv2d(operand, weight, padding=1), *gradients(operand, weight, pending)]
    truth = [F.conv2d(*exactly[:2], padding=1), *gradients(*exactly)]
    for side in (eager, truth):  # behind the activation's derivative
        side[1] = side[1] * (operand > 0)
    for ours, theirs, true, what in zip((y, dx, dweight), eager, truth, ("y", "dx", "dweight"), strict=True):
        assert ours is not None
        assert_parity(ours, theirs, true, what)


@needs_pairs
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38, 3e38], ids=str)
@pytest.mark.parametrize("n, c, h, w, k", [(2, 64, 24, 25, 64), (1, 272, 24, 41, 64), (4, 64, 15, 15, 272)])
def test_numbers_of_bfloat16_that_are_not_ordinary_go_where_they_go_directly(
    n: int, c: int, h: int, w: int, k: int, value: float
) -> None:
    """What a transform makes of them is computed again by pairs."""

    def poked(size: int) -> Tensor:
        x = torch.randn(n, size, h, w)
        x[0, 3, h // 2, w // 2], x[-1, 5, 0, 3], x[-1, -1, -1, -1] = value, -value, value
        return channels_last(x.bfloat16())

    def check(ours: Tensor | None, theirs: Tensor) -> None:
        assert ours is not None
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours[ours.isinf()], theirs[theirs.isinf()])
        finite = theirs.isfinite() & ours.isfinite()
        # both are rounded to bfloat16, where they may be neighbours (2^-7), from sums in float32 of up to 9 * 272 products: the root of
        # that many roundings, 50 * 6e-8, which the transforms magnify, of the largest number, which a small one may be off, too
        torch.testing.assert_close(
            ours[finite], theirs[finite], rtol=2**-7, atol=1e-5 * theirs[finite].abs().max().item()
        )

    weight, plain = weight_of(k, c).bfloat16(), channels_last(torch.randn(n, c, h, w).bfloat16())
    x, grad = poked(c), poked(k)
    check(BACKEND.conv_forward(LazyMap(x), weight, None, THREE), F.conv2d(x, weight, padding=1))
    # of padding's zeros times infinity, each multiplies some
    finite = abs(value) < float("inf")
    dx, dweight = BACKEND.conv_backward(LazyGrad(grad), LazyMap(plain), weight, THREE, GradTarget(), finite)
    expected = gradients(plain, weight, grad)
    check(dx, expected[0])
    if finite:
        check(dweight, expected[1])
