"""The BatchNorms beside nn.BatchNorm2d: torchvision's frozen one, and SyncBatchNorm where it is alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from narrow import ResNet
from support import ran
from torch import nn

import fusedres
from fusedres.swap import FusedBlock
from fusedres.testing import assert_fused, assert_parity, randomize, run_training

pytest.importorskip("torchvision")
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

FUSED = "cpp" if fusedres.backends()["cpp"] == "available" else "eager"


@pytest.fixture(autouse=True)
def one_fused_backend():
    """The compiled backend, or eager's primitives where there is no extension: never the original modules."""
    torch.manual_seed(0)
    with fusedres.use_backend(FUSED):
        yield


def frozen(block: type[nn.Module]) -> nn.Module:
    model = ResNet(block, [1, 1, 1, 1], num_classes=5, norm_layer=FrozenBatchNorm2d)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer, low, high in (
                (module.weight, 0.5, 1.5),
                (module.running_var, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                buffer.uniform_(low, high)
            module.running_mean.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck], ids=["basic", "bottleneck"])
def test_frozen_batch_norms_run_fused(block, training):
    plain = frozen(block).double().train(training)
    model = fusedres.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    theirs, ours = run_training(plain, x), run_training(model, x)
    assert_fused(model, FUSED)
    for key, value in ours.items():
        assert_parity(value, theirs[key], theirs[key], key)


def test_a_frozen_batch_norm_that_widens_its_input_is_left_to_its_own_arithmetic():
    plain = frozen(BasicBlock)
    model = fusedres.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = plain.layer1(plain.conv1(x)), model.layer1(model.conv1(x))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all("BatchNorm in torch.float32 meets torch.bfloat16" in ran(m) for m in model.layer1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_sync_batch_norm_alone_is_a_batch_norm(training):
    plain = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).double()
    randomize(plain)
    plain.train(training)
    model = fusedres.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    theirs, ours = run_training(plain, x), run_training(model, x)
    assert {row.detail for row in fusedres.report(model)} == {FUSED}
    for key, value in ours.items():
        if value.is_floating_point():
            assert_parity(value, theirs[key], theirs[key], key)
        else:
            assert torch.equal(value, theirs[key]), key


def test_a_converted_sync_batch_norm_copies_pickles_and_reverts():
    model = fusedres.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.GELU(), nn.SyncBatchNorm(4)))
    x = torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert all(isinstance(other[i], FusedBlock) and isinstance(other[i], nn.SyncBatchNorm) for i in (1, 3))
        assert {type(m) for m in fusedres.revert(other)} == {nn.Conv2d, nn.SyncBatchNorm, nn.GELU}
