"""Maps on a CPU lie in memory that is kept from one to the next: no two in the same place, no more of it than was in use, and seen."""

from __future__ import annotations

import os
import pickle
import random
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends.layout import empty_gradient, empty_map
from fusedres.testing import assert_fused, run_training
from fusedres.trial.memory import peak_bytes

torchvision = pytest.importorskip("torchvision")
CPU, CHANNELS_LAST = torch.device("cpu"), torch.channels_last
LARGE = 1 << 20
LINE = 64

try:
    from fusedres import _C
except ImportError:
    pytest.skip("needs the C++ extension", allow_module_level=True)


@pytest.fixture(autouse=True)
def keeps():
    fusedres.release_memory()
    floats(LARGE)
    if _C.map_bytes() == 0:
        pytest.skip("keeps no memory: not Linux, AddressSanitizer, or switched off")


def floats(count: int) -> Tensor:
    return torch.ops.fusedres_cpp.fresh([count], [1], torch.float32)


def program(code: str, **environment: str) -> str:
    """What it prints, in a process of its own."""
    path = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    done = forked.python(["-c", textwrap.dedent(code)], env=os.environ | {"PYTHONPATH": path} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def work(seed: int, steps: int) -> None:
    """Takes and gives in any order; every tensor still has at its end what was written into it at its beginning."""
    draw, alive = random.Random(seed), []
    for step in range(steps):
        if alive and draw.random() < 0.5:
            t, value = alive.pop(draw.randrange(len(alive)))
            assert torch.equal(t, torch.full_like(t, value))
        else:
            value = float(seed * steps + step)
            alive.append(
                (floats(draw.choice([40_000, 123_457, 1 << 18, draw.randrange(33_000, 600_000)])).fill_(value), value)
            )
    places = sorted((t.data_ptr(), t.numel() * 4) for t, _ in alive)
    for (begin, size), (following, _) in zip(places, places[1:], strict=False):
        assert begin % LINE == 0 and begin + size <= following
    for t, value in alive:
        assert torch.equal(t, torch.full_like(t, value))


@pytest.mark.parametrize("threads", [1, 4])
def test_no_two_lie_in_the_same_place(threads):
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads), [400] * threads))


