"""The outputs of a converted module lie in memory as those of the module it was, and so do its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from converted import (
    FUSED,
    KINDS,
    Block,
    Copies,
    Flipped,
    Layer,
    assert_same_step,
    draw,
    each_kind,
    one_fused_backend,
    pair,
)
from torch import Tensor, nn

from fusedres.blocks import kind_key
from fusedres.blocks.handover import suggests_channels_last
from fusedres.swap import FusedBlock, state_of
from fusedres.testing import assert_fused, assert_parity

pytestmark = pytest.mark.usefixtures("proven_once")


@pytest.fixture(autouse=True)
def fused_backend() -> Iterator[None]:
    with one_fused_backend():
        yield


FORMATS = {
    "nchw": (torch.contiguous_format, torch.contiguous_format),
    "channels-last": (torch.channels_last, torch.channels_last),
    "channels-last-input": (torch.channels_last, torch.contiguous_format),
    "channels-last-weights": (torch.contiguous_format, torch.channels_last),
}


def steps_in(x_format: torch.memory_format, m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of an input that is no leaf, as they are."""
    leaf = x.clone().contiguous(memory_format=x_format).requires_grad_()
    inner = leaf * 1
    y = m(inner)
    (grad,) = torch.autograd.grad(y, inner, torch.ones_like(y))
    return y, grad


@pytest.mark.parametrize("formats", FORMATS)
@each_kind
def test_outputs_and_gradients_are_in_the_memory_format_of_the_original(kind, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(KINDS[kind]))
    ours, theirs = (steps_in(x_format, m, draw()) for m in (model, plain))
    assert_fused(model, FUSED)
    assert ours[0].stride() == theirs[0].stride()
    if formats in ("nchw", "channels-last"):
        assert ours[1].stride() == theirs[1].stride()
    with torch.no_grad():
        x = draw().contiguous(memory_format=x_format)
        assert model.eval()(x).stride() == plain.eval()(x).stride()


#: views of a map that torch takes neither for contiguous nor for channels_last
VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: draw((3, 8, 5, 6)).transpose(2, 3),
    "permuted": lambda: draw((6, 3, 5, 8)).permute(1, 3, 0, 2),
    "channels-last-expanded": lambda: draw((1, 6, 5, 8)).permute(0, 3, 1, 2).expand(3, 8, 6, 5),
    "slice": lambda: draw((3, 8, 7, 9))[:, :, 1:, 2:-2],
    "one-row": lambda: draw((3, 8, 1, 5)).transpose(0, 3),
}
VIEWED: dict[str, Callable[[], nn.Module]] = {
    **KINDS,
    "flipped-blocks": lambda: nn.Sequential(Flipped(), Flipped(), Block()),
    "twice": lambda: Twice(True, False),
    "strided-slice": lambda: Strided(),
}


class Strided(Block):
    """A block that adds every other pixel of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1.stride = (2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :, ::2, ::2] + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(inputs)))))


def lies(x: Tensor) -> list[int]:
    """Its strides, but for those of dimensions of one, which nothing is found by."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", VIEWED)
def test_an_output_has_the_strides_that_a_view_gives_it(kind, view, weight_format):
    plain, model = (m.to(memory_format=weight_format) for m in pair(VIEWED[kind]))
    x = VIEWS[view]()
    if min(x.shape[2:]) < 2 and kind == "transition":
        pytest.skip("no map is left behind its pool")
    ours, theirs = model(x), plain(x)
    assert_fused(model, FUSED)
    assert lies(ours) == lies(theirs)
    assert_parity(ours, theirs, theirs)
    assert_same_step(model, plain, x)
    with torch.no_grad():
        assert lies(model.eval()(x)) == lies(plain.eval()(x))


def test_a_dropout_behind_a_transposed_map_draws_the_same_mask():
    plain, model = pair(lambda: nn.Sequential(Flipped(), nn.Dropout(0.5)))
    x, found = VIEWS["transposed"](), []
    for m in (model, plain):
        torch.manual_seed(3)
        found.append(m(x))
    assert_fused(model, FUSED)
    assert torch.equal(found[0] == 0, found[1] == 0)


