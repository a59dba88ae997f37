"""The operators ``torch.ops.fusedres.*``: their schemas and fakes tell the truth, and they compute what the primitives do."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.backends.eager import BACKEND as EAGER
from fusedres.operands import Epilogue, LazyMap
from fusedres.specs import Geometry, Pool

NAN = float("nan")
GEOMETRY = ([2, 1], [1, 1], [1, 1], 1)
MAX = ("max", [3, 3], [2, 2], [1, 1])
MEAN = ("mean", [2, 2], [2, 2], [0, 0])


def map_(*shape: int, fill: float | None = None) -> torch.Tensor:
    values = torch.randn(shape) if fill is None else torch.full(shape, fill)
    return values.to(memory_format=torch.channels_last)


def vectors(rows: int, channels: int, fill: float | None = None) -> torch.Tensor:
    return torch.rand(rows, channels) + 0.5 if fill is None else torch.full((rows, channels), fill)


def cases() -> dict[str, tuple]:
    """One call of every operator, two where a result depends on an argument: fresh tensors, outputs filled with NaN."""
    torch.manual_seed(0)
    x, weight = map_(2, 6, 9, 7), torch.randn(5, 6, 3, 3)
    raw = map_(2, 5, 5, 7)
    conv = (x, vectors(2, 6), "relu", weight, torch.randn(5), *GEOMETRY, map_(2, 5, 5, 7, fill=NAN))
    back = (map_(2, 5, 5, 7), raw, vectors(3, 5), x, vectors(2, 6))
    norm = (torch.rand(5), torch.rand(5), torch.rand(5), torch.rand(5))
    added = (raw, vectors(2, 5), map_(2, 5, 5, 7), vectors(2, 5))
    index = EAGER.pool_forward(LazyMap(x), Pool("max", (3, 3), (2, 2), (1, 1)))[1]
    pooled = (x, vectors(2, 6), vectors(2, 6), "relu")
    return {
        "statistics": (x, vectors(2, 6, NAN)),
        "conv_forward-training": (*conv, vectors(2, 5, NAN), None, None, None, "none"),
        "conv_forward-inference": (*conv, None, vectors(2, 5), map_(2, 5, 5, 7), vectors(2, 5), "relu"),
        "conv_dgrad": (
            *back, vectors(2, 6), "relu", weight, *GEOMETRY, map_(2, 6, 9, 7, fill=NAN), map_(2, 6, 9, 7), False, True,
            vectors(2, 6, NAN),
        ),
        "conv_wgrad": (*back, "relu", weight, *GEOMETRY),
        "add_act_forward": (*added, "relu", map_(2, 5, 5, 7, fill=NAN), vectors(2, 5, NAN)),
        "add_act_backward-relu": (
            map_(2, 5, 5, 7), raw, vectors(2, 5), vectors(2, 5), "relu", vectors(2, 5, NAN), *added[2:], vectors(2, 5),
            vectors(2, 5, NAN),
        ),
        "add_act_backward-none": (
            map_(2, 5, 5, 7), raw, vectors(2, 5), vectors(2, 5), "none", vectors(2, 5, NAN), None, None, None, None,
        ),
        "highway_forward": (raw, vectors(2, 5), "relu", *added[2:], map_(2, 5, 5, 7), map_(2, 5, 5, 7, fill=NAN)),
        "highway_backward": (
            map_(2, 5, 5, 7), raw, vectors(2, 5), vectors(2, 5), "relu", *added[2:], vectors(2, 5), map_(2, 5, 5, 7),
            vectors(2, 5, NAN), vectors(2, 5, NAN),
        ),
        "apply_grad_coeff": (map_(2, 5, 5, 7), raw, vectors(3, 5), map_(2, 5, 5, 7, fill=NAN)),
        "pool_forward-max": (x, vectors(2, 6), "relu", *MAX, map_(2, 6, 5, 4, fill=NAN), vectors(2, 6, NAN)),
        "pool_forward-mean": (x, vectors(2, 6), "relu", *MEAN, map_(2, 6, 4, 3, fill=NAN), None),
        "pool_backward-sums": (map_(2, 6, 5, 4), index, *pooled, *MAX, vectors(2, 6, NAN), None, None),
        "pool_backward-dx": (map_(2, 6, 5, 4), index, *pooled, *MAX, None, vectors(3, 6), map_(2, 6, 9, 7, fill=NAN)),
        "bn_coefficients": (vectors(2, 5), 20, *norm, 0.1, 1e-5),
        "bn_frozen": (*norm, 1e-5, torch.float32),
        "bn_backward": (vectors(2, 5), 20, norm[0], vectors(2, 5), True, vectors(3, 5, NAN), False),
    }  # fmt: skip


def operator(name: str):
    return getattr(torch.ops.fusedres, name.partition("-")[0]).default


@pytest.mark.parametrize("name", cases())
def test_schema_and_fake_implementation_are_true(name):
    torch.library.opcheck(operator(name), cases()[name])


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_operators_write_all_of_their_outputs(name, backend):
    arguments = cases()[name]
    with fusedres.use_backend(backend):
        results = operator(name)(*arguments)
    written = [a for a in arguments if isinstance(a, torch.Tensor)]
    returned = results if isinstance(results, (tuple, list)) else [] if results is None else [results]
    assert not any(t.isnan().any() for t in (*written, *returned))


def test_a_convolution_by_its_operator_is_the_primitive():
    x, scale_shift, act, weight, bias, *geometry, out, stats, _, _, _, _ = cases()["conv_forward-training"]
    with fusedres.use_backend("eager"):
        torch.ops.fusedres.conv_forward(
            x, scale_shift, act, weight, bias, *geometry, out, stats, None, None, None, "none"
        )
    geometry = Geometry((2, 1), (1, 1), (1, 1), 1)
    expected_stats = vectors(2, 5, NAN)
    expected = EAGER.conv_forward(LazyMap(x, scale_shift, act), weight, bias, geometry, Epilogue(stats=expected_stats))
    assert torch.equal(out, expected) and torch.equal(stats, expected_stats)


def test_the_operators_trace_into_one_graph():
    x, scale_shift, act, weight, bias, *geometry, _, _, _, _, _, _ = cases()["conv_forward-training"]

    def step(x):
        out, stats = torch.empty(2, 5, 5, 7), torch.empty(2, 5)
        torch.ops.fusedres.conv_forward(
            x, scale_shift, act, weight, bias, *geometry, out, stats, None, None, None, "none"
        )
        return torch.relu(out), stats

    with fusedres.use_backend("eager"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        assert all(torch.equal(a, b) for a, b in zip(compiled, step(x), strict=True))
