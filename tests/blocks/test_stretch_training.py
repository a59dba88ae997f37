"""Blocks in a row that are asked once where gradients are recorded: the bits of the blocks one by one, as long as nothing has changed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from converted import small_resnet
from stretched import (
    CHANGES,
    MODELS,
    WARM_ROWS,
    added_by,
    assert_same_state,
    assert_same_step,
    blocks,
    images,
    model_of,
    one_by_one,
    row,
    step,
    training,
    warm,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.backends import select
from fusedres.swap import state_of
from fusedres.trial import memory

pytestmark = pytest.mark.usefixtures("compiled_backend")


#: rows that a step runs: in front of a forward's own code and behind it there is one each
RAN = {"forward": 2}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_leaves_the_bits_of_its_blocks(name, memory_format, rows):
    model = training(MODELS[name])
    twin = one_by_one(model)
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images().to(memory_format=memory_format))
    x = images().to(memory_format=memory_format).requires_grad_()
    assert added_by(lambda: step(model, x), rows) == RAN.get(name, 1)
    assert added_by(lambda: step(twin, x), rows) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_row_of_other_dtypes(dtype, rows):
    model = training(row, dtype)
    twin = one_by_one(model)
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images().to(dtype))
    assert rows[0] > 0


def test_evaluation_with_gradients_is_a_row_too(rows):
    model = model_of(small_resnet)
    twin = one_by_one(model)
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images())
    assert rows[0] == 1


def test_the_report_says_of_a_row_what_it_says_of_its_blocks(rows):
    model = training()
    twin, x = one_by_one(model), images()
    warm(model, x)
    step(model, x[:1])  # whose records are others
    step(model, x), step(twin, x)
    assert rows[0] == 1
    assert str(fusedres.report(model)) == str(fusedres.report(twin))


#: done alike to a model and to its twin
FURTHER: dict[str, Callable[[nn.Module], object]] = {
    "momentum": lambda m: setattr(m.layer1[0].bn1, "momentum", 0.5),
    "a cumulative average": lambda m: setattr(m.layer1[0].bn1, "momentum", None),
    "a frozen weight": lambda m: m.layer1[0].conv1.weight.requires_grad_(False),
    "frozen": lambda m: m.requires_grad_(False),
    "no running statistics": lambda m: setattr(m.layer1[0].bn1, "track_running_stats", False),
    "another counter": lambda m: setattr(m.layer2[0].bn1, "num_batches_tracked", torch.tensor(7)),
    "another dtype, back again": lambda m: m.double().float(),
    "evaluation": lambda m: m.eval(),
    "recompute": lambda m: fusedres.convert(m, recompute=True),
}
#: a training BatchNorm does not read what it has run
TRAINED = {k: v for k, v in CHANGES.items() if k not in ("a block's mode", "a batchnorm's mode")} | FURTHER


@pytest.mark.parametrize("change", TRAINED.values(), ids=TRAINED)
def test_a_change_is_noticed_in_training(change, rows):
    model = training()
    warm(model, images())
    assert added_by(lambda: step(model, images()), rows) == 1
    twin = one_by_one(model)
    for net in (model, twin):
        torch.manual_seed(1)
        with torch.no_grad():
            change(net)
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images())


def test_a_block_that_is_to_recompute_keeps_less_at_once(rows):
    def kept(net: nn.Module) -> int:
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.nbytes), t)[1], lambda t: t):
            net(images())
        return sum(saved)

    model = training(MODELS["forward"])
    warm(model, images())
    before = kept(model)
    fusedres.convert(model, recompute=True)
    assert kept(model) == kept(one_by_one(model)) < before


def test_the_memory_format_follows_weights_that_are_given_another(rows):
    model = training(row)
    twin = one_by_one(model)
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images())
    for net in (model, twin):
        net.to(memory_format=torch.channels_last)  # the same parameters, in other strides
    for _ in range(WARM_ROWS + 1):
        assert_same_step(model, twin, images())


def test_of_other_changes_than_those_of_weights_a_row_knows():
    """That the test above can fail: each of these leaves other bits than the model that has not changed."""
    for name in ("momentum", "a frozen weight", "another counter", "evaluation"):
        model = training()
        twin = copy.deepcopy(model)
        FURTHER[name](twin)
        with pytest.raises(AssertionError):
            assert_same_step(model, twin, images())


def test_a_weight_of_another_dtype_raises_as_without_and_moves_no_statistics(rows):
    model = training()
    x = images()
    warm(model, x)
    weight = model.layer1[0].conv1.weight
    weight.data = weight.double()
    before = copy.deepcopy(model.layer1.state_dict())
    with pytest.raises(RuntimeError):
        model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.layer1.state_dict().items())


@pytest.mark.parametrize("kind", ["momentum", "synchronised"])
def test_what_is_another_description_at_every_call_is_no_row(kind, rows):
    model = training(row)
    if kind == "momentum":
        model[1].momentum = None
    else:
        model[1] = nn.SyncBatchNorm(8)
        model = model.eval()  # in training it wants processes
    twin = one_by_one(model)
    for _ in range(WARM_ROWS + 2):
        assert_same_step(model, twin, images())
    assert rows[0] == 0


def test_a_global_hook_and_an_observer_see_every_block(rows):
    model, seen = training(), []
    x = images()
    warm(model, x)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(None)):
        step(model, x)
    assert len(seen) > 10
    with select.observe(lambda backend: (seen.clear(), backend)[1]):
        step(model, x)
    assert not seen and rows[0] == 0


def test_autocast_runs_the_blocks_one_by_one(rows):
    model = training()
    twin, x = one_by_one(model), images()
    warm(model, x)
    warm(twin, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(model, twin, x)
    assert rows[0] == 0


def test_a_model_trains_and_serves_by_turns(rows):
    model = training()
    twin = one_by_one(model)
    for turn in range(4):
        for net in (model, twin):
            net.train()
        for _ in range(2):
            assert_same_step(model, twin, images())
        x = images()
        with torch.no_grad():
            assert torch.equal(model.eval()(x), twin.eval()(x)), turn
    assert rows[0] >= 4


def test_second_derivatives_checkpoints_and_kept_graphs(rows):
    model = training(row)
    twin = one_by_one(model)

    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    def twice(net: nn.Module, x: Tensor) -> Tensor:
        return (net(x) * net(x.flip(0))).sum()

    def checkpointed(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False).square().sum()

    for loss in (penalty, twice, checkpointed):
        for _ in range(WARM_ROWS + 1):
            x = images(2, 3, 8, 8)
            for net in (model, twin):
                net.zero_grad()
                loss(net, x.clone().requires_grad_()).backward()
            assert_same_state(model, twin)
    assert rows[0] > 4


def test_gradients_arrive_block_by_block(rows):
    model, order = training(row), []
    x = images()
    warm(model, x)
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name.split(".")[0]))
    assert added_by(lambda: step(model, x), rows) == 1
    assert order.index("0") > max(i for i, name in enumerate(order) if name in ("3", "4"))


def test_threads_share_a_row():
    model = training(lambda: nn.Sequential(*blocks())).eval()
    maps = [images(1, 8, size, 12) for size in (12, 16, 12, 20)]
    twin = one_by_one(model)

    def slope(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(net(x).square().sum(), x)[0]

    expected, wrong = [slope(twin, x) for x in maps], list[int]()

    def serve(at: int) -> None:
        for _ in range(20):
            if not torch.equal(slope(model, maps[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(len(maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(state_of(model).stretches[1]._known.rows) == 3


def test_a_row_keeps_no_more_than_its_blocks_one_by_one():
    model = training(lambda: nn.Sequential(*blocks(), *blocks()))
    x = images(1, 8, 64, 64).to(memory_format=torch.channels_last)

    def peak(net: nn.Module) -> int:
        warm(net, x)
        return memory.peak_bytes(lambda: step(net, x), x.device)

    assert peak(model) <= peak(one_by_one(model))
