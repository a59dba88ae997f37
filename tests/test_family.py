"""The rest of the family: pre-activation blocks, every shortcut, blocks split around foreign modules, dense layers of other shapes; what
reading a block's structure takes and leaves. By the rule of :mod:`fusedres.testing`, with NaN in uninitialised memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import each_mode, ran, served
from torch import Tensor, nn

import fusedres
from fusedres import functional
from fusedres.backends import select
from fusedres.backends.contract import Wrapped
from fusedres.nn import PreActBasicBlock, PreActBottleneck
from fusedres.swap import FusedBlock, is_converted, original_class
from fusedres.testing import compare

pytest.importorskip("torchvision")
from torchvision.models.densenet import _DenseBlock  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("proven_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]


# ---- models as users write them --------------------------------------------------------------------------------------


class PreAct(nn.Module):
    """The pre-activation block of CIFAR repositories: functional activations, a shortcut that may be missing."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(x if self.raw else out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Pyramid(nn.Module):
    """A pyramidal block: BatchNorm at both ends, a pooled and zero-padded shortcut."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inplanes), nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        self.more = planes - inplanes

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv2(self.relu(self.bn2(self.conv1(self.bn1(x))))))
        return out + F.pad(self.pool(x), (0, 0, 0, 0, 0, self.more))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OptionA(nn.Module):
    """The basic block of ResNet-20 on CIFAR, with a shortcut without parameters."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        more = (planes - inplanes) // 2
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more, more), "constant", 0))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Squeeze(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Between(nn.Module):
    """A bottleneck with modules that no schedule knows: ``where`` says before which step they stand."""

    def __init__(self, channels: int, where: str, module: Callable[[int], nn.Module], act: str = "relu") -> None:
        super().__init__()
        self.where, self.extra, self.act = where, module(channels), act
        kernels = (1, 3, 1)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(channels, channels, k, 1, k // 2, bias=False) for k in kernels)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        def at(where: str, h: Tensor) -> Tensor:
            return self.extra(h) if where == self.where else h

        h = F.relu(self.bn1(self.conv1(at("first", x))))
        h = self.bn2(self.conv2(h))
        h = at("second", F.relu(at("before the activation", h)))
        h = at("last", self.bn3(self.conv3(h)))
        return at("behind", F.relu(h + at("shortcut", x)))


class Dense(nn.Module):
    """A dense layer that concatenates by itself."""

    def __init__(self, channels: int, growth: int, bottleneck: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        wide = 2 * growth if bottleneck else channels
        self.drop = drop
        row = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, wide, 1, bias=False)] if bottleneck else []
        self.row = nn.Sequential(*row, nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, growth, 3, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        new = self.row(x)
        if self.drop > 0:
            new = F.dropout(new, p=self.drop, training=self.training)
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.bn, self.conv, self.pool = nn.BatchNorm2d(channels), nn.Conv2d(channels, outputs, 1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.bn(x))))


