"""What a forward reads, and code that is replaced, is noticed before the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from followed import Block, C, OfAClass, assert_equal, converted, step, twins
from narrow import ResNet
from torch import Tensor, nn

import fusedres
from fusedres.convert import left_alone
from fusedres.swap import FusedBlock, state_of

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


# ---- what is read may change later --------------------------------------------------------------------------------------

SCALE = 0.5
NAMES = SimpleNamespace()


def rectified(x: Tensor) -> Tensor:
    return F.relu(x)


class OfAGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * SCALE + x)


class OfAnAttribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.act = 0.5, rectified

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) * self.scale + x)


class OfAFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return rectified(self.body(x) + x)


class OfAnAbsence(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x))


def with_a_closure() -> tuple[nn.Module, Callable[[float], None]]:
    scale = 0.5

    class OfAClosure(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) * scale + x)

    def change(to: float) -> None:
        nonlocal scale
        scale = to

    return OfAClosure(), change


def change_global(monkeypatch, *models):
    monkeypatch.setitem(globals(), "SCALE", 2.0)


def change_class(monkeypatch, *models):
    monkeypatch.setattr(OfAClass, "scale", 2.0)


def change_attribute(monkeypatch, *models):
    for model in models:
        model.scale = 2.0


def change_held_function(monkeypatch, *models):
    for model in models:
        model.act = torch.tanh


def change_function(monkeypatch, *models):
    monkeypatch.setitem(globals(), "rectified", torch.tanh)


def change_code(monkeypatch, *models):
    monkeypatch.setattr(rectified, "__code__", (lambda x: torch.tanh(x)).__code__)


def change_method(monkeypatch, *models):
    monkeypatch.setattr(Block, "body", lambda self, x: self.conv1(x))


def change_forward(monkeypatch, *models):
    monkeypatch.setattr(OfAFunction, "forward", lambda self, x: self.body(x) + x)


def add_to_the_class(monkeypatch, *models):
    monkeypatch.setattr(OfAnAbsence, "shortcut", lambda self, x: 2 * x, raising=False)


def add_a_child(monkeypatch, *models):
    torch.manual_seed(5)
    child = nn.Conv2d(C, C, 1).double()
    for model in models:
        model.shortcut = copy.deepcopy(child)


def change_torch(monkeypatch, *models):
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.tanh(x))


CHANGES = [
    (OfAGlobal, change_global), (OfAClass, change_class), (OfAnAttribute, change_attribute), (OfAnAttribute, change_held_function),
    (OfAFunction, change_function), (OfAFunction, change_code), (OfAFunction, change_method), (OfAFunction, change_forward),
    (OfAnAbsence, add_to_the_class), (OfAnAbsence, add_a_child), (Block, change_torch),
]  # fmt: skip


@pytest.mark.parametrize("called", [True, False], ids=["called-before", "not-called"])
@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=lambda value: value.__name__)
def test_a_later_change_of_what_a_forward_reads_is_noticed(kind, change, called, monkeypatch):
    model, twin = twins(kind)
    assert isinstance(twin, FusedBlock)
    if called:
        assert_equal(model, twin)
        assert state_of(twin).outcome.fused
    change(monkeypatch, model, twin)
    assert_equal(model, twin)
    assert not state_of(twin).outcome.fused


def test_a_later_change_of_a_closure_is_noticed():
    built, change = with_a_closure()
    model = built.double()
    twin = fusedres.convert(copy.deepcopy(model))
    assert isinstance(twin, FusedBlock)
    assert_equal(model, twin)
    change(2.0)
    assert_equal(model, twin)
    assert not state_of(twin).outcome.fused


def test_what_is_undone_runs_fused_again(monkeypatch):
    model, twin = twins(OfAClass)
    with monkeypatch.context() as patched:
        patched.setattr(OfAClass, "scale", 2.0)
        assert_equal(model, twin)
    assert_equal(model, twin)
    assert state_of(twin).outcome.fused


# ---- tensors may be replaced ---------------------------------------------------------------------------------------------


class Gains(Block):
    """A block with a parameter and a buffer of its own in its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((C, 1, 1), 0.3))
        self.register_buffer("offset", torch.full((C, 1, 1), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.gain * self.body(x)) + self.offset


def assign_state(model: nn.Module) -> Callable[[Tensor], Tensor]:
    state = {name: t * 0.5 if t.is_floating_point() else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def assign_attributes(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.gain, model.offset = nn.Parameter(model.gain.detach() * 3), model.offset + 1
    return model


class OfOtherTensors(nn.Module):
    """``inner`` by parameters and buffers that are computed at every call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        tensors = {name: 0.75 * t for name, t in (*self.inner.named_parameters(), ("offset", self.inner.offset))}
        return torch.func.functional_call(self.inner, tensors, (x,))


@pytest.mark.parametrize("called", [True, False], ids=["called-before", "not-called"])
@pytest.mark.parametrize("change", [assign_state, assign_attributes, OfOtherTensors], ids=lambda f: f.__name__)
def test_tensors_of_a_block_may_be_replaced_and_it_stays_fused(change, called):
    model, twin = twins(Gains)
    assert isinstance(twin, FusedBlock)
    if called:
        assert_equal(model, twin)
    assert_equal(change(model), change(twin))
    assert state_of(twin).outcome.fused


def test_one_tensor_by_two_names_is_left_to_the_modules():
    class Tied(Gains):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x) * self.gain + self.tied

    def build() -> nn.Module:
        block = Tied()
        block.tied = block.gain
        return block

    model, twin = twins(build)
    assert "by several names" in dict((m, reason) for _, m, reason in left_alone(twin))[twin]
    for m in (model, twin):
        m.gain = nn.Parameter(torch.full((C, 1, 1), 0.7, dtype=torch.float64))
    assert_equal(model, twin)


# ---- code that was replaced from outside --------------------------------------------------------------------------------


def mirrored(self: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of another padding, as those who make tiles put it into every convolution."""
    padded = F.pad(x, self._reversed_padding_repeated_twice, mode="circular")
    return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def doubled_norm(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def patch_class(cls: type, name: str, function: Callable) -> Callable:
    def patch(monkeypatch, *models: nn.Module) -> None:
        monkeypatch.setattr(cls, name, function)

    return patch


def patch_instances(kind: type[nn.Module], function: Callable, name: str = "forward") -> Callable:
    def patch(monkeypatch, *models: nn.Module) -> None:
        for model in models:
            for module in [m for m in model.modules() if isinstance(m, kind)]:
                setattr(module, name, function.__get__(module))

    return patch


resnet, densenet = torchvision.models.resnet, torchvision.models.densenet


def without_act(self: nn.Module, x: Tensor) -> Tensor:
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return out + (x if self.downsample is None else self.downsample(x))


def without_pool(self: nn.Module, x: Tensor) -> Tensor:
    x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
    return self.fc(torch.flatten(self.avgpool(self.layer4(self.layer3(x))), 1))


def with_gelu(self: nn.Module, x: Tensor) -> Tensor:
    out = F.gelu(self.features(x))
    return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


def twice(self: nn.Module, init_features: Tensor) -> Tensor:
    features = [init_features]
    for layer in self.values():
        features.append(2 * layer(features))
    return torch.cat(features, 1)


def half(self: nn.Module, x: list[Tensor] | Tensor) -> Tensor:
    seen = x if isinstance(x, Tensor) else torch.cat(x, 1)
    return 0.5 * self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(seen))))))


