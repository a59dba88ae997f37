"""Models as their libraries build them, without weights: converted they compute the same step, and their blocks run fused."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends import select
from fusedres.swap import FusedBlock
from fusedres.testing import assert_fused, assert_parity, compare, randomize

pytestmark = [
    pytest.mark.usefixtures("proven_once"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Output(nn.Module):
    """``model`` reduced to one tensor of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        y = getattr(y, "logits", y)
        if isinstance(y, dict):  # the maps of a pyramid, or of a segmentation
            y = torch.cat([map.flatten(1) for map in y.values()], 1)
        return y[-1] if isinstance(y, list | tuple) else y


def timm(name: str, **arguments) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("timm").create_model(name, num_classes=5, **arguments)


def torchvision(name: str, **arguments) -> nn.Module:
    return pytest.importorskip("torchvision").models.get_model(name, num_classes=5, **arguments)


def torchvision_segmentation(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5)


def optical_flow() -> Any:
    pytest.importorskip("torchvision")
    return importlib.import_module("torchvision.models.optical_flow").raft_large()


def torchvision_pyramid(norm: Callable[[int], nn.Module]) -> nn.Module:
    pytest.importorskip("torchvision")
    utils = importlib.import_module("torchvision.models.detection.backbone_utils")
    return utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)


def pytorchcv(name: str, **arguments) -> nn.Module:
    pytest.importorskip("pytorchcv")
    return importlib.import_module("pytorchcv.model_provider").get_model(name, pretrained=False, **arguments)


def monai_densenet() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.DenseNet(2, 3, 5, init_features=16, growth_rate=8, block_config=(2, 3), bn_size=2)


def monai(name: str, **arguments) -> nn.Module:
    return getattr(pytest.importorskip("monai.networks.nets"), name)(spatial_dims=2, **arguments)


def xrayvision_densenet() -> nn.Module:
    return pytest.importorskip("torchxrayvision").models.DenseNet(num_classes=5, in_channels=1)


