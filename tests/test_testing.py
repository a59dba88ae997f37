"""``fusedres.testing``: the rule, and the primitive in which a wrong number begins."""

from __future__ import annotations

from typing import Any

import forked
import pytest
import torch
from support import served
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.autograd.residual import Residual
from fusedres.backends import select
from fusedres.backends.contract import Backend, Wrapped
from fusedres.specs import Conv, Geometry, Norm, Unit
from fusedres.testing import assert_fused, assert_parity, error, first_difference, randomize

CHANNEL = 3


class Faulty(Wrapped):
    """A backend of which one primitive's result, or what it writes, has one wrong channel."""

    def __init__(self, inner: Backend, primitive: str, tensor: str, factor: float = 1.01) -> None:
        super().__init__(inner)
        self.primitive, self.tensor, self.factor = primitive, tensor, factor

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        result = super().call(primitive, *args, **kwargs)
        if primitive == self.primitive:
            for value in self.written(args, kwargs, result):
                value[:, CHANNEL] *= self.factor
        return result

    def written(self, args: tuple, kwargs: dict, result: Any) -> list[Tensor]:
        """Where the fault goes."""
        if kwargs.get(self.tensor) is not None:
            return [kwargs[self.tensor]]
        operands = [a for a in args if isinstance(a, tuple) and self.tensor in getattr(a, "_fields", ())]
        found = [getattr(operand, self.tensor) for operand in operands]
        if any(value is not None for value in found):
            return [value for value in found if value is not None]
        return [result[0] if isinstance(result, tuple) else result]


def block(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, channels = {
        "residual": lambda: (BasicBlock(8, 8), 8),
        "dense": lambda: (_DenseBlock(2, 8, 2, 4, 0.0), 8),
        "transition": lambda: (_Transition(8, 6), 8),
    }[kind]()
    randomize(model)
    return fusedres.convert(model), torch.randn(4, channels, 8, 6)


FAULTS = [
    ("residual", "conv_forward", "stats"),
    ("residual", "conv_forward", "out"),
    ("residual", "bn_coefficients", "scale_shift"),
    ("residual", "add_act_forward", "out"),
    ("residual", "add_act_backward", "sums"),
    ("residual", "conv_backward", "dx"),
    ("dense", "conv_forward", "out"),
    ("dense", "conv_backward", "sums"),
    ("transition", "pool_backward", "sums"),
    ("transition", "pool_forward", "out"),
]


@pytest.mark.parametrize(("kind", "primitive", "tensor"), FAULTS)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_the_first_difference_is_where_the_fault_is(backend, kind, primitive, tensor):
    served(backend, torch.float32)
    model, x = block(kind)
    found = first_difference(model, x, backend=Faulty(select.get(backend), primitive, tensor))
    assert found is not None
    assert (found.primitive, found.channel, found.backend, found.call) == (primitive, CHANNEL, backend, 1)
    assert found.tensor == tensor
    assert found.error > 2 * found.eager_error
    said = str(found)
    assert all(word in said for word in (primitive, tensor, f"channel {CHANNEL}", "eager's own error", backend))


def test_a_fault_in_a_weights_gradient_and_nan_are_found():
    model, x = block("residual")

    class Weight(Faulty):
        def written(self, args: tuple, kwargs: dict, result: Any) -> list[Tensor]:
            return [result[1].transpose(0, 1)]

    found = first_difference(model, x, backend=Weight(select.get("eager"), "conv_backward", ""))
    assert found is not None and (found.tensor, found.channel) == ("dweight", CHANNEL)
    found = first_difference(model, x, backend=Faulty(select.get("eager"), "conv_forward", "out", float("nan")))
    assert found is not None and (found.primitive, found.channel, found.error) == (
        "conv_forward",
        CHANNEL,
        float("inf"),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["residual", "dense", "transition"])
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_where_nothing_is_wrong_there_is_no_difference(backend, kind, dtype, training):
    served(backend, dtype)
    model, x = block(kind)
    model.to(dtype).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert first_difference(model, x.to(dtype), backend=backend) is None
    # it ran on a copy
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_description_can_be_looked_at_too():
    torch.manual_seed(0)
    running = torch.zeros(6), torch.ones(6)
    norm = Norm(
        torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True), *running, True, 0.1, 1e-5, "relu"
    )
    conv = Conv(torch.randn(6, 5, 3, 3, requires_grad=True), None, Geometry((1, 1), (1, 1), (1, 1), 1))
    spec, x = Residual((Unit(conv, norm),)), torch.randn(2, 5, 6, 4)
    assert first_difference(spec, x, backend="eager") is None
    assert torch.equal(running[0], torch.zeros(6)) and conv.weight.grad is None
    found = first_difference(spec, x, backend=Faulty(select.get("eager"), "conv_forward", "stats"))
    assert found is not None and (found.primitive, found.tensor) == ("conv_forward", "stats")


def test_original_modules_have_no_primitives():
    model, x = block("residual")
    model.conv1.register_forward_hook(lambda module, args, y: y)
    with pytest.raises(ValueError, match="no primitive ran"):
        first_difference(model, x)


def test_the_package_does_not_import_it():
    code = "import sys, fusedres; sys.exit('fusedres.testing' in sys.modules)"
    assert forked.python(["-P", "-c", code]).returncode == 0


def test_errors_are_relative_and_what_is_not_finite_never_passes():
    truth = torch.tensor([3.0, -4.0], dtype=torch.float64)
    norm, largest = error(torch.tensor([3.0, -4.5]), truth)
    assert (norm, largest) == (0.1, 0.125)
    nan, inf = torch.tensor([float("nan"), 0.0]), torch.tensor([float("inf"), 0.0])
    assert error(nan, truth) == error(inf, truth) == (float("inf"), float("inf"))
    for wrong in (nan, inf):
        with pytest.raises(AssertionError, match="sum: 2-norm error inf"):
            assert_parity(wrong, wrong, truth, "sum")


def test_the_rule_is_twice_eagers_error_and_a_rounding():
    truth = torch.ones(4, dtype=torch.float64)
    eager, eps = torch.ones(4) * (1 + 1e-4), torch.finfo(torch.float32).eps
    assert_parity(torch.ones(4) * (1 + 2e-4), eager, truth)
    with pytest.raises(AssertionError, match="eager's own 0.0001"):
        assert_parity(torch.ones(4) * (1 + 2.1e-4), eager, truth)
    assert_parity(torch.ones(4) * (1 + eps), truth.float(), truth)
    with pytest.raises(AssertionError):
        assert_parity(torch.ones(4) * (1 + 3 * eps), truth.float(), truth)
    # one draw of three may be struck
    assert_parity([eager, eager, 2 * eager], [eager] * 3, [truth] * 3)
    with pytest.raises(AssertionError, match="torch.float64, eager gives torch.float32"):
        assert_parity(truth, eager, truth)


def test_assert_fused_wants_every_block_on_the_backend():
    model, x = block("residual")
    with fusedres.use_backend("eager"):
        model(x)
    assert_fused(model, "eager")
    with pytest.raises(AssertionError, match="eager"):
        assert_fused(model, "cpp")
    with pytest.raises(AssertionError, match="nothing was converted"):
        assert_fused(nn.Conv2d(1, 1, 1), "eager")