class Plain(nn.Module):
    """A block without shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Frozen(nn.Module):
    """``block`` whose BatchNorms ``which`` stay in evaluation."""

    def __init__(self, block: nn.Module, which: slice) -> None:
        super().__init__()
        self.block, self.which = block, which

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for norm in [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)][self.which]:
            norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def without(block: nn.Module, *names: str) -> nn.Module:
    """``block`` without gradients of the parameters whose names begin so."""
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return block


def conv1x1(inplanes: int, planes: int, stride: int = 1, bias: bool = False) -> nn.Module:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=bias)


def average(inplanes: int, planes: int, ceil: bool = True, norm: bool = True) -> nn.Module:
    rest = [nn.BatchNorm2d(planes)] if norm else []
    pool = nn.AvgPool2d(2, 2, ceil_mode=ceil, count_include_pad=False)
    return nn.Sequential(pool, conv1x1(inplanes, planes), *rest)


def blur(channels: int) -> nn.Module:
    return nn.AvgPool2d(3, 1, 1)


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


def plain(block: nn.Module) -> nn.Module:
    """A block of ``fusedres.nn`` without what makes it fused: what ``convert`` finds in it, it has to read off its structure."""
    block.__class__ = original_class(block)
    return block


def plain_basic(*arguments) -> nn.Module:
    return plain(PreActBasicBlock(*arguments))


def plain_bottleneck(*arguments, **more) -> nn.Module:
    return plain(PreActBottleneck(*arguments, **more))


PREACT: dict[str, Case] = {
    "basic": (lambda: plain_basic(7, 7), (2, 7, 5, 6)),
    "two-basics": (lambda: nn.Sequential(plain_basic(7, 7), plain_basic(7, 7)), (2, 7, 5, 6)),
    "basic-projection": (lambda: plain_basic(7, 9, 2, conv1x1(7, 9, 2)), (2, 7, 5, 6)),
    "basic-projection-bias": (lambda: plain_basic(7, 9, 2, conv1x1(7, 9, 2, True)), (2, 7, 5, 6)),
    "basic-projection-norm": (
        lambda: plain_basic(7, 9, 2, nn.Sequential(conv1x1(7, 9, 2), nn.BatchNorm2d(9))),
        (2, 7, 5, 6),
    ),
    "basic-pooled-projection": (lambda: plain_basic(7, 9, 2, average(7, 9, norm=False)), (2, 7, 6, 4)),
    "basic-pooled-projection-odd": (lambda: plain_basic(7, 9, 2, average(7, 9, norm=False)), (2, 7, 5, 7)),
    "bottleneck": (lambda: plain_bottleneck(12, 3), (2, 12, 5, 6)),
    "bottleneck-projection": (lambda: plain_bottleneck(7, 3, 2, conv1x1(7, 12, 2)), (2, 7, 5, 6)),
    "bottleneck-grouped": (lambda: plain_bottleneck(8, 2, groups=2), (2, 8, 5, 6)),
    "own-class": (lambda: PreAct(7, 7), (2, 7, 5, 6)),
    "own-class-projection": (lambda: PreAct(7, 9, 2), (2, 7, 5, 6)),
    "own-class-raw-projection": (lambda: PreAct(7, 9, 2, raw=True), (2, 7, 5, 6)),
    "pyramid": (lambda: Pyramid(5, 9), (2, 5, 7, 6)),
    "frozen-first": (lambda: Frozen(plain_basic(7, 7), slice(0, 1)), (2, 7, 5, 6)),
    "frozen-second": (lambda: Frozen(PreAct(7, 9, 2), slice(1, 2)), (2, 7, 5, 6)),
    "no-gradient-of-norms": (lambda: without(plain_basic(7, 7), "bn"), (2, 7, 5, 6)),
    "no-gradient-of-convs": (lambda: without(PreAct(7, 9, 2), "conv", "shortcut"), (2, 7, 5, 6)),
}
SHORTCUTS: dict[str, Case] = {
    "option-a": (lambda: OptionA(4, 8, 2), (2, 4, 5, 7)),
    "option-a-stride-1": (lambda: OptionA(4, 8, 1), (2, 4, 5, 7)),
    "option-a-modules": (
        lambda: BasicBlock(4, 8, 2, nn.Sequential(nn.AvgPool2d(1, 2), nn.ZeroPad3d((0, 0, 0, 0, 1, 3)))),
        (2, 4, 5, 7),
    ),
    "pooled": (lambda: BasicBlock(5, 7, 2, average(5, 7)), (2, 5, 6, 4)),
    "pooled-odd": (lambda: BasicBlock(5, 7, 2, average(5, 7)), (2, 5, 5, 7)),
    "pooled-floor": (lambda: BasicBlock(5, 5, 1, average(5, 5, ceil=False)[1:]), (2, 5, 5, 7)),
    "identity-module": (lambda: BasicBlock(5, 5, 1, nn.Identity()), (2, 5, 5, 7)),
    "identity-behind": (lambda: BasicBlock(5, 5, 1, nn.Sequential(conv1x1(5, 5), nn.BatchNorm2d(5), nn.Identity())), (2, 5, 5, 7)),
    "overlapping-pool": (
        lambda: BasicBlock(5, 7, 1, nn.Sequential(nn.AvgPool2d(3, 1, 1), conv1x1(5, 7), nn.BatchNorm2d(7))),
        (2, 5, 5, 7),
    ),
    "activated-shortcut": (
        lambda: BasicBlock(5, 7, 1, nn.Sequential(conv1x1(5, 7), nn.BatchNorm2d(7), nn.ReLU())),
        (2, 5, 5, 7),
    ),
}  # fmt: skip
SPLIT: dict[str, Case] = {
    f"{what}-{where.replace(' ', '-')}": (lambda where=where, module=module: Between(6, where, module), (2, 6, 5, 7))
    for what, module, wheres in (
        ("squeeze", Squeeze, ("first", "second", "last", "behind", "shortcut")),
        ("blur", blur, ("before the activation", "last")),
    )
    for where in wheres
}
DENSE: dict[str, Case] = {
    "row": (lambda: nn.Sequential(Dense(5, 3), Dense(8, 3), Dense(11, 3)), (2, 5, 5, 7)),
    "row-without-bottleneck": (lambda: nn.Sequential(*(Dense(5 + 3 * i, 3, False) for i in range(3))), (2, 5, 5, 7)),
    "row-mixed": (lambda: nn.Sequential(Dense(5, 3), Dense(8, 2, False), Dense(10, 4)), (2, 5, 5, 7)),
    "row-of-ten": (lambda: nn.Sequential(*(Dense(5 + 2 * i, 2) for i in range(10))), (2, 5, 3, 4)),
    "row-then-transition": (lambda: nn.Sequential(nn.Sequential(Dense(5, 3), Dense(8, 3)), Transition(11, 4)), (2, 5, 6, 5)),
    "frozen-first-norms": (
        lambda: Frozen(nn.Sequential(Dense(5, 3, False), Dense(8, 3)), slice(0, None, 2)),
        (2, 5, 5, 7),
    ),
}  # fmt: skip
ROWS: dict[str, Case] = {"plain": (lambda: Plain(6), (2, 6, 5, 7))}
ALL = PREACT | SHORTCUTS | SPLIT | DENSE | ROWS


@each_mode
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", ALL)
def test_the_family_equals_its_plain_modules(name, backend, training):
    served(backend, torch.float64)
    compare(*ALL[name], torch.float64, backend, training, draws=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "own-class-projection", "option-a", "pooled", "row-mixed"])
def test_the_family_trains_in_other_dtypes(name, dtype):
    served("cpp", dtype)
    compare(*ALL[name], dtype, "cpp")


@pytest.mark.parametrize(
    "name",
    [
        "basic",
        "basic-projection",
        "basic-pooled-projection",
        "option-a",
        pytest.param("row-mixed", marks=pytest.mark.slow),
    ],
)
def test_the_family_trains_on_triton(name):
    served("triton", torch.float32)
    build, (_, channels, *_) = ALL[name]
    compare(build, (1, channels, 6, 5), torch.float32, "triton", draws=1)


@pytest.mark.parametrize(
    "name", ["bottleneck", "bottleneck-projection", "own-class-projection", "pooled", "squeeze-second"]
)
def test_recomputing_gives_the_same_step(name):
    served("cpp", torch.float64)
    compare(*ALL[name], torch.float64, "cpp", recompute=True, draws=1)


@pytest.mark.parametrize(
    "name", ["basic-projection", "basic-pooled-projection-odd", "option-a", "squeeze-last", "row-mixed"]
)
def test_double_backward_on_eager(name):
    build, shape = ALL[name]
    torch.manual_seed(0)
    model = build().double()
    x = torch.rand(shape, dtype=torch.float64)

    def second(model: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [leaf, *model.parameters()]))

    wanted = second(copy.deepcopy(model))
    with fusedres.use_backend("eager"):
        found = second(fusedres.convert(model))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: PreActBasicBlock(7, 9, 2, conv1x1(7, 9, 2)),
        lambda: PreActBottleneck(7, 3, 2, conv1x1(7, 12, 2)),
        lambda: PreActBottleneck(7, 3, 1, average(7, 12)),
        lambda: PreActBasicBlock(7, 7),
    ],
)
def test_the_modules_equal_their_plain_forward(build, backend):
    served(backend, torch.float64)
    torch.manual_seed(0)
    block, x = build().double(), torch.randn(2, 7, 5, 6, dtype=torch.float64)
    if block.stride == 1 and block.downsample is not None:
        x, block.downsample = x, nn.Sequential(*list(block.downsample)[1:])
    twin = plain(copy.deepcopy(block))
    results = []
    with fusedres.use_backend(backend):
        for model in (block, twin):
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert ran(block) == backend
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


class Counting(Wrapped):
    """A backend that counts the passes that do nothing but reduce statistics."""

    calls = 0

    def call(self, primitive, *args, **kwargs):
        Counting.calls += primitive == "statistics"
        return super().call(primitive, *args, **kwargs)


@pytest.fixture
def counting() -> Iterator[type[Counting]]:
    Counting.calls = 0
    with fusedres.use_backend("eager"), select.observe(Counting):
        yield Counting


def test_the_next_blocks_statistics_are_carried(counting):
    """The first BatchNorm of a pre-activation block takes the statistics that the block before has reduced with its sum."""
    model = fusedres.convert(nn.Sequential(PreActBasicBlock(5, 5), PreActBasicBlock(5, 5)), verify=False)
    model(torch.randn(2, 5, 4, 4))
    # the first block reduces its input by a pass of its own; the second finds what the addition has left
    assert counting.calls == 1


def test_statistics_are_not_carried_past_a_change(counting):
    """What code between two blocks does to a map is not known: statistics do not leave with it."""
    torch.manual_seed(0)
    first, second = PreActBasicBlock(5, 5), PreActBasicBlock(5, 5)
    plain = [copy.deepcopy(block) for block in (first, second)]
    x = torch.randn(2, 5, 4, 4)
    y = first(x)
    y.data.mul_(2)
    found = second(y)
    assert counting.calls == 2
    wanted = super(FusedBlock, plain[1]).forward(2 * super(FusedBlock, plain[0]).forward(x))
    torch.testing.assert_close(found, wanted)


# ---- what a structure takes and what it leaves -----------------------------------------------------------------------


def converted(module: nn.Module) -> list[str]:
    fusedres.convert(module)
    return [name for name, m in module.named_modules() if isinstance(m, FusedBlock)]


class InPlaceOnInput(PreAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(F.relu(x, inplace=True)))) + x


class Gated(PreAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x))) * x


class TwoInputs(PreAct):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.conv1(F.relu(self.bn1(x))) + x


class Branching(PreAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class AddsNoMap(PreAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x))) + 0 * x.sum()


class Scaled(PreAct):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x))) * self.scale + x


@pytest.mark.parametrize("kind", [InPlaceOnInput, Gated, TwoInputs, Branching, AddsNoMap, Scaled])
def test_what_is_neither_a_row_nor_a_sum_of_two_computes_as_before(kind):
    torch.manual_seed(0)
    block = kind(5, 5).double()
    results = []
    for model in (block, fusedres.convert(copy.deepcopy(block))):
        leaf = torch.linspace(-1, 1, 2 * 5 * 4 * 4, dtype=torch.float64).reshape(2, 5, 4, 4).requires_grad_()
        given = leaf * 1
        y = model(given)
        y.square().sum().backward()
        results.append([y, given.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_branch_on_values_leaves_a_block_alone():
    block = Branching(5, 5)
    assert converted(block) == [] and type(block) is Branching


def test_an_unknown_activation_leaves_the_block_alone():
    class Other(PreAct):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.elu(self.bn2(self.conv1(self.elu(self.bn1(x)))))) + x

    block = Other(5, 5)
    block.elu = nn.ELU()
    assert converted(block) == []


def test_foreign_parts_are_steps_and_may_be_converted_themselves():
    class Attention(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x).sigmoid()

    assert converted(Between(6, "last", Attention)) == ["", "extra"]


def test_a_changed_block_runs_its_own_forward_until_it_is_converted_again():
    served("cpp", torch.float32)
    block = fusedres.convert(PreAct(5, 5))
    x = torch.randn(2, 5, 4, 4)
    block.shortcut = nn.Conv2d(5, 5, 1)
    wanted = PreAct.forward(copy.deepcopy(block), x)
    assert torch.equal(block(x), wanted) and "changed" in ran(block)
    fusedres.convert(block)
    torch.testing.assert_close(block(x), wanted)
    assert ran(block) == "cpp"


def test_a_replaced_convolution_is_used():
    served("cpp", torch.float32)
    block = fusedres.convert(PreAct(5, 5))
    block.conv2 = nn.Conv2d(5, 5, 3, 1, 1)
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(block(x), PreAct.forward(copy.deepcopy(block), x))
    assert ran(block) == "cpp"


@pytest.mark.parametrize("where", ["bn2", "extra"])
def test_hooks_inside_fire(where):
    served("cpp", torch.float32)
    block, seen = fusedres.convert(Between(6, "second", Squeeze)), []
    block.get_submodule(where).register_forward_hook(lambda m, i, o: seen.append(o))
    block(torch.randn(2, 6, 4, 4))
    assert len(seen) == 1
    # a hook on what is fused leaves the piece to its modules, one on a foreign module changes nothing
    assert ran(block) == ("cpp" if where == "extra" else "original modules: a hook is registered on its BatchNorm2d")


def test_copies_and_pickles_run_fused():
    served("cpp", torch.float32)
    block = fusedres.convert(PreAct(5, 9, 2)).eval()
    x = torch.randn(2, 5, 4, 4)
    wanted = block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert is_converted(twin) and torch.equal(twin(x), wanted) and ran(twin) == "cpp"


def test_revert_and_state_dict():
    block = PreAct(5, 9, 2)
    before = copy.deepcopy(block.state_dict())
    fusedres.convert(block)
    assert block.state_dict().keys() == before.keys()
    fusedres.revert(block)
    assert type(block) is PreAct and not any(name.startswith("_fusedres") for name in block.__dict__)


def test_modes_have_structures_of_their_own():
    """Dropout inside a layer splits it in training alone."""
    served("cpp", torch.float32)
    model = fusedres.convert(nn.Sequential(Dense(5, 3, drop=0.5), Dense(8, 3)))
    x = torch.randn(2, 5, 4, 4)
    y = model(x)
    assert ran(model) == "cpp" and y.shape == (2, 11, 4, 4)
    assert 0.2 < (y[:, 5:8] == 0).float().mean() < 0.8
    assert (model.eval()(x)[:, 5:8] != 0).all() and ran(model) == "cpp"


def test_dropout_splits_a_dense_block_and_draws_as_the_original():
    served("cpp", torch.float32)
    block = _DenseBlock(3, 6, bn_size=2, growth_rate=4, drop_rate=0.5)
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    twin = fusedres.convert(copy.deepcopy(block))
    results = []
    for model in (block.to(memory_format=torch.channels_last), twin):
        torch.manual_seed(1)
        results.append(model(x))
    assert ran(twin) == "cpp"
    torch.testing.assert_close(*results)


def test_autocast_of_pre_activation_blocks():
    served("cpp", torch.bfloat16)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), PreAct(6, 6), PreAct(6, 8, 2))
    twin = fusedres.convert(copy.deepcopy(model))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = model(x), twin(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    assert [ran(m) for m in twin[1:]] == ["cpp", "cpp"]


def test_the_report_names_the_kinds():
    model = nn.Sequential(PreAct(5, 5), OptionA(5, 5, 1), Between(5, "last", Squeeze), Plain(5))
    kinds = [row.kind for row in fusedres.report(fusedres.convert(model))]
    assert kinds == ["pre-activation basic block", "basic block", "bottleneck", "conv-bn row"]


# ---- the functional form ---------------------------------------------------------------------------------------------


def test_the_functional_forms():
    torch.manual_seed(0)
    block = PreActBasicBlock(4, 4).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def norm(m: nn.BatchNorm2d) -> functional.Norm:
        return functional.Norm(m.weight, m.bias, None, None, True, 0.0, m.eps, "relu")

    same = functional.Geometry((1, 1), (1, 1), (1, 1), 1)
    conv1, conv2 = (functional.Conv(m.weight, None, same) for m in (block.conv1, block.conv2))
    units = (functional.Unit(conv1, norm(block.bn2)), functional.Unit(conv2, None))
    y = functional.preact_block(x, norm(block.bn1), units)
    wanted = block.conv2(F.relu(block.bn2(block.conv1(F.relu(block.bn1(x)))))) + x
    torch.testing.assert_close(y, wanted)
    less = functional.Conv(block.conv1.weight[:, 1:], None, same)
    unit = functional.Unit(less, replace(norm(block.bn2), act="none"))
    zeros = functional.Shortcut(subsample=functional.Subsample((1, 1), 1, 0))
    y = functional.residual_block(x[:, 1:], (unit,), shortcut=zeros)
    h = block.bn2(F.conv2d(x[:, 1:], block.conv1.weight[:, 1:], padding=1))
    torch.testing.assert_close(y, F.relu(h + F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0))))