def without_gradient(model: nn.Module, *parts: str) -> nn.Module:
    """``model`` without gradients of what a BatchNorm behind it removes: zero up to rounding, of which the rule makes nothing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.search(part, name) for part in parts))
    return model


def segmentation(encoder: str, architecture: str = "Unet", **arguments) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return getattr(smp, architecture)(encoder, encoder_weights=None, **arguments)


def transformers(kind: str = "ResNet", **arguments) -> nn.Module:
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{kind}Config")
    model = getattr(library, f"{kind}ForImageClassification")
    return model(config(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=5, **arguments))


IMAGE = (2, 3, 64, 64)
# the model, its input, and how many fused blocks of at least two layers convert has to make
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "timm-resnet18": (lambda: timm("resnet18"), IMAGE, 8),
    "timm-resnet26d": (lambda: timm("resnet26d"), IMAGE, 8),
    "timm-resnet50": (lambda: timm("resnet50"), IMAGE, 16),
    "timm-seresnet18": (lambda: timm("seresnet18"), IMAGE, 8),
    "timm-resnetblur18": (lambda: timm("resnetblur18"), IMAGE, 8),
    "timm-ecaresnet26t": (lambda: timm("ecaresnet26t"), IMAGE, 8),
    # a BatchNorm over as many values as there are images decides its attention: over two it forgets their size
    "timm-skresnet18": (lambda: timm("skresnet18"), (6, 3, 64, 64), 8),
    "timm-resnest14d": (lambda: without_gradient(timm("resnest14d"), "fc1.bias"), IMAGE, 4),
    "timm-resnext50": (lambda: timm("resnext50_32x4d"), IMAGE, 16),
    "timm-drop-block": (lambda: timm("resnet26", drop_block_rate=0.1).eval(), IMAGE, 8),
    "timm-res2net": (lambda: timm("res2net50_26w_4s"), IMAGE, 1),
    "timm-resnetv2-18": (lambda: timm("resnetv2_18"), IMAGE, 8),
    "timm-resnetv2-18d": (lambda: timm("resnetv2_18d"), IMAGE, 8),
    "timm-resnetv2-50": (lambda: timm("resnetv2_50"), IMAGE, 16),
    "timm-densenet121": (lambda: timm("densenet121"), IMAGE, 7),
    "timm-densenetblur121d": (lambda: timm("densenetblur121d"), IMAGE, 4),
    "timm-regnetx-002": (lambda: timm("regnetx_002"), IMAGE, 13),
    "timm-regnety-002": (lambda: timm("regnety_002"), IMAGE, 13),
    "timm-hrnet-small": (lambda: without_gradient(timm("hrnet_w18_small"), "downsamp_modules", "final_layer"), IMAGE, 20),
    "timm-legacy-seresnet18": (lambda: timm("legacy_seresnet18"), IMAGE, 8),
    "timm-vovnet": (lambda: timm("vovnet39a"), IMAGE, 1),
    "timm-resnet10t": (lambda: timm("resnet10t"), IMAGE, 5),
    "timm-resnet34": (lambda: timm("resnet34"), IMAGE, 16),
    "timm-resnet50d": (lambda: timm("resnet50d"), IMAGE, 17),
    "timm-seresnext26t": (lambda: timm("seresnext26t_32x4d"), IMAGE, 9),
    "timm-resnetv2-50d": (lambda: timm("resnetv2_50d"), IMAGE, 17),
    "timm-wide-resnet50": (lambda: timm("wide_resnet50_2"), IMAGE, 16),
    "timm-densenet169": (lambda: timm("densenet169"), IMAGE, 8),
    "timm-gernet-s": (lambda: timm("gernet_s"), IMAGE, 16),
    "timm-cspresnet50": (lambda: timm("cspresnet50"), IMAGE, 17),
    "timm-repvgg-a0": (lambda: timm("repvgg_a0"), IMAGE, 27),
    "timm-dla34": (lambda: timm("dla34"), IMAGE, 8),
    "timm-selecsls42": (lambda: timm("selecsls42"), (6, 3, 64, 64), 12),  # maps of one pixel, as above
    "torchvision-resnet34": (lambda: torchvision("resnet34"), IMAGE, 17),
    "torchvision-mnasnet": (lambda: torchvision("mnasnet0_5"), IMAGE, 17),
    "torchvision-fcn-resnet50": (lambda: torchvision_segmentation("fcn_resnet50"), IMAGE, 17),
    "torchvision-pyramid": (lambda: torchvision_pyramid(nn.BatchNorm2d), IMAGE, 8),
    "torchvision-resnet18": (lambda: torchvision("resnet18"), IMAGE, 8),
    # its blocks end in an activation in front of the addition, and one behind it
    "torchvision-raft-encoder": (lambda: without_gradient(optical_flow().context_encoder, r"\.0\.bias"), IMAGE, 6),
    "torchvision-densenet121": (lambda: torchvision("densenet121"), IMAGE, 7),
    "torchvision-regnet-x-400mf": (lambda: torchvision("regnet_x_400mf"), IMAGE, 22),
    "torchvision-regnet-y-400mf": (lambda: torchvision("regnet_y_400mf"), IMAGE, 16),
    "torchvision-vgg11-bn": (lambda: torchvision("vgg11_bn"), IMAGE, 1),
    "pytorchcv-resnet20": (lambda: pytorchcv("resnet20_cifar10"), (2, 3, 32, 32), 9),
    "pytorchcv-preresnet20": (lambda: pytorchcv("preresnet20_cifar10"), (2, 3, 32, 32), 9),
    "pytorchcv-densenet40": (lambda: pytorchcv("densenet40_k12_cifar10"), (2, 3, 32, 32), 3),
    "pytorchcv-densenet40-bc": (lambda: pytorchcv("densenet40_k12_bc_cifar10"), (2, 3, 32, 32), 3),
    "pytorchcv-seresnet20": (lambda: pytorchcv("seresnet20_cifar10"), (2, 3, 32, 32), 9),
    "pytorchcv-resnet56": (lambda: pytorchcv("resnet56_cifar10"), (2, 3, 32, 32), 28),
    "pytorchcv-preresnet56": (lambda: pytorchcv("preresnet56_cifar10"), (2, 3, 32, 32), 27),
    "pytorchcv-resnext29": (lambda: pytorchcv("resnext29_32x4d_cifar10"), (2, 3, 32, 32), 10),
    "pytorchcv-ror": (lambda: pytorchcv("ror3_56_cifar10"), (2, 3, 32, 32), 29),
    "pytorchcv-pyramidnet": (
        lambda: without_gradient(pytorchcv("pyramidnet110_a48_cifar10"), "init_block", r"unit\d+\.bn\.bias"),
        (2, 3, 32, 32),
        54,
    ),
    "monai-densenet": (monai_densenet, IMAGE, 3),
    "segmentation-resnet18": (lambda: segmentation("resnet18", decoder_channels=(64, 32, 16, 8, 8)), IMAGE, 8),
    "segmentation-deeplab-resnet34": (lambda: segmentation("resnet34", "DeepLabV3Plus"), IMAGE, 19),
    "monai-resnet18": (
        lambda: without_gradient(monai("resnet18", n_input_channels=3, num_classes=5), r"downsample\.0\.bias"),
        IMAGE,
        8,
    ),
    "monai-densenet121": (lambda: monai("DenseNet121", in_channels=3, out_channels=5), IMAGE, 8),
    "xrayvision-densenet121": (xrayvision_densenet, (2, 1, 64, 64), 8),
    "transformers-resnet": (transformers, IMAGE, 4),
    "transformers-resnet-basic": (lambda: transformers(layer_type="basic"), IMAGE, 5),
    "transformers-regnet-x": (lambda: transformers("RegNet", layer_type="x", groups_width=8), IMAGE, 5),
    "transformers-regnet-y": (lambda: transformers("RegNet", layer_type="y", groups_width=8), IMAGE, 5),
}  # fmt: skip


#: one of a kind; the others take minutes together
QUICK = (
    "timm-resnet26d", "timm-seresnet18", "timm-resnetblur18", "timm-resnetv2-18d", "timm-densenetblur121d", "timm-regnety-002",
    "torchvision-raft-encoder", "pytorchcv-preresnet20", "pytorchcv-densenet40-bc", "monai-densenet", "segmentation-resnet18",
    "transformers-resnet",
)  # fmt: skip


#: training and inference take turns
IN_BOTH_MODES = [
    pytest.param(name, training, id=f"{name}-{mode}", marks=[] if (name, mode) in quick else [pytest.mark.slow])
    for quick in [{(name, ("training", "inference")[i % 2]) for i, name in enumerate(QUICK)}]
    for name in MODELS
    for training, mode in ((True, "training"), (False, "inference"))
]


@pytest.mark.parametrize(("name", "training"), IN_BOTH_MODES)
def test_a_model_computes_the_same_converted(name, training):
    if reason := select.why_not("cpp", torch.device("cpu"), torch.float64):
        pytest.skip(reason)
    build, shape, least = MODELS[name]
    model = fusedres.convert(build())
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) >= least
    compare(lambda: Output(build()), shape, torch.float64, "cpp", training, draws=1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_optical_flow_is_the_same_converted(training):
    torch.manual_seed(0)
    plain = optical_flow().train(training)
    model = fusedres.convert(copy.deepcopy(plain))
    images = torch.rand(2, 1, 3, 128, 128)
    with torch.no_grad():
        ours, theirs = (m(*images, num_flow_updates=1)[0] for m in (model, plain))
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) >= 7
    # its coordinates are float32 whatever its dtype, so that there is no float64 to compare with: a hundred roundings
    assert (ours - theirs).norm() <= 100 * torch.finfo(torch.float32).eps * theirs.norm()


@pytest.mark.parametrize(
    "name", ["pytorchcv-preresnet20", "monai-densenet", "transformers-resnet", "timm-resnetblur18", "timm-regnety-002"]
)
def test_running_statistics_agree_after_three_steps(name):
    if reason := select.why_not("cpp", torch.device("cpu"), torch.float64):
        pytest.skip(reason)
    build, shape, _ = MODELS[name]
    torch.manual_seed(0)
    plain = Output(build()).double()
    randomize(plain)
    model = fusedres.convert(copy.deepcopy(plain))
    batches = torch.randn(3, *shape, dtype=torch.float64)
    for m in (plain, model):
        optimizer = torch.optim.SGD(m.parameters(), 1e-3)
        for x in batches:
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    assert_fused(model, "cpp")
    for (key, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        if ours.is_floating_point():
            assert_parity(ours, theirs, theirs, key)
        else:
            assert torch.equal(ours, theirs), key
            assert ours.numel() != 1 or ours == 3, key


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_detection_backbone_with_frozen_batch_norms_computes_the_same(training):
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    plain = torchvision_pyramid(ops.FrozenBatchNorm2d).double().train(training)
    model = fusedres.convert(copy.deepcopy(plain))
    x = torch.randn(IMAGE, dtype=torch.float64)
    found = []
    for m in (model, plain):
        out = torch.cat([map.flatten(1) for map in m(x).values()], 1)
        out.square().mean().backward()
        found.append({"output": out} | {n: p.grad for n, p in m.named_parameters() if p.requires_grad})
    for key, value in found[0].items():
        assert_parity(value, found[1][key], found[1][key], key)


#: one model of each of many of timm's files, residual or not
SAMPLE = (
    "convnext_atto", "cspresnet50", "dla34", "dpn48b", "efficientnet_b0", "ese_vovnet19b_dw", "gernet_s", "ghostnet_100",
    "hardcorenas_a", "inception_v3", "legacy_xception", "mixnet_s", "mobilenetv3_small_100", "nf_resnet26", "rexnet_100", "repvgg_a0",
    "res2net50_26w_4s", "resnetv2_50x1_bit", "selecsls42", "skresnet18", "tresnet_m", "vgg11_bn", "vit_tiny_patch16_224", "xception41",
)  # fmt: skip


#: whose many blocks are of the kinds that others have, or that the tests of general blocks see
LONG = ("inception_v3", "legacy_xception", "mixnet_s", "selecsls42", "tresnet_m", "xception41")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in SAMPLE])
def test_convert_never_raises(name):
    library = pytest.importorskip("timm")
    if not library.is_model(name):
        pytest.skip("not in this version")
    with torch.device("meta"):
        model = library.create_model(name)
    assert fusedres.convert(model) is model
    str(fusedres.report(model))
    fusedres.revert(model)
    assert not any(isinstance(m, FusedBlock) for m in model.modules())


def timm_files() -> list[str]:
    """The files of timm that models stand in, none where it is not installed."""
    try:
        return importlib.import_module("timm").list_modules()
    except ImportError:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("file", timm_files())
def test_convert_raises_for_no_model_of_timm(file):
    library = importlib.import_module("timm")
    for name in library.list_models(module=file):
        with torch.device("meta"):
            try:
                model = library.create_model(name)
            except (RuntimeError, NotImplementedError):
                continue  # cannot be built there
        keys = list(model.state_dict())
        try:
            fusedres.convert(model)
            str(fusedres.report(model))
            fusedres.revert(model)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
        assert list(model.state_dict()) == keys, name
        assert not any(isinstance(m, FusedBlock) for m in model.modules()), name
