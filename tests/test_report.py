"""The report: a table that a person reads, with the bytes that blocks keep for backward and the plans of their convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.report import Report, Row
from fusedres.swap import FusedBlock

torchvision = pytest.importorskip("torchvision")
from torchvision.models import densenet, resnet  # noqa: E402

FUSED = "eager" if fusedres.backends()["cpp"] != "available" else "cpp"
SHAPE = (2, 8, 12, 10)


@pytest.fixture(autouse=True)
def one_fused_backend():
    """The compiled backend, or eager's schedules where there is no extension: never the original modules."""
    torch.manual_seed(0)
    with fusedres.use_backend(None if FUSED == "cpp" else FUSED):
        yield


def projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: resnet.BasicBlock(8, 8),
    "projection": lambda: resnet.BasicBlock(8, 12, 2, projection()),
    "bottleneck": lambda: resnet.Bottleneck(8, 2),
    "stem": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
    "dense": lambda: densenet._DenseBlock(3, 8, 2, 4, 0.0),
    "transition": lambda: densenet._Transition(8, 4),
}


def kept_by_a_call(block: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a real call of ``block`` saves, each once, but for parameters, buffers and the output."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers(), y)}
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_bytes_are_those_that_a_call_keeps(name, recompute):
    plain = BLOCKS[name]()
    block = fusedres.convert(copy.deepcopy(plain), recompute=recompute)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = (kept_by_a_call(m, x.clone()) for m in (block, plain))
    (row,) = fusedres.report(block)
    assert row.fused and row.detail == FUSED
    assert row.kept == ours
    # small vectors are as many, but not kept as such by every backend of batch_norm
    assert row.eager_kept == pytest.approx(theirs, rel=0.02)
    assert row.kept < row.eager_kept


def test_following_leaves_the_model_and_its_gradients_alone():
    model = fusedres.convert(nn.Sequential(*(BLOCKS[name]() for name in ("stem", "basic"))))
    model(torch.randn(SHAPE)).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    fusedres.report(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_bytes_are_reported_of_calls_in_training_alone():
    model = fusedres.convert(nn.Sequential(BLOCKS["basic"](), BLOCKS["basic"]()))
    assert [row.kept for row in fusedres.report(model)] == [None, None]
    model(torch.randn(SHAPE))
    assert all(row.kept > 0 for row in fusedres.report(model))
    assert "kept, MiB" in str(fusedres.report(model))
    model.eval()
    assert [row.kept for row in fusedres.report(model)] == [None, None], "not what the next call would keep"
    with torch.no_grad():
        model.train()(torch.randn(SHAPE))
    assert [row.kept for row in fusedres.report(model)] == [None, None]
    assert "MiB" not in str(fusedres.report(model))


def test_autocast_halves_the_bytes():
    model = fusedres.convert(nn.Sequential(nn.Conv2d(8, 8, 1), BLOCKS["basic"]()))
    x, kept = torch.randn(SHAPE), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x)
        (row,) = fusedres.report(model)
        assert row.fused
        kept.append((row.kept, row.eager_kept))
    assert all(half == pytest.approx(whole / 2, rel=0.1) for whole, half in zip(*kept, strict=True))


def test_a_whole_model_keeps_what_its_blocks_say():
    model = fusedres.convert(torchvision.models.resnet18()).to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    report = fusedres.report(model)
    assert all(row.kept is not None and row.kept < row.eager_kept for row in report if row.kind != "sequential")
    last = str(report).splitlines()[-2]
    assert last.startswith("kept for backward by the last call: ") and last.endswith(" % less)")


def test_neighbours_that_agree_share_a_line():
    rows = [Row(f"layer1.{i}", "bottleneck", True, "cpp", (), 2**20, 2**21) for i in range(3)]
    rows += [
        Row("layer2.0", "bottleneck", True, "cpp", (), 2**20, 2**21),
        Row("layer2.1", "bottleneck", False, "a hook"),
    ]
    assert str(Report(rows)).splitlines() == [
        "module                kind        fused  by what, or why not  kept, MiB  in eager",
        "--------------------  ----------  -----  -------------------  ---------  --------",
        "layer1.0 to layer1.2  bottleneck  yes    cpp                        3.0       6.0",
        "layer2.0              bottleneck  yes    cpp                        1.0       2.0",
        "layer2.1              bottleneck  no     a hook",
        "kept for backward by the last call: 4.0 MiB, by the same modules in eager 8.0 MiB (50 % less)",
        "4 of 5 blocks fused",
    ]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("plan", ["fused", "library"])
def test_the_plan_of_each_convolution_is_named(plan, training):
    if fusedres.backends()["triton"] != "available":
        pytest.skip(fusedres.backends()["triton"])
    from fusedres.backends import triton

    model = fusedres.convert(resnet.BasicBlock(8, 8)).train(training)
    with fusedres.use_backend("triton"), triton.use_plan(plan), torch.set_grad_enabled(training):
        model(torch.randn(1, 8, 4, 4))
        (row,) = fusedres.report(model)
    assert row.routes == (("conv1", plan), ("conv2", plan))
    assert f"conv1 {plan}, conv2 {plan}" in str(Report([row]))
    assert (row.kept is None) is not training


def test_plans_that_differ_by_direction_are_told_apart(monkeypatch):
    if fusedres.backends()["triton"] != "available":
        pytest.skip(fusedres.backends()["triton"])
    from fusedres.backends import triton

    routes = {"conv_forward": {"forward": "fused"}, "conv_backward": {"dgrad": "library", "wgrad": "fused"}}
    monkeypatch.setattr(triton.BACKEND, "routes", lambda primitive, *_, **__: routes.get(primitive, {}))
    model = fusedres.convert(resnet.BasicBlock(8, 8))
    with fusedres.use_backend("triton"):
        model(torch.randn(1, 8, 4, 4, requires_grad=True))
        (row,) = fusedres.report(model)
    assert row.routes == (("conv1", "fused/library/fused"), ("conv2", "fused/library/fused"))


def test_what_ran_by_its_modules_has_neither_bytes_nor_plans():
    model = fusedres.convert(nn.Sequential(BLOCKS["basic"](), BLOCKS["basic"]()))
    model[0].conv1.register_forward_hook(lambda *_: None)
    model(torch.randn(SHAPE))
    first, second = fusedres.report(model)
    assert not first.fused and first.kept is None and first.routes == ()
    assert second.fused and second.kept > 0


def test_a_split_block_reports_the_sum_of_its_pieces():
    timm = pytest.importorskip("timm")
    plain = timm.create_model("seresnet18").layer1[0]
    block = fusedres.convert(copy.deepcopy(plain))
    block(torch.randn(2, 64, 8, 8, requires_grad=True))
    assert isinstance(block, FusedBlock) and len(block._fusedres.records) > 1
    (row,) = fusedres.report(block)
    # the input, read by the first piece and by the join, counts once: two raw maps, and what the squeeze-and-excitation makes
    map_bytes = 4 * 2 * 64 * 8 * 8
    assert row.kept == pytest.approx(4 * map_bytes, rel=0.05)
    assert row.eager_kept == pytest.approx(4 * map_bytes, rel=0.05)


class Aside(nn.Module):
    """A block whose shortcut runs in a piece of its own, between two pieces of its main path that are narrower than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def main(self, x: Tensor) -> Tensor:
        return self.bn2(torch.relu(self.conv2(self.bn1(torch.relu(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.downsample(x)


class AsideFirst(Aside):
    """The same with its shortcut first."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        return self.main(x) + shortcut


@pytest.mark.parametrize("cls", [Aside, AsideFirst])
def test_pieces_are_followed_in_the_order_in_which_they_ran(cls):
    block = fusedres.convert(cls())
    block(torch.randn(SHAPE)).sum().backward()
    records = block._fusedres.records
    (row,) = fusedres.report(block)
    assert row.fused and len(records) == 3 and row.kept > 0
    wide = [record.shapes[0][1] for record in records]
    assert wide == ([5, 8, 8] if cls is Aside else [8, 5, 8])


class Beside(nn.Module):
    """A block that puts its input behind a row, which it calls as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((torch.relu(self.row(x)), x), 1)


WITHOUT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (BLOCKS["basic"], "conv2"),
    "residual-row": (BLOCKS["projection"], "downsample.1"),
    "general": (Beside, "row.1"),
    "general-whole-row": (Beside, "row"),
    "dense": (BLOCKS["dense"], "denselayer2.conv1"),
    "dense-activation": (BLOCKS["dense"], "denselayer2.relu1"),
    "transition": (BLOCKS["transition"], "conv"),
    "highway": (lambda: fusedres.nn.HighwayBlock(8), "gate"),
    "highway-norm": (lambda: fusedres.nn.HighwayBlock(8, gate_norm=True), "gate_bn"),
    "block-of-ours": (lambda: fusedres.nn.BasicBlock(8, 8), "bn1"),
    "stem": (lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3), "bn1"),
    "head": (lambda: densenet.DenseNet(4, (2, 2), 8, num_classes=3), "features"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_block_that_has_lost_a_module_is_reported_and_raises_as_the_original(name):
    build, path = WITHOUT[name]
    model = fusedres.convert(build())
    x = torch.randn(2, 3 if name in ("stem", "head") else 8, 32, 32)
    model(x)
    assert next(row for row in fusedres.report(model) if row.path == "").fused
    above, _, child = path.rpartition(".")
    parent, lost = model.get_submodule(above), model.get_submodule(path)
    delattr(parent, child)
    row = next(row for row in fusedres.report(model) if row.path == "")
    assert not row.fused and row.kept is None
    if isinstance(parent, nn.Sequential):
        return  # a row without it is a shorter row
    with pytest.raises(AttributeError, match=child):
        model(x)
    parent.add_module(child, lost)
    model(x)
    assert next(row for row in fusedres.report(model) if row.path == "").fused


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(9, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.Conv2d(8, 9, 3, padding=1, bias=False),
    ],
    ids=["channels", "size", "norm"],
)
def test_a_block_that_no_longer_fits_its_last_call_has_neither_bytes_nor_plans(other):
    block = fusedres.convert(BLOCKS["basic"]())
    block(torch.randn(SHAPE)).sum().backward()
    block.conv2 = other
    (row,) = fusedres.report(block)
    assert row.kept is None and row.routes == ()
