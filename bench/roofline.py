"""Where a step's time or traffic goes, primitive by primitive, against the machine's limits.

    python -m bench.roofline --model densenet121 --batch 256 --dtype bfloat16     (counted on meta tensors, no device needed)
    python -m bench.roofline --model resnet50 --batch 8 --device cpu              (measured on this machine)
    python -m bench.roofline --model resnet50 --batch 256 --resolution 224 --dtype bfloat16 --device cuda    (on a GPU)

Bytes and FLOPs are those of the calls that the blocks really make, recorded at the backend's boundary; a convolution's two gradients count
as two kernels, but where the backend makes them by one. Measured runs compare each primitive with a floor: its bytes over the bandwidth
of a large copy or its FLOPs over the rate of a well-shaped convolution of the library, whichever is larger, both taken in the same run.
Beside it stands what the library takes for the same convolutions by themselves, again and again on the same maps, with nothing of what is
fused into ours: no BatchNorm, activation, addition or statistics.
Counted runs compare the feature-map traffic with eager's, where every operator is a pass of its own: BatchNorm reads twice and writes once,
its backward reads four times and writes once, ReLU works in place. They also count what the triton backend launches in the step, with every
convolution fused and by the plans that hold where nothing was measured, which leave some convolutions to the library and pay for it with
passes: its kernels, and PyTorch's operators. And what the cuda backend does, whose convolutions are all the library's.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fusedres
from fusedres.backends import select
from fusedres.backends.contract import Backend, Wrapped
from fusedres.backends.eager import BACKEND as EAGER
from fusedres.operands import Epilogue, GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry

from . import environment, report
from .launches import PLANS, EagerTraffic, bytes_of, launched, launched_by_cuda, met
from .models import known_model, new_model


@dataclass(frozen=True)
class Bare:
    """A convolution by itself: its shapes, and which gradients are wanted, None of its forward."""

    x: torch.Size
    weight: torch.Size
    geometry: Geometry
    wanted: tuple[bool, bool] | None

    @classmethod
    def of(cls, primitive: str, a: Mapping[str, Any]) -> Bare | None:
        """That of a call of ``primitive`` with the arguments ``a``, None where that is no convolution."""
        if primitive not in ("conv_forward", "conv_backward"):
            return None
        wanted = None if primitive == "conv_forward" else (a["target"] is not None, a["need_dw"])
        return cls(a["x"].raw.shape, a["weight"].shape, a["geometry"], wanted)

    def on(self, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
        """The library's call, of maps and a weight in channels_last."""
        draw = functools.partial(torch.randn, dtype=dtype, device=device)
        x, weight = (draw(s).to(memory_format=torch.channels_last) for s in (self.x, self.weight))
        g = self.geometry
        forward = functools.partial(torch.conv2d, x, weight, None, g.stride, g.padding, g.dilation, g.groups)
        if self.wanted is None:
            return forward
        grad, mask = torch.randn_like(forward()), [*self.wanted, False]
        of_both = torch.ops.aten.convolution_backward.default
        return lambda: of_both(
            grad, x, weight, None, [*g.stride], [*g.padding], [*g.dilation], False, [0, 0], g.groups, mask
        )


@dataclass
class Call:
    """One primitive call: bytes of feature maps read and written, FLOPs, seconds (0 where only counted), kernels it stands for, and the
    convolution that is in it."""

    label: str
    read: int
    written: int
    flops: int
    seconds: float
    kernels: int
    bare: Bare | None = None


def account(
    primitive: str, a: Mapping[str, Any], result: Any, one_kernel: bool = False
) -> tuple[str, int, int, int, int]:
    """``(label, bytes read, bytes written, FLOPs, kernels)`` of a call of ``primitive`` with the arguments ``a``, by their names in the
    contract. ``one_kernel``: whether that makes both gradients of a convolution."""
    maps = [value for name in ("x", "residual", "gate") if (value := a.get(name)) is not None]
    read = bytes_of(*(m.raw if isinstance(m, LazyMap) else m for m in maps))
    written = bytes_of(*(result if isinstance(result, tuple) else (result,)))
    match primitive:
        case "conv_forward":
            return _account_forward(a["x"], a["weight"], a["geometry"], a["epilogue"], result)
        case "conv_backward":
            return _account_backward(**a, one_kernel=one_kernel)
        case "add_act_forward":
            copied = "copy with statistics" if a["x"].scale_shift is None else "normalise"
            return copied if a["residual"] is None else "addition", read, written, 0, 1
        case "add_act_backward":
            return "addition backward", bytes_of(a["grad"]) + read, 0 if a["act"] == "none" else written, 0, 1
        case "highway_forward":
            return "highway", read + bytes_of(a["carry"]), written, 0, 1
        case "highway_backward":
            return "highway backward", bytes_of(a["grad"], a["carry"]) + read, written, 0, 1
        case "statistics":
            return "statistics", read, 0, 0, 1
        case "apply_grad_coeff":
            return "gradient correction", bytes_of(a["grad"].grad, a["grad"].raw), written, 0, 1
        case "pool_forward":
            return f"{a['pool'].kind} pool", read, written, 0, 1
        case "pool_backward":
            return f"{a['pool'].kind} pool backward", bytes_of(a["grad"], a["index"]) + read, written, 0, 1
        case "bn_coefficients" | "bn_frozen" | "bn_backward":
            return "C-sized", 0, 0, 0, 1
    raise ValueError(f"nobody has said what {primitive} reads and writes")


