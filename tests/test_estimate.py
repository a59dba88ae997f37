"""The plans that hold where nobody has measured: what the model behind them counts, and what follows for each GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fusedres.kernels.tiles import DEFAULT_ARCH, Arch
from fusedres.tuning import estimate
from fusedres.tuning.estimate import SPEEDS, Cost, costs, is_fused, seconds
from fusedres.tuning.plans import Problem

TRAINING = ("scale_shift", "relu", "stats")
BACKWARD = ("both", "coeff", "raw", "scale_shift", "relu", "sums")


def problem(op: str, channels: int, outputs: int, size: int, batch: int = 256, **changes: object) -> Problem:
    """A 1x1 convolution of a bottleneck in training, in bfloat16."""
    features = TRAINING if op == "forward" else BACKWARD
    found = Problem(
        op, "bfloat16", (batch, channels, size, size), channels, outputs, (outputs, channels, 1, 1), (1, 1), (0, 0), (1, 1), 1,
        features,
    )  # fmt: skip
    return found._replace(**changes)


def arch(family: str) -> Arch:
    return Arch(family, 227 * 1024, 32)


X, Y = 2 * 256 * 64 * 8 * 8, 2 * 256 * 32 * 8 * 8


@pytest.mark.parametrize(
    "op, features, fused, library, correction",
    [
        ("forward", (), Cost(X + Y, 0, 1), Cost(X + Y, 0, 1), 0),
        # x is stored activated, and read again; y is read for its statistics
        ("forward", TRAINING, Cost(X + Y, 0, 1), Cost(X + Y, 2 * X + Y, 3), 0),
        ("forward", ("relu",), Cost(X + Y, 0, 1), Cost(X + Y, 2 * X, 2), 0),
        ("forward", ("out_scale_shift", "residual", "out_relu"), Cost(X + 2 * Y, 0, 1), Cost(X + Y, 3 * Y, 2), 0),
        # the gradient is read with raw, or corrected in a pass; the input's is rebuilt from x
        ("dgrad", BACKWARD, Cost(2 * X + 2 * Y, 0, 1), Cost(X + Y, 3 * X, 2), 3 * Y),
        ("dgrad", ("accumulate",), Cost(2 * X + Y, 0, 1), Cost(X + Y, 3 * X, 2), 0),
        ("wgrad", BACKWARD, Cost(X + 2 * Y, 0, 1), Cost(X + Y, 2 * X, 2), 3 * Y),
        ("wgrad", ("coeff",), Cost(X + Y, 0, 1), Cost(X + Y, 0, 1), 2 * Y),
        # both by one kernel: each map once, where the library is two convolutions
        ("backward", BACKWARD, Cost(2 * X + 2 * Y, 0, 1), Cost(2 * X + 2 * Y, 5 * X, 4), 3 * Y),
        ("backward", ("accumulate",), Cost(3 * X + Y, 0, 1), Cost(2 * X + 2 * Y, 3 * X, 3), 0),
    ],
)
def test_what_each_way_moves(op, features, fused, library, correction):
    assert costs(problem(op, 64, 32, 8, features=features)) == (fused, library, correction)


@pytest.mark.parametrize("family", SPEEDS)
def test_nothing_is_fused_that_the_model_says_loses(family):
    """Of all ways to run a forward, or two gradients with the correction that the library's share, none is faster than the one taken."""
    for channels, outputs, size in ((64, 256, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7)):
        for batch in (1, 32, 256):
            sizes, margin = (channels, outputs, size, batch), estimate.MARGIN
            fused, library, _ = seconds(problem("forward", *sizes), arch(family))
            assert is_fused(problem("forward", *sizes), arch(family)) == (fused * margin < library)
            dgrad, wgrad = (seconds(problem(op, *sizes), arch(family)) for op in ("dgrad", "wgrad"))
            ways = {
                (False, False): dgrad.library + wgrad.library + dgrad.correction,
                (True, False): margin * dgrad.fused + wgrad.library + wgrad.correction,
                (False, True): dgrad.library + margin * wgrad.fused + dgrad.correction,
                (True, True): margin * (dgrad.fused + wgrad.fused),
            }
            taken = tuple(is_fused(problem(op, *sizes), arch(family)) for op in ("dgrad", "wgrad"))
            assert ways[taken] == pytest.approx(min(ways.values()))
            one = problem("backward", *sizes)
            by_one = margin * seconds(one, arch(family)).fused
            assert is_fused(one, arch(family)) == (by_one < min(ways.values()))


