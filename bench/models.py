"""Whole models, side by side: images per second, memory kept for backward, peak memory and parity of every contender.

    python -m bench.models --models densenet121 resnet50 --modes train infer --contenders eager compile fused --json FILE

All contenders hold the same weights and read the same images, channels_last. They run interleaved in one process: every
round times each of them once, and a speed is claimed as the median over the rounds of the ratio to eager in the same
round. A training step is forward, cross entropy and backward, with gradients set to None in between. Warm-up and
compilation are not timed; the seconds of the first call, which compiles without any cache, are a figure of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import fusedres
from fusedres import testing
from fusedres.trial import memory
from fusedres.trial.timing import Step, captured, in_turns, seconds_per_call

from . import environment, peers
from .networks import NETWORKS
from .progress import progress

MIB = 2**20
#: what PyTorch and fusedres call an instruction set, and oneDNN's word for it
CAPABILITIES = {"default": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}


class NotOffered(Exception):
    """A contender that does not exist for a model."""


@dataclass(frozen=True)
class Settings:
    """What all contenders of a run share."""

    batch: int = 8
    resolution: int = 160
    dtype: torch.dtype = torch.float32
    amp: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 15
    seconds_per_round: float = 0.3
    parity_draws: int = 3
    bytes: bool = True
    cuda_graphs: bool = False
    compiler_caches: bool = False

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of weights and images: under autocast they stay float32."""
        return torch.float32 if self.amp else self.dtype

    def autocast(self) -> AbstractContextManager:
        """Autocast to the dtype where it was asked for."""
        return torch.autocast(self.device.type, self.dtype) if self.amp else nullcontext()

    def place(self, images: Tensor) -> Tensor:
        """Images as the models read them."""
        return images.to(self.device, self.model_dtype, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Contender:
    """A way to run a model in ``modes``: ``build`` makes it from a copy of eager's; it is warmed up in ``context``. ``allocates_unseen``:
    not by PyTorch, which counts."""

    build: Callable[[nn.Module], nn.Module]
    modes: tuple[str, ...] = ("train", "infer")
    context: Callable[[], AbstractContextManager] = nullcontext
    compiles: bool = False
    allocates_unseen: bool = False


def memory_efficient(model: nn.Module) -> nn.Module:
    """Torchvision's checkpointing of the concatenations, which its DenseNets offer."""
    layers = [m for m in model.modules() if isinstance(m, torchvision.models.densenet._DenseLayer)]
    if not layers:
        raise NotOffered
    for layer in layers:
        layer.memory_efficient = True
    return model


class Apart(nn.Module):
    """A model behind a forward of its own: Dynamo would give a second contender what it compiled for the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The model's output."""
        return self.model(images)


CONTENDERS = {
    "eager": Contender(lambda model: model),
    "compile": Contender(torch.compile, compiles=True),
    # Inductor's option to treat weights as constants, which folds BatchNorm into convolutions
    "compile-freezing": Contender(
        lambda model: torch.compile(Apart(model)),
        ("infer",),
        lambda: torch._inductor.config.patch(freezing=True),
        compiles=True,
    ),
    # Inductor decides by a model's forward convolutions whether it computes in channels_last; told to, in training too
    "compile-layout": Contender(
        lambda model: torch.compile(Apart(model)),
        context=lambda: torch._inductor.config.patch(force_layout_optimization=True),
        compiles=True,
    ),
    "openvino": Contender(peers.openvino, ("infer",), allocates_unseen=True),
    "onnxruntime": Contender(peers.onnxruntime, ("infer",), allocates_unseen=True),
    # captured by the harness as the others are, where graphs are asked for
    "compile-max-autotune": Contender(
        lambda model: torch.compile(model, mode="max-autotune-no-cudagraphs"), compiles=True
    ),
    "fused": Contender(fusedres.convert),
    "fused+compile": Contender(lambda model: torch.compile(Apart(fusedres.convert(model))), compiles=True),
    "fused-prepacked": Contender(lambda model: fusedres.prepack(fusedres.convert(model)), ("infer",)),
    "fused-recompute": Contender(lambda model: fusedres.convert(model, recompute=True), ("train",)),
    "memory_efficient": Contender(memory_efficient, ("train",)),
}


def new_model(name: str) -> nn.Module:
    """A model of :mod:`bench.networks` or, by another name, torchvision's, with random weights."""
    return NETWORKS[name]() if name in NETWORKS else torchvision.models.get_model(name, weights=None)


def build_model(name: str, images: Tensor, settings: Settings) -> nn.Module:
    """The model with random weights, seeded.

    Its running statistics are those of the images: with torch's initial zeros and ones, inference would leave float16.
    """
    torch.manual_seed(0)
    model = new_model(name)
    model = model.to(settings.device, memory_format=torch.channels_last)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momentum = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(images.float())
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    return model.to(settings.model_dtype)


def make_step(model: nn.Module, images: Tensor, labels: Tensor, mode: str, settings: Settings) -> Callable[[], None]:
    """One training step without optimizer, or one inference."""

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with settings.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    def infer() -> None:
        with torch.no_grad(), settings.autocast():
            model(images)

    return train if mode == "train" else infer


@dataclass
class Entry:
    """A contender on its way through a run."""

    name: str
    contender: Contender
    model: nn.Module | None = None
    step: Callable[[], None] | None = None
    timed: Step | None = None
    record: dict = field(default_factory=dict)


def prepare(entry: Entry, base: nn.Module, images: Tensor, labels: Tensor, mode: str, settings: Settings) -> None:
    """Build the contender, run it until it is warm, and decide how many calls make a round."""
    device = settings.device
    with entry.contender.context():
        entry.model = entry.contender.build(copy.deepcopy(base))
        entry.step = make_step(entry.model, images, labels, mode, settings)
        start = time.perf_counter()
        entry.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if entry.contender.compiles and not settings.compiler_caches:
            entry.record["compile_s"] = time.perf_counter() - start
        call = captured(entry.step) if settings.cuda_graphs else entry.step
    call()
    entry.timed = Step(call, max(1, math.ceil(settings.seconds_per_round / seconds_per_call(call, 1, device))))


def measure_memory(entry: Entry, images: Tensor, labels: Tensor, mode: str, settings: Settings) -> None:
    """The bytes of one more step, which nobody times."""
    if mode == "train":
        entry.model.zero_grad(set_to_none=True)
        with memory.count_kept(entry.model, len(images)) as kept:
            with settings.autocast():
                loss = F.cross_entropy(entry.model(images), labels)
            entry.record["kept_for_backward_bytes"] = kept()
        del loss
        entry.model.zero_grad(set_to_none=True)
    entry.record["peak_bytes"] = memory.peak_bytes(entry.step, settings.device)
    entry.model.zero_grad(set_to_none=True)


def measure_parity(entry: Entry, base: nn.Module, mode: str, settings: Settings) -> None:
    """Compare with eager in float64 on small batches of noise.

    Not for what compiles: a compiler's errors are not ours to check, and it would compile again for the size.
    """
    if entry.name == "eager" or entry.contender.compiles or settings.parity_draws == 0:
        return
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(settings.parity_draws):
        size = min(4, settings.batch)
        images = torch.randn(size, 3, settings.resolution, settings.resolution, generator=generator)
        labels = torch.randint(1000, (size,), generator=generator).to(settings.device)
        draws.append((settings.place(images), labels if mode == "train" else None))
    groups = testing.measure(base, entry.contender.build, draws, settings.autocast, settings.dtype)
    entry.record["parity"] = {
        "passed": all(g.passed for g in groups),
        "groups": [asdict(g) | {"passed": g.passed} for g in groups],
    }


def fused_blocks(model: nn.Module) -> str | None:
    """How many blocks of a converted model ran fused, and by what, or the first reason why not."""
    rows = fusedres.report(model)
    fused = [r for r in rows if r.fused]
    details = sorted({r.detail for r in rows if r.fused == bool(fused)})
    return f"{len(fused)} of {len(rows)} blocks fused: {', '.join(details[:2])}" if rows else None


def finish(entry: Entry, eager: Entry | None) -> None:
    """The record's speeds from the times of the rounds."""
    seconds = entry.timed.seconds
    entry.record["images_per_s"] = entry.record["batch"] / statistics.median(seconds)
    entry.record["rounds"] = len(seconds)
    if eager is not None:
        ratios = [theirs / mine for theirs, mine in zip(eager.timed.seconds, seconds, strict=True)]
        entry.record["ratio_to_eager"] = statistics.median(ratios)
        entry.record["ratio_range"] = [min(ratios), max(ratios)]


def attempt(entry: Entry, what: Callable[..., None], *arguments) -> bool:
    """Whether ``what`` went well; if not, the record says why and the others go on."""
    try:
        what(entry, *arguments)
    except NotOffered:
        raise
    # a compiler or a capture can fail in any way, and its failure is a result
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        entry.record["failure"] = f"{type(error).__name__}: {first}"
        return False
    return True


def new_record(name: str, mode: str, contender: str, settings: Settings, where: dict) -> dict:
    """A record with nothing measured yet."""
    measured = (
        "images_per_s", "ratio_to_eager", "ratio_range", "kept_for_backward_bytes", "peak_bytes", "compile_s", "parity",
        "fused_blocks", "failure",
    )  # fmt: skip
    return {
        "model": name,
        "mode": mode,
        "contender": contender,
        "device": settings.device.type,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "amp": settings.amp,
        "batch": settings.batch,
        "resolution": settings.resolution,
        "cuda_graphs": settings.cuda_graphs,
        "rounds": 0,
        **dict.fromkeys(measured),
        "environment": where,
    }


def run_case(
    name: str,
    mode: str,
    contenders: Sequence[str],
    settings: Settings,
    where: dict,
    images: Tensor | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> list[dict]:
    """The records of one model in one mode, of the contenders that exist there.

    ``where`` is the environment; ``images`` are noise unless given; ``advance`` hears of every step.
    """
    generator = torch.Generator().manual_seed(0)
    if images is None:
        images = torch.randn(settings.batch, 3, settings.resolution, settings.resolution, generator=generator)
    images = settings.place(images)
    labels = torch.randint(1000, (settings.batch,), generator=generator).to(settings.device)
    base = build_model(name, images, settings).train(mode == "train")

    torch.compiler.reset()
    entries, running = [], []
    with torch.compiler.config.patch(force_disable_caches=not settings.compiler_caches), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        for contender in contenders:
            advance(f"{name} {mode}: warming up {contender}")
            entry = Entry(contender, CONTENDERS[contender], record=new_record(name, mode, contender, settings, where))
            if mode not in entry.contender.modes:
                continue
            with contextlib.suppress(NotOffered):
                running += [entry] if attempt(entry, prepare, base, images, labels, mode, settings) else []
                entries.append(entry)
    in_turns(
        [entry.timed for entry in running],
        settings.rounds,
        settings.device,
        lambda i: advance(f"{name} {mode}: round {i + 1} of {settings.rounds}"),
    )
    eager = next((e for e in running if e.name == "eager"), None)
    for entry in entries:
        advance(f"{name} {mode}: memory and parity of {entry.name}")
        if entry in running:
            finish(entry, eager)
            if settings.bytes and not entry.contender.allocates_unseen:
                attempt(entry, measure_memory, images, labels, mode, settings)
            attempt(entry, measure_parity, base, mode, settings)
            if entry.name.startswith("fused"):
                entry.record["fused_blocks"] = fused_blocks(entry.model)
    records = [entry.record for entry in entries]
    # compiled models are in cycles, and the next case wants the memory
    del entries, running, eager, entry
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return records


def run(
    models: Sequence[str],
    modes: Sequence[str],
    contenders: Sequence[str],
    settings: Settings,
    where: dict,
    console: Console,
    images: Tensor | None = None,
    keep: Callable[[list[dict]], None] = lambda records: None,
) -> list[dict]:
    """The records of all models and modes, with progress on the console; ``keep`` gets those so far after each case."""
    records = []
    with progress(console, len(models) * len(modes) * (2 * len(contenders) + settings.rounds)) as advance:
        for model in models:
            for mode in modes:
                records += run_case(model, mode, contenders, settings, where, images, advance)
                keep(records)
    return records


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:.1f}"


def _parity(found: dict | None) -> str:
    if found is None:
        return ""
    failed = [g["name"] for g in found["groups"] if not g["passed"]]
    return f"failed: {', '.join(failed)}" if failed else "passed"


def cells(record: dict) -> dict[str, str]:
    """A record as a row for readers; memory in MiB per step."""
    r = record
    return {
        "model": r["model"],
        "mode": r["mode"],
        "contender": r["contender"],
        "images/s": "" if r["images_per_s"] is None else f"{r['images_per_s']:.1f}",
        "to eager": "" if r["ratio_to_eager"] is None else f"{r['ratio_to_eager']:.2f}x",
        "kept MiB": _mib(r["kept_for_backward_bytes"]),
        "peak MiB": _mib(r["peak_bytes"]),
        "compile s": "" if r["compile_s"] is None else f"{r['compile_s']:.0f}",
        "parity": _parity(r["parity"]),
        "remark": r["failure"] or r["fused_blocks"] or "",
    }


def setting(record: dict) -> str:
    """What the contenders of a record share, in words."""
    precision = f"{record['dtype']} autocast" if record["amp"] else record["dtype"]
    graphs = ", CUDA graphs" if record["cuda_graphs"] else ""
    return f"{record['device']}, batch {record['batch']}, {record['resolution']} px, {precision}{graphs}"


def table(records: Sequence[dict]) -> Table:
    """The records of one setting as a table, without columns that nobody fills."""
    rows = [cells(r) for r in records]
    where = records[0]["environment"]
    shown = Table(title=f"{where['device']}, {where['threads']} threads: {setting(records[0])}")
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    text = ("model", "mode", "contender", "parity", "remark")
    for head in heads:
        shown.add_column(head, justify="left" if head in text else "right", no_wrap=head not in ("parity", "remark"))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or (following["model"], following["mode"]) != (row["model"], row["mode"])
        shown.add_row(*(escape(row[head]) for head in heads), end_section=last)
    return shown


def new_console() -> Console:
    """A console that is wide enough for the table also where the output is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def save(records: Sequence[dict], path: Path) -> None:
    """Write the records as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n")


def known_model(name: str) -> str:
    """``name``, where :mod:`bench.networks` or torchvision has a model of that name; else an error that says which torchvision has."""
    known = [*NETWORKS, *torchvision.models.list_models(module=torchvision.models)]
    if name not in known:
        near = difflib.get_close_matches(name, known) or ["resnet50", "densenet121"]
        raise argparse.ArgumentTypeError(f"torchvision.models has no {name!r}; it has, among others, {', '.join(near)}")
    return name


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where the parity of a fused contender failed."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", type=known_model, default=["densenet121", "resnet50"], help="torchvision models"
    )
    parser.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=["eager", "compile", "fused", "memory_efficient"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=160, help="pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--amp", action="store_true", help="autocast to --dtype, weights and images in float32")
    parser.add_argument("--device", default=default)
    parser.add_argument("--rounds", type=int, help=f"default {Settings.rounds}, with --quick 5")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument(
        "--capability", choices=CAPABILITIES, help="let PyTorch, oneDNN and fusedres use no more of the CPU than this"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="time replays of CUDA graphs, of every contender")
    parser.add_argument(
        "--compiler-caches", action="store_true", help="allow them: compile times are then not measured"
    )
    parser.add_argument("--quick", action="store_true", help="few and short rounds, parity on one batch")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    args = parser.parse_args(arguments)
    if args.capability:
        limits = {
            "ATEN_CPU_CAPABILITY": args.capability,
            "ONEDNN_MAX_CPU_ISA": CAPABILITIES[args.capability],
            "FUSEDRES_CPU_CAPABILITY": args.capability,
        }
        if not limits.items() <= os.environ.items():  # the libraries read them when they are loaded
            again = [sys.executable, "-m", "bench.models", *(sys.argv[1:] if arguments is None else arguments)]
            return subprocess.run(again, env=os.environ | limits, check=False).returncode
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.cuda_graphs and device.type != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    settings = Settings(
        args.batch, args.resolution, getattr(torch, args.dtype), args.amp, device,
        rounds=args.rounds or (5 if args.quick else Settings.rounds),
        seconds_per_round=0.0 if args.quick else Settings.seconds_per_round,
        parity_draws=1 if args.quick else Settings.parity_draws,
        cuda_graphs=args.cuda_graphs,
        compiler_caches=args.compiler_caches,
    )  # fmt: skip
    console = new_console()
    where = environment.describe(device, environment.command("bench.models", arguments))
    keep = functools.partial(save, path=args.json) if args.json else lambda records: None
    records = run(args.models, args.modes, args.contenders, settings, where, console, keep=keep)
    console.print(table(records))
    if args.json:
        console.print(f"records: {args.json}")
    checked = [r["parity"] for r in records if r["contender"].startswith("fused") and r["parity"]]
    return int(not all(found["passed"] for found in checked))


if __name__ == "__main__":
    raise SystemExit(main())
