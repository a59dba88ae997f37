"""The proof at conversion finds what differs, leaves it alone and says so; it changes nothing, and is made once for a structure. On the
user's own input the same is told of a whole model."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.autograd.residual import Residual
from fusedres.autograd.transition import Transition
from fusedres.convert import left_alone
from fusedres.swap import FusedBlock, original_class

verify = sys.modules["fusedres.verify"]  # the package gives the function its name


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


class Block(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Transitional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.pool = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.norm(x))))


def without_last_act(spec: Residual) -> Residual:
    return dataclasses.replace(spec, act="none")


def without_shortcut(spec: Residual) -> Residual:
    return dataclasses.replace(spec, shortcut=None)


def of_other_momentum(spec: Residual) -> Residual:
    first = spec.units[0]
    units = (dataclasses.replace(first, norm=dataclasses.replace(first.norm, momentum=0.3)), *spec.units[1:])
    return dataclasses.replace(spec, units=units)


def of_other_eps(spec: Residual) -> Residual:
    first = spec.units[0]
    units = (dataclasses.replace(first, norm=dataclasses.replace(first.norm, eps=1e-3)), *spec.units[1:])
    return dataclasses.replace(spec, units=units)


def by_the_batch_alone(spec: Residual) -> Residual:
    first = spec.units[0]
    norm = dataclasses.replace(first.norm, training=True, running_mean=None, running_var=None)
    return dataclasses.replace(spec, units=(dataclasses.replace(first, norm=norm), *spec.units[1:]))


def wrongly(monkeypatch, change: Callable[[Residual], Residual]) -> None:
    """Make every residual block run as ``change`` describes it."""
    run = Residual.run

    def changed(self: Residual, *args, **kwargs):
        return run(change(self) if self.units else self, *args, **kwargs)

    monkeypatch.setattr(Residual, "run", changed)


WRONG = [without_last_act, without_shortcut, of_other_momentum, of_other_eps, by_the_batch_alone]


@pytest.mark.parametrize("change", WRONG)
def test_a_block_that_would_compute_something_else_is_left_alone_and_named(change, monkeypatch):
    wrongly(monkeypatch, change)
    model = nn.Sequential(Block(), nn.Conv2d(6, 3, 1))
    with pytest.warns(RuntimeWarning, match="leaves 0 alone: fused, "):
        fusedres.convert(model)
    assert type(model[0]) is Block
    ((path, _, reason),) = left_alone(model)
    assert path == "0" and reason.startswith("fused, ") and "differs by" in reason
    assert reason in str(fusedres.report(model))


def test_what_raises_when_it_is_fused_is_left_alone(monkeypatch):
    def fails(self, *args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Residual, "run", fails)
    with pytest.warns(RuntimeWarning, match="raises RuntimeError: no such kernel"):
        model = fusedres.convert(Block())
    assert type(model) is Block


def test_a_wrong_transition_is_left_alone(monkeypatch):
    run = Transition.run
    monkeypatch.setattr(Transition, "run", lambda s, b, x, *a, **k: run(s, b, 2 * x, *a, **k))
    with pytest.warns(RuntimeWarning, match="leaves"):
        assert type(fusedres.convert(Transitional())) is Transitional


def test_a_wrong_row_is_left_alone(monkeypatch):
    wrongly(monkeypatch, of_other_eps)
    row = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.warns(RuntimeWarning, match="leaves"):
        assert type(fusedres.convert(row)) is nn.Sequential


def test_without_the_proof_it_is_converted(monkeypatch):
    wrongly(monkeypatch, without_last_act)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(fusedres.convert(Block(), verify=False), FusedBlock)


def test_a_block_that_was_fused_without_proof_is_given_back_where_it_is_wrong(monkeypatch):
    block = fusedres.convert(Block(), verify=False)
    wrongly(monkeypatch, without_last_act)
    with pytest.warns(RuntimeWarning):
        fusedres.convert(block)
    assert type(block) is Block


def counted(monkeypatch) -> list[nn.Module]:
    proven: list[nn.Module] = []
    disprove = verify.disprove

    def count(claim):
        proven.append(claim.block)
        return disprove(claim)

    monkeypatch.setattr(verify, "disprove", count)
    return proven


def test_a_structure_is_proven_once_on_its_narrowest_block(monkeypatch):
    proven = counted(monkeypatch)
    model = nn.Sequential(Block(32), Block(16), Block(24), Block(16))
    fusedres.convert(model)
    assert proven == [model[1]] and all(isinstance(block, FusedBlock) for block in model)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b.conv1, "stride", (2, 2)) or setattr(b.conv2, "stride", (1, 1)),
        lambda b: setattr(b.bn1, "momentum", None),
        lambda b: setattr(b, "conv1", nn.Conv2d(16, 16, 3, padding=1, bias=True)),
        lambda b: setattr(b, "conv1", nn.Conv2d(16, 16, 3, padding=1, groups=2)),
        lambda b: setattr(b, "bn2", nn.BatchNorm2d(16, affine=False)),
    ],
    ids=["stride", "momentum", "bias", "groups", "affine"],
)
def test_other_structures_are_proven_by_themselves(change, monkeypatch):
    proven = counted(monkeypatch)
    model = nn.Sequential(Block(16), Block(16))
    change(model[1])
    fusedres.convert(model)
    assert len(proven) == 2


class Counting(nn.Module):
    """What a block may hold and a proof may not run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


