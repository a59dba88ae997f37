"""Everything that needs a GPU, in one command of at most nine minutes.

    python -m bench.gpu --out results/gpu               (all of it)
    python -m bench.gpu --out /tmp/rehearsal --dry-run  (every stage at toy size on the CPU, to prove this script)

The stages run in the order of their worth, each in a process of its own: one that fails or is cut off by the budget
takes no other's results with it. After each of them the folder holds its log, its figures as JSON, ``summary.json``,
``summary.md`` and the plots of what was measured so far. A run of some stages (``--only``) adds to what the folder has.
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
from matplotlib.figure import Figure
from rich.console import Console

import fusedres

from . import dependent, environment, report, roofline

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
    """A command, not started with less than ``least`` seconds left and stopped after ``most``; ``tuned`` ones follow the
    measured plans, the others those that hold where nothing was measured. A rehearsal's kernels are ``interpreted``. ``backend``: on
    which blocks run, but in a rehearsal; None for the one that they choose."""

    name: str
    command: Callable[[Run], list[str]]
    least: float = 20.0
    most: float = 150.0
    tuned: bool = False
    interpreted: bool = True
    backend: str | None = None


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


def tests(file: str, rehearsed: str, *options: str) -> Callable[[Run], list[str]]:
    """The tests of a file or folder, spread over the cores: most of their time is compilation. A rehearsal runs those whose names
    contain ``rehearsed``."""

    def command(run: Run) -> list[str]:
        if run.dry:
            return ["-m", "pytest", "-q", "-rs", f"tests/{file}", *options, "-k", rehearsed]
        workers = min(16, os.cpu_count() or 1)
        spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") is not None else []
        return ["-m", "pytest", "-q", "-rs", *spread, f"tests/{file}", *options]

    return command


def whole_models(
    contenders: str,
    batch: int,
    *,
    graphs: bool,
    name: str,
    least: float = 40.0,
    tuned: bool = False,
    backend: str | None = None,
) -> Stage:
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

    most = 240.0 if "compile" in contenders else 120.0
    return Stage(name, command, least, most=most, tuned=tuned, backend=backend)


def host_time(run: Run) -> list[str]:
    """A step's time on the host beside that of eager's operators."""
    sizes = ["--models", "resnet50", "--modes", "infer", "--rounds", "1"] if run.dry else []
    return ["-m", "bench.host", "--json", str(run.out / "host.json"), *sizes]


def primitives(model: str, mode: str) -> Stage:
    """Every primitive of a step against its floor."""

    def command(run: Run) -> list[str]:
        sizes = [model, "--batch", "256", "--resolution", "224", "--dtype", "bfloat16"]
        if run.dry:
            sizes = ["resnet18", "--batch", "2", "--resolution", "32", "--repeats", "1"]
        json_file = str(run.out / f"primitives-{model}-{mode}.json")
        return ["-m", "bench.roofline", "--model", *sizes, "--mode", mode, "--device", run.device, "--json", json_file]

    return Stage(f"primitives-{model}-{mode}", command, most=60.0)


def one_kernel(run: Run) -> list[str]:
    """Both gradients of every 1x1 by one kernel, beside two, the library, and the floor; and forwards by descriptors likewise."""
    sizes = ["--batch", "256"]
    if run.dry:
        sizes = ["--model", "resnet50", "--batch", "2", "--resolution", "32", "--dtype", "float32", "--repeats", "1"]
        sizes += ["--most", "1"]
    return ["-m", "bench.pointwise", "--device", run.device, *sizes, "--json", str(run.out / "pointwise.json")]


def dependent_launches(run: Run) -> list[str]:
    """Both models with dependent launches off and on: their bits, then their times."""
    sizes = ["--quick", "--models", "resnet18", "--rounds", "1"] if run.dry else ["--models", *reversed(MODELS)]
    return ["-m", "bench.dependent", "--device", run.device, *sizes, "--json", str(run.out / "pdl.json")]


STAGES = (
    Stage("environment", own("environment"), least=0.0, most=60.0),
    Stage("tests", tests("test_gpu.py", "same_bits"), least=30.0, most=150.0),
    Stage("ceilings", own("ceilings"), most=30.0),
    Stage("compile", own("compile"), most=90.0),
    # of this machine's processor, over the stub of the driver
    Stage("host", host_time, most=60.0, interpreted=False),
    whole_models("eager fused", 256, graphs=False, name="models-256"),
    whole_models("eager fused", 256, graphs=True, name="models-256-graphs"),
    *(primitives(model, mode) for model in MODELS for mode in ("train", "infer")),
    Stage("pointwise", one_kernel, most=120.0),
    # the sanitizer's kernels are among these, compiled when its turn comes
    Stage("kernel-tests", tests("backends", "test_apply_grad_coeff and float32", "--backend", "triton"), most=120.0),
    Stage("cuda-blocks", tests("test_gpu_cuda.py", "as_right"), most=60.0),
    Stage("cuda-tests", tests("backends/test_contract.py", "test_statistics", "--backend", "cuda"), most=60.0),
    whole_models("eager fused", 256, graphs=False, name="models-256-cuda", backend="cuda"),
    Stage("memcheck", own("memcheck"), most=60.0),
    Stage("racecheck", own("racecheck"), most=60.0),
    Stage("pdl", dependent_launches, least=60.0, most=200.0),
    whole_models("eager compile fused", 256, graphs=False, name="models-256-compile", least=90.0),
    whole_models("eager compile fused", 256, graphs=True, name="models-256-compile-graphs", least=90.0),
    Stage("tune", own("tune"), least=60.0, most=240.0, tuned=True),
    whole_models("eager fused", 256, graphs=True, name="models-256-tuned-graphs", tuned=True),
    whole_models("eager fused", 256, graphs=False, name="models-256-tuned", tuned=True),
    whole_models("eager compile fused", 32, graphs=False, name="models-32", least=90.0),
    whole_models("eager compile fused", 32, graphs=True, name="models-32-graphs", least=90.0),
    whole_models("eager compile-max-autotune fused", 256, graphs=False, name="models-256-autotune", least=120.0),
    whole_models("eager compile-max-autotune fused", 256, graphs=True, name="models-256-autotune-graphs", least=120.0),
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


#: the contract's tests that the sanitizer sees, with their cases
SANITIZED = {
    "test_conv_forward_in_training": ("1x1 odd", "3x3 stride 2"),
    "test_conv_backward_of_a_dense_layer": ("1x1 odd", "3x3 stride 2"),
    "test_add_act": ("odd: projection",),
    "test_pool": ("stem five of thirteen",),
}


def sanitize(run: Run, kind: str) -> int:
    """The tests of a few kernels under compute-sanitizer; passed with a remark where it is not installed."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    file = "tests/backends/test_contract.py"
    cases = [f"{file}::{test}[triton-float16-{case}]" for test, of_test in SANITIZED.items() for case in of_test]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--backend", "triton"]
    if run.dry or tool is None:
        # a rehearsal runs what would be checked
        print("remark: compute-sanitizer was not found" if tool is None else "remark: rehearsed without it")
        return subprocess.call([*command, cases[0]]) if run.dry else 0
    options = ["--tool", kind, "--error-exitcode", "9"]
    options += ["--leak-check", "no"] if kind == "memcheck" else []
    # each tensor its own allocation, or an access beside one hits another unseen
    apart = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.call([tool, *options, *command, *cases], env=apart)


