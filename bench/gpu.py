"""Everything that needs a GPU, in one command of at most nine minutes.

    python -m bench.gpu --out results/gpu               (all of it)
    python -m bench.gpu --out /tmp/rehearsal --dry-run  (every stage at toy size on the CPU, to prove this script)

The stages run in the order of their worth, each in a process of its own: one that fails or is cut off by the budget
takes no other's results with it. After each of them the folder holds its log, its figures as JSON, ``summary.json`` and
``summary.md``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import fusedres

from . import environment, roofline

MODELS = ("densenet121", "resnet50")


@dataclass(frozen=True)
class Run:
    """The settings of a run of the script."""

    out: Path
    dry: bool

    @property
    def device(self) -> str:
        """Where the stages run."""
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Stage:
    """A command, not started with less than ``least`` seconds left and stopped after ``most``."""

    name: str
    command: Callable[[Run], list[str]]
    least: float = 20.0
    most: float = 150.0


@dataclass
class Outcome:
    """How a stage ended: ``status`` is passed, failed, cut off or left out."""

    stage: str
    status: str
    seconds: float
    command: str
    remark: str = ""


# ---- the stages ------------------------------------------------------------------------------------------------------


def own(name: str) -> Callable[[Run], list[str]]:
    """A stage that is a function of this file."""
    return lambda run: ["-m", "bench.gpu", "--stage", name, "--out", str(run.out), *(["--dry-run"] if run.dry else [])]


def tests(run: Run) -> list[str]:
    """The tests that need a GPU, and those of the kernels, which run on one where it is."""
    chosen = ["tests/test_gpu.py", "tests/test_triton_kernels.py"]
    if run.dry:
        chosen = [
            "tests/test_gpu.py",
            "tests/test_triton_kernels.py",
            "-k",
            "gpu or test_conv_forward_training[1x1-float32]",
        ]
    parallel = importlib.util.find_spec("xdist") is not None and not run.dry
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if parallel else []
    return ["-m", "pytest", "-q", "-rs", *spread, *chosen]


def whole_models(contenders: str, batch: int, *, graphs: bool, name: str) -> Stage:
    """A run of bench.models in bfloat16, in training and inference."""

    def command(run: Run) -> list[str]:
        sizes = ["--batch", str(batch), "--resolution", "224", "--dtype", "bfloat16", "--rounds", "5"]
        models, modes = MODELS, ["train", "infer"]
        entrants = contenders.split()
        if run.dry:
            sizes = ["--batch", "2", "--resolution", "32", "--quick", "--rounds", "1"]
            # what compiles takes longer than the rest of a rehearsal
            models, modes, entrants = ("resnet18",), ["infer"], [c for c in entrants if not c.startswith("compile")]
        return [
            "-m", "bench.models", "--models", *models, "--modes", *modes, "--contenders", *entrants, *sizes,
            "--device", run.device, "--compiler-caches", "--json", str(run.out / f"{name}.json"),
            *(["--cuda-graphs"] if graphs and not run.dry else []),
        ]  # fmt: skip

    return Stage(name, command, least=40.0, most=240.0)


def primitives(model: str, mode: str) -> Stage:
    """Every primitive of a step against its floor."""

    def command(run: Run) -> list[str]:
        sizes = [model, "--batch", "256", "--resolution", "224", "--dtype", "bfloat16"]
        if run.dry:
            sizes = ["resnet18", "--batch", "1", "--resolution", "32", "--repeats", "1"]
        json_file = str(run.out / f"primitives-{model}-{mode}.json")
        return ["-m", "bench.roofline", "--model", *sizes, "--mode", mode, "--device", run.device, "--json", json_file]

    return Stage(f"primitives-{model}-{mode}", command, most=60.0)


STAGES = (
    Stage("environment", own("environment"), least=0.0, most=60.0),
    Stage("tests", tests, least=30.0, most=180.0),
    Stage("ceilings", own("ceilings"), most=30.0),
    whole_models("eager fused", 256, graphs=False, name="models-256"),
    whole_models("eager fused", 256, graphs=True, name="models-256-graphs"),
    *(primitives(model, mode) for model in MODELS for mode in ("train", "infer")),
    whole_models("eager compile fused", 256, graphs=False, name="models-256-compile"),
    Stage("memcheck", own("memcheck"), most=90.0),
    Stage("racecheck", own("racecheck"), most=90.0),
    whole_models("eager compile fused", 256, graphs=True, name="models-256-compile-graphs"),
    Stage("tune", own("tune"), least=60.0, most=200.0),
    whole_models("eager fused", 256, graphs=True, name="models-256-tuned-graphs"),
    whole_models("eager compile fused", 32, graphs=False, name="models-32"),
    whole_models("eager compile fused", 32, graphs=True, name="models-32-graphs"),
    whole_models("eager compile-max-autotune fused", 256, graphs=False, name="models-256-autotune"),
    whole_models("eager compile-max-autotune fused", 256, graphs=True, name="models-256-autotune-graphs"),
)


def show_environment(run: Run) -> int:
    """What this machine is, and whether the package is built for it; 1 where its fused kernels cannot run."""
    device = torch.device(run.device)
    found = environment.describe(device, environment.command("bench.gpu", None))
    found["platform"] = platform.platform()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    found["backends"] = {str(dtype): fusedres.backends(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    (run.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(found["backends"]["torch.float32"]["triton"] != "available")


def measure_ceilings(run: Run) -> int:
    """The rates of a large copy and of a large product, in the dtypes of the other stages."""
    device = torch.device(run.device)
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if not run.dry else (torch.float32,):
        bandwidth, rate = roofline.ceilings(dtype, device)
        found[str(dtype).removeprefix("torch.")] = {"copy_bytes_per_s": bandwidth, "flops_per_s": rate}
    (run.out / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def sanitize(run: Run, kind: str) -> int:
    """The tests of a few kernels under compute-sanitizer; passed with a remark where it is not installed."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    cases = "float16 and (1x1-odd or 3x3-stride2 or (test_join and odd) or (test_pool and max-stem))"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_triton_kernels.py"]
    if run.dry or tool is None:
        # a rehearsal runs what would be checked
        print("remark: compute-sanitizer was not found" if tool is None else "remark: rehearsed without it")
        return subprocess.call([*command, "-k", "float16 and 1x1-odd and training"]) if run.dry else 0
    options = ["--tool", kind, "--error-exitcode", "9"]
    options += ["--leak-check", "no"] if kind == "memcheck" else []
    # each tensor its own allocation, or an access beside one hits another unseen
    apart = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.call([tool, *options, *command, "-k", cases], env=apart)


