"""Faults of the libraries beside us, and that converted models keep off them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusedres import doctor

# oneDNN's weight gradient of a strided 1x1 convolution with fewer than 8 input channels writes past its memory on CPUs with AVX2 and
# without AVX-512 (torch 2.14.1): some steps later the process dies. ONEDNN_MAX_CPU_ISA makes any newer CPU take that kernel.
STEPS = """
import torch, fusedres
torch.manual_seed(0)
row = torch.nn.Sequential(torch.nn.Conv2d({channels}, 48, 1, {stride}, bias=False), torch.nn.BatchNorm2d(48), torch.nn.ReLU())
row = fusedres.convert(row.to(memory_format=torch.channels_last))
for _ in range(20):
    x = torch.randn(2, {channels}, 64, 64).to(memory_format=torch.channels_last)
    row(x).sum().backward()
    blocks = [torch.empty(size) for size in (100, 1000, 10000, 50000)]
(block,) = fusedres.report(row)
assert block.fused and block.detail == "cpp", block
assert dict(block.routes) == {{"0": "fused"}}, block.routes
print("survived", row[0].weight.grad.isfinite().all().item())
"""


def _has_avx2() -> bool:
    return "avx2" in (doctor.diagnose()["extension"].get("capabilities") or ())


@pytest.mark.skipif(not _has_avx2(), reason="needs the C++ extension on a CPU with AVX2")
def test_narrow_strided_pointwise_convolutions_train_off_the_librarys_faulty_weight_gradient():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "FUSEDRES_CPU_CAPABILITY": "avx2"}
    program = "".join(STEPS.format(channels=channels, stride=stride) for channels, stride in ((3, 2), (7, 3)))
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["survived True"] * 2
