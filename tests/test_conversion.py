"""What ``convert`` promises: the same parameters, checkpoints, numbers and semantics, and a report that tells the truth."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from support import ran
from torch import Tensor, nn

import fusedres
from fusedres.swap import is_converted, state_of
from fusedres.testing import assert_parity, compare, randomize, run_training

torchvision = pytest.importorskip("torchvision")
from torchvision.models import densenet, resnet  # noqa: E402

pytestmark = pytest.mark.usefixtures("proven_once")

FUSED = "eager" if fusedres.backends()["cpp"] != "available" else "cpp"


@pytest.fixture(autouse=True)
def one_fused_backend():
    """The compiled backend, or eager's primitives where there is no extension: never the original modules."""
    torch.manual_seed(0)
    with fusedres.use_backend(None if FUSED == "cpp" else FUSED):
        yield


class Small(nn.Module):
    """One block of every kind that ``convert`` knows, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.basic = resnet.BasicBlock(8, 12, 2, shortcut)
        self.bottleneck = resnet.Bottleneck(12, 3)
        self.dense = densenet._DenseBlock(2, 12, bn_size=2, growth_rate=5, drop_rate=0.0)
        self.transition = densenet._Transition(22, 11)
        self.fc = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(self.dense(self.bottleneck(self.basic(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


BLOCKS = ["stem", "basic", "bottleneck", "dense", "transition"]
SHAPE = (4, 3, 17, 21)


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Small()
    randomize(model)
    return model.to(dtype)


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A plain model and its converted twin."""
    model = small(dtype)
    return model, fusedres.convert(copy.deepcopy(model))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether both hold the same keys and the same bits."""
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def rows(model: nn.Module) -> dict[str, tuple[bool, str]]:
    return {row.path: (row.fused, row.detail) for row in fusedres.report(model)}


# ---- what a conversion keeps -----------------------------------------------------------------------------------------


def test_conversion_keeps_every_parameter_buffer_and_child():
    model = small()
    held = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert fusedres.convert(model) is model
    now = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
    assert len(held) == len(now) and all(a == c and b is d for (a, b), (c, d) in zip(held, now, strict=True))
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("direction", ["plain-to-converted", "converted-to-plain"])
def test_checkpoints_load_both_ways(direction):
    source, target = small(), small()
    fusedres.convert(target if direction == "plain-to-converted" else source)
    step(source, torch.optim.SGD(source.parameters(), 0.1), torch.randn(SHAPE))
    assert not same_state(source, target)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(source, target)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(source.eval()(x), target.eval()(x))


def test_revert_gives_back_the_original_classes_and_bits():
    model = small()
    classes = {n: type(m) for n, m in model.named_modules()}
    before = copy.deepcopy(model)
    fusedres.convert(model)
    assert {n for n, m in model.named_modules() if type(m) is not classes[n]} == set(BLOCKS)
    with torch.no_grad():
        model.eval()(torch.randn(SHAPE))
    assert fusedres.revert(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert same_state(before, model)
    assert not [k for m in model.modules() for k in m.__dict__ if k.startswith("_fusedres")]
    x = torch.randn(SHAPE)
    assert torch.equal(before.train()(x), model.train()(x))


def test_converting_twice_changes_nothing():
    model = fusedres.convert(small())
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in fusedres.convert(model).modules()] == classes
    fusedres.revert(model)
    assert not any(is_converted(m) for m in model.modules())


def test_converting_again_sets_recompute():
    model = fusedres.convert(small())
    fusedres.convert(model.dense, recompute=True)
    assert [state_of(getattr(model, b)).recompute for b in BLOCKS] == [b == "dense" for b in BLOCKS]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch-save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_converted_model_is_converted(way):
    model = fusedres.convert(small(), recompute=True)
    twin = COPIES[way](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert all(state_of(getattr(twin, b)).recompute for b in BLOCKS)
    assert same_state(model, twin)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    x = torch.randn(SHAPE)
    ours, theirs = run_training(model, x), run_training(twin, x)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(fused for fused, _ in rows(twin).values())
    assert type(fusedres.revert(twin).basic) is resnet.BasicBlock


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_an_optimizer_made_before_goes_on_training(recompute):
    plain = small(torch.float64)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, weight_decay=1e-4) for m in (plain, model)]
    fusedres.convert(model, recompute=recompute)
    for _ in range(3):
        x = torch.randn(SHAPE, dtype=torch.float64)
        step(plain, optimizers[0], x)
        step(model, optimizers[1], x)
    assert all(fused for fused, _ in rows(model).values())
    theirs = plain.state_dict()
    for key, value in model.state_dict().items():
        if "num_batches_tracked" in key:
            assert value.item() == 3, key
        else:
            torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_gradients_accumulate_over_backward_calls():
    plain, model = pair(torch.float64)
    for x in torch.randn(2, *SHAPE, dtype=torch.float64):
        for m in (plain, model):
            m(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_parity(ours.grad, theirs.grad, theirs.grad, name)


def test_backward_twice_needs_retain_graph_as_in_torch():
    model = fusedres.convert(small())
    loss = model(torch.randn(SHAPE)).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_changed_weight_is_noticed_in_backward():
    model = fusedres.convert(resnet.BasicBlock(5, 5))
    loss = model(torch.randn(2, 5, 4, 4)).sum()
    with torch.no_grad():
        model.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_inplace_change_of_the_output_does_not_reach_the_gradients():
    plain, model = pair(torch.float64)
    x = torch.randn(2, 22, 7, 5, dtype=torch.float64)
    for m in (plain, model):
        y = m.transition(x)  # torch's own ReLU keeps its output and forbids this
        y.mul_(2).add_(1)
        y.square().sum().backward()
    for (name, ours), theirs in zip(model.transition.named_parameters(), plain.transition.parameters(), strict=True):
        assert_parity(ours.grad, theirs.grad, theirs.grad, name)


def test_a_changed_dense_output_is_reduced_again_by_the_transition():
    plain, model = pair(torch.float64)
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64)
    outputs = []
    for m in (plain, model):
        with torch.no_grad():
            h = m.dense(x)
            h[:, :3] += 5 * torch.linspace(-1, 1, 5, dtype=torch.float64)
            outputs.append(m.transition(h))
    assert_parity(outputs[1], outputs[0], outputs[0])
    assert_parity(model.transition.norm.running_var, *[plain.transition.norm.running_var] * 2)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_batch_is_counted_once(recompute):
    model = fusedres.convert(small(), recompute=recompute)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for steps in (1, 2, 3):
        model(torch.randn(SHAPE)).sum().backward()
        assert {m.num_batches_tracked.item() for m in norms} == {steps}
    with torch.no_grad():
        model(torch.randn(SHAPE))
    assert {m.num_batches_tracked.item() for m in norms} == {4}
    model.eval()(torch.randn(SHAPE)).sum().backward()
    assert {m.num_batches_tracked.item() for m in norms} == {4}


def live_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_training_steps_do_not_grow_memory():
    model = fusedres.convert(small())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    after = []
    for _ in range(4):
        step(model, optimizer, torch.randn(SHAPE))
        after.append(live_bytes())
    assert after[1] == after[2] == after[3]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process' memory from /proc")
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "inference"])
def test_hundreds_of_steps_do_not_grow_the_process(training):
    model, x = fusedres.convert(small()).train(training), torch.randn(SHAPE)

    def steps(number: int) -> int:
        for _ in range(number):
            with torch.set_grad_enabled(training):
                y = model(x)
            if training:
                model.zero_grad(set_to_none=True)
                y.sum().backward()
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # allocators take a while to have what they want; one map lost in each step would be 2 MiB or more
    steps(100)
    before = steps(1)
    assert steps(500) - before < 2**20


def fused_node(y: Tensor) -> torch.autograd.graph.Node:
    """The node of the block behind ``y``: behind the copy with which a map leaves for code that is not ours."""
    node = y.grad_fn
    while not isinstance(node, torch.autograd.function.BackwardCFunction):
        node = node.next_functions[0][0]
    return node


@pytest.mark.parametrize("block", BLOCKS)
def test_a_graph_dies_with_its_output(block):
    module = getattr(fusedres.convert(small()), block)
    x = torch.randn(2, {"stem": 3, "basic": 8, "transition": 22}.get(block, 12), 8, 8, requires_grad=True)
    gc.collect()
    gc.disable()  # by reference counts alone: no cycle may wait for the collector
    try:
        y = module(x)
        graph, output = weakref.ref(fused_node(y)), weakref.ref(y)
        assert graph() is not None
        del y
        assert output() is None and graph() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_without_gradients_the_numbers_are_the_same_and_nothing_is_kept(mode, training):
    plain, model = pair(torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64)
    with mode():
        ours, theirs = model.train(training)(x), plain.train(training)(x)
    assert not ours.requires_grad and ours.is_inference() == (mode is torch.inference_mode)
    assert_parity(ours, theirs, theirs)
    for (name, mine), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert all(fused for fused, _ in rows(model).values())


def test_train_and_eval_of_single_modules_after_conversion():
    plain, model = pair(torch.float64)
    for m in (plain, model):
        m.basic.bn1.eval()
        m.dense.eval()
        m.bottleneck.eval()
        m.bottleneck.bn2.train()
    x = torch.randn(SHAPE, dtype=torch.float64)
    ours, theirs = run_training(model, x), run_training(plain, x)
    for key, value in ours.items():
        if value.is_floating_point():
            assert_parity(value, theirs[key], theirs[key], key)
        else:
            assert torch.equal(value, theirs[key]), key
    assert model.dense.denselayer1.norm1.num_batches_tracked == 0 and model.bottleneck.bn2.num_batches_tracked == 1
    assert all(fused for fused, _ in rows(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_computes_in_low_precision_as_eager_does(dtype):
    results: dict[str, dict[str, list[Tensor]]] = {"plain": {}, "fused": {}, "truth": {}}
    for seed in range(9):
        torch.manual_seed(seed)
        plain = small()
        model = fusedres.convert(copy.deepcopy(plain), verify=seed == 0)
        truth = copy.deepcopy(plain).double()
        x = torch.randn(SHAPE)
        with torch.autocast("cpu", dtype):
            found = {"plain": run_training(plain, x, seed), "fused": run_training(model, x, seed)}
        found["truth"] = run_training(truth, x.double(), seed)
        assert all(fused for fused, _ in rows(model).values()), fusedres.report(model)
        for name, tensors in found.items():
            for key, value in tensors.items():
                results[name].setdefault(key, []).append(value)
    for key, values in results["fused"].items():
        if values[0].is_floating_point():
            # float32 gradients of bfloat16 arithmetic
            assert_parity(values, results["plain"][key], results["truth"][key], key)


# ---- double backward, torch.compile ----------------------------------------------------------------------------------


def penalised(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a gradient penalty."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    module.zero_grad()
    g.square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


NEEDS_CPP = pytest.mark.skipif(FUSED != "cpp", reason="needs the C++ extension")
CHANNELS = {"stem": 3, "basic": 8, "bottleneck": 12, "dense": 12, "transition": 22}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=NEEDS_CPP)])
def test_double_backward_equals_autograd_on_every_backend(block, training, backend):
    plain, model = (getattr(m.train(training), block) for m in pair(torch.float64))
    x = torch.randn(2, CHANNELS[block], 7, 6, dtype=torch.float64)
    with fusedres.use_backend(backend):
        ours = penalised(model, x)
    theirs = penalised(plain, x)
    assert ran(model) == backend
    for mine, other, name in zip(ours, theirs, ["input", *dict(model.named_parameters())], strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "training", [pytest.param(True, id="training"), pytest.param(False, id="eval", marks=pytest.mark.slow)]
)
def test_torch_compile_traces_the_original_modules(training):
    plain, model = (m.train(training) for m in pair(torch.float64))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(SHAPE, dtype=torch.float64)
    ours, theirs = compiled(x), plain(x)
    assert_parity(ours, theirs, theirs)
    for (name, mine), other in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(mine, other[1], rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


# ---- what is left alone ----------------------------------------------------------------------------------------------


class OwnForward(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnInit(resnet.BasicBlock):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)


class Untraceable(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else x


def test_a_subclass_with_a_forward_of_its_own_is_what_its_forward_computes_or_left_alone():
    model = nn.Sequential(OwnForward(5, 5), OwnInit(5), Untraceable(5, 5))
    first, second, third = fusedres.convert(model)
    assert type(third) is Untraceable and is_converted(second)
    kinds = [("0", "basic block"), ("1", "basic block"), ("2", "left alone")]
    assert [(row.path, row.kind) for row in fusedres.report(model)] == kinds
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(first.eval()(x), 2 * resnet.BasicBlock.forward(first, x))


def test_an_overridden_forward_of_an_instance_is_left_alone():
    block, inner = resnet.BasicBlock(5, 5), resnet.BasicBlock(5, 5)
    block.forward = lambda x: x + 1
    inner.conv1.forward = lambda x: x * 0
    model = fusedres.convert(nn.ModuleList([block, inner]))
    assert type(block) is resnet.BasicBlock
    x = torch.randn(2, 5, 4, 4)
    inner.eval()(x)
    assert rows(model)["1"] == (False, "the forward of its Conv2d is overridden")


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda m, i, o: seen.append((i[0], o))),
    "forward-pre": lambda module, seen: module.register_forward_pre_hook(lambda m, i: seen.append((i[0],))),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda m, i, o: seen.append((i[0], o[0]))),
    "backward-pre": lambda module, seen: module.register_full_backward_pre_hook(lambda m, o: seen.append((o[0],))),
}


@pytest.mark.parametrize(
    ("where", "hook"),
    [
        # each place with two kinds of hook, and each kind in two places
        pytest.param(where, hook, marks=[] if (i + j) % 2 == 0 else [pytest.mark.slow])
        for i, where in enumerate(("basic.conv2", "bottleneck.conv3", "dense.denselayer2.conv1", "dense.denselayer1"))
        for j, hook in enumerate(HOOKS)
    ],
)
def test_hooks_on_inner_modules_fire_with_the_right_tensors(where, hook):
    plain, model = pair(torch.float64)
    seen: list[list] = [[], []]
    handles = [HOOKS[hook](m.get_submodule(where), s) for m, s in zip((plain, model), seen, strict=True)]
    x = torch.randn(SHAPE, dtype=torch.float64)
    run_training(plain, x), run_training(model, x)
    assert len(seen[0]) == len(seen[1]) == 1
    for theirs, ours in zip(*(s[0] for s in seen), strict=True):
        if theirs is not None:
            assert_parity(ours, theirs, theirs)
    block = where.split(".")[0]
    report = rows(model)
    assert not report[block][0] and "hook" in report[block][1]
    assert all(report[b][0] for b in BLOCKS if b != block)
    handles[1].remove()
    run_training(model, x)
    assert rows(model)[block] == (True, FUSED)


def test_hooks_on_blocks_themselves_fire_and_leave_them_fused():
    model, seen = fusedres.convert(small()), []
    for block in BLOCKS:
        getattr(model, block).register_forward_hook(lambda m, i, o, block=block: seen.append(block))
    model(torch.randn(SHAPE))
    assert seen == BLOCKS and all(fused for fused, _ in rows(model).values())


def test_a_global_hook_sees_inner_modules():
    model, seen = fusedres.convert(small()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(torch.randn(SHAPE))
    finally:
        handle.remove()
    assert model.basic.conv1 in seen and model.dense.denselayer1.norm2 in seen
    assert not any(fused for fused, _ in rows(model).values())


def test_a_replaced_child_is_used():
    model = fusedres.convert(small())
    x = torch.randn(SHAPE)
    model(x)
    replaced = nn.Conv2d(12, 12, 3, padding=1, bias=False)
    model.basic.conv2, model.bottleneck.relu, model.dense.denselayer1.relu2 = replaced, nn.ELU(), nn.Identity()
    plain = fusedres.revert(copy.deepcopy(model))
    torch.testing.assert_close(model(x), plain(x))
    report = rows(model)
    assert report["basic"] == report["dense"] == (True, FUSED)
    assert report["bottleneck"] == (False, "found ELU, which is not among the activations that are fused")
    model.zero_grad()
    model(x).sum().backward()
    assert replaced.weight.grad is not None


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_before_and_after_a_call():
    model = small()
    kinds = ["sequential", "basic block", "bottleneck", "dense block", "transition"]
    before = fusedres.report(model)
    assert [(r.path, r.kind, r.fused) for r in before] == [(p, k, False) for p, k in zip(BLOCKS, kinds, strict=True)]
    assert all("fusedres.convert" in r.detail for r in before)
    fusedres.convert(model)
    expected = [(p, k, True, FUSED) for p, k in zip(BLOCKS, kinds, strict=True)]
    assert [(r.path, r.kind, r.fused, r.detail) for r in fusedres.report(model)] == expected
    with fusedres.use_backend("eager"):
        model(torch.randn(SHAPE))
    assert [r.detail for r in fusedres.report(model)] == ["eager"] * 5
    text = str(fusedres.report(model))
    assert text.endswith("5 of 5 blocks fused") and all(f"\n{b}" in text for b in BLOCKS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m.basic, "relu", nn.ELU()), "found ELU"),
        (lambda m: setattr(m.basic, "conv1", nn.Conv2d(8, 12, 3, 2, 1, padding_mode="reflect")), "padding_mode 'reflect'"),
        (lambda m: setattr(m.basic, "bn1", nn.GroupNorm(3, 12)), "found GroupNorm"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.basic.conv1), "found ParametrizedConv2d"),
    ],
    ids=["activation", "padding-mode", "group-norm", "weight-norm"],
)  # fmt: skip
def test_the_report_says_why_not(change, words):
    model = small()
    change(model)
    fused, detail = rows(fusedres.convert(model))["basic"]
    assert not fused and words in detail
    plain = fusedres.revert(copy.deepcopy(model)).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(model.eval()(x), plain(x))
    assert not rows(model)["basic"][0] and rows(model)["bottleneck"] == (True, FUSED)


def test_dropout_inside_dense_layers_splits_the_block_in_training_alone():
    model = fusedres.convert(densenet._DenseBlock(2, 6, bn_size=2, growth_rate=5, drop_rate=0.5))
    x = torch.randn(2, 6, 4, 4)
    model(x)
    assert rows(model)[""] == (True, FUSED)
    model.eval()(x)
    assert rows(model)[""] == (True, FUSED)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121"])
def test_every_block_of_a_torchvision_model_is_fused(name):
    model = fusedres.convert(torchvision.models.get_model(name)).eval()
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    report = fusedres.report(model)
    blocks = {"resnet18": 8, "densenet121": 7}.get(name, 16)
    assert sum(r.kind in ("basic block", "bottleneck", "dense block", "transition") for r in report) == blocks
    assert all(r.fused and r.detail == FUSED for r in report), str(report)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param("resnet18", True, id="resnet18-training"),
        pytest.param("densenet121", False, id="densenet121-eval"),
        pytest.param("resnet18", False, id="resnet18-eval", marks=pytest.mark.slow),
        pytest.param("densenet121", True, id="densenet121-training", marks=pytest.mark.slow),
    ],
)
def test_a_torchvision_model_equals_itself_unconverted(name, training):
    compare(
        lambda: torchvision.models.get_model(name, num_classes=7),
        (3, 3, 64, 64),
        torch.float64,
        FUSED,
        training,
        draws=1,
    )
