"""Thousands of small steps with sizes, dtypes, layouts and modes mixed: memory stays flat, and the same steps give the same bits."""

from __future__ import annotations

import hashlib
import resource

import pytest
import torch
from torch import nn

import fusedres
from fusedres.nn import BasicBlock, Bottleneck, ConvBNAct, DenseBlock, Transition

STEPS = 5000
SIZES = ((1, 9), (2, 8), (3, 7), (4, 12), (2, 5))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        ConvBNAct(3, 8, 3),
        BasicBlock(8, 8),
        Bottleneck(8, 2),
        DenseBlock(num_layers=2, num_input_features=8, bn_size=2, growth_rate=4, drop_rate=0.0),
        Transition(16, 8),
    )


def run(steps: int) -> tuple[str, list[int]]:
    """A digest of every parameter and buffer after ``steps`` steps, and the peak resident memory, KiB, after each tenth of them."""
    model = fusedres.convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    peaks = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        n, size = SIZES[step % len(SIZES)]
        x = torch.randn(n, 3, size, size, generator=generator)
        if step % 3:
            x = x.contiguous(memory_format=torch.channels_last)
        model.train(step % 4 != 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 7 == 0):
            if step % 11 == 10:
                with torch.no_grad():
                    model(x)
            else:
                optimizer.zero_grad()
                model(x).float().square().mean().backward()
                optimizer.step()
        if (step + 1) % (steps // 10) == 0:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest(), peaks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_mixed_steps_keep_memory_flat_and_repeat_bit_for_bit():
    (first, peaks), (second, more) = run(STEPS), run(STEPS)
    assert first == second
    # the first tenth fills caches: of plans, of allocators; from then on one page per step would be 20 MB
    assert more[-1] - peaks[0] < 8 * 1024, (peaks, more)