def _label(weight: Tensor, geometry: Geometry) -> str:
    return "convolution " + "x".join(map(str, weight.shape[2:])) + ("" if geometry.stride[0] == 1 else " strided")


def _account_forward(
    x: LazyMap, weight: Tensor, geometry: Geometry, epilogue: Epilogue, y: Tensor
) -> tuple[str, int, int, int, int]:
    read = met(x.raw, weight.shape[2:], geometry.stride)
    read += 0 if epilogue.residual is None else bytes_of(epilogue.residual.raw)
    return _label(weight, geometry), read, bytes_of(y), 2 * y.numel() * weight[0].numel(), 1


def _account_backward(
    grad: LazyGrad,
    x: LazyMap,
    weight: Tensor,
    geometry: Geometry,
    target: GradTarget | None,
    need_dw: bool,
    one_kernel: bool,
) -> tuple[str, int, int, int, int]:
    g = bytes_of(grad.grad, None if grad.coeff is None else grad.raw)
    read = written = kernels = 0
    label, flops = f"{_label(weight, geometry)} backward", 2 * grad.grad.numel() * weight[0].numel()
    if target is not None and one_kernel:
        old = target.accumulate or target.base is not None
        return label, g + (1 + old) * bytes_of(x.raw), bytes_of(x.raw), 2 * flops, 1
    if target is not None:
        below = x.scale_shift is not None or target.sums is not None
        old = target.accumulate or target.base is not None
        read, written, kernels = g + (below + old) * bytes_of(x.raw), bytes_of(x.raw), 1
    if need_dw:
        read, kernels = read + g + met(x.raw, weight.shape[2:], geometry.stride), kernels + 1
    return label, read, written, flops * kernels, kernels


def makes_both(backend: Backend, arguments: Mapping[str, Any]) -> bool:
    """Whether ``backend`` makes both gradients of such a call of ``conv_backward`` by one kernel."""
    plans = getattr(backend, "backward_plans", None)
    return plans is not None and "backward" in plans(**arguments)


@functools.cache
def _signature(primitive: str) -> inspect.Signature:
    return inspect.signature(getattr(Backend, primitive))


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


class Recorder(Wrapped):
    """A backend around ``inner`` that records every primitive's call; ``seconds`` holds two moments until :func:`settle`."""

    def __init__(self, inner: Backend, calls: list[Call], clock: Clock) -> None:
        super().__init__(inner)
        self._calls, self._clock = calls, clock

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        """Run the primitive, timed, and account for it."""
        bound = _signature(primitive).bind(self, *args, **kwargs)
        bound.apply_defaults()
        one_kernel = primitive == "conv_backward" and makes_both(self.inner, _arguments(bound))
        start = self._clock.now()
        result = super().call(primitive, *args, **kwargs)
        moments = (start, self._clock.now())
        label, read, written, flops, kernels = account(primitive, _arguments(bound), result, one_kernel)
        bare = Bare.of(primitive, _arguments(bound))
        self._calls.append(Call(label, read, written, flops, moments, kernels, bare))
        return result


def _arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    return {name: value for name, value in bound.arguments.items() if name != "self"}


def settle(calls: list[Call], clock: Clock) -> None:
    """Turn the moments of recorded calls into seconds."""
    clock.finish()
    for call in calls:
        call.seconds = clock.seconds(*call.seconds)


def build(name: str, device: str, dtype: torch.dtype, mode: str) -> torch.nn.Module:
    """The model, channels_last."""
    with torch.device(device):
        model = new_model(name)
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