def example(run: Run, name: str, mode: str, batch: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A converted model and its input."""
    model = fusedres.convert(roofline.build(name, run.device, torch.bfloat16, mode))
    x = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16, device=run.device)
    return model, x.contiguous(memory_format=torch.channels_last)


def toy() -> tuple[torch.nn.Module, torch.Tensor]:
    """What a rehearsal has in the place of a model."""
    conv = torch.nn.Conv2d(8, 16, 1, bias=False)
    model = fusedres.convert(torch.nn.Sequential(conv, torch.nn.BatchNorm2d(16), torch.nn.ReLU()))
    return model, torch.randn(2, 8, 4, 4)


def compile_models(run: Run) -> int:
    """The kernels of both models by the default plans, into Triton's cache, where the stages after it find them."""
    if run.dry:
        with fusedres.use_backend("triton"):
            model, x = toy()
            return int(fusedres.precompile(model, x) != 0)  # interpreted kernels do not compile
    for batch in (256, 32):
        for name in MODELS:
            for mode in ("train", "infer"):
                start = time.perf_counter()
                count = fusedres.precompile(*example(run, name, mode, batch))
                print(f"{name} {mode} {batch}: {count} kernels, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def tune_models(run: Run) -> int:
    """Measured plans for both models, in the folder: for the stages after it, and to be committed."""
    if run.dry:
        with fusedres.use_backend("triton"):
            clock = functools.partial(roofline.best_of, device=torch.device("cpu"), repeats=1)
            found = fusedres.tune(*toy(), measure=clock)
        print(found)
        return int(not found)
    for mode in ("train", "infer"):
        for name in MODELS:
            print(f"{name} {mode}", fusedres.tune(*example(run, name, mode, 256)), sep="\n", flush=True)
            torch.cuda.empty_cache()
    return 0


OWN: dict[str, Callable[[Run], int]] = {
    "environment": show_environment,
    "ceilings": measure_ceilings,
    "compile": compile_models,
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
    folder = run.out / ("plans" if stage.tuned else "no-plans")
    variables = dict(os.environ) | {"FUSEDRES_CACHE_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    if not stage.interpreted:
        variables.pop("TRITON_INTERPRET", None)
    elif run.dry:
        # the kernels' stages; whole models would take the interpreter minutes, and run as they do on a CPU
        variables |= {"TRITON_INTERPRET": "1"}
    if stage.backend is not None and not run.dry:
        variables |= {"FUSEDRES_BACKEND": stage.backend}
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
        remarks[0] if remarks else lines[-1][:200] if lines and ("tests" in stage.name or status != "passed") else ""
    )
    return Outcome(stage.name, status, time.perf_counter() - start, shown, remark)


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def pointwise_table(records: list[dict]) -> list[str]:
    """The lines of what the stage of that name has left."""
    lines = []
    for op, title in (("backward", "both gradients"), ("forward", "forward, nothing pending on the input")):
        of_op = [r for r in records if r["problem"]["op"] == op]
        ways = list(of_op[0]["seconds"]) if of_op else []
        head = ["model", "input", "outputs", "calls", "floor us", *(f"{way} us" for way in ways)]
        if of_op:
            lines += ["", f"## pointwise: {title} of a 1x1", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for r in of_op:
            times = [r["floor_seconds"], *(r["seconds"][way] for way in ways)]
            shown = ["failed" if spent is None else f"{spent * 1e6:.0f}" for spent in times]
            cells = [r["model"], "x".join(map(str, r["problem"]["x"])), r["problem"]["weight"][0], r["calls"], *shown]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


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
        for page in found or []:
            lines += ["", f"## {stage.name}: {page['total_seconds'] * 1e3:.1f} ms", ""]
            lines += ["| primitive | calls | ms | floor ms | of floor |", "|---|---:|---:|---:|---:|"]
            for label, p in sorted(page["primitives"].items(), key=lambda item: -item[1]["seconds"]):
                share = f"{p['floor_seconds'] / p['seconds']:.0%}" if p["seconds"] else ""
                lines.append(
                    f"| {label} | {p['calls']} | {p['seconds'] * 1e3:.2f} | {p['floor_seconds'] * 1e3:.2f} | {share} |"
                )
    lines += pointwise_table(_load(run.out / "pointwise.json") or [])
    lines += dependent.markdown(_load(run.out / "pdl.json") or [])
    lines += ["", "| stage | outcome | s | remark |", "|---|---|---:|---|"]
    lines += [f"| {o.stage} | {o.status} | {o.seconds:.0f} | {o.remark.replace('|', '/')} |" for o in outcomes]
    return "\n".join(lines) + "\n"


def known_outcomes(run: Run) -> dict[str, Outcome]:
    """What an earlier run has left in the folder, by stage."""
    return {entry["stage"]: Outcome(**entry) for entry in _load(run.out / "summary.json") or []}


def save(outcomes: dict[str, Outcome], run: Run) -> None:
    """Write the summary."""
    ordered = [outcomes[stage.name] for stage in STAGES if stage.name in outcomes]
    (run.out / "summary.json").write_text(json.dumps([asdict(o) for o in ordered], indent=1) + "\n")
    (run.out / "summary.md").write_text(markdown(ordered, run))


def draw(run: Run) -> None:
    """The plots of what the folder holds: whole models, of every contender the first measurement in a setting, and each
    primitive against its floor."""
    records: dict[tuple, dict] = {}
    for stage in STAGES:
        for record in (_load(run.out / f"{stage.name}.json") or []) if stage.name.startswith("models") else []:
            if stage.tuned and record["contender"].startswith("fused"):
                record["contender"] += ", tuned"
            key = tuple(record[name] for name in ("batch", "cuda_graphs", "model", "mode", "contender"))
            records.setdefault(key, record)
    if records:
        report.write_report(list(records.values()), run.out, "ResNet and DenseNet on a GPU")
    found = {stage.name: _load(run.out / f"{stage.name}.json") for stage in STAGES if "primitives" in stage.name}
    found = {name: pages[0]["primitives"] for name, pages in found.items() if pages}
    if not found:
        return
    most = max(map(len, found.values()))
    figure = Figure(figsize=(5.5 * len(found), 1.2 + 0.3 * most), dpi=120, layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        ordered = sorted(rows.items(), key=lambda row: row[1]["seconds"])
        labels = [label for label, _ in ordered]
        axes.barh(labels, [1e3 * row["seconds"] for _, row in ordered], color="#9a9a9a", label="measured")
        axes.barh(
            labels, [1e3 * row["floor_seconds"] for _, row in ordered], height=0.4, color="#0072b2", label="floor"
        )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("ms per step")
        axes.legend(loc="lower right", fontsize=8)
    figure.savefig(run.out / "primitives.png")


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
    console = Console(width=140)
    # a whole run starts anew; one of some stages adds to what is there
    outcomes = known_outcomes(run) if args.only else {}
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        console.print(f"{stage.name} ...", highlight=False)
        outcome = outcomes[stage.name] = perform(stage, run, end - time.perf_counter())
        console.print(f"  {outcome.status}, {outcome.seconds:.0f} s {outcome.remark}", highlight=False, markup=False)
        save(outcomes, run)
        # a plot that fails takes no stage after it along
        try:
            draw(run)
        except Exception as error:
            console.print(f"  no plot: {type(error).__name__}: {error}", highlight=False, markup=False)
    console.print(f"{run.out / 'summary.md'}", highlight=False)
    return int(any(outcome.status == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