def tune_models(run: Run) -> int:
    """Measured plans for both models, in the folder: for the stages after it, and to be committed."""

    def tuned(name: str, mode: str) -> fusedres.tuning.TuningReport:
        model = fusedres.convert(roofline.build(name, run.device, torch.bfloat16, mode))
        x = torch.randn(256, 3, 224, 224, dtype=torch.bfloat16, device=run.device)
        return fusedres.tune(model, x.contiguous(memory_format=torch.channels_last))

    if run.dry:
        conv = torch.nn.Conv2d(8, 16, 1, bias=False)
        model = fusedres.convert(torch.nn.Sequential(conv, torch.nn.BatchNorm2d(16), torch.nn.ReLU()))
        with fusedres.use_backend("triton"):
            clock = functools.partial(roofline.best_of, device=torch.device("cpu"), repeats=1)
            report = fusedres.tune(model, torch.randn(2, 8, 4, 4), measure=clock)
        print(report)
        return int(not report)
    for name in MODELS:
        for mode in ("infer", "train"):
            print(f"{name} {mode}", tuned(name, mode), sep="\n", flush=True)
            torch.cuda.empty_cache()
    return 0


OWN: dict[str, Callable[[Run], int]] = {
    "environment": show_environment,
    "ceilings": measure_ceilings,
    "memcheck": lambda run: sanitize(run, "memcheck"),
    "racecheck": lambda run: sanitize(run, "racecheck"),
    "tune": tune_models,
}


# ---- the run ---------------------------------------------------------------------------------------------------------