class WithCounting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.extra = Counting()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.extra(F.relu(self.bn1(self.conv1(x)))))) + x)


def test_a_proof_runs_nothing_whose_effects_are_not_known():
    seen: list[nn.Module] = []

    class Global(Counting):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self)
            return x * self.weight

    block = WithCounting()
    block.extra = Global()
    fusedres.convert(block)
    assert isinstance(block, FusedBlock) and seen == []


@pytest.mark.parametrize("kind", [Block, Transitional, WithCounting])
def test_a_proof_changes_nothing(kind):
    block = kind()
    hooks: list[nn.Module] = []
    block.register_forward_hook(lambda m, i, o: hooks.append(m))
    before = {name: (id(t), t.clone()) for name, t in block.state_dict(keep_vars=True).items()}
    states = torch.random.get_rng_state(), random.getstate()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        fusedres.convert(block)
    assert isinstance(block, FusedBlock) and not hooks
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    after = block.state_dict(keep_vars=True)
    assert all(id(t) == before[name][0] and torch.equal(t, before[name][1]) for name, t in after.items())
    assert all(p.grad is None for p in block.parameters())


def test_a_model_on_the_meta_device_is_proven_by_values_of_the_proofs_own(monkeypatch):
    with torch.device("meta"):
        model = nn.Sequential(Block(), Transitional())
    proven = counted(monkeypatch)
    fusedres.convert(model)
    assert len(proven) == 2 and all(isinstance(block, FusedBlock) for block in model)
    assert all(p.is_meta for p in model.parameters())


def test_what_a_global_hook_would_see_is_not_run(monkeypatch):
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        assert isinstance(fusedres.convert(Block()), FusedBlock)
    finally:
        handle.remove()
    assert seen == []


def test_a_gradient_that_vanishes_is_no_difference():
    class Depthwise(nn.Module):
        """A block with biases in front of BatchNorms, whose gradients are nothing but rounding."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)
            self.side = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.side(x)

    assert isinstance(fusedres.convert(Depthwise()), FusedBlock)


# ---- a whole model on its own input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_a_converted_model_is_verified(dtype, training):
    model = fusedres.convert(nn.Sequential(Block(), Transitional(), nn.Dropout(0.3))).to(dtype).train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = fusedres.verify(model, torch.randn(4, 6, 8, 8).to(dtype))
    assert found.holds, str(found)
    assert {"output", "gradient of input[0]", "gradient of 0.conv1.weight"} <= {d.name for d in found}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert str(found) == f"all {len(found)} results are as right as eager's"


def test_a_wrong_model_is_not_verified(monkeypatch):
    model = fusedres.convert(Block())
    wrongly(monkeypatch, without_last_act)
    found = fusedres.verify(model, torch.randn(4, 6, 8, 8))
    assert not found.holds and "output: error" in str(found)


@pytest.mark.parametrize("struck", ["one call", "every call"])
def test_the_sign_of_an_activation_within_rounding_of_zero_is_no_fault(monkeypatch, struck):
    """One such activation in a small map moves gradients by percents, in the calls that it strikes."""
    model, x, run, calls = fusedres.convert(Block()), torch.randn(4, 6, 8, 8), verify._run, []

    def strike(of: nn.Module, example: tuple, seed: int) -> dict:
        found = run(of, example, seed)
        if isinstance(of, FusedBlock):
            calls.append(torch.equal(example[0], x))
            if struck == "every call" or calls[-1]:
                for gradient in found["gradients"].values():
                    gradient.mul_(1.005)
        return found

    monkeypatch.setattr(verify, "_run", strike)
    found = fusedres.verify(model, x)
    assert calls == [True, *[False] * 8], "the inputs of the deciding calls differ"
    assert found.holds == (struck == "one call"), str(found)


class Biased(nn.Module):
    """A block with a bias in front of a BatchNorm, whose gradient vanishes, and with the mean of what is normalised in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
        return torch.relu(y + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_what_vanishes_excuses_no_other_error(monkeypatch, dtype):
    model, run = fusedres.convert(Biased().to(dtype)), verify._run
    x = torch.randn(4, 6, 8, 8, dtype=dtype)
    found = fusedres.verify(model, x)
    assert found.holds, str(found)

    def twice(of: nn.Module, example: tuple, seed: int) -> dict:
        found = run(of, example, seed)
        if isinstance(of, FusedBlock):
            for value in (found["gradients"]["gradient of bn.weight"], found["buffers"]["buffer bn.running_mean"]):
                value.mul_(2)
        return found

    monkeypatch.setattr(verify, "_run", twice)
    wrong = {d.name for d in fusedres.verify(model, x) if not d.holds}
    assert wrong == {"gradient of bn.weight", "buffer bn.running_mean"}


def test_models_of_several_inputs_and_outputs_are_verified():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), Block()

        def forward(self, x: Tensor, options: dict[str, Tensor]) -> dict[str, list[Tensor]]:
            return {"maps": [self.a(x), self.b(options["y"])]}

    model = fusedres.convert(copy.deepcopy(Two()))
    found = fusedres.verify(model, torch.randn(2, 6, 5, 5), {"y": torch.randn(2, 6, 5, 5)})
    assert found.holds, str(found)
    assert {"output['maps'][1]", "gradient of input[1]['y']"} <= {d.name for d in found}
    assert original_class(model.a) is Block


def test_verify_wants_a_module():
    with pytest.raises(TypeError, match="verify expects a torch.nn.Module"):
        fusedres.verify(torch.relu, torch.ones(1))