class Mixed(nn.Module):
    """A block of two paths, on one of which a norm stands whose output is in a memory format of its own: an InstanceNorm's is never
    channels_last. ``join`` adds them."""

    def __init__(self, norm: nn.Module, join: Callable[[Tensor, Tensor], Tensor], behind: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm
        self.behind = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) if behind else None
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.join = join

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm(self.conv1(x))
        if self.behind is not None:
            y = self.behind(y)
        return self.join(y, self.bn2(self.conv2(x))) * scale


def norm_first(y: Tensor, shortcut: Tensor) -> Tensor:
    return y + shortcut


def norm_last(y: Tensor, shortcut: Tensor) -> Tensor:
    return shortcut + y


class Twice(nn.Module):
    """A block that adds its input twice, to what a convolution has made and to the sum; ``last`` stands behind, a convolution alone."""

    def __init__(self, flipped: bool, last: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.flipped = nn.BatchNorm2d(8), flipped
        self.last = nn.Conv2d(8, 8, 3, padding=1) if last else None

    def forward(self, x: Tensor) -> Tensor:
        s = torch.relu(self.bn1(x))
        y = self.bn2(self.conv1(s))
        y = s + y if self.flipped else y + s
        y = s + y if self.flipped else y + s
        return y if self.last is None else self.last(y)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("last", [False, True], ids=["sum", "convolution"])
@pytest.mark.parametrize("flipped", [False, True], ids=["input-last", "input-first"])
def test_what_runs_between_pieces_is_in_the_memory_format_of_the_original(flipped, last, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: Twice(flipped, last)))
    x = draw().contiguous(memory_format=x_format)
    ours, theirs = model(x), plain(x)
    assert kind_key(model) == "general"
    assert_fused(model, FUSED)
    assert ours.stride() == theirs.stride()
    assert_parity(ours, theirs, theirs)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("behind", [False, True], ids=["alone", "convolution-behind"])
@pytest.mark.parametrize("join", [norm_first, norm_last])
@pytest.mark.parametrize("norm", [lambda: nn.InstanceNorm2d(8), lambda: nn.GroupNorm(2, 8)], ids=["instance", "group"])
def test_a_sum_has_the_memory_format_of_its_first_operand(norm, join, behind, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: Mixed(norm(), join, behind)))
    x = draw().contiguous(memory_format=x_format)
    ours, theirs = model(x), plain(x)
    assert kind_key(model) == "general"
    assert_fused(model, FUSED)
    assert ours.stride() == theirs.stride()
    assert_parity(ours, theirs, theirs)
    with torch.no_grad():
        assert model.eval()(x).stride() == plain.eval()(x).stride()


class Scaled(Block):
    """A block that adds what it computes, scaled, to its input, and another map to both."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None:
            x = x + other
        return x + 0.2 * self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


@pytest.mark.parametrize("formats", FORMATS)
def test_a_sum_with_an_expanded_map_has_the_memory_format_of_the_other(formats):
    _, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(Scaled))
    x = draw()[:, :, :1].expand(-1, -1, 6, -1)
    ours, theirs = model(x), plain(x)
    assert kind_key(model) == "general"
    assert_fused(model, FUSED)
    assert ours.stride() == theirs.stride()
    assert_parity(ours, theirs, theirs)
    torch._dynamo.reset()
    assert torch.compile(model, backend="eager")(x).stride() == theirs.stride()


@pytest.mark.parametrize("join", [norm_first, norm_last])
def test_a_sum_that_runs_unfused_has_the_memory_format_of_its_first_operand(join):
    plain, model = pair(lambda: Mixed(nn.InstanceNorm2d(8), join))
    x = draw().contiguous(memory_format=torch.channels_last)
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # which leaves float64 alone, and no piece of a general block is known to take
        assert model(x).stride() == plain(x).stride()
    assert not state_of(model).outcome.fused


class Parts(Block):
    """A block that returns parts of its sum."""

    def __init__(self, part: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.part, self.out = part, nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x
        found = self.part(y)
        return self.out(found[0]), found[-1], torch.relu(found[0])


PARTS = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: torch.split(y, [3, 5], 1),
    "slice": lambda y: (y[:, :, :-1], y[..., 1:]),
    "narrow": lambda y: (y.narrow(2, 1, 3), y),
    "slice of a part": lambda y: (y.chunk(2, 1)[1][:, 1:], y),
}


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_map_has_the_strides_of_the_map(part, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: Parts(PARTS[part])))
    x = draw().contiguous(memory_format=x_format)
    for ours, theirs in zip(model(x), plain(x), strict=True):
        assert ours.stride() == theirs.stride()
        assert_parity(ours, theirs, theirs)
    assert_fused(model, FUSED)


@pytest.mark.parametrize(
    ("part", "formats"),
    [
        # formats take turns
        pytest.param(part, formats, marks=[] if i == turn % len(FORMATS) else [pytest.mark.slow])
        for turn, part in enumerate(PARTS)
        for i, formats in enumerate(FORMATS)
    ],
)
def test_a_part_of_a_compiled_map_has_the_strides_of_the_map(part, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: Parts(PARTS[part])))
    x = draw().contiguous(memory_format=x_format)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")(x)
    assert [y.stride() for y in compiled] == [y.stride() for y in plain(x)]


class Dropping(Layer):
    """A dense layer with a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(self.conv(torch.relu(self.norm(x))), 0.5, self.training)], 1)