@pytest.mark.parametrize("family", SPEEDS)
def test_one_kernel_for_both_gradients_is_estimated_faster_than_two(family):
    """It reads less and computes as much, where it has outputs enough for its instructions and few tiles of columns."""
    for size in ((64, 256, 56), (512, 128, 28), (1000, 128, 7)):
        two = sum(seconds(problem(op, *size), arch(family)).fused for op in ("dgrad", "wgrad"))
        assert seconds(problem("backward", *size), arch(family)).fused < two


def test_the_gradient_is_read_again_for_many_columns():
    """From a cache, which at some number of them takes longer than memory does."""
    few, many = (problem("backward", channels, 256, 14) for channels in (64, 1024))
    moved = costs(many).fused.bytes / SPEEDS["sm_90"].bandwidth
    assert seconds(few, arch("sm_90")).fused < 2 * costs(few).fused.bytes / SPEEDS["sm_90"].bandwidth
    assert not is_fused(many, arch("sm_90")) and seconds(many, arch("sm_90")).fused > 2 * moved


def test_a_gradient_alone_pays_its_correction_alone():
    """So that one may be fused which beside the other, the library's, is not."""
    for family in SPEEDS:
        one = problem("wgrad", 1024, 256, 14)
        alone = one._replace(features=tuple(f for f in BACKWARD if f != "both"))
        fused, library, correction = seconds(alone, arch(family))
        assert is_fused(alone, arch(family)) == (fused * estimate.MARGIN < library + correction)


@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad"])
def test_a_convolution_from_which_nothing_is_saved_is_the_librarys(op):
    """With nothing pending and nothing reduced it is a convolution, and the library's is faster."""
    assert not any(is_fused(problem(op, 64, 256, 56, features=()), arch(family)) for family in SPEEDS)


@pytest.mark.parametrize(
    "family, fused",
    [
        # memory is the limit of the first stages, and of more of them the faster products are in relation to it; the gradients' loops
        # issue too much for the matrix units of sm_90 and sm_100
        ("sm_80", ["forward dgrad wgrad", "forward", "", ""]),
        ("sm_90", ["forward dgrad wgrad", "forward", "forward", ""]),
        ("sm_100", ["forward", "forward", "", ""]),
        ("gfx942", ["forward dgrad wgrad", "forward dgrad wgrad", "forward", ""]),
    ],
)
def test_the_last_convolution_of_a_bottleneck_by_stage(family, fused):
    stages = ((64, 256, 56), (128, 512, 28), (256, 1024, 14), (512, 2048, 7))
    found = [
        " ".join(op for op in ("forward", "dgrad", "wgrad") if is_fused(problem(op, *stage), arch(family)))
        for stage in stages
    ]
    assert found == fused


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"weight": (256, 64, 3, 3), "padding": (1, 1)},
        {"stride": (2, 2)},
        {"groups": 2, "weight": (256, 32, 1, 1)},
        {"x_pitch": 68},
        {"y_pitch": 260},
        {"x": (256, 24, 56, 56), "weight": (256, 24, 1, 1), "x_pitch": 24},
    ],
    ids=str,
)
def test_what_the_model_does_not_know_is_the_librarys(changes):
    """Of a convolution that is fused but for this."""
    one = problem("forward", 64, 256, 56)
    assert is_fused(one, arch("sm_90")) and not is_fused(one._replace(**changes), arch("sm_90"))


def test_few_launches_count_where_maps_are_small():
    """Of a single image the time is that of launches: one for three."""
    fused, library, _ = seconds(problem("forward", 64, 256, 7, batch=1), arch("sm_90"))
    assert library - fused == pytest.approx(2 * estimate.LAUNCH, rel=0.2)


def test_every_architecture_that_is_compiled_for_has_its_speeds():
    pytest.importorskip("torchvision")
    pytest.importorskip("rich")
    from bench.cross_compile import ARCHITECTURES

    assert set(ARCHITECTURES) == set(SPEEDS)


def test_an_unknown_gpu_counts_as_the_default_one():
    one = problem("dgrad", 256, 1024, 14)
    assert seconds(one, arch("sm_999")) == seconds(one, DEFAULT_ARCH)
