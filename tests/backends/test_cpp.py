"""What the C++ backend promises beyond the contract: its activations are the package's, its shortcuts do not show where numbers are
infinite, huge or far from zero, and what it cannot do raises."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import forked
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import activations
from fusedres.backends import cpp, eager
from fusedres.operands import Epilogue, GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry, Pool
from fusedres.testing import assert_parity, error

_C = pytest.importorskip("fusedres._C")

POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
THREE = Geometry((1, 1), (1, 1), (1, 1), 1)
#: large enough for Winograd's algorithm: whole panels, a rest of channels, several chunks, and panels that are packed where they are used;
#: by tiles of 3 x 3, 3 x 3, 2 x 2 and 2 x 2, then chunks and packing panels by 3 x 3 (test_cpp_winograd.py)
WINOGRAD = [
    (2, 64, 14, 14, 64),
    (2, 128, 9, 17, 80),
    (1, 1024, 16, 16, 64),
    (1, 64, 9, 8, 272),
    (1, 272, 16, 41, 64),
    (1, 96, 15, 15, 272),
]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def normal(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return channels_last(x) if len(shape) == 4 else x


def weight_of(k: int, c: int, size: int = 3) -> Tensor:
    return channels_last(normal(k, c, size, size, seed=1) / (c * size * size) ** 0.5)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own."""
    return forked.python(["-c", textwrap.dedent(code)], env={**os.environ, **environment})


# ---- activations -----------------------------------------------------------------------------------------------------


def test_the_extension_computes_every_activation_of_the_package() -> None:
    assert set(_C.activations()) == set(activations.KINDS)


@pytest.mark.parametrize("number", [-1, len(_C.activations())])
@pytest.mark.parametrize(
    "operator",
    [
        "add_act_forward",
        "add_act_backward",
        "dgrad_epilogue",
        "pool_forward",
        "pool_backward",
        "conv_forward",
        "conv_forward_out",
        "conv_dgrad",
        "conv_wgrad",
    ],
)
def test_an_unknown_activation_raises(operator: str, number: int) -> None:
    ops = torch.ops.fusedres_cpp
    x, weight, index = normal(1, 8, 4, 4), weight_of(8, 8), channels_last(torch.zeros(1, 8, 2, 2, dtype=torch.uint8))
    act, none, point = (number, 0.0), (0, 0.0), [1, 1, 1, 1, 1, 1]
    small, scale_shift, window = normal(1, 8, 2, 2), torch.ones(2, 8), [2, 2, 2, 2, 0, 0]
    calls = {
        "add_act_forward": lambda: ops.add_act_forward(x, None, None, None, *act, x.clone(), None),
        "add_act_backward": lambda: ops.add_act_backward(
            x, x, None, None, *act, x.clone(), None, None, None, None, None
        ),
        "dgrad_epilogue": lambda: ops.dgrad_epilogue(
            x, x, scale_shift, None, *act, x.clone(), None, False, False, None
        ),
        "pool_forward": lambda: ops.pool_forward(x, None, *act, window, small, index, None),
        "pool_backward": lambda: ops.pool_backward(
            small, index, x, None, None, *act, window, None, torch.ones(3, 8), x.clone()
        ),
        "conv_forward": lambda: ops.conv_forward(
            x, scale_shift, *act, weight, None, point, x.clone(), None, None, None, None, *none
        ),
        "conv_forward_out": lambda: ops.conv_forward(
            x, scale_shift, *none, weight, None, point, x.clone(), None, None, None, None, *act
        ),
        "conv_dgrad": lambda: ops.conv_dgrad(
            x, None, None, weight, point, x.clone(), x, scale_shift, *act, None, None, False, False, None
        ),
        "conv_wgrad": lambda: ops.conv_wgrad(x, None, None, x, scale_shift, *act, point, weight.clone()),
    }
    with pytest.raises(RuntimeError, match=f"no activation has the number {number}"):
        calls[operator]()


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [4, 5, 20])
def test_measuring_few_rows_of_mostly_one_value_costs_less_than_a_rounding(height: int) -> None:
    """Of which eager, by the rule alone, would allow three: their squared deviations round in one direction again and again."""
    x, stats = normal(1, 512, height, 8), torch.empty(2, 512)
    x[:, :, 1:] = x[:, :, 1:2, :1]
    cpp.BACKEND.statistics(x, stats)
    deviations = x.double() - x.double().mean((2, 3), keepdim=True)
    assert error(stats[1], deviations.square().sum((0, 2, 3)))[0] < torch.finfo(torch.float32).eps