def timed(function: Callable[[], object], clock: Clock) -> float:
    """The seconds that ``function`` takes."""
    clock.head_start()
    start = clock.now()
    function()
    end = clock.now()
    clock.finish()
    return clock.seconds(start, end)


def best_of(function: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median time of ``function`` after a warm-up."""
    clock = Clock(device)
    function()
    return statistics.median(timed(function, clock) for _ in range(repeats))


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """``(bytes per second of a large copy, FLOPs per second of a library's convolution)`` on this device, now; on a GPU the
    rate is that of a large matrix product."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * bytes_of(source) / best_of(lambda: target.copy_(source), device)
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
    """Run the converted model and hold each primitive's time against its floor.

    A step's time is that of one that nobody observes, which goes by recorded schedules; its primitives' are those of another, between whose
    calls there is Python. What is left, outside the primitives, is the model's modules that are not fused, and the host.
    """
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    model = fusedres.convert(build(name, args.device, dtype, mode))
    x = torch.randn(args.batch, 3, args.resolution, args.resolution, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last)
    bandwidth, rate = ceilings(dtype, device)
    clock = Clock(device)
    # until its schedules are recorded
    for _ in range(3):
        step(model, x, mode)
    runs, totals = [], []
    for _ in range(args.repeats):
        totals.append(timed(lambda: step(model, x, mode), clock))
        calls: list[Call] = []
        with select.observe(lambda inner, calls=calls: Recorder(inner or EAGER, calls, clock)):
            timed(lambda: step(model, x, mode), clock)
        settle(calls, clock)
        runs.append(calls)
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0, 0, 0.0])
    with torch.no_grad():
        alone = {bare: best_of(bare.on(dtype, device), device) for bare in {call.bare for call in runs[0]} - {None}}
    for same in zip(*runs, strict=True):
        row, call = rows[same[0].label], same[0]
        row[0] += 1
        row[1] += statistics.median(c.seconds for c in same)
        row[2] += max((call.read + call.written) / bandwidth, call.flops / rate)
        row[3] += call.read + call.written
        row[4] += call.flops
        row[5] += 0.0 if call.bare is None else alone[call.bare]
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
            "library's alone, ms": f"{library * 1e3:.1f}" if library else "-",
        }
        for label, (calls, seconds, floor, moved, flops, library) in sorted(rows.items(), key=lambda item: -item[1][1])
    ]  # fmt: skip
    outside = total - sum(row[1] for row in rows.values())
    rest = {"primitive": "outside the primitives", "ms": f"{outside * 1e3:.1f}", "share": f"{outside / total:.1%}"}
    shown.append(dict.fromkeys(shown[0], "") | rest)
    names = ("calls", "seconds", "floor_seconds", "bytes", "flops", "library_seconds")
    figures = {
        "total_seconds": total, "copy_bytes_per_s": bandwidth, "flops_per_s": rate,
        "primitives": {label: dict(zip(names, row, strict=True)) for label, row in rows.items()},
    }  # fmt: skip
    return Page(title, shown, [], figures)


def counted(args, name: str, mode: str) -> Page:
    """Count the traffic of a step on meta tensors, ours and eager's, with floors for a given device."""
    dtype = getattr(torch, args.dtype)
    x = torch.empty(args.batch, 3, args.resolution, args.resolution, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    model = build(name, "meta", dtype, mode)
    with EagerTraffic() as theirs:
        step(model, x, mode)
    calls: list[Call] = []
    clock = Clock(torch.device("cpu"))
    fusedres.convert(model)
    with select.observe(lambda inner: Recorder(EAGER, calls, clock)):
        step(model, x, mode)
    settle(calls, clock)
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
    plans = {plan: launched(model, x, mode, *how) for plan, (*how, _) in PLANS.items()}
    plans["cuda"] = launched_by_cuda(model, x, mode)
    words = {plan: f"triton backend, {what}" for plan, (*_, what) in PLANS.items()} | {"cuda": "cuda backend"}
    for plan, found in plans.items():
        if found is not None:
            said.append(
                f"launches per step, {words[plan]}: {found['kernels'] + found['operators']} "
                f"({found['kernels']} kernels of its own, {found['operators']} operators); "
                f"{found['bytes'] / args.batch / 1e6:.0f} MB per image, {found['bytes'] / theirs.total:.2f}x eager's"
            )
    figures = {
        "bytes": ours, "eager_bytes": theirs.total, "eager_operators": theirs.operators, "launches": plans,
        "calls": [asdict(c) for c in calls],
    }  # fmt: skip
    title = f"{name} {mode}, batch {args.batch}, {args.resolution} px, {args.dtype}: counted from the calls"
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