def test_what_is_freed_is_used_again_whatever_the_sizes():
    held = _C.map_bytes()
    for count in (LARGE, LARGE // 4, LARGE // 3 + 1, LARGE):
        first, second = floats(count // 2), floats(count // 3)
        del first, second
    assert _C.map_bytes() == held


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
def test_neighbours_that_are_freed_in_any_order_become_one(order):
    place = floats(3 * LARGE).data_ptr()
    three = [floats(LARGE // 2) for _ in range(3)]
    for i in order:
        three[i] = None
    assert floats(3 * LARGE).data_ptr() == place


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_released_memory_is_the_systems_and_what_lives_stays():
    low, high = floats(LARGE).fill_(3.0), floats(16 * LARGE).fill_(4.0)
    kept = floats(LARGE).fill_(5.0)
    del high
    before = resident()
    fusedres.release_memory()
    assert before - resident() > 60 << 20  # although something lies behind it
    assert torch.equal(low, torch.full_like(low, 3.0)) and torch.equal(kept, torch.full_like(kept, 5.0))
    held = _C.map_bytes()
    del kept
    fusedres.release_memory()
    assert held - _C.map_bytes() > 60 << 20


def test_no_more_is_held_for_good_than_twice_what_is_in_use_at_once():
    floats(64 * LARGE)
    assert _C.map_bytes() > 256 << 20
    for _ in range(2 * 4096):
        floats(1 << 16)
    assert _C.map_bytes() <= 2 * (1 << 18) + 4096


def network() -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock(32, 32)
    return fusedres.convert(nn.Sequential(block)).to(memory_format=CHANNELS_LAST)


def images() -> Tensor:
    return torch.randn(8, 32, 32, 32, generator=torch.Generator().manual_seed(1)).to(memory_format=CHANNELS_LAST)


def test_steps_find_the_memory_of_the_last_and_gradients_of_weights_lie_as_their_weights():
    model, x = network(), images()
    with fusedres.use_backend("cpp"):
        run_training(model, x)
        held = _C.map_bytes()
        for _ in range(3):
            run_training(model, x)
    assert_fused(model, "cpp")
    assert _C.map_bytes() == held > x.numel() * 4
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_not_a_bit_differs_where_no_memory_is_kept():
    code = """
    import hashlib
    import test_map_memory as here
    torch, fusedres = here.torch, here.fusedres
    with fusedres.use_backend("cpp"):
        found = here.run_training(here.network(), here.images())
    print(hashlib.sha256(b"".join(t.detach().double().numpy().tobytes() for t in found.values())).hexdigest())
    print(here._C.map_bytes() > 0)
    """
    (kept, yes), (fresh, no) = (program(code, FUSEDRES_MAP_MEMORY=wanted).split() for wanted in "10")
    assert kept == fresh and (yes, no) == ("True", "False")


def test_where_there_is_no_room_torch_is_asked():
    program("""
    import resource
    import torch
    from fusedres import _C
    import fusedres
    most = int(open("/proc/self/statm").read().split()[0]) * 4096 + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    assert torch.equal(torch.ops.fusedres_cpp.fresh([1 << 20], [1], torch.float32).fill_(2.0), torch.full([1 << 20], 2.0))
    fusedres.release_memory()
    assert _C.map_bytes() == 0
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_has_what_its_parent_had_and_both_go_on_by_themselves():
    program("""
    import os, threading, warnings
    from test_map_memory import floats, torch, work
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    shared = floats(1 << 20).fill_(7.0)
    beside = threading.Thread(target=work, args=(1, 3000))  # takes and gives while the child is made
    beside.start()
    children = []
    for number in range(5):
        child = os.fork()
        if child == 0:
            work(number + 2, 50)
            shared.fill_(8.0)
            os._exit(0)
        children.append(child)
    beside.join()
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert torch.equal(shared, torch.full_like(shared, 7.0))
    """)


def test_torchs_profiler_sees_maps():
    assert peak_bytes(lambda: floats(LARGE), CPU) == 4 * LARGE
    assert peak_bytes(lambda: [floats(LARGE), floats(LARGE // 2)], CPU) == 6 * LARGE


@pytest.mark.parametrize("shape", [(2, 64, 48, 40), (1, 70_000, 1, 2), (2, 3, 160, 150), (2, 8, 16, 24, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8], ids=str)
def test_a_large_map_lies_as_torch_would_lay_it(shape, dtype):
    layout = CHANNELS_LAST if len(shape) == 4 else torch.channels_last_3d
    found, expected = empty_map(shape, torch.ones(1), dtype), torch.empty(shape, memory_format=layout, dtype=dtype)
    assert found.stride() == expected.stride() and found.dtype == dtype and found.shape == expected.shape
    assert _C.map_bytes() >= found.numel() * found.element_size()


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(512, 512, 1, 1),
        torch.randn(256, 128, 3, 3).to(memory_format=CHANNELS_LAST),
        torch.randn(256, 128, 3, 3).transpose(2, 3),
        torch.randn(256, 256, 3, 3)[:, ::2],
    ],
    ids=["contiguous", "channels_last", "transposed", "every second channel"],
)
def test_a_weights_gradient_lies_as_torch_would_lay_it(weight):
    assert empty_gradient(weight).stride() == torch.empty_like(weight).stride()


def test_what_others_do_with_tensors_works_with_maps():
    t = floats(LARGE).fill_(2.0)
    twin = pickle.loads(pickle.dumps(t))
    assert torch.equal(twin, t) and torch.equal(t.clone(), t) and t.numpy().sum() == 2.0 * LARGE
    array = t.numpy()
    del t
    floats(LARGE).fill_(3.0)
    assert (array == 2.0).all()  # NumPy still has it
    t = floats(LARGE).fill_(4.0)
    t.share_memory_()
    assert t.is_shared() and torch.equal(t, torch.full_like(t, 4.0))


def test_an_operators_answer_to_bad_sizes_is_an_error():
    with pytest.raises(RuntimeError, match="a stride for each size: found 1 for 2"):
        torch.ops.fusedres_cpp.fresh([1024, 1024], [1], torch.float32)
