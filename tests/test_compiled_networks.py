"""Whole networks under torch.compile: one graph of operators for every batch, which computes what eager does, to the bit."""

from __future__ import annotations

import collections
import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusedres

pytest.importorskip("torchvision")
from compiling import NEEDS_CPP, assert_close, assert_equal, calls, compiled, images, operators, parts, step, twins  # noqa: E402
from torchvision.models import DenseNet, densenet121, regnet_y_400mf, resnet18, resnet50  # noqa: E402
from torchvision.models.regnet import BlockParams, RegNet  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
pytestmark = [NEEDS_CPP, pytest.mark.usefixtures("proven_once")]


def timm_model(name: str, **arguments):
    return pytest.importorskip("timm").create_model(name, num_classes=5, **arguments)


def preactivation(**arguments) -> nn.Module:
    """A ResNetV2 with BatchNorm."""
    layers = pytest.importorskip("timm.layers")
    return timm_model("resnetv2_50d", norm_layer=layers.BatchNormAct2d, conv_layer=layers.create_conv2d, **arguments)


def of_two_stages(model: nn.Module) -> nn.Module:
    """A ResNet without its last two stages."""
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(
        next(m for m in reversed(list(model.layer2.modules())) if isinstance(m, nn.BatchNorm2d)).num_features, 5
    )
    return model


SMALL = {
    "basic": lambda: of_two_stages(ResNet(BasicBlock, [1, 1, 1, 1])),
    "bottleneck": lambda: of_two_stages(ResNet(Bottleneck, [1, 1, 1, 1])),
    "densenet": lambda: DenseNet(8, (2, 1), 8, bn_size=2, num_classes=5),
    "preactivation": lambda: preactivation(layers=(1, 1), channels=(32, 64)),
    "deep-stem": lambda: of_two_stages(timm_model("resnet50d", layers=[1, 1, 1, 1])),
    "squeeze": lambda: RegNet(BlockParams.from_init_params(2, 16, 8.0, 2.0, 8, se_ratio=0.25), num_classes=5),
}


def without_mean(model: nn.Module) -> nn.Module:
    """A ResNet of torchvision whose last pool has one right result."""
    model.avgpool = nn.AdaptiveMaxPool2d((1, 1))
    return model


#: of which Inductor computes nothing that it rounds otherwise than eager: a mean in another order, a convolution in another layout
EXACT = {
    "basic": lambda: without_mean(SMALL["basic"]()),
    "bottleneck": lambda: without_mean(SMALL["bottleneck"]()),
    "densenet": SMALL["densenet"],
    "pre-activation": lambda: nn.Sequential(
        fusedres.nn.ConvBNAct(3, 16, stride=2),
        fusedres.nn.PreActBasicBlock(16, 16),
        fusedres.nn.PreActBottleneck(16, 4),
    ),
}
FULL = {
    "resnet18": lambda: resnet18(num_classes=5),
    "resnet50": lambda: resnet50(num_classes=5),
    "densenet121": lambda: densenet121(num_classes=5),
    "preactivation": preactivation,
    "regnet": lambda: regnet_y_400mf(num_classes=5),
    "resnet50d": lambda: timm_model("resnet50d"),
}
#: how many parts of each family run fused
FAMILIES = {
    "resnet18": {"residual": 9},
    "resnet50": {"residual": 17},
    "densenet121": {"residual": 1, "dense": 4, "transition": 4},
    "preactivation": {"residual": 18},
    "regnet": {"residual": 33},
    "resnet50d": {"residual": 18},
}
#: in which a convolution is not fused: torch chooses in the trace, by the batch, who computes it
UNFUSED_CONVOLUTION = {"squeeze", "regnet", "preactivation", "deep-stem", "resnet50d"}
#: whose unfused modules stand between operators: a compiler adds their gradients in an order of its own
SUMS_DIFFER = {"squeeze", "regnet"}


