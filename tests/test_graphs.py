"""Models by CUDA graphs: what a replay computes, keeps and refuses. Without a GPU: a graph whose replay runs again what was captured, into
the same memory, as a replay does. On a GPU, in ``test_gpu.py``, it is torch's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from support import Counts
from torch import Tensor, nn

import fusedres
from fusedres import graphs
from fusedres.testing import randomize

pytest.importorskip("torchvision")
from torchvision.models.resnet import BasicBlock  # noqa: E402


def captured(run: Callable[[], graphs.Results], pool: object) -> graphs.Capture:
    """A capture records and runs nothing: neither buffers nor results have values of it."""
    results = run()
    with torch.no_grad():
        for t in results:
            if t is not None:
                t.fill_(float("nan"))
    recorded = torch.is_grad_enabled()

    def replay() -> None:
        with torch.set_grad_enabled(recorded):
            again = run()
        with torch.no_grad():
            for mine, new in zip(results, again, strict=True):
                if mine is not None:
                    mine.copy_(new)

    return graphs.Capture(replay, results)


@pytest.fixture(autouse=True)
def check_devices(monkeypatch) -> Callable[..., None]:
    """What is not asked here, where all is on the CPU."""
    original = graphs._check_devices
    monkeypatch.setattr(graphs, "_check_devices", lambda model, example: None)
    monkeypatch.setattr(graphs, "capture", captured)
    monkeypatch.setattr(graphs, "_aside", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return original


class Network(nn.Module):
    """Two outputs, dropout, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.drop, self.head = BasicBlock(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(x)
        return self.head(self.drop(y.mean((2, 3)))), y


def network(training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    randomize(model)
    return fusedres.convert(model, verify=False).train(training)


def maps(seed: int, batch: int = 2) -> Tensor:
    x = torch.randn(batch, 4, 5, 6, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


def step(call: Callable[..., tuple[Tensor, Tensor]], model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Everything that a step makes."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    logits, y = call(x)
    (logits.sum() + y.square().sum()).backward()
    found = {"logits": logits, "y": y, "x": x.grad, **dict(model.named_buffers())}
    return {k: v if v is None else v.detach().clone() for k, v in found.items()} | {
        f"gradient of {k}": None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
    }


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine = found[name]
        assert (mine is None) == (value is None), name
        assert value is None or mine is None or torch.equal(mine, value), name


def test_training_steps_are_those_of_the_model_accumulated_gradients_included():
    model = network()
    twin = copy.deepcopy(model)
    forward = fusedres.graphed(model, maps(0).requires_grad_())
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))  # as before the warm-up
    for seed in (1, 2, 3):
        if seed == 3:
            model.zero_grad(), twin.zero_grad()
        assert_same(step(forward, model, maps(seed)), step(twin, twin, maps(seed)))
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.mul_(0.9), q.mul_(0.9)


def test_random_states_are_as_before():
    model = network()
    before = torch.get_rng_state()
    fusedres.graphed(model, maps(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_keeps_outputs_of_earlier_calls():
    model = network(False)
    with torch.no_grad():
        forward = fusedres.graphed(model, maps(0))
        found = [forward(maps(seed)) for seed in (1, 2)]
        expected = [model(maps(seed)) for seed in (1, 2)]
    for mine, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, mine, theirs)) and not mine[0].requires_grad


def test_a_model_in_evaluation_has_a_backward_where_gradients_are_enabled(monkeypatch):
    model = network(False)
    twin = copy.deepcopy(model)
    forward = fusedres.graphed(model, maps(0).requires_grad_())
    assert_same(step(forward, model, maps(1)), step(twin, twin, maps(1)))
    with torch.no_grad():
        assert Replays(forward, monkeypatch)(maps(1)) == 0


class Plain(nn.Sequential):
    """What autocast casts the weights of, and would keep the casts."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(120, 6), nn.Linear(6, 3))


def test_under_autocast_a_replay_sees_weights_that_have_moved(monkeypatch):
    """Captured is the cast of each weight, which is not left to autocast's cache."""
    model = Plain()
    twin = copy.deepcopy(model)
    cached = []
    monkeypatch.setattr(
        graphs, "capture", lambda *args: (cached.append(torch.is_autocast_cache_enabled()), captured(*args))[1]
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(maps(0))  # which fills the cache
        forward = fusedres.graphed(model, maps(0))
    replays = Replays(forward, monkeypatch)
    for seed in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = forward(maps(seed)), twin(maps(seed))
        assert torch.equal(found, expected) and found.dtype == torch.bfloat16
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.mul_(2), q.mul_(2)
    assert replays.count == 2 and replays(maps(1)) == 0 and cached == [False, False]


class Replays:
    def __init__(self, forward: Callable[..., object], monkeypatch) -> None:
        self.forward, self.count = forward, 0
        run = forward.run  # type: ignore[attr-defined]

        def counted(inputs):
            self.count += 1
            return run(inputs)

        monkeypatch.setattr(forward, "run", counted)

    def __call__(self, *args, **kwargs) -> int:
        """How many replays a call makes."""
        before = self.count
        self.forward(*args, **kwargs)
        return self.count - before


CHANGES = {
    "child-mode": lambda model: model.block.bn1.eval(),
    "momentum": lambda model: setattr(model.block.bn1, "momentum", 0.3),
    "weight": lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(3, 4))),
    "data": lambda model: setattr(model.head.weight, "data", torch.ones(3, 4)),
    "frozen": lambda model: model.head.weight.requires_grad_(False),
    "hook": lambda model: model.block.conv1.register_forward_hook(lambda *_: None),
    "child": lambda model: setattr(model, "drop", nn.Identity()),
    "forward": lambda model: setattr(model.block, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_has_changed_is_called_itself(change, monkeypatch):
    model = network()
    replays = Replays(fusedres.graphed(model, maps(0)), monkeypatch)
    assert replays(maps(1)) == 1
    change(model)
    assert replays(maps(1)) == 0


@pytest.mark.parametrize(
    "inputs",
    [
        (maps(1, 3),),
        (maps(1).contiguous(),),
        (maps(1).double(),),
        (maps(1).requires_grad_(),),
        (maps(1).numpy(),),
    ],
    ids=["batch", "layout", "dtype", "gradient", "no-tensor"],
)
def test_other_inputs_go_to_the_model_itself(inputs, monkeypatch):
    model = network()
    replays = Replays(fusedres.graphed(model, maps(0)), monkeypatch)
    with contextlib.suppress(RuntimeError, TypeError, AttributeError, ValueError):  # what the model says of them
        assert replays(*inputs) == 0
    assert replays.count == 0


def test_other_settings_go_to_the_model_itself(monkeypatch):
    replays = Replays(fusedres.graphed(network(), maps(0)), monkeypatch)
    with torch.no_grad():
        assert replays(maps(1)) == 0
    assert replays(x=maps(1)) == 0
    assert replays(maps(1)) == 1


def test_a_backward_whose_forward_was_overwritten_raises():
    forward = fusedres.graphed(network(), maps(0))
    first, second = forward(maps(1)), forward(maps(2))
    with pytest.raises(RuntimeError, match="called again before the backward"):
        first[0].sum().backward()
    second[0].sum().backward()


def test_a_forward_that_sets_attributes_is_refused():
    with pytest.raises(ValueError, match="sets attributes"):
        fusedres.graphed(Counts(), maps(0))


def test_outputs_are_tensors():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x + 1, 2

    with pytest.raises(TypeError, match="has to return tensors, found int"):
        fusedres.graphed(Pair(), maps(0))


def test_what_cannot_be_captured_is_said(check_devices):
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, found function"):
        fusedres.graphed(lambda x: x, maps(0))
    with pytest.raises(TypeError, match="tensors as examples, found int"):
        fusedres.graphed(network(), 3)
    model = network()
    model.block.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"block\.conv1 has a hook"):
        fusedres.graphed(model, maps(0))
    model = network()
    model.block.bn2.momentum = None
    with pytest.raises(ValueError, match=r"block\.bn2 has momentum=None"):
        fusedres.graphed(model, maps(0))
    with pytest.raises(ValueError, match="on one CUDA device, found cpu"):
        check_devices(network(), (maps(0),))
