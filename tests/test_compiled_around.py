"""What stands around fused blocks that are compiled: functional calls, checkpoints, processes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fusedres.testing import assert_fused

pytest.importorskip("torchvision")
from compiling import NEEDS_CPP, assert_equal, block, calls, compiled, maps, operators  # noqa: E402

pytestmark = [NEEDS_CPP, pytest.mark.usefixtures("proven_once")]


def test_functional_call_takes_the_weights_that_it_is_given():
    model, twin = block()
    weights = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    program = torch.compile(lambda w, x: functional_call(model, w, (x,)), fullgraph=True, backend=counter)
    found = torch.autograd.grad(program(weights, maps()).square().sum(), list(weights.values()))
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(weights[name])
    expected = torch.autograd.grad(twin(maps()).square().sum(), list(twin.parameters()))
    assert all(map(torch.equal, found, expected))
    assert operators(counter) == {"residual_forward": 2}


@pytest.mark.parametrize("selective", [False, True], ids=["whole", "selective"])
def test_activation_checkpointing_equals_eager(selective):
    model, twin = block()
    context, backend = {}, "aot_eager"
    if selective:
        backend = "aot_eager_decomp_partition"
        saved = [torch.ops.fusedres.residual_forward.default]
        context = {"context_fn": functools.partial(create_selective_checkpoint_contexts, saved)}

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False, **context)

    torch._dynamo.reset()
    program = torch.compile(checkpointed, fullgraph=True, backend=backend)
    for m, call in ((model, program), (twin, twin)):
        m.zero_grad()
        call(maps().requires_grad_()).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("regional", [False, True], ids=["model", "blocks"])
def test_a_checkpoint_around_what_is_compiled_equals_one_in_eager(regional):
    """Statistics move once more in the recomputation, in both, as torch's own do."""
    model, twin = block()
    torch._dynamo.reset()
    program, counter = model, CompileCounterWithBackend("aot_eager")
    if regional:
        for child in model:
            child.compile(fullgraph=True, backend=counter)
    else:
        program = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert_equal(
            step_of(model, lambda x: checkpoint(program, x, use_reentrant=False)),
            step_of(twin, lambda x: checkpoint(twin, x, use_reentrant=False)),
        )
    assert twin[1].bn3.num_batches_tracked == 4
    assert operators(counter)["residual_forward"] == (1 if regional else 2)


def step_of(model: nn.Module, call: Callable[[Tensor], Tensor], backward: bool = True) -> dict[str, Tensor]:
    """The output, the gradients and the buffers of a step of ``model``, by ``call``; without ``backward`` it does that, too."""
    model.zero_grad()
    x = maps().requires_grad_()
    y = call(x)
    if backward:
        y.square().sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: value.clone() for name, value in found.items()} | {n: b.clone() for n, b in model.named_buffers()}


def test_compiled_autograd_takes_the_operators_of_the_backward():
    model, twin = block()
    torch._dynamo.reset()
    counters["compiled_autograd"].clear()

    def train(x: Tensor) -> Tensor:
        y = model(x)
        y.square().sum().backward()
        return y

    with torch._dynamo.config.patch(compiled_autograd=True):  # which is read when a function is compiled
        program = torch.compile(train, backend="aot_eager")
        assert_equal(step_of(model, program, backward=False), step_of(twin, twin))
        kinds = calls(lambda: step_of(model, program, backward=False))
    assert counters["compiled_autograd"]["captures"] > 0
    assert kinds == {"residual_forward": 2, "residual_backward": 2}


def test_a_stance_runs_the_same_module_in_eager():
    model, twin = block()
    program, counter = compiled(model)
    assert_equal(step_of(model, program), step_of(twin, twin))
    with torch.compiler.set_stance("force_eager"):
        assert_equal(step_of(model, program), step_of(twin, twin))
        assert_fused(model, "cpp")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(step_of(model, program), step_of(twin, twin))
    assert counter.frame_count == 1


@pytest.mark.parametrize("in_a_group", [False, True], ids=["no group", "a group of one"])
def test_sync_batch_norm_of_one_process_is_a_batch_norm(in_a_group):
    model, twin = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in block())
    if in_a_group:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        program, counter = compiled(model)
        assert_equal(step_of(model, program), step_of(twin, twin))
    finally:
        if in_a_group:
            dist.destroy_process_group()
    assert_fused(twin, "cpp")
    assert operators(counter) == {"residual_forward": 2}


def test_data_parallel_training_equals_eager():
    model, twin = block()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        program = torch.compile(DistributedDataParallel(model), backend=counter)
        for _ in range(2):
            for m in (program, twin):
                m.zero_grad()
                m(maps()).square().sum().backward()
            for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(mine.grad, other.grad)
    finally:
        dist.destroy_process_group()
    assert operators(counter)
