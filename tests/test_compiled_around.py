"""What stands around fused blocks that are compiled: functional calls, checkpoints, processes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("torchvision")
from compiling import NEEDS_CPP, block, maps, operators  # noqa: E402

pytestmark = NEEDS_CPP


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
