"""What a block remembers between calls is never more than what still holds: every change inside is computed as the plain modules do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.swap import FusedBlock, is_converted, original_class
from fusedres.testing import randomize, run_training

torchvision = pytest.importorskip("torchvision")
from torchvision.models import densenet, resnet  # noqa: E402

pytestmark = [
    pytest.mark.skipif(fusedres.backends()["cpp"] != "available", reason="needs the C++ extension"),
    pytest.mark.usefixtures("proven_once"),
]


def shortcut() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))


class Squeezed(nn.Module):
    """A residual block in two pieces, around what no schedule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.blur = nn.AvgPool2d(3, 1, 1)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.blur(self.bn1(self.conv1(x))))) + x


KINDS = {
    "basic": lambda: resnet.BasicBlock(6, 8, 2, shortcut()),
    "pieces": Squeezed,
    "pre-activation": lambda: fusedres.nn.PreActBasicBlock(6, 6),
    "dense": lambda: densenet._DenseBlock(2, 6, 2, 4, 0.0),
    "transition": lambda: densenet._Transition(6, 4),
    "row": lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
}
SHAPE = (3, 6, 6, 6)


def first(block: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(m for m in block.modules() if isinstance(m, kind))


def new_weight(block: nn.Module) -> None:
    first(block, nn.Conv2d).weight = nn.Parameter(torch.randn_like(first(block, nn.Conv2d).weight))


def new_data(block: nn.Module) -> None:
    weight = first(block, nn.Conv2d).weight
    weight.data = torch.randn_like(weight)


def new_values(block: nn.Module) -> None:
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.mul_(2)  # which no version counts


def new_gamma(block: nn.Module) -> None:
    norm = first(block, nn.BatchNorm2d)
    norm.weight = nn.Parameter(torch.randn_like(norm.weight))


def new_running_mean(block: nn.Module) -> None:
    norm = first(block, nn.BatchNorm2d)
    norm.running_mean = torch.randn_like(norm.running_mean)


def no_affine(block: nn.Module) -> None:
    first(block, nn.BatchNorm2d).weight = None


def no_running_statistics(block: nn.Module) -> None:
    norm = first(block, nn.BatchNorm2d)
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


def other_mode_of_a_norm(block: nn.Module) -> None:
    norm = first(block, nn.BatchNorm2d)
    norm.train(not norm.training)


def other_mode(block: nn.Module) -> None:
    block.train(not block.training)


def momentum(block: nn.Module) -> None:
    first(block, nn.BatchNorm2d).momentum = 0.7


def cumulative_average(block: nn.Module) -> None:
    first(block, nn.BatchNorm2d).momentum = None


def eps(block: nn.Module) -> None:
    first(block, nn.BatchNorm2d).eps = 0.5


def new_convolution(block: nn.Module) -> None:
    parent, name = next((m, n) for m in block.modules() for n, c in m._modules.items() if isinstance(c, nn.Conv2d))
    setattr(parent, name, copy.deepcopy(parent._modules[name]))
    new_data(block)


def other_class(block: nn.Module) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    first(block, nn.Conv2d).__class__ = Doubled


def own_forward(block: nn.Module) -> None:
    convolution = first(block, nn.Conv2d)
    weight, geometry = convolution.weight.detach().clone(), (convolution.stride, convolution.padding)
    convolution.forward = lambda x: nn.functional.conv2d(x, weight, None, *geometry)


def hook(block: nn.Module) -> None:
    first(block, nn.BatchNorm2d).register_forward_hook(lambda module, inputs, output: output * 2)


def pre_hook(block: nn.Module) -> None:
    first(block, nn.Conv2d).register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def parametrized(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(first(block, nn.Conv2d))
    with torch.no_grad():
        first(block, nn.Conv2d).parametrizations.weight.original0.mul_(2)


def dilated(block: nn.Module) -> None:
    convolution = first(block, nn.Conv2d)
    if convolution.kernel_size == (3, 3) and convolution.padding == (1, 1):
        convolution.dilation = convolution.padding = (2, 2)


def frozen(block: nn.Module) -> None:
    first(block, nn.Conv2d).requires_grad_(False)


CHANGES = [
    new_weight, new_data, new_values, new_gamma, new_running_mean, no_affine, no_running_statistics, other_mode_of_a_norm,
    other_mode, momentum, cumulative_average, eps, new_convolution, other_class, own_forward, hook, pre_hook, parametrized,
    dilated, frozen,
]  # fmt: skip


def warm(kind: str, training: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A converted block that remembers a call."""
    torch.manual_seed(0)
    block = KINDS[kind]()
    randomize(block)
    block = fusedres.convert(block.to(dtype).train(training))
    x = torch.randn(SHAPE, dtype=dtype)
    for _ in range(2):
        block(x)
    assert block._fusedres.reading is not None and block._fusedres.outcome.backend == "cpp"
    return block


def plain_twin(block: nn.Module) -> nn.Module:
    """The same numbers by the original modules."""
    twin = copy.deepcopy(block)
    if is_converted(twin):
        return fusedres.revert(twin)
    twin.__class__ = original_class(twin)
    return twin


def assert_computes_as_its_modules(block: nn.Module, dtype: torch.dtype = torch.float64, steps: int = 2) -> None:
    plain = plain_twin(block)
    for seed in range(steps):
        x = torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        ours, theirs = run_training(block, x), run_training(plain, x)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert (value is None) == (theirs[name] is None), name
            if value is not None:
                torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_noticed(kind, change, training):
    block = warm(kind, training)
    change(block)
    assert_computes_as_its_modules(block)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_undone_is_fused_again(kind):
    block, x = warm(kind, True), torch.randn(SHAPE, dtype=torch.float64)
    convolution = first(block, nn.Conv2d)
    handle = convolution.register_forward_hook(lambda module, inputs, output: None)
    block(x)
    assert "hook" in block._fusedres.outcome.reason
    handle.remove()
    block(x)
    assert block._fusedres.outcome.backend == "cpp"
    nn.utils.parametrizations.weight_norm(convolution)
    block(x)
    assert not block._fusedres.outcome.fused
    nn.utils.parametrize.remove_parametrizations(convolution, "weight")
    block(x)
    assert block._fusedres.outcome.backend == "cpp"
    assert_computes_as_its_modules(block)


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_noticed(kind):
    block = warm(kind, False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        block.to(dtype)
        y = block(torch.randn(SHAPE, dtype=dtype))
        assert y.dtype == dtype and block._fusedres.outcome.backend == "cpp"
    block.half()
    with pytest.raises(RuntimeError):
        block(torch.randn(SHAPE))
    # the parameters alone, whose objects stay the same
    for parameter in block.parameters():
        parameter.data = parameter.data.float()
    with pytest.raises(RuntimeError):
        block(torch.randn(SHAPE, dtype=torch.half))


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_is_noticed(kind):
    block = warm(kind, False).to("meta")
    y = block(torch.randn(SHAPE, dtype=torch.float64, device="meta"))
    assert y.device.type == "meta" and not block._fusedres.outcome.fused
    with pytest.raises(RuntimeError):
        block(torch.randn(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_are_checked(kind):
    block = warm(kind, True)
    block(torch.randn(2, 6, 4, 8, dtype=torch.float64))
    assert block._fusedres.outcome.backend == "cpp"
    with pytest.raises(RuntimeError):
        block(torch.randn(2, 5, 4, 8, dtype=torch.float64))
    first(block, nn.Conv2d).weight.data = torch.randn(8, 9, 3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        block(torch.randn(SHAPE, dtype=torch.float64))


def test_one_value_per_channel_is_an_error_also_after_other_calls():
    block = warm("row", True)
    before = block[1].num_batches_tracked.clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 6, 1, 1, dtype=torch.float64))
    assert torch.equal(block[1].num_batches_tracked, before)


def test_a_norm_that_stands_twice_counts_twice():
    block = resnet.BasicBlock(6, 6)
    block.bn2 = block.bn1
    assert_computes_as_its_modules(fusedres.convert(block.double()))
    assert block._fusedres.outcome.backend == "cpp" and block.bn1.num_batches_tracked == 4


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_after_a_call_without(kind):
    block = warm(kind, False, torch.float32)
    x = torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        casts = isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv2d)
        assert block(x).dtype == plain_twin(block)(x).dtype
        assert (block._fusedres.outcome.backend == "cpp") == casts
    assert block(x).dtype == torch.float32 and block._fusedres.outcome.backend == "cpp"


@pytest.mark.parametrize("kind", KINDS)
def test_copies_remember_nothing(kind):
    block = warm(kind, True)
    state = block.state_dict().keys()
    for twin in (copy.copy(block), copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert not any(m._fusedres.reading is not None for m in twin.modules() if isinstance(m, FusedBlock))
        assert twin.state_dict().keys() == state
    assert_computes_as_its_modules(copy.deepcopy(block))


def test_what_stood_inside_is_freed_at_the_next_call():
    block, x = warm("basic", True), torch.randn(SHAPE, dtype=torch.float64)
    old = weakref.ref(block.conv2), weakref.ref(block.conv1.weight)
    block.conv2 = copy.deepcopy(block.conv2)
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach().clone())
    block(x)
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_weights_that_were_computed_are_used_and_not_kept():
    block, x = warm("basic", True), torch.randn(SHAPE, dtype=torch.float64)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    weights = {name: 2 * leaf for name, leaf in leaves.items()}
    y = torch.func.functional_call(block, weights, (x,))
    assert block._fusedres.outcome.backend == "cpp"
    twin = fusedres.revert(copy.deepcopy(block))
    torch.testing.assert_close(y, torch.func.functional_call(twin, weights, (x,)), rtol=1e-9, atol=1e-9)
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    kept = [weakref.ref(w) for w in weights.values()]
    del weights, y
    gc.collect()
    assert not any(ref() is not None for ref in kept)