@pytest.mark.parametrize("formats", FORMATS)
def test_a_dropout_inside_a_dense_layer_draws_the_same_mask(formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: nn.Sequential(Dropping(8), Dropping(12))))
    found, x = [], draw().contiguous(memory_format=x_format)
    for m in (model, plain):
        torch.manual_seed(3)
        found.append(m(x))
    assert_fused(model, FUSED)
    assert_parity(*found, found[1])
    assert torch.equal(found[0] == 0, found[1] == 0) and found[0].stride() == found[1].stride()


@pytest.mark.parametrize("kind", ["residual", "row", "dense"])
def test_a_dropout_behind_a_block_draws_the_same_mask(kind):
    plain, model = pair(lambda: nn.Sequential(KINDS[kind](), nn.Dropout(0.5)))
    x = draw()
    found = []
    for m in (model, plain):
        torch.manual_seed(3)
        found.append(m(x))
    assert_parity(*found, found[1])
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert_fused(model, FUSED)


class Policy(nn.Module):
    """A small net that plays games, in NCHW: a convolution, residual blocks, and heads that flatten by ``view``."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.size = size
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.policy = nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.value_conv, self.value_bn = nn.Conv2d(8, 1, 1, bias=False), nn.BatchNorm2d(1)
        self.moves, self.value = nn.Linear(2 * size * size, size * size), nn.Linear(size * size, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        moves = self.moves(self.policy(x).view(-1, 2 * self.size * self.size))
        value = self.value(torch.relu(self.value_bn(self.value_conv(x))).view(x.size(0), -1))
        return torch.cat([moves, torch.tanh(value)], 1)


def test_a_net_that_flattens_its_maps_by_view_computes_the_same():
    plain, model = pair(Policy)
    assert_same_step(model, plain, draw((4, 3, 6, 6)))
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) >= 4
    assert_fused(model, FUSED)


def test_gradients_that_leave_a_block_may_be_viewed():
    plain, model = pair(lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Block()))
    for m in (plain, model):
        y = m[0](draw((2, 3, 6, 6)))
        seen = []
        y.register_hook(lambda grad, seen=seen: seen.append(grad.view(-1)))
        m[1](y).sum().backward()
        assert len(seen) == 1
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert p.grad.stride() == q.grad.stride()
    assert_fused(model[1], FUSED)


def test_maps_are_converted_where_a_region_begins_and_ends_and_not_between():
    _, model = pair(lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())))
    with Copies() as copies, torch.no_grad():
        y = model(draw())
    assert_fused(model, FUSED)
    assert y.is_contiguous() and len(copies.found) == 2


@pytest.mark.parametrize(
    "shape",
    [(2, 8, 5, 6), (2, 1, 5, 6), (2, 8, 1, 1), (1, 8, 5, 6), (2, 8, 1, 6), (1, 1, 1, 1), (8, 4, 3, 3), (8, 1, 3, 3)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_a_map_suggests_the_format_that_torch_takes_it_for(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format)
    y = F.batch_norm(x, None, None, training=True) if x.numel() > shape[1] else x
    x_is = suggests_channels_last(x)
    assert x_is is (torch._prims_common.suggest_memory_format(x) is torch.channels_last)
    assert x_is is suggests_channels_last(y) or min(shape) == 1
