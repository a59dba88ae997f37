"""The extension's own convolutions, direct and by Winograd's algorithm, against their definition in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from fusedres.backends import cpp, eager, native
from fusedres.backends.eager import Geometry

pytestmark = pytest.mark.skipif(cpp._C is None, reason="the C++ extension is not built")

# (batch, in channels, height, width, out channels), kernel, stride, padding, dilation
DIRECT = {
    "1x1": ((2, 20, 9, 7, 35), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, many channels": ((2, 600, 5, 5, 130), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 strided": ((2, 48, 9, 8, 64), (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1 padded": ((1, 16, 5, 4, 16), (1, 1), (1, 1), (1, 1), (1, 1)),
    "3x3, odd channels": ((2, 13, 8, 7, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 strided": ((2, 32, 9, 10, 48), (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 dilated": ((1, 16, 11, 9, 16), (3, 3), (1, 1), (2, 2), (2, 2)),
    "7x7 strided": ((2, 3, 19, 18, 24), (7, 7), (2, 2), (3, 3), (1, 1)),
    "3x1": ((2, 16, 7, 6, 16), (3, 1), (1, 1), (1, 0), (1, 1)),
    "1x1 of a small map": ((1, 64, 1, 1, 64), (1, 1), (1, 1), (0, 0), (1, 1)),
}
WINOGRAD = {
    "even sizes": ((2, 64, 20, 20, 64), (3, 3), (1, 1), (1, 1), (1, 1)),
    "odd sizes, tiles across images": ((5, 32, 13, 11, 48), (3, 3), (1, 1), (1, 1), (1, 1)),
    "channels beyond one chunk": ((2, 528, 14, 10, 64), (3, 3), (1, 1), (1, 1), (1, 1)),
    "outputs not of a register": ((2, 48, 16, 17, 37), (3, 3), (1, 1), (1, 1), (1, 1)),
    "growth rate": ((2, 128, 14, 14, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one row": ((6, 32, 1, 70, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one column": ((6, 32, 70, 1, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    "without padding": ((2, 32, 17, 18, 32), (3, 3), (1, 1), (0, 0), (1, 1)),
    "wide padding": ((2, 32, 15, 12, 32), (3, 3), (1, 1), (2, 2), (1, 1)),
    "wide rows": ((1, 32, 6, 120, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    "a phase of a strided 5x5's input gradient": ((2, 32, 24, 25, 32), (5, 5), (2, 2), (2, 2), (1, 1)),
}
# so few pixels that a channels_last weight is read as it lies
FEW = {
    "few pixels, 3x3": ((2, 64, 4, 3, 96), (3, 3), (1, 1), (1, 1), (1, 1)),
    "few pixels, 3x3, odd outputs": ((1, 48, 5, 4, 37), (3, 3), (1, 1), (1, 1), (1, 1)),
    "few pixels, deep 1x1": ((1, 528, 2, 3, 80), (1, 1), (1, 1), (0, 0), (1, 1)),
    "few pixels, 3x3 strided": ((3, 32, 5, 6, 48), (3, 3), (2, 2), (1, 1), (1, 1)),
    "few pixels, 1x1 strided": ((2, 32, 7, 6, 64), (1, 1), (2, 2), (0, 0), (1, 1)),
    "few pixels, 3x3 dilated": ((1, 32, 6, 5, 16), (3, 3), (1, 1), (2, 2), (2, 2)),
    "few pixels, most of them outside": ((2, 32, 1, 1, 16), (5, 3), (1, 1), (2, 1), (1, 1)),
    "few outputs of many pixels": ((1, 32, 12, 11, 32), (3, 3), (3, 3), (0, 0), (1, 1)),
    "pixels that only the gradients call few": ((1, 32, 7, 7, 48), (3, 3), (1, 1), (1, 1), (1, 1)),
}
EVERY = {**DIRECT, **WINOGRAD, **FEW}
cases = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
# bfloat16 is multiplied in pairs of channels
PAIRED = {name: case for name, case in EVERY.items() if case[0][1] % 2 == case[0][4] % 2 == 0}
needs_bfloat16 = pytest.mark.skipif(
    cpp.cpu_capability() != "avx512_bf16",
    reason="this process multiplies no bfloat16 itself (CPU capability avx512_bf16)",
)


class Draw:
    """The operands of one convolution, in ``dtype``: numbers of ``stored`` for maps and weights, of float32 for what belongs to a channel.
    Maps are slices of buffers full of NaN."""

    def __init__(self, case: tuple, seed: int, dtype: torch.dtype, stored: torch.dtype = torch.float32) -> None:
        (n, c, h, w, k), kernel, stride, padding, dilation = case
        self.generator, self.dtype, self.stored = torch.Generator().manual_seed(seed), dtype, stored
        self.accum = torch.float64 if dtype == torch.float64 else torch.float32
        self.geometry = Geometry(stride, padding, dilation, 1)
        sizes = zip((h, w), kernel, stride, padding, dilation, strict=True)
        self.out = (n, k, *((s + 2 * p - d * (r - 1) - 1) // t + 1 for s, r, t, p, d in sizes))
        scale = (2 / (c * kernel[0] * kernel[1])) ** 0.5
        self.weight = (self.values(k, c, *kernel).float() * scale).to(stored).to(dtype)
        if case in FEW.values():
            self.weight = self.weight.to(memory_format=torch.channels_last)
        self.x = self.map(n, c, h, w)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.accum)

    def numbers(self, *shape: int) -> Tensor:
        return self.values(*shape).to(self.stored).to(self.dtype)

    def hole(self, *shape: int) -> Tensor:
        n, c, *rest = shape
        return torch.full((n, c + 7, *rest), torch.nan, dtype=self.dtype).to(memory_format=torch.channels_last)[
            :, 2 : 2 + c
        ]

    def map(self, *shape: int) -> Tensor:
        return self.hole(*shape).copy_(self.numbers(*shape))

    def vectors(self, rows: int, channels: int) -> Tensor:
        return self.values(rows, channels).abs() + 0.5

    def poisoned(self, rows: int, channels: int) -> Tensor:
        return torch.full((rows, channels), torch.nan, dtype=self.accum)


def assert_neighbours_untouched(*maps: Tensor) -> None:
    for m in maps:
        assert m._base[:, :2].isnan().all() and m._base[:, 2 + m.shape[1] :].isnan().all()


def forward_training(backend, d: Draw) -> dict[str, Tensor]:
    c, k = d.x.shape[1], d.out[1]
    affine = torch.cat([d.vectors(1, c), d.values(1, c) * 0.3])
    out, stats = d.hole(*d.out), d.poisoned(2, k)
    backend.conv_forward(d.x, affine, "relu", d.weight, d.numbers(k), d.geometry, out=out, stats=stats)
    assert_neighbours_untouched(out)
    return {"raw": out, "mean": stats[0], "M2": stats[1]}


def forward_inference(backend, d: Draw) -> dict[str, Tensor]:
    k = d.out[1]
    residual, residual_affine = d.map(*d.out), d.vectors(2, k)
    y = backend.conv_forward(
        d.x, None, "none", d.weight, None, d.geometry, out_affine=d.vectors(2, k), residual=residual,
        residual_affine=residual_affine, out_act="relu",
    )  # fmt: skip
    return {"output": y}


def backward_pending(backend, d: Draw) -> dict[str, Tensor]:
    c, k = d.x.shape[1], d.out[1]
    affine = torch.cat([d.vectors(1, c), d.values(1, c) * 0.3])
    grad, raw, dx, sums = d.map(*d.out), d.map(*d.out), d.hole(*d.x.shape), d.poisoned(2, c)
    _, dw = backend.conv_backward(
        grad, raw, d.values(3, k), d.x, affine, d.vectors(2, c), "relu", d.weight, d.geometry, dx=dx, sums=sums
    )
    assert_neighbours_untouched(dx)
    return {"dx": dx, "dw": dw, "sum dz": sums[0], "sum dz xhat": sums[1]}


def backward_accumulating(backend, d: Draw) -> dict[str, Tensor]:
    c = d.x.shape[1]
    affine, dx = torch.cat([d.vectors(1, c), d.values(1, c) * 0.3]), d.map(*d.x.shape)
    _, dw = backend.conv_backward(
        d.map(*d.out), None, None, d.x, affine, None, "relu", d.weight, d.geometry, dx=dx, accumulate=True, scaled=True
    )
    assert_neighbours_untouched(dx)
    return {"dx": dx, "dw": dw}


steps = pytest.mark.parametrize(
    "step",
    [forward_training, forward_inference, backward_pending, backward_accumulating],
    ids=lambda f: f.__name__.replace("_", " "),
)


@cases
@steps
def test_a_native_convolution_is_as_right_as_eager(case, step):
    runs = [
        [step(backend, Draw(case, seed, dtype)) for seed in range(5)]
        for backend, dtype in ((cpp, torch.float32), (eager, torch.float32), (eager, torch.float64))
    ]
    for key in runs[0][0]:
        assert_parity(*([found[key] for found in run] for run in runs), key)


@needs_bfloat16
@pytest.mark.parametrize("case", PAIRED.values(), ids=PAIRED)
@steps
def test_a_native_bfloat16_convolution_is_as_right_as_eager(case, step):
    bfloat16 = torch.bfloat16
    d = Draw(case, 0, bfloat16)
    assert native._plan(d.x.shape, d.weight.shape, bfloat16, d.geometry) is not None
    runs = [
        [step(backend, Draw(case, seed, dtype, bfloat16)) for seed in range(5)]
        for backend, dtype in ((cpp, bfloat16), (eager, bfloat16), (eager, torch.float64))
    ]
    for key in runs[0][0]:
        assert_parity(*([found[key] for found in run] for run in runs), key)


@needs_bfloat16
def test_odd_channels_in_bfloat16_go_to_the_vendor():
    case = DIRECT["3x3, odd channels"]
    d = Draw(case, 0, torch.bfloat16)
    assert native._plan(d.x.shape, d.weight.shape, torch.bfloat16, d.geometry) is None
    assert forward_training(cpp, d)["raw"].isfinite().all()
    even = Draw(DIRECT["3x3 strided"], 0, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"even numbers of channels, found 13 and 5"):
        numbers = native._plan(even.x.shape, even.weight.shape, torch.bfloat16, even.geometry)[1]
        numbers[:4] = [1, 1, 1, 1]
        torch.ops.fusedres_cpp.conv_forward(
            d.x, None, 0, 0.0, d.weight, None, numbers, d.hole(*d.out), None, None, None, None, 0, 0.0
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [DIRECT["3x3 strided"], WINOGRAD["growth rate"]], ids=["direct", "winograd"])
def test_a_weight_may_have_any_layout(case, layout):
    d = Draw(case, 0, torch.float32)
    reference = forward_training(cpp, d)["raw"].clone()
    again = Draw(case, 0, torch.float32)
    again.weight = again.weight.contiguous(memory_format=layout)
    assert torch.equal(forward_training(cpp, again)["raw"], reference)
    assert backward_pending(cpp, again)["dw"].stride() == again.weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=str)
@pytest.mark.parametrize(
    "case", [DIRECT["1x1, many channels"], *list(WINOGRAD.values())[:3], FEW["few pixels, 3x3"]], ids=str
)
def test_the_number_of_threads_changes_no_bit(case, dtype):
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [
            value for step in (forward_training, backward_pending) for value in step(cpp, Draw(case, 0, dtype)).values()
        ]

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_convolution_on_every_capability(name):
    """This file again, in a process that uses another instruction set."""
    if name not in cpp._C.cpu_capabilities():
        pytest.skip(f"this CPU has no {name}")
    if name == cpp.cpu_capability():
        pytest.skip("what this process runs on")
    env = os.environ | {"FUSEDRES_CPU_CAPABILITY": name}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
