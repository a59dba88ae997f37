"""Blocks and whole networks on the CUDA C++ kernels, compiled for the host: as right as eager, and with no more memory kept than on the
other backends. Images are small, and labels random: it is the arithmetic that is compared."""

from __future__ import annotations

import host_kernels
import pytest
import torch
from support import each_mode
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedres
from fusedres.backends import select
from fusedres.backends.cuda import CudaBackend
from fusedres.nn import BasicBlock, Bottleneck, DenseBlock, HighwayBlock, PreActBottleneck, Transition
from fusedres.testing import assert_fused, compare, measure

torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.skipif(
    select.why_not(host_kernels.NAME, torch.device("cpu"), torch.float32) is not None, reason="no compiler for the host"
)
BLOCKS = {
    "basic": (lambda: BasicBlock(8, 8), (2, 8, 7, 5)),
    "bottleneck": (lambda: Bottleneck(16, 4), (2, 16, 6, 5)),
    "pre-activation": (lambda: PreActBottleneck(16, 4), (2, 16, 6, 5)),
    "dense": (lambda: DenseBlock(3, 8, 2, 4, 0.0), (2, 8, 6, 5)),
    "dense, narrow": (lambda: DenseBlock(2, 6, 2, 3, 0.0), (2, 6, 5, 5)),
    "transition": (lambda: Transition(12, 6), (2, 12, 6, 4)),
    "highway": (lambda: HighwayBlock(8), (2, 8, 5, 6)),
}


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_as_right_as_eager(name, dtype, training):
    """And ran on this backend, which compare asserts."""
    build, shape = BLOCKS[name]
    compare(build, shape, dtype, host_kernels.NAME, training)


@pytest.mark.parametrize("name", ["bottleneck", "dense", "transition"])
def test_recomputation_is_as_right_as_eager(name):
    build, shape = BLOCKS[name]
    compare(build, shape, torch.float32, host_kernels.NAME, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_a_whole_network_trains_as_right_as_eager(name):
    torch.manual_seed(0)
    base = torchvision.models.get_model(name, num_classes=10).to(memory_format=torch.channels_last)
    draws = []
    for seed in range(3):  # the median is that of none that a flipped ReLU has struck alone
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, 64, 64, generator=generator).to(memory_format=torch.channels_last)
        draws.append((x, torch.randint(10, (4,), generator=generator)))
    found: list[nn.Module] = []

    def convert(model: nn.Module) -> nn.Module:
        found.append(fusedres.convert(model, verify=False))
        return found[-1]

    with fusedres.use_backend(host_kernels.NAME):
        groups = measure(base, convert, draws)
    assert_fused(found[0], host_kernels.NAME)
    assert all(group.passed for group in groups), "\n".join(map(str, groups))


# ---- memory ----------------------------------------------------------------------------------------------------------


def kept_for_backward(block: nn.Module, x: Tensor) -> int:
    """The bytes of all different storages that backward will read and that are no parameters or buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers(), x)}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        at = t.untyped_storage()
        if at.data_ptr() not in own:
            storages[at.data_ptr()] = at.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    del y
    return sum(storages.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["bottleneck", "dense", "transition"])
def test_as_much_is_kept_for_backward_as_on_any_backend(name, recompute):
    build, shape = BLOCKS[name]
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    kept = []
    for backend in ("eager", host_kernels.NAME):
        torch.manual_seed(0)
        block = fusedres.convert(build(), recompute=recompute, verify=False)
        with fusedres.use_backend(backend):
            kept.append(kept_for_backward(block, x))
    assert kept[0] == kept[1] > 0


class Alive(TorchDispatchMode):
    """The bytes of the storages that operators have made and that are still there, at most: ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and _storage(leaf) not in known:
                self.storages = {at: kept for at, kept in self.storages.items() if not kept[0].expired()}
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return found


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@pytest.mark.slow
def test_a_densenet121_trains_on_256_images_within_16_gb():
    """In float16 at 224 pixels, counted on tensors without values: maps and gradients, but not what the library works in."""
    pytest.importorskip("rich")
    from bench.launches import Nowhere

    with torch.device("meta"):
        model = torchvision.models.densenet121()
        x = torch.empty(256, 3, 224, 224, dtype=torch.float16).to(memory_format=torch.channels_last)
    model = fusedres.convert(model.to(torch.float16, memory_format=torch.channels_last), verify=False)
    backend = CudaBackend(Nowhere())
    with select.observe(lambda inner: backend), Alive() as alive:
        model(x).float().sum().backward()
    assert all(row.fused for row in fusedres.report(model))
    weights = 2 * sum(p.nbytes for p in model.parameters())
    total = alive.peak + x.nbytes + weights
    assert 3e9 < total < 16e9, f"{total / 1e9:.1f} GB"
