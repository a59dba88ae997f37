"""Where a step's time or traffic goes, primitive by primitive, against the machine's limits.

    python -m bench.roofline --model densenet121 --batch 256 --dtype bfloat16     (counted on meta tensors, no device needed)
    python -m bench.roofline --model resnet50 --batch 8 --device cpu              (measured on this machine)
    python -m bench.roofline --model resnet50 --batch 256 --resolution 224 --dtype bfloat16 --device cuda    (on a GPU)

Bytes and FLOPs are those of the calls that the schedules really make, recorded at the backend's boundary; a convolution's two gradients
count as two kernels. Measured runs compare each primitive with a floor: its bytes over the bandwidth of a large copy or its FLOPs over the
rate of a well-shaped vendor convolution, whichever is larger, both taken in the same run. Counted runs compare the feature-map traffic with
eager's, where every operator is a pass of its own: BatchNorm reads twice and writes once, its backward reads four times and writes once,
ReLU works in place. They also count what the triton backend launches in the step, with every convolution fused and by the plans that hold
where nothing was measured, which leave some convolutions to the vendor and pay for it with passes: its kernels, and PyTorch's operators.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import dispatch
from fusedres.backends import eager
from fusedres.schedules.common import Conv, accum_dtype

from . import environment, report
from .models import known_model


@dataclass
class Call:
    """One primitive call: bytes of feature maps read and written, FLOPs, seconds (0 where only counted), kernels it stands for."""

    label: str
    read: int
    written: int
    flops: int
    seconds: float
    kernels: int


def _bytes(*maps: Tensor | None) -> int:
    return sum(m.numel() * m.element_size() for m in maps if m is not None)


def _met(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> int:
    """The bytes of the map ``x`` that a convolution meets: a stride wider than the kernel skips pixels, as in a projection."""
    met = [min(1.0, k / step) for k, step in zip(kernel, stride, strict=True)]
    return int(_bytes(x) * math.prod(met))


def account(name: str, a: dict, result) -> tuple[str, int, int, int, int]:
    """``(label, bytes read, bytes written, FLOPs, kernels)`` of a call of primitive ``name`` with arguments ``a``."""
    if name in ("conv_forward", "conv_backward"):
        weight = a["weight"]
        shape = "x".join(str(k) for k in weight.shape[2:]) + ("" if a["geometry"].stride[0] == 1 else " strided")
        met = _met(a["x"], weight.shape[2:], a["geometry"].stride)
    if name == "conv_forward":
        flops = 2 * result.numel() * weight[0].numel()
        return f"convolution {shape}", met + _bytes(a["residual"]), _bytes(result), flops, 1
    if name == "conv_backward":
        g, raw, x = a["grad"], a["raw"] if a["coeff"] is not None else None, a["x"]
        flops = 2 * g.numel() * weight[0].numel()
        read = written = kernels = 0
        if a["need_dx"]:
            below = x if a["affine"] is not None or a["sums"] is not None else None
            old = x if a["accumulate"] or a["base"] is not None else None
            read, written, kernels = _bytes(g, raw, below, old), _bytes(x), 1
        if a["need_dw"]:
            read, kernels = read + _bytes(g, raw) + met, kernels + 1
        return f"convolution {shape} backward", read, written, flops * kernels, kernels
    if name == "join_forward":
        label = "join" if a["residual"] is not None else "copy with statistics" if a["affine"] is None else "normalise"
        return label, _bytes(a["raw"], a["residual"]), _bytes(result), 0, 1
    if name == "join_backward":
        written = 0 if a["act"] == "none" else _bytes(result)
        return "join backward", _bytes(a["grad"], a["raw"], a["residual"]), written, 0, 1
    if name == "highway_forward":
        return "highway join", _bytes(a["raw"], a["gate"], a["carry"]), _bytes(result), 0, 1
    if name == "highway_backward":
        return "highway join backward", _bytes(a["grad"], a["raw"], a["gate"], a["carry"]), _bytes(*result), 0, 1
    if name == "statistics":
        return "statistics", _bytes(a["x"]), 0, 0, 1
    if name == "grad_affine":
        return "gradient correction", _bytes(a["grad"], a["raw"]), _bytes(result), 0, 1
    if name == "pool_forward":
        return f"{a['pool'].kind} pool", _bytes(a["x"]), _bytes(*result), 0, 1
    if name == "pool_backward":
        return f"{a['pool'].kind} pool backward", _bytes(a["grad"], a["index"], a["x"]), _bytes(result), 0, 1
    return "C-sized", 0, 0, 0, 1


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(getattr(eager, name))


class Clock:
    """Times calls: on a GPU by events in its stream, which are read after the step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self):
        """A moment."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        """Between two moments, after :meth:`finish`."""
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def finish(self) -> None:
        """Wait until all moments have passed."""
        if self._cuda:
            torch.cuda.synchronize()

    def head_start(self) -> None:
        """Keep the GPU busy for a moment, so that launches queue up and no time is lost between kernels."""
        if self._cuda:
            torch.cuda._sleep(400_000_000)


class Recorder:
    """A backend that forwards every primitive to ``inner`` and records the call; ``seconds`` holds two moments until
    :func:`settle`."""

    def __init__(self, inner, calls: list[Call], clock: Clock) -> None:
        self._inner, self._calls, self._clock, self.name = inner, calls, clock, inner.name

    def __getattr__(self, name: str):
        function = getattr(self._inner, name)
        if not hasattr(eager, name):
            return function  # no primitive: what a backend offers beside them
        signature = _signature(name)

        def recorded(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            start = self._clock.now()
            result = function(*args, **kwargs)
            moments = (start, self._clock.now())
            label, read, written, flops, kernels = account(name, bound.arguments, result)
            self._calls.append(Call(label, read, written, flops, moments, kernels))
            return result

        return recorded


def settle(calls: list[Call], clock: Clock) -> None:
    """Turn the moments of recorded calls into seconds."""
    clock.finish()
    for call in calls:
        call.seconds = clock.seconds(*call.seconds)


class Shapes:
    """A backend that computes shapes only, for counting on meta tensors."""

    name = "shapes"

    def conv_forward(self, x, affine, act, weight, bias, geometry, *, out=None, **rest):
        shape = Conv(weight, bias, geometry).out_shape(tuple(x.shape))
        return out if out is not None else x.new_empty(shape)

    def conv_backward(
        self, grad, raw, coeff, x, affine, saved, act, weight, geometry, *, need_dx=True, need_dw=True, dx=None, **rest
    ):
        dx = (dx if dx is not None else x.new_empty(x.shape)) if need_dx else None
        return dx, torch.empty_like(weight) if need_dw else None

    def join_forward(self, raw, *rest, out=None, **more):
        return out if out is not None else raw.new_empty(raw.shape)

    def join_backward(self, grad, raw, affine, saved, act, **rest):
        return grad if act == "none" else raw.new_empty(raw.shape)

    def statistics(self, x, stats):
        return None

    def grad_affine(self, grad, raw, coeff, *, out=None):
        return out if out is not None else grad.new_empty(grad.shape)

    def pool_forward(self, x, affine, act, pool, *, out=None, stats=None):
        sizes = zip(x.shape[2:], pool.kernel, pool.stride, pool.padding, strict=True)
        shape = (*x.shape[:2], *((size + 2 * pad - k) // step + 1 for size, k, step, pad in sizes))
        index = None if pool.kind == "mean" else x.new_empty(shape, dtype=torch.uint8)
        return out if out is not None else x.new_empty(shape), index

    def pool_backward(self, grad, index, x, affine, saved, act, pool, *, sums=None, coeff=None, dx=None):
        return None if coeff is None else x.new_empty(x.shape)

    def bn_coefficients(self, stats, *rest):
        return torch.empty_like(stats), torch.empty_like(stats)

    def bn_frozen(self, weight, bias, running_mean, running_var, eps, dtype):
        pair = running_mean.new_empty((2, running_mean.numel()), dtype=accum_dtype(dtype))
        return pair, torch.empty_like(pair)

    def bn_backward(self, *rest, **more):
        return None


class EagerTraffic(TorchDispatchMode):
    """Counts PyTorch's operators that compute something, and their feature-map bytes: each its own pass over its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
        maps = [t for t in flat if isinstance(t, Tensor) and t.dim() == 4]
        outs = [
            t
            for t in (result if isinstance(result, (list, tuple)) else (result,))
            if isinstance(t, Tensor) and t.dim() == 4
        ]
        name = func.overloadpacket.__name__
        if func.is_view or "detach" in name or name.startswith(("empty", "t.", "view", "new_")):
            return result
        if name == "convolution":
            moved = _met(args[0], args[1].shape[2:], args[3]) + _bytes(result)
        elif name == "convolution_backward":
            grad, x = args[0], args[1]
            moved = _bytes(grad) + _met(x, args[2].shape[2:], args[4])
            moved += _bytes(grad, x) if result[0] is not None else 0
        elif "batch_norm_backward" in name:
            moved = 5 * _bytes(args[1])
        elif "batch_norm" in name:
            moved = (3 if args[5] else 2) * _bytes(args[0])
        else:
            moved = _bytes(*maps, *outs)
        self.operators += 1
        if maps:
            self.total += moved
        return result


