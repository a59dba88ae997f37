"""Threads and processes around a converted model: the numbers are those of one thread that is alone, bit for bit."""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Callable, Iterator

import forked
import pytest
import torch
from support import served
from torch import Tensor, nn

import fusedres
from fusedres.nn import BasicBlock, Bottleneck, ConvBNAct, DenseBlock, Transition
from fusedres.testing import assert_fused, randomize

CALLERS = 4
ROUNDS = 5


def network() -> nn.Module:
    """A block of every kind, wide enough that kernels share out their work."""
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvBNAct(3, 32, 3),
        BasicBlock(32, 32),
        Bottleneck(32, 8),
        DenseBlock(num_layers=2, num_input_features=32, bn_size=2, growth_rate=16, drop_rate=0.0),
        Transition(64, 32),
    )
    randomize(model)
    return fusedres.convert(model.eval())


def images(seed: int, size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


def infer(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def differentiate(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every parameter's gradient, none of it left in the model."""
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


each_use = pytest.mark.parametrize("use", [infer, differentiate])
#: torch's own threads inside every call; `make sanitize` takes the tests with one, since it cannot follow OpenMP's
each_inside = pytest.mark.parametrize("inside", [1, 2], ids=["one-inside", "two-inside"])


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Afterwards as many of torch's threads as before."""
    served("cpp", torch.float32)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_threads(bodies: list[Callable[[], None]]) -> None:
    """Run all at once; what one of them raises is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(bodies))

    def run(body: Callable[[], None]) -> None:
        try:
            start.wait()
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def assert_same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@each_inside
@each_use
def test_threads_that_share_a_model_compute_what_one_computes(
    use: Callable[[nn.Module, Tensor], list[Tensor]], inside: int
) -> None:
    torch.set_num_threads(inside)
    model = network()
    # maps of several sizes, so that scratch memory grows while others compute
    inputs = [images(seed, size=12 + 4 * seed) for seed in range(CALLERS)]
    wanted = [use(model, x) for x in inputs]
    assert_fused(model, "cpp")

    def body(x: Tensor, expected: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(ROUNDS):
                assert_same(use(model, x), expected)

        return run

    in_threads([body(x, expected) for x, expected in zip(inputs, wanted, strict=True)])


@each_inside
def test_backward_runs_in_another_thread_than_forward(inside: int) -> None:
    torch.set_num_threads(inside)
    model, x = network(), images(1)
    wanted = differentiate(model, x)
    for _ in range(ROUNDS):
        y = model(x)
        found: list[Tensor] = [y.detach()]
        in_threads(
            [lambda y=y, found=found: found.extend(torch.autograd.grad(y.square().sum(), list(model.parameters())))]
        )
        assert_same(found, wanted)


@each_use
def test_the_number_of_threads_may_change_between_calls(use: Callable[[nn.Module, Tensor], list[Tensor]]) -> None:
    model, x = network(), images(2)
    wanted = use(model, x)
    for count in (1, 4, 2, 3, 1, 2):
        torch.set_num_threads(count)
        assert_same(use(model, x), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_forked_after_use_computes_the_same() -> None:
    """With a thread of its own, as a data loader's worker has: more than that hang in eager PyTorch, too."""
    code = f"""
    import os, sys, warnings
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    import torch
    from test_threads import assert_same, differentiate, images, network
    torch.set_num_threads(2)
    model, x = network(), images(3)
    wanted = differentiate(model, x)
    warnings.simplefilter("ignore", DeprecationWarning)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        assert_same(differentiate(model, x), wanted)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert_same(differentiate(model, x), wanted)
    sys.exit(os.waitstatus_to_exitcode(status))
    """
    done = forked.python(["-c", textwrap.dedent(code)])
    assert done.returncode == 0, done.stderr
