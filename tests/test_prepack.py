"""Prepacked models compute what they did before, to the bit, and notice what changes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends import cpp
from fusedres.testing import assert_fused, randomize

pytestmark = pytest.mark.skipif(fusedres.backends()["cpp"] != "available", reason="needs the C++ extension")


class Network(nn.Module):
    """A weight of every kind of convolution: unfolded (7x7), by Winograd's algorithm in one chunk and in several, strided in several,
    of odd channels, grouped, and so wide on few pixels that tiles pack for themselves."""

    def __init__(self, memory_format: torch.memory_format = torch.channels_last) -> None:
        super().__init__()
        block = fusedres.nn.ConvBNAct
        self.stem = block(3, 32, 7, stride=2)
        self.winograd = block(32, 272, 3)
        self.chunks = block(272, 272, 3)
        self.strided = block(272, 35, 3, stride=2)
        self.odd = block(35, 64, 1)
        self.grouped = block(64, 64, 3, groups=4)
        self.wide = block(64, 320, 1)
        self.to(memory_format=memory_format)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


@pytest.fixture
def bytes_now() -> Callable[[], int]:
    """How many bytes are packed, of the weights of this test."""
    from fusedres import _C

    gc.collect()
    before = _C.packed_bytes()
    return lambda: _C.packed_bytes() - before


def network(**kwargs: torch.memory_format) -> Network:
    torch.manual_seed(0)
    model = Network(**kwargs)
    randomize(model)
    return model.eval()


def images(batch: int, size: int = 36) -> Tensor:
    return torch.randn(batch, 3, size, size + 3).to(memory_format=torch.channels_last)


@torch.no_grad()
def assert_same(model: nn.Module, x: Tensor) -> None:
    """``model`` gives the bits of a copy, which is not prepacked; twice: the second call reads what the first has packed."""
    expected = copy.deepcopy(model)(x)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    if len(x):
        assert_fused(model, "cpp")


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_results_are_those_of_before_to_the_bit(
    batch: int, memory_format: torch.memory_format, bytes_now: Callable[[], int]
) -> None:
    model = fusedres.prepack(network(memory_format=memory_format))
    with torch.no_grad():
        expected = copy.deepcopy(model)(images(batch))
    assert bytes_now() == 0
    torch.manual_seed(0)
    assert_same(model, images(batch))
    assert expected.shape[0] == batch and (bytes_now() > 0) == (batch > 0)


def test_every_weight_that_is_packed_stays_so(bytes_now: Callable[[], int]) -> None:
    model = fusedres.prepack(network())
    assert_same(model, images(3))
    # by Winograd's algorithm or as they are, in whole vectors of outputs
    weights = [part[0].weight for part in model.children()]
    assert bytes_now() >= sum(4 * weight.numel() for weight in weights)


def test_sizes_that_want_other_layouts_take_turns(bytes_now: Callable[[], int]) -> None:
    model = fusedres.prepack(network())
    for batch, size in ((1, 20), (4, 70), (1, 20), (2, 36)):
        assert_same(model, images(batch, size))
        assert bytes_now() > 0


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 0.5 * t for name, t in model.state_dict().items()})


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(images(2)).mean().backward()
    optimizer.step()
    model.eval()


def replaced(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)
    # where the old ones were, if their memory is free
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)


def written_uncounted(model: nn.Module) -> None:
    """As optimizers and averages of weights of long ago do: every value, but in no way that torch counts."""
    for weight in model.parameters():
        weight.data.mul_(1.5)


def cast_and_back(model: nn.Module) -> None:
    model.double().float()
    in_place(model)


def written_once_and_prepacked(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data.select(0, 0).fill_(7.0)
    fusedres.prepack(model)


@pytest.mark.parametrize(
    "change", [in_place, loaded, trained, replaced, cast_and_back, written_uncounted, written_once_and_prepacked]
)
def test_a_change_of_weights_is_noticed(change: Callable[[nn.Module], None]) -> None:
    model, x = fusedres.prepack(network()), images(2)
    with torch.no_grad():
        before = model(x)
    change(model)
    assert_same(model, x)
    with torch.no_grad():
        assert not torch.equal(model(x), before)


def test_training_steps_are_those_of_before_to_the_bit() -> None:
    plain, x = network().train(), images(2)
    packed = fusedres.prepack(copy.deepcopy(plain))
    for model in (plain, packed):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for name, expected in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], expected), name


def test_compiled_models_read_what_is_packed(bytes_now: Callable[[], int]) -> None:
    model, x = fusedres.prepack(network()), images(2)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        assert torch.equal(compiled(x), expected)
        assert bytes_now() > 0
        in_place(model)
        assert torch.equal(compiled(x), copy.deepcopy(model)(x))
        assert not torch.equal(compiled(x), expected)


def test_threads_share_a_prepacked_model() -> None:
    model = fusedres.prepack(network())
    plain = copy.deepcopy(model)
    given = [images(1 + i % 3, 20 + 16 * (i % 2)) for i in range(24)]
    with torch.no_grad():
        expected = [plain(x) for x in given]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(4) as pool:
        for y, y0 in zip(pool.map(run, given), expected, strict=True):
            assert torch.equal(y, y0)


def test_what_is_packed_ends_with_the_model_or_on_demand(bytes_now: Callable[[], int]) -> None:
    model = fusedres.prepack(network())
    assert_same(model, images(2))
    assert bytes_now() > 0
    fusedres.prepack(model, keep=False)
    assert bytes_now() == 0
    assert_same(model, images(2))
    assert bytes_now() == 0
    assert_same(fusedres.prepack(model), images(2))
    assert bytes_now() > 0
    del model
    gc.collect()
    assert bytes_now() == 0


@pytest.mark.skipif(cpp.cpu_capability() != "avx512_bf16", reason="convolutions in bfloat16 are the library's here")
def test_results_in_bfloat16_are_those_of_before_to_the_bit(bytes_now: Callable[[], int]) -> None:
    model = fusedres.prepack(network().bfloat16())
    assert_same(model, images(3).bfloat16())
    assert bytes_now() > 0


def test_what_cannot_be_prepacked_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"prepack expects a torch.nn.Module, found Tensor"):
        fusedres.prepack(torch.ones(1))  # type: ignore[type-var]
    with pytest.raises(ValueError, match="nothing in this one is: call fusedres.convert"):
        fusedres.prepack(nn.Conv2d(3, 3, 1))
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match=r"stem\.0\.weight was made under torch.inference_mode"):
        fusedres.prepack(model)


def test_nothing_happens_where_kernels_read_weights_as_they_are(bytes_now: Callable[[], int]) -> None:
    with fusedres.use_backend("eager"):
        model = fusedres.prepack(network())
        with torch.no_grad():
            model(images(1))
    assert bytes_now() == 0