def build(name: str, device: str, dtype: torch.dtype, mode: str) -> torch.nn.Module:
    """The torchvision model, channels_last."""
    with torch.device(device):
        model = torchvision.models.get_model(name)
    return model.to(dtype=dtype, memory_format=torch.channels_last).train(mode == "train")


def step(model: torch.nn.Module, x: Tensor, mode: str) -> None:
    """One training step without optimizer, or one inference."""
    if mode == "train":
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()
    else:
        with torch.no_grad():
            model(x)


def best_of(function, device: torch.device, repeats: int = 7) -> float:
    """The median time of ``function`` after a warm-up."""
    clock = Clock(device)
    function()
    times = []
    for _ in range(repeats):
        start = clock.now()
        function()
        end = clock.now()
        clock.finish()
        times.append(clock.seconds(start, end))
    return statistics.median(times)


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """``(bytes per second of a large copy, FLOPs per second of a vendor convolution)`` on this device, now; on a GPU the
    rate is that of a large matrix product."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * _bytes(source) / best_of(lambda: target.copy_(source), device)
    if device.type == "cuda":
        size = 8192
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        return bandwidth, 2 * size**3 / best_of(lambda: a @ b, device)
    x = torch.randn(8, 128, 20, 20, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        rate = 2 * x.numel() * w[0].numel() / best_of(lambda: torch.conv2d(x, w, padding=1), device)
    return bandwidth, rate


@dataclass
class Page:
    """What one model and mode gave: figures for a file, and rows and sentences to read."""

    title: str
    rows: list[dict[str, str]]
    sentences: list[str]
    figures: dict

    def show(self, console: Console) -> None:
        """On the console."""
        console.print(report.console_table(self.rows, self.title))
        for sentence in self.sentences:
            console.print(sentence, highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        """As a section."""
        return "\n\n".join([f"## {self.title}", report.markdown_table(self.rows), *self.sentences])


def measured(args, name: str, mode: str) -> Page:
    """Run the converted model and hold each primitive's time against its floor."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    model = fusedres.convert(build(name, args.device, dtype, mode))
    x = torch.randn(args.batch, 3, args.resolution, args.resolution, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last)
    bandwidth, rate = ceilings(dtype, device)
    clock = Clock(device)
    step(model, x, mode)
    runs, totals = [], []
    for _ in range(args.repeats):
        calls: list[Call] = []
        clock.head_start()
        start = clock.now()
        with dispatch.observe(lambda inner, calls=calls: Recorder(inner or eager, calls, clock)):
            step(model, x, mode)
        end = clock.now()
        settle(calls, clock)
        totals.append(clock.seconds(start, end))
        runs.append(calls)
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0, 0])
    for same in zip(*runs, strict=True):
        row, call = rows[same[0].label], same[0]
        row[0] += 1
        row[1] += statistics.median(c.seconds for c in same)
        row[2] += max((call.read + call.written) / bandwidth, call.flops / rate)
        row[3] += call.read + call.written
        row[4] += call.flops
    total = statistics.median(totals)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    title = (
        f"{name} {mode}, batch {args.batch}, {args.resolution} px, {args.dtype}, {where}: "
        f"{total * 1e3:.0f} ms (ceilings: copy {bandwidth / 1e9:.1f} GB/s, product {rate / 1e9:.0f} GFLOP/s)"
    )
    shown = [
        {
            "primitive": label, "calls": str(calls), "ms": f"{seconds * 1e3:.1f}", "floor ms": f"{floor * 1e3:.1f}",
            "of floor": f"{floor / seconds:.0%}" if floor else "-", "share": f"{seconds / total:.1%}",
            "GB/s": f"{moved / seconds / 1e9:.1f}", "GFLOP/s": f"{flops / seconds / 1e9:.0f}",
        }
        for label, (calls, seconds, floor, moved, flops) in sorted(rows.items(), key=lambda item: -item[1][1])
    ]  # fmt: skip
    outside = total - sum(row[1] for row in rows.values())
    rest = {"primitive": "outside the primitives", "ms": f"{outside * 1e3:.1f}", "share": f"{outside / total:.1%}"}
    shown.append(dict.fromkeys(shown[0], "") | rest)
    names = ("calls", "seconds", "floor_seconds", "bytes", "flops")
    figures = {
        "total_seconds": total, "copy_bytes_per_s": bandwidth, "flops_per_s": rate,
        "primitives": {label: dict(zip(names, row, strict=True)) for label, row in rows.items()},
    }  # fmt: skip
    return Page(title, shown, [], figures)


