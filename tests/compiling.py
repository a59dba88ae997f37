"""What the tests of fused blocks under torch.compile share: a converted model twice, one step of each, and the operators of the graph."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import fusedres
from fusedres.swap import FusedBlock, state_of
from fusedres.testing import randomize, run_training

NEEDS_CPP = pytest.mark.skipif(
    fusedres.backends()["cpp"] != "available", reason="no backend would serve these blocks by itself"
)


def twins(build: Callable[[], nn.Module], training: bool = True, **arguments) -> tuple[nn.Module, nn.Module]:
    """A converted model, twice."""
    torch.manual_seed(0)
    model = build()
    randomize(model)
    model = fusedres.convert(model.train(training), **arguments)
    return model, copy.deepcopy(model)


def images(batch: int = 4, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def step(model: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """The results of a call, by the names of the model's own parameters."""
    for p in model.parameters():
        p.grad = None
    if training:
        found = run_training(model, x)
        return {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in found.items()}
    with torch.no_grad():
        return {"output": model(x)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], but: str = "nothing") -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in found if not torch.equal(found[name], expected[name]) and but not in name]
    assert not wrong, {name: (found[name] - expected[name]).abs().max().item() for name in wrong}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Assert that sums in another order are all that differs: of gradients that nearly cancel, against the largest of them all."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = max(e.abs().max().item() for n, e in expected.items() if n.split()[0] == name.split()[0])
        assert (value - expected[name]).abs().max() <= relative * scale, name


def operators(counter: CompileCounterWithBackend) -> dict[str, int]:
    """The fused operators in the last graph, by kind: those of forward, whose derivatives make those of backward."""
    return operators_in(counter.graphs[-1])


def operators_in(graph: torch.fx.GraphModule) -> dict[str, int]:
    """The fused operators in ``graph``, by kind."""
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    names = (str(node.target) for m in modules for node in m.graph.nodes if node.op == "call_function")
    return dict(collections.Counter(name.split(".")[1] for name in names if name.startswith("fusedres.")))


def calls(run: Callable[[], object]) -> dict[str, int]:
    """The fused operators that ``run`` calls, by kind."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
    names = (event.name for event in profiler.events())
    return dict(collections.Counter(name.split("::")[-1] for name in names if name.startswith("fusedres::")))


def parts(model: nn.Module) -> int:
    """How many parts the last call in eager ran fused."""
    states = [state_of(m) for m in model.modules() if isinstance(m, FusedBlock)]
    return sum(record is not None for state in states if state is not None for record in state.records)


def compiled(model: nn.Module, backend: str = "aot_eager", **options) -> tuple[nn.Module, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


def projected() -> nn.Module:
    """torchvision's bottleneck with a projection, for :func:`maps`."""
    from torchvision.models.resnet import Bottleneck

    return Bottleneck(16, 8, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32)))


def block(recompute: bool = False) -> tuple[nn.Module, nn.Module]:
    """Two of torchvision's bottlenecks in a row, converted, twice."""
    from torchvision.models.resnet import Bottleneck

    return twins(lambda: nn.Sequential(projected(), Bottleneck(32, 8)), recompute=recompute)


def maps(batch: int = 3) -> Tensor:
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(batch))