# ---- Winograd's algorithm, where numbers are not ordinary ------------------------------------------------------------


def assert_same_kinds(ours: Tensor, eager: Tensor) -> None:
    """What is infinite, with which sign, and what is NaN is the same; what is finite is close."""
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    assert torch.equal(ours[ours.isinf()], eager[eager.isinf()])
    finite = eager.isfinite()
    # both are roundings of float32 apart (6e-8), over sums of up to 9 * 1024 products, of which Winograd's transforms have added four at a
    # time: the root of that many, 6e-6 of the largest output, which a small one may be off, too
    atol = 1e-5 * eager[finite].abs().max().item()
    torch.testing.assert_close(ours[finite], eager[finite], rtol=1e-4, atol=atol)


def poked(x: Tensor, value: float) -> Tensor:
    """``x`` with ``value`` at some pixels of one channel each: in the middle, at an edge and in a corner."""
    x = x.clone()
    x[0, 3, x.shape[2] // 2, x.shape[3] // 2] = value
    x[-1, 5, 0, 3] = -value
    x[-1, -1, -1, -1] = value
    return x


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """The gradient of ``weight`` in float64, of the products of pixels that there are: none with padding."""
    found = torch.empty(weight.shape, dtype=torch.float64)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            rows, columns = (torch.arange(size) for size in grad.shape[2:])
            y = rows * g.stride[0] - g.padding[0] + i * g.dilation[0]
            z = columns * g.stride[1] - g.padding[1] + j * g.dilation[1]
            inside, beside = (y >= 0) & (y < x.shape[2]), (z >= 0) & (z < x.shape[3])
            pixels = x[:, :, y[inside]][:, :, :, z[beside]].double()
            gradients = grad[:, :, rows[inside]][:, :, :, columns[beside]].double()
            for group, (of, by) in enumerate(zip(gradients.chunk(g.groups, 1), pixels.chunk(g.groups, 1), strict=True)):
                rows_of_group = found.chunk(g.groups)[group]
                rows_of_group[:, :, i, j] = torch.einsum("nkyx,ncyx->kc", of, by)
    return found


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38, 3e38], ids=str)
@pytest.mark.parametrize("n, c, h, w, k", WINOGRAD)
def test_a_pixel_that_is_not_ordinary_reaches_the_outputs_that_it_reaches_directly(
    n: int, c: int, h: int, w: int, k: int, value: float
) -> None:
    x, weight = poked(normal(n, c, h, w), value), weight_of(k, c)
    ours = cpp.BACKEND.conv_forward(LazyMap(x), weight, None, THREE)
    assert_same_kinds(ours, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("n, c, h, w, k", WINOGRAD)
def test_an_infinite_pixel_is_infinite_behind_the_epilogue(n: int, c: int, h: int, w: int, k: int) -> None:
    x, weight, residual = poked(normal(n, c, h, w), torch.inf), weight_of(k, c), normal(n, k, h, w, seed=2)
    scale_shift = normal(2, k, seed=3)
    epilogue = Epilogue(scale_shift=scale_shift, residual=LazyMap(residual), act="relu")
    ours = cpp.BACKEND.conv_forward(LazyMap(x), weight, None, THREE, epilogue)
    assert_same_kinds(ours, eager.BACKEND.conv_forward(LazyMap(x), weight, None, THREE, epilogue))


@pytest.mark.parametrize("value", [1e37, 1e38], ids=str)
def test_a_map_and_a_weight_of_huge_numbers_do_not_overflow(value: float) -> None:
    weight = torch.zeros(64, 64, 3, 3)
    weight[torch.arange(64), torch.arange(64), 1, 1] = 1.0
    x = normal(2, 64, 14, 14).clamp(-1.5, 1.5) * value
    ours = cpp.BACKEND.conv_forward(LazyMap(x), channels_last(weight), None, THREE)
    assert ours.isfinite().all()
    # at 1e38 every tile's transforms overflow, and what is computed instead multiplies by ones and zeros: exact. At 1e37 a number is
    # rounded in sums with its neighbours, a few roundings (6e-8) of the largest
    exact = value == 1e38
    torch.testing.assert_close(ours, x, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5 * value)
    small, huge = normal(2, 64, 14, 14) * 1e-30, weight_of(64, 64).clamp(-1, 1) * value * 3
    ours = cpp.BACKEND.conv_forward(LazyMap(small), huge, None, THREE)
    # sums of 576 products of up to 3e-30 * value: the root of that many roundings, 24 * 6e-8, of their sum
    torch.testing.assert_close(ours, F.conv2d(small, huge, padding=1), rtol=1e-4, atol=1e-5 * value * 1e-30)


@pytest.mark.parametrize("accumulate", [False, True], ids=["fresh", "accumulate"])
@pytest.mark.parametrize("value", [float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("n, c, h, w, k", WINOGRAD)
def test_gradients_of_what_is_not_ordinary(
    n: int, c: int, h: int, w: int, k: int, value: float, accumulate: bool
) -> None:
    x, grad, weight = normal(n, c, h, w), poked(normal(n, k, h, w, seed=2), value), weight_of(k, c)
    results = []
    for backend in (cpp.BACKEND, eager.BACKEND):
        target = GradTarget(dx=x.clone(), accumulate=True) if accumulate else GradTarget()
        results.append(backend.conv_backward(LazyGrad(grad), LazyMap(x), weight, THREE, target))
    (dx, dweight), (wanted, _) = results
    assert dx is not None and dweight is not None and wanted is not None
    assert_same_kinds(dx, wanted)
    # the library's own multiplies padding's zeros for some of these shapes
    assert_same_kinds(dweight, weight_gradient(x, grad, weight, THREE).float())


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "n, c, h, w, k, size, g",
    [
        (2, 64, 14, 14, 64, 3, THREE),
        (2, 24, 13, 9, 40, 3, THREE),
        (3, 17, 12, 11, 19, 3, Geometry((2, 2), (1, 1), (1, 1), 1)),
        (2, 8, 15, 16, 16, 5, Geometry((1, 2), (2, 1), (1, 2), 1)),
        (1, 16, 10, 10, 16, 1, Geometry((1, 1), (1, 1), (1, 1), 1)),
        (1, 64, 4, 5, 48, 3, THREE),
        (1, 32, 7, 7, 64, 3, Geometry((2, 2), (1, 1), (1, 1), 1)),
        (2, 64, 13, 12, 64, 3, Geometry((1, 1), (1, 1), (1, 1), 16)),
        (2, 64, 13, 12, 64, 3, Geometry((2, 2), (1, 1), (1, 1), 8)),
        (1, 64, 13, 12, 64, 5, Geometry((1, 1), (2, 2), (1, 1), 4)),
        (2, 64, 9, 12, 64, 3, Geometry((1, 1), (1, 1), (1, 1), 2)),
    ],
    ids=[
        "winograd",
        "3x3",
        "stride",
        "5x5",
        "1x1 padded",
        "few pixels",
        "few pixels, stride",
        "groups of 4",
        "groups of 8, stride",
        "groups of 16, 5x5",
        "groups of 32",
    ],
)
def test_padding_has_no_part_in_the_gradient_of_a_weight(
    n: int, c: int, h: int, w: int, k: int, size: int, g: Geometry, weights: torch.memory_format, value: float
) -> None:
    weight = normal(k, c // g.groups, size, size, seed=1).contiguous(memory_format=weights)
    x = poked(normal(n, c, h, w), value)
    shape = F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups).shape
    for grad in (poked(normal(*shape, seed=2), value), normal(*shape, seed=2)):
        _, ours = cpp.BACKEND.conv_backward(LazyGrad(grad), LazyMap(x), weight, g, None)
        assert ours is not None
        assert_same_kinds(ours, weight_gradient(x, grad, weight, g).float())


# ---- a mean far above the deviation ----------------------------------------------------------------------------------

#: 10,000 for deviations of one: a float tells apart 1,000 steps there
FAR = 1e4
POOL = Pool("max", (3, 3), (1, 1), (1, 1))
DRAWS = 5


def moments(x: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    return torch.stack([mean.flatten(), (x - mean).square().sum((0, 2, 3))])


@pytest.mark.parametrize(
    "producer", ["statistics", "add_act", "max pool", "conv 1x1", "conv 3x3", "conv 3x3 of few pixels"]
)
def test_statistics_far_from_zero_are_as_precise_as_eager(producer: str) -> None:
    ours, theirs, truth = [], [], []
    for seed in range(DRAWS):
        x, stats = normal(4, 64, 14, 14, seed=seed, mean=FAR), torch.empty(2, 64)
        if producer == "statistics":
            cpp.BACKEND.statistics(x, stats)
        elif producer == "add_act":
            residual = LazyMap(normal(4, 64, 14, 14, seed=99))
            x = cpp.BACKEND.add_act_forward(LazyMap(x), residual, stats=stats)
        elif producer == "max pool":
            x, _ = cpp.BACKEND.pool_forward(LazyMap(x), POOL, stats=stats)
        else:
            size, geometry = (1, POINT) if "1x1" in producer else (3, THREE)
            shape = (1, 64, 5, 5) if "few" in producer else (4, 64, 14, 14)
            bias = torch.full((64,), FAR)
            x = cpp.BACKEND.conv_forward(
                LazyMap(normal(*shape, seed=seed)), weight_of(64, 64, size), bias, geometry, Epilogue(stats=stats)
            )
        ours.append(stats)
        theirs.append(moments(x))
        truth.append(moments(x.double()))
    for row, name in enumerate(("mean", "M2")):
        assert_parity(*([v[row] for v in values] for values in (ours, theirs, truth)), name)


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("producer", ["add_act", "dgrad_epilogue", "dgrad 1x1", "dgrad 3x3"])
def test_sums_far_from_zero_are_as_precise_as_eager(producer: str, channels: int) -> None:
    ours, theirs, truth = [], [], []
    for seed in range(DRAWS):
        shape = (4, channels, 28, 28)
        raw, grad = normal(*shape, seed=seed, mean=FAR), normal(*shape, seed=50 + seed, mean=1.0)
        mean_invstd = torch.stack([raw.double().mean((0, 2, 3)), torch.ones(channels)]).float()
        x, sums = LazyMap(raw, None, "none", mean_invstd), torch.empty(2, channels)
        da, exact = grad, grad.double()
        if producer == "add_act":
            cpp.BACKEND.add_act_backward(grad, x, sums=sums)
        elif producer == "dgrad_epilogue":
            cpp.BACKEND.dgrad_epilogue(grad.clone(), x, GradTarget(sums=sums))
        else:
            size, geometry = (1, POINT) if "1x1" in producer else (3, THREE)
            weight = weight_of(channels, channels, size)
            cpp.BACKEND.conv_backward(LazyGrad(grad), x, weight, geometry, GradTarget(sums=sums), need_dw=False)
            da, exact = (
                torch.nn.grad.conv2d_input(shape, weight.to(g.dtype), g, padding=size // 2) for g in (grad, exact)
            )
        ours.append(sums)
        for values, dz in ((theirs, da), (truth, exact)):
            xhat = raw.to(dz.dtype) - mean_invstd[0].to(dz.dtype).view(1, -1, 1, 1)
            values.append(torch.stack([dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))]))
    for row, name in enumerate(("sum of dz", "sum of dz * xhat")):
        assert_parity(*([v[row] for v in values] for values in (ours, theirs, truth)), name)


# ---- what it cannot do -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
@pytest.mark.parametrize(
    "call",
    [
        "cpp.BACKEND.conv_forward(LazyMap(x), weight, None, POINT)",
        "cpp.BACKEND.conv_backward(LazyGrad(x), LazyMap(x), weight, POINT)",
        "cpp.BACKEND.statistics(wide, stats)",
    ],
    ids=["forward", "backward", "pass"],
)
def test_too_little_memory_raises(call: str) -> None:
    done = run_python(
        f"""
        import resource
        import torch
        from fusedres.backends import cpp
        from fusedres.operands import LazyGrad, LazyMap
        from fusedres.specs import Geometry
        POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
        torch.set_num_threads(1)
        x = torch.zeros(5, 4096, 8, 8).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(4096, 4096, 1, 1)
        wide, stats = torch.zeros(4, 1 << 20, 1, 1), torch.zeros(2, 1 << 20)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (10 << 20), size + (10 << 20)))
        try:
            {call}
        except RuntimeError as error:
            print("raised:", error)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "raised:" in done.stdout and "memory" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_a_model_runs_on_after_there_was_too_little_memory() -> None:
    """In a kernel, and in front of one; the very bits of a model to which nothing has happened."""
    code = """
        import copy
        import gc
        import resource
        import threading
        import torch
        import fusedres
        from fusedres.nn import ConvBNAct
        from fusedres.testing import assert_fused
        torch.set_num_threads(2)
        wide = torch.nn.Sequential(ConvBNAct(4096, 4096, 1), ConvBNAct(4096, 64, 3))
        model = fusedres.convert(wide, verify=False)  # a proof would copy weights of 128 MiB, in float64
        x = torch.randn(5, 4096, 8, 8).contiguous(memory_format=torch.channels_last)
        large = torch.zeros(1, 4096, 1, 1).expand(64, 4096, 64, 64)
        untouched = copy.deepcopy(model)
        # what a first call and the conversion leave behind would be counted as memory that is there
        fusedres.convert(ConvBNAct(8, 8, 1).eval())(torch.randn(1, 8, 4, 4))
        gc.collect()

        def step(model, x):
            y = model.train()(x)
            grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
            return [y.detach(), *grads]

        def starve():
            # a thread has scratch memory of its own, so that none is there from before; it cannot start others without memory
            torch.set_num_threads(1)
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (size + (10 << 20), most))
            for images in (x, large, x):
                try:
                    model.eval()(images)
                except RuntimeError as error:
                    print("raised:", error)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        starved = threading.Thread(target=starve)
        starved.start()
        starved.join()
        for ours, wanted in zip(step(model, x), step(untouched, x), strict=True):
            assert torch.equal(ours, wanted)
        for ours, wanted in zip(model.buffers(), untouched.buffers(), strict=True):
            assert torch.equal(ours, wanted)
        assert_fused(model, "cpp")
        """
    # what is freed goes back at once, so that none of it is there for the calls that are to find none
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **allocator},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("raised:") == 3, done.stdout


def test_an_unknown_capability_raises() -> None:
    done = run_python("import fusedres._C as c; c.cpu_capability()", FUSEDRES_CPU_CAPABILITY="sse9")
    assert done.returncode != 0 and "FUSEDRES_CPU_CAPABILITY=sse9 is not known" in done.stderr