def launched(model: torch.nn.Module, x: Tensor, mode: str, plan: str) -> dict[str, int] | None:
    """What a step of the converted ``model`` launches on the triton backend by ``plan``, on meta tensors: the backend's own kernels,
    PyTorch's operators beside them, and the bytes of the feature maps that both read and write, whole. None where Triton is missing."""
    backend = dispatch.load("triton")
    if isinstance(backend, str):
        return None
    from fusedres.kernels import helpers

    with helpers.record() as launches, backend.use_plan(plan), dispatch.observe(lambda inner: backend):
        with EagerTraffic() as operators, torch.set_grad_enabled(mode == "train"):
            y = model(x)
            if mode == "train":
                # not backward(): a recorded launch holds its tensors, and what is held a parameter's gradient copies
                torch.autograd.grad(y.sum(), list(model.parameters()))
    moved = sum(
        _bytes(value)
        for launch in launches
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 4 and name != "weight"
    )
    return {"kernels": len(launches), "operators": operators.operators, "bytes": moved + operators.total}


PLANS = {"fused": "every convolution fused", "auto": "by the default plans"}


def counted(args, name: str, mode: str) -> Page:
    """Count the traffic of a step on meta tensors, ours and eager's, with floors for a given device."""
    dtype = getattr(torch, args.dtype)
    x = torch.empty(args.batch, 3, args.resolution, args.resolution, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    model = build(name, "meta", dtype, mode)
    with EagerTraffic() as theirs:
        step(model, x, mode)
    calls: list[Call] = []
    fusedres.convert(model)
    with dispatch.observe(lambda inner: Recorder(Shapes(), calls, Clock(torch.device("cpu")))):
        step(model, x, mode)
    settle(calls, Clock(torch.device("cpu")))
    bandwidth, rate = args.bandwidth * 1e12, args.rate * 1e12
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for call in calls:
        row = rows[call.label]
        row[0] += call.kernels
        row[1] += call.read + call.written
        row[2] += call.flops
        row[3] += max((call.read + call.written) / bandwidth, call.flops / rate)
    floor_head = f"floor ms ({args.bandwidth} TB/s, {args.rate} TFLOP/s)"
    shown = [
        {
            "primitive": label, "kernels": str(kernels), "MB per image": f"{moved / args.batch / 1e6:.1f}",
            "GFLOP per image": f"{flops / args.batch / 1e9:.2f}", floor_head: f"{floor * 1e3:.2f}",
        }
        for label, (kernels, moved, flops, floor) in sorted(rows.items(), key=lambda item: -item[1][3])
    ]  # fmt: skip
    ours = sum(row[1] for row in rows.values())
    said = [
        f"feature-map traffic per image: {ours / args.batch / 1e6:.0f} MB, eager {theirs.total / args.batch / 1e6:.0f} MB: "
        f"{ours / theirs.total:.2f}x; floor {sum(row[3] for row in rows.values()) * 1e3:.1f} ms, "
        f"of eager's traffic {theirs.total / bandwidth * 1e3:.1f} ms",
        f"launches per step: eager {theirs.operators} operators",
    ]
    plans = {}
    for plan, words in PLANS.items():
        found = plans[plan] = launched(model, x, mode, plan)
        if found is not None:
            said.append(
                f"launches per step, triton backend, {words}: {found['kernels'] + found['operators']} "
                f"({found['kernels']} kernels of its own, {found['operators']} operators); "
                f"{found['bytes'] / args.batch / 1e6:.0f} MB per image, {found['bytes'] / theirs.total:.2f}x eager's"
            )
    figures = {
        "bytes": ours, "eager_bytes": theirs.total, "eager_operators": theirs.operators, "launches": plans,
        "calls": [asdict(c) for c in calls],
    }  # fmt: skip
    title = f"{name} {mode}, batch {args.batch}, {args.resolution} px, {args.dtype}: counted from the schedule"
    return Page(title, shown, said, figures)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=known_model, nargs="+", default=["resnet50"], help="torchvision models")
    parser.add_argument("--mode", choices=("train", "infer"), nargs="+", default=("train", "infer"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=None, help="pixels; 160 measured, 224 counted")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure on this device instead of counting")
    parser.add_argument("--count", action="store_true", help="count on meta tensors, as without --device")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s for counted floors (an H200's copy)")
    parser.add_argument(
        "--rate", type=float, default=790, help="TFLOP/s for counted floors (an H200's bfloat16 product)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    args = parser.parse_args(argv)
    if args.count and args.device:
        parser.error("--count needs no --device: it runs nothing")
    args.resolution = args.resolution or (160 if args.device else 224)
    where = environment.describe(torch.device(args.device or "cpu"), environment.command("bench.roofline", argv))
    console, pages, records = Console(width=130), [], []
    for name, mode in itertools.product(args.model, args.mode):
        page = (measured if args.device else counted)(args, name, mode)
        page.show(console)
        pages.append(page)
        records.append({"model": name, "mode": mode, **page.figures, "environment": where})
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    if args.markdown:
        parts = ["# A step, primitive by primitive", *(page.markdown() for page in pages)]
        parts += ["## How it was taken", report.environment_list(where)]
        args.markdown.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
