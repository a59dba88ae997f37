"""Converted models over several processes: SyncBatchNorm is one BatchNorm over all batches, DDP and FSDP2 train as one process does."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.autograd import exchange
from fusedres.testing import assert_parity

dist = pytest.importorskip("torch.distributed")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import distributed  # noqa: E402

FUSED = "cpp" if fusedres.backends()["cpp"] == "available" else "eager"

TWO = [f"{block}/uneven" for block in distributed.SYNCHRONISED] + [
    "basic/even", "bottleneck/empty", "dense/empty", "stem/empty", "basic/empty/backend-in-one", "bottleneck/uneven/recompute",
    "dense/uneven/recompute", "basic/uneven/hook-in-one", "dense/uneven/hook-in-one", "dense/even/backend-in-one",
    "bottleneck/uneven/cumulative",
]  # fmt: skip
FOUR = [f"{block}/four" for block in distributed.SYNCHRONISED] + ["basic/four/hook-in-one", "dense/four/recompute"]
COMPILED = ["dense/empty", "bottleneck/uneven/groups"]
SLOW_COMPILED = [f"{block}/uneven" for block in distributed.SYNCHRONISED if f"{block}/uneven" not in COMPILED] + [
    "split/even", "bottleneck/uneven/cumulative", "dense/uneven/recompute", "basic/uneven/inductor", "dense/uneven/inductor",
]  # fmt: skip
# one whole model and one block by block, one of either wrapper, with no compiler of derivatives behind the graph
WRAPPED_COMPILED = ["ddp/eager", "fsdp-parts/eager"]
SLOW_WRAPPED_COMPILED = list(distributed.WRAPPED_COMPILED)
# torch's DistributedDataParallel refuses a SyncBatchNorm on CPU
WRAPPED = [f"{way}/eval" for way in distributed.WRAPPED] + [
    f"{way}/sync" for way in distributed.WRAPPED if not way.startswith("ddp")
]  # fmt: skip


@pytest.mark.parametrize("rows", [(7, 5, 9), (0, 6, 3), (4, 0, 0)], ids=["all", "first-empty", "one"])
def test_gathered_statistics_keep_their_digits_beside_a_large_mean(rows, monkeypatch):
    torch.manual_seed(0)
    maps = torch.randn(sum(rows), 4, dtype=torch.float64) + 1e4
    found = []
    for part in maps.float().split(rows):
        mean = part.mean(0)  # of no rows: NaN
        found.append(torch.cat([mean, (part - mean).square().sum(0), torch.tensor([float(len(part))])]))
    monkeypatch.setattr(exchange.dist, "get_world_size", lambda group: len(rows))
    monkeypatch.setattr(
        exchange.dist, "all_gather", lambda out, own, group: [o.copy_(f) for o, f in zip(out, found, strict=True)]
    )
    (mean, m2), total = exchange.gather_stats(found[0][:-1].view(2, 4), rows[0], None)
    truth = maps.float().double()
    assert total == sum(rows)
    torch.testing.assert_close(mean.double(), truth.mean(0), rtol=2e-7, atol=0)
    invstd = truth.var(0, correction=0).rsqrt()
    # three digits of it: a mean of 1e4 has no more than its own rounding leaves
    torch.testing.assert_close((m2.double() / total).rsqrt(), invstd, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    processes = distributed.Processes(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    processes = distributed.Processes(4, tmp_path_factory.mktemp("four"))
    yield processes
    processes.stop()


def assert_one_batch_norm(processes: distributed.Processes, name: str) -> None:
    """Assert that the processes found what one process with a BatchNorm over the whole batch finds."""
    build, sizes, change = distributed.parse(name)
    plain = fusedres.revert(distributed.seeded(build, distributed.momentum_of(change)))
    with fusedres.use_backend("eager"):
        truth = distributed.training_step(plain, distributed.batch(sizes))
    truth["inference"] = plain.eval()(distributed.batch(sizes)).detach()
    found = processes.run(distributed.synchronised, name)
    results = [of_rank["results"] for of_rank in found]
    for key, expected in truth.items():
        ours = [result[key] for result in results]
        if key.startswith("buffer"):
            assert all(torch.equal(ours[0], other) for other in ours), f"{key}: processes disagree"
            ours = ours[0]
        else:
            ours = sum(ours) if key.startswith("gradient") else torch.cat(ours)
        if key.startswith("gradient") and expected.abs().max() < 1e-10:
            # of a bias in front of a BatchNorm: nothing, but for the rounding of sums of some hundred
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        elif expected.is_floating_point():
            assert_parity(ours, expected, expected, key)
        else:
            assert torch.equal(ours, expected), key
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    for rank, of_rank in enumerate(found):
        last = rank == processes.world - 1
        if change == "hook-in-one" and last:
            assert of_rank["fired"] and any("hook" in outcome for outcome in of_rank["outcomes"])
        else:
            alone = sizes[rank] == 0 or change == "backend-in-one" and last
            assert set(of_rank["outcomes"]) == {"eager" if alone else FUSED}
        assert of_rank["calls"].count("gather") == norms, "statistics are exchanged once per norm"
        assert of_rank["calls"].count("reduce") <= norms, "sums are exchanged once per norm at most"
        assert of_rank["calls"] == found[0]["calls"]


@pytest.mark.parametrize("name", TWO)
def test_sync_batch_norm_is_one_batch_norm_over_two_processes(two, name):
    assert_one_batch_norm(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_sync_batch_norm_is_one_batch_norm_over_four_processes(four, name):
    assert_one_batch_norm(four, name)


def assert_compiles_as_eager(processes: distributed.Processes, name: str) -> None:
    for of_rank in processes.run(distributed.compiled, name):
        ours, theirs, *alone = of_rank["calls"]
        assert of_rank["differs"] == [] and of_rank["infers"]
        assert ours == theirs and {"gather", "reduce"} == set(ours), "what processes exchange"
        assert not any(alone)
        assert of_rank["graphs"] == (2 if name.endswith("groups") else 1)
        assert all(kind.endswith("_forward") for kind in of_rank["operators"])
        assert sum(of_rank["operators"].values()) == of_rank["parts"] > 0


@pytest.mark.parametrize("name", COMPILED)
def test_sync_batch_norm_is_inside_of_operators_that_equal_eager_to_the_bit(two, name):
    assert_compiles_as_eager(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_COMPILED)
def test_every_block_with_sync_batch_norm_is_operators_that_equal_eager_to_the_bit(two, name):
    assert_compiles_as_eager(two, name)


def assert_trains_as_one_process(processes: distributed.Processes, name: str) -> None:
    way, normalise = name.split("/")
    found = processes.run(distributed.wrapped, name)
    plain = fusedres.revert(distributed.net(normalise))
    with fusedres.use_backend("eager"):
        truth = distributed.losses(plain, *distributed.task(processes.world))
    for of_rank in found:
        # four steps of momentum multiply the rounding of the sums over processes
        torch.testing.assert_close(of_rank["losses"], truth, rtol=1e-9, atol=0)
        assert of_rank["left"] == []
        outcomes = of_rank["outcomes"]
        assert set(outcomes) == {"stem", "basic", "bottleneck", "dense"}
        inner = {"basic", "bottleneck"} if way == "fsdp-inner" else set()
        for path, outcome in outcomes.items():
            assert ("FSDPConv2d" in outcome) if path in inner else outcome == FUSED, f"{path}: {outcome}"


def assert_trains_compiled_as_one_process(processes: distributed.Processes, name: str) -> None:
    plain = fusedres.revert(distributed.net("eval"))
    with fusedres.use_backend("eager"):
        truth = distributed.losses(plain, *distributed.task(2))
    rows = 2 if "parts" in name else 3  # the stem is none of the parts
    expected = {"residual_forward": rows, "dense_forward": 1}
    for of_rank in processes.run(distributed.wrapped_and_compiled, name):
        # four steps of momentum multiply the rounding of the sums over processes
        torch.testing.assert_close(of_rank["losses"], truth, rtol=1e-9, atol=0)
        assert of_rank["operators"] == expected


@pytest.mark.parametrize("name", WRAPPED_COMPILED)
def test_compiled_models_and_blocks_under_ddp_and_fsdp_train_as_one_process(two, name):
    assert_trains_compiled_as_one_process(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_WRAPPED_COMPILED)
def test_the_other_ways_to_compile_under_ddp_and_fsdp_train_as_one_process(two, name):
    assert_trains_compiled_as_one_process(two, name)


@pytest.mark.parametrize("name", WRAPPED)
def test_ddp_and_fsdp_of_converted_models_train_as_one_process(two, name):
    assert_trains_as_one_process(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_ddp_and_fsdp_over_four_processes_train_as_one_process(four, name):
    assert_trains_as_one_process(four, name)