def perform(stage: Stage, run: Run, left: float) -> Outcome:
    """Run the stage, if there is time."""
    arguments = stage.command(run)
    shown = " ".join(["python", *arguments])
    if left < stage.least:
        return Outcome(stage.name, "left out", 0.0, shown, "no time left")
    variables = os.environ | {"FUSEDRES_CACHE_DIR": str(run.out / "plans"), "PYTHONUNBUFFERED": "1"}
    if run.dry:
        # the kernels' stages; whole models would take the interpreter minutes, and run as they do on a CPU
        variables |= {"TRITON_INTERPRET": "1"}
    log = run.out / f"{stage.name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        # a session of its own, so that what the stage has started ends with it
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=variables,
            cwd=Path(__file__).parents[1], start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(min(stage.most, left)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "cut off"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    remarks = [line.removeprefix("remark: ") for line in lines if line.startswith("remark: ")]
    remark = (
        remarks[0] if remarks else lines[-1][:200] if lines and (stage.name == "tests" or status != "passed") else ""
    )
    return Outcome(stage.name, status, time.perf_counter() - start, shown, remark)


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def markdown(outcomes: list[Outcome], run: Run) -> str:
    """What the folder holds, for readers."""
    where = _load(run.out / "environment.json") or {}
    title = "rehearsal without a GPU: its figures mean nothing" if run.dry else where.get("device", "")
    versions = ", ".join(f"{name} {where.get(name)}" for name in ("torch", "triton", "cuda", "fusedres", "commit"))
    lines = [f"# GPU: {title}", "", f"{where.get('date', '')}, {versions}", ""]
    for dtype, found in (_load(run.out / "ceilings.json") or {}).items():
        lines.append(
            f"- {dtype}: copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s, product {found['flops_per_s'] / 1e12:.0f} TFLOP/s"
        )
    head = ["model", "mode", "contender", "batch", "graphs", "images/s", "to eager", "peak MiB", "parity", "stage"]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for stage in STAGES:
        if stage.name.startswith("models"):
            for r in _load(run.out / f"{stage.name}.json") or []:
                speed = "failed" if r["images_per_s"] is None else f"{r['images_per_s']:.0f}"
                ratio = "" if r["ratio_to_eager"] is None else f"{r['ratio_to_eager']:.2f}x"
                peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
                parity = "" if r["parity"] is None else "passed" if r["parity"]["passed"] else "failed"
                graphs = "yes" if r["cuda_graphs"] else ""
                cells = (
                    r["model"],
                    r["mode"],
                    r["contender"],
                    r["batch"],
                    graphs,
                    speed,
                    ratio,
                    peak,
                    parity,
                    stage.name,
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    for stage in STAGES:
        found = _load(run.out / f"{stage.name}.json") if stage.name.startswith("primitives") else None
        if found:
            lines += ["", f"## {stage.name}: {found['total_seconds'] * 1e3:.1f} ms", ""]
            lines += ["| primitive | calls | ms | floor ms | of floor |", "|---|---:|---:|---:|---:|"]
            for label, p in sorted(found["primitives"].items(), key=lambda item: -item[1]["seconds"]):
                share = f"{p['floor_seconds'] / p['seconds']:.0%}" if p["seconds"] else ""
                lines.append(
                    f"| {label} | {p['calls']} | {p['seconds'] * 1e3:.2f} | {p['floor_seconds'] * 1e3:.2f} | {share} |"
                )
    lines += ["", "| stage | outcome | s | remark |", "|---|---|---:|---|"]
    lines += [f"| {o.stage} | {o.status} | {o.seconds:.0f} | {o.remark.replace('|', '/')} |" for o in outcomes]
    return "\n".join(lines) + "\n"


def save(outcomes: list[Outcome], run: Run) -> None:
    """Write the summary."""
    (run.out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    (run.out / "summary.md").write_text(markdown(outcomes, run))


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, kernels interpreted")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STAGES], help="these stages")
    parser.add_argument("--stage", choices=OWN, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    end = time.perf_counter() + args.budget
    run = Run(args.out.resolve(), args.dry_run)
    run.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        return OWN[args.stage](run)
    if not run.dry and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run rehearses the stages without one")
    console, outcomes = Console(width=140), []
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        console.print(f"{stage.name} ...", highlight=False)
        outcomes.append(perform(stage, run, end - time.perf_counter()))
        console.print(
            f"  {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s {outcomes[-1].remark}",
            highlight=False,
            markup=False,
        )
        save(outcomes, run)
    console.print(f"{run.out / 'summary.md'}", highlight=False)
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