def graphs_of_original(model: nn.Module, batches: tuple[int, ...]) -> int:
    """How many graphs the original modules of ``model`` make for these batches."""
    program, counter = compiled(fusedres.revert(copy.deepcopy(model)).eval(), "eager")
    with torch.no_grad():
        for batch in batches:
            program(images(batch))
    return counter.frame_count


def assert_runs_as_eager(
    name: str, build: Callable[[], nn.Module], training: bool, backend: str, batches: tuple[int, ...]
) -> dict[str, int]:
    """Assert that a network is one graph of as many operators as eager runs parts, compiled once more at most, which computes what eager
    does; the operators by kind."""
    model, twin = twins(build, training)
    program, counter = compiled(model, backend)
    for batch in batches:
        found, expected = step(program, images(batch), training), step(twin, images(batch), training)
        but = "gradient" if name in SUMS_DIFFER else "nothing"
        assert_equal(found, expected, but)
        if but != "nothing":
            assert_close(found, expected, 1e-5)
    compilations, fused = counter.frame_count, ("forward", "backward") if training else ("infer",)
    assert sum(operators(counter).values()) == parts(twin)
    kinds = calls(lambda: step(program, images(batches[-1]), training))
    count = collections.Counter(key.rsplit("_")[-1] for key, n in kinds.items() for _ in range(n))
    assert dict(count) == dict.fromkeys(fused, parts(twin))
    allowed = graphs_of_original(twin, batches) if name in UNFUSED_CONVOLUTION else 2
    assert compilations <= allowed, "compiled anew for a batch"
    return kinds


MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def each_network(*quick: str) -> pytest.MarkDecorator:
    """Every small network in both modes, those that are not ``quick`` as slow."""
    ids = {f"{name}-{mode}": (name, mode == "training") for name in SMALL for mode in ("training", "inference")}
    marks = {key: [] if key in quick else [pytest.mark.slow] for key in ids}
    return pytest.mark.parametrize(
        ("name", "training"), [pytest.param(*ids[key], id=key, marks=marks[key]) for key in ids]
    )


@each_network("basic-training", "preactivation-training")
def test_a_network_is_one_graph_of_operators_that_equals_eager_to_the_bit(name, training):
    assert_runs_as_eager(name, SMALL[name], training, "aot_eager", (4,))


@each_network("densenet-training", "squeeze-inference")
def test_a_network_is_compiled_once_more_for_every_other_batch(name, training):
    assert_runs_as_eager(name, SMALL[name], training, "aot_eager", (4, 2))


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", FULL)
def test_published_networks_are_compiled_once_more_for_batches_from_1_to_64(name, training):
    found = assert_runs_as_eager(name, FULL[name], training, "aot_eager", (1, 4, 2, 64))
    forms = ("forward", "backward") if training else ("infer",)
    assert found == {f"{family}_{form}": n for family, n in FAMILIES[name].items() for form in forms}


@pytest.mark.slow
@COMPILER
@MODES
@pytest.mark.parametrize("name", EXACT)
def test_inductor_equals_eager_to_the_bit(name, training):
    assert_runs_as_eager(name, EXACT[name], training, "inductor", (4, 2))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param("basic", True, id="basic-training"),
        pytest.param("densenet", False, id="densenet-inference"),
        pytest.param("basic", False, id="basic-inference", marks=pytest.mark.slow),
        pytest.param("densenet", True, id="densenet-training", marks=pytest.mark.slow),
    ],
)
def test_autocast_equals_eager_to_the_bit(name, training):
    model, twin = twins(SMALL[name], training)
    program, counter = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(step(program, images(), training), step(twin, images(), training))
    assert sum(operators(counter).values()) == parts(twin)


def test_sizes_may_be_symbols():
    model, twin = twins(SMALL["densenet"], False)
    program, counter = compiled(model, dynamic=True)
    for batch, size in ((2, 40), (3, 72), (40, 56)):
        assert_equal(step(program, images(batch, size), False), step(twin, images(batch, size), False))
    assert counter.frame_count <= 2, "compiled anew for more than one size"