def small_resnet() -> nn.Module:
    return ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def small_densenet() -> nn.Module:
    return densenet.DenseNet(4, (2, 2), 8, num_classes=3)


PATCHES: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "BasicBlock.forward": (small_resnet, patch_class(resnet.BasicBlock, "forward", without_act)),
    "ResNet._forward_impl": (small_resnet, patch_class(resnet.ResNet, "_forward_impl", without_pool)),
    "ResNet.forward": (small_resnet, patch_class(resnet.ResNet, "forward", without_pool)),
    "DenseNet.forward": (small_densenet, patch_class(densenet.DenseNet, "forward", with_gelu)),
    "_DenseBlock.forward": (small_densenet, patch_class(densenet._DenseBlock, "forward", twice)),
    "_DenseLayer.forward": (small_densenet, patch_class(densenet._DenseLayer, "forward", half)),
    "Conv2d._conv_forward": (small_resnet, patch_class(nn.Conv2d, "_conv_forward", mirrored)),
    "Conv2d.forward": (small_densenet, patch_class(nn.Conv2d, "forward", lambda s, x: mirrored(s, x, s.weight, s.bias))),
    "BatchNorm2d.forward": (small_resnet, patch_class(nn.BatchNorm2d, "forward", doubled_norm)),
    "ReLU.forward": (small_resnet, patch_class(nn.ReLU, "forward", lambda s, x: torch.tanh(x))),
    "MaxPool2d.forward": (small_resnet, patch_class(nn.MaxPool2d, "forward", lambda s, x: F.max_pool2d(x, 2))),
    "convolutions' _conv_forward": (small_resnet, patch_instances(nn.Conv2d, mirrored, "_conv_forward")),
    "norms' _call_impl": (small_resnet, patch_instances(nn.BatchNorm2d, doubled_norm, "_call_impl")),
    "convolutions' forward": (small_densenet, patch_instances(nn.Conv2d, lambda s, x: mirrored(s, x, s.weight, s.bias))),
    "norms' forward": (small_resnet, patch_instances(nn.BatchNorm2d, doubled_norm)),
    "blocks' forward": (small_resnet, patch_instances(resnet.BasicBlock, without_act)),
    "activations' forward": (small_resnet, patch_instances(nn.ReLU, lambda s, x: torch.tanh(x))),
    "batch_norm itself": (
        small_resnet, patch_class(F, "batch_norm", lambda x, m, v, w, b, training, *rest: 0.5 * x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after", "after-a-call"])
@pytest.mark.parametrize("name", PATCHES)
def test_code_that_was_replaced_is_what_runs(name, when, monkeypatch):
    build, patch = PATCHES[name]
    torch.manual_seed(0)
    model = build().double()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if when != "before":
        fusedres.convert(twin)
        assert converted(twin)
    if when == "after-a-call":
        model(x), twin(x)
    patch(monkeypatch, model, twin)
    if when == "before":
        fusedres.convert(twin)
    for training in (True, False):
        model.train(training), twin.train(training)
        wanted, found = step(model, x), step(twin, x)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")


def test_the_forward_of_a_patched_class_is_what_is_fused(monkeypatch):
    monkeypatch.setattr(resnet.BasicBlock, "forward", without_act)
    model = fusedres.convert(small_resnet().double())
    assert isinstance(model.layer1[0], FusedBlock)
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert state_of(model.layer1[0]).outcome.fused
