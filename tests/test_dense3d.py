"""Dense blocks in three dimensions: in one buffer, statistics once a channel, in less memory than eager; everything else is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import each_mode, ran, served
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import functional
from fusedres.backends import select
from fusedres.backends.contract import Wrapped
from fusedres.operands import Epilogue
from fusedres.testing import assert_fused, compare
from fusedres.trial import memory

pytestmark = [
    pytest.mark.usefixtures("proven_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]


class Layer(nn.Module):
    """A dense layer as medical networks write it."""

    def __init__(
        self, channels: int, growth: int, bottleneck: bool = True, bias: bool = False, drop: float = 0.0
    ) -> None:
        super().__init__()
        wide = 2 * growth if bottleneck else channels
        first = [nn.BatchNorm3d(channels), nn.ReLU(), nn.Conv3d(channels, wide, 1, bias=False)] if bottleneck else []
        last = [nn.BatchNorm3d(wide), nn.ReLU(), nn.Conv3d(wide, growth, 3, padding=1, bias=bias)]
        self.layers = nn.Sequential(*first, *last, *([nn.Dropout3d(drop)] if drop else []))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class Residual(nn.Module):
    """A residual block in three dimensions, which no schedule takes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm3d(channels), nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def block(*arguments, layers: int = 3, **more) -> nn.Sequential:
    channels, growth = arguments
    return nn.Sequential(*(Layer(channels + i * growth, growth, **more) for i in range(layers)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bottlenecks": (lambda: block(5, 3), (2, 5, 3, 4, 5)),
    "without-bottlenecks": (lambda: block(5, 3, bottleneck=False), (2, 5, 3, 4, 5)),
    "biases": (lambda: block(5, 3, bias=True), (2, 5, 3, 4, 5)),
    "flat": (lambda: block(5, 3, layers=2), (2, 5, 1, 4, 5)),
    "one-column": (lambda: block(5, 3, layers=2), (1, 5, 3, 1, 1)),
    "in-a-network": (
        lambda: nn.Sequential(nn.Conv3d(2, 5, 3), block(5, 3), nn.Conv3d(14, 4, 1), nn.AvgPool3d(2), block(4, 2, layers=2)),
        (2, 2, 6, 6, 8),
    ),
}  # fmt: skip


@each_mode
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_their_plain_modules(name, backend, training):
    served(backend, torch.float64)
    compare(*CASES[name], torch.float64, backend, training, draws=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blocks_train_in_other_dtypes(dtype):
    served("cpp", dtype)
    compare(*CASES["bottlenecks"], dtype, "cpp")


def test_blocks_train_on_triton():
    served("triton", torch.float32)
    compare(lambda: block(5, 3, layers=2), (1, 5, 2, 2, 3), torch.float32, "triton", draws=1)


def test_recomputing_gives_the_same_step():
    served("cpp", torch.float64)
    compare(*CASES["bottlenecks"], torch.float64, "cpp", recompute=True, draws=1)


@each_mode
def test_blocks_of_monai_equal_themselves(training):
    networks = pytest.importorskip("monai.networks.nets.densenet")
    served("cpp", torch.float64)
    compare(
        lambda: nn.Sequential(networks._DenseBlock(3, 3, 5, 2, 3, 0.0)), (2, 5, 3, 4, 5), torch.float64, "cpp", training, draws=1
    )  # fmt: skip


def test_a_monai_densenet_is_converted():
    monai = pytest.importorskip("monai")
    served("cpp", torch.float32)
    model = monai.networks.nets.DenseNet(3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2), bn_size=2).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    wanted = model(x)
    rows = fusedres.report(fusedres.convert(model))
    assert [row.kind for row in rows] == ["dense block", "dense block"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert_fused(model, "cpp")


# ---- what it is for --------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Names of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_step_concatenates_nothing(backend):
    served(backend, torch.float32)
    model, x = fusedres.convert(block(5, 3)), torch.randn(2, 5, 3, 4, 5, requires_grad=True)
    with fusedres.use_backend(backend), Recorder() as recorder:
        model(x).sum().backward()
    assert not [name for name in recorder.names if name.startswith("aten.cat.")]
    assert ran(model) == backend


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_channels_statistics_are_reduced_once(backend):
    """One reduction for every channel of the buffer and one for every bottleneck's output, however many layers read it."""
    served(backend, torch.float32)
    model, reduced = fusedres.convert(block(5, 3)), []

    class Counting(Wrapped):
        def call(self, primitive, *args, **kwargs):
            epilogues = [a for a in args if isinstance(a, Epilogue)]
            written = [args[1]] if primitive == "statistics" else [kwargs.get("stats"), *(e.stats for e in epilogues)]
            reduced.extend(stats.shape[1] for stats in written if stats is not None)
            return super().call(primitive, *args, **kwargs)

    with fusedres.use_backend(backend), select.observe(Counting):
        model(torch.randn(2, 5, 3, 4, 5))
    # x, then a bottleneck of 6 and a slice of 3 for each layer
    assert sorted(reduced) == sorted([5] + 3 * [6, 3])


@pytest.mark.parametrize(
    ("backend", "training", "share"),
    [("eager", True, 0.9), ("cpp", True, 0.6), ("cpp", False, 1.0)],
    ids=["eager-training", "cpp-training", "cpp-inference"],
)
def test_a_step_takes_less_memory_than_eagers(backend, training, share):
    """The oracle's passes have temporaries of their own, which in inference outweigh what it saves: there it is the extension's promise."""
    served(backend, torch.float32)
    peaks = {}
    for name in ("modules", backend):
        model = block(16, 8, layers=6).train(training).to(memory_format=torch.channels_last_3d)
        if name == backend:
            fusedres.convert(model)
        x = torch.randn(2, 16, 8, 16, 16).to(memory_format=torch.channels_last_3d).requires_grad_(training)

        def step(model=model, x=x) -> None:
            model.zero_grad(set_to_none=True)
            x.grad = None
            with torch.set_grad_enabled(training):
                y = model(x)
            if training:
                y.sum().backward()

        with fusedres.use_backend(backend):
            step()
            peaks[name] = memory.peak_bytes(step, torch.device("cpu"), smallest=2 * 8 * 16 * 16 * 4)
    assert peaks[backend] < share * peaks["modules"]


# ---- what is taken and what is left ----------------------------------------------------------------------------------


def test_other_blocks_in_three_dimensions_are_left_alone():
    row = nn.Sequential(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
    transition = nn.Sequential(nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1), nn.AvgPool3d(2))
    model = nn.Sequential(Residual(4), row, transition)
    types = [type(m) for m in model.modules()]
    assert [type(m) for m in fusedres.convert(model).modules()] == types
    assert [(row.path, row.fused) for row in fusedres.report(model)] == [("0", False)]
    assert "three dimensions" in fusedres.report(model)[0].detail


def test_dropout_in_layers_leaves_them_to_their_modules():
    """With dropout nothing is written into a buffer in training; in evaluation it rests."""
    served("cpp", torch.float32)
    torch.manual_seed(0)
    model, x = block(5, 3, drop=0.5), torch.randn(2, 5, 3, 4, 5)
    twin = fusedres.convert(copy.deepcopy(model))
    results = []
    for m in (model, twin):
        torch.manual_seed(1)
        results.append(m(x))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert ran(twin) == "cpp"


def test_the_memory_format_of_the_input_does_not_matter():
    """The output has the format that the modules' own would have, and the same values."""
    served("cpp", torch.float32)
    model, x = fusedres.convert(block(5, 3)).eval(), torch.randn(2, 5, 3, 4, 5)
    y, z = model(x), model(x.to(memory_format=torch.channels_last_3d))
    assert y.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(y, z)


def test_inputs_that_do_not_fit_are_the_modules_affair():
    served("cpp", torch.float32)
    model = fusedres.convert(block(5, 3))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 6, 3, 4, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 5, 1, 1, 1))
    with pytest.raises(ValueError, match="4D"):
        model(torch.randn(2, 5, 4, 5))
    model(torch.randn(2, 5, 3, 4, 5))
    assert ran(model) == "cpp"


def test_the_functional_form():
    torch.manual_seed(0)
    model = block(5, 3, layers=2).double()
    x = torch.randn(2, 5, 3, 4, 5, dtype=torch.float64)

    def described(layer: Layer) -> functional.Layer:
        parts = []
        for module in layer.layers:
            if isinstance(module, nn.BatchNorm3d):
                parts.append(functional.Norm(module.weight, module.bias, None, None, True, 0.0, module.eps, "relu"))
            elif isinstance(module, nn.Conv3d):
                geometry = functional.Geometry(module.stride, module.padding, module.dilation, module.groups)
                parts.append(functional.Conv(module.weight, module.bias, geometry))
        return functional.Layer(*parts)

    torch.testing.assert_close(functional.dense_block(x, tuple(map(described, model))), model(x))
