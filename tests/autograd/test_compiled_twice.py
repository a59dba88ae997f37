"""Second derivatives of compiled blocks, where the compiler's backend leaves differentiation to autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from converted import KINDS, draw, one_fused_backend, pair
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fusedres.testing import assert_parity


@pytest.fixture(autouse=True)
def fused_backend() -> Iterator[None]:
    with one_fused_backend():
        torch._dynamo.reset()
        yield


def penalised(module: nn.Module, x: Tensor, of_weights: bool) -> dict[str, Tensor | None]:
    """The gradients of a loss with a penalty on its gradients: of the input, or of the weights."""
    x = x.clone().requires_grad_(not of_weights)
    weights = dict(module.named_parameters())
    loss = module(x).square().mean()
    first = torch.autograd.grad(loss, list(weights.values()) if of_weights else x, create_graph=True)
    module.zero_grad()
    (loss + sum(g.square().sum() for g in first)).backward()
    return {"x": x.grad, **{name.replace("_orig_mod.", ""): p.grad for name, p in weights.items()}}


def assert_penalised_as_eager(build: Callable[[], nn.Module], training: bool, of_weights: bool) -> None:
    plain, model = (m.train(training) for m in pair(build))
    counter = CompileCounterWithBackend("eager")
    x = draw()
    found = penalised(torch.compile(model, backend=counter, fullgraph=True), x, of_weights)
    expected = penalised(plain, x, of_weights)
    assert any("fusedres" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            assert_parity(ours, theirs, theirs, name)


@pytest.mark.parametrize(
    ("kind", "training", "of_weights"),
    [
        # the penalty on the gradients of weights and that in evaluation take turns
        pytest.param(kind, *mode, id=f"{kind}-{name}", marks=[] if i in (0, 1 + turn % 2) else [pytest.mark.slow])
        for turn, kind in enumerate(
            kind for kind in KINDS if kind != "split"
        )  # whose sum stands alone, as ordinary code
        for i, (name, mode) in enumerate(
            {"training": (True, False), "training-weights": (True, True), "eval": (False, False)}.items()
        )
    ],
)
def test_a_gradient_penalty_is_that_of_eager(kind, training, of_weights):
    assert_penalised_as_eager(KINDS[kind], training, of_weights)


@pytest.mark.parametrize("first", ["residual", "dense"])
def test_a_gradient_penalty_goes_through_a_dense_block_to_what_stands_before(first):
    """A dense block keeps its output instead of its input, whose place in the graph is another."""
    channels = {"residual": 8, "dense": 16}[first]

    def build() -> nn.Module:
        return nn.Sequential(KINDS[first](), nn.Conv2d(channels, 8, 1), KINDS["dense"]())

    assert_penalised_as_eager(build, True, False)
