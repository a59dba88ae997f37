"""The main job, on photographs: a ResNet-50 and a DenseNet-121 converted, proven equal to eager, timed, and a report of it.

    python -m bench.demo --out demo

The photographs are those that scikit-image ships; batches are random crops of them. Parity is that of the output, the
running statistics and every gradient of a training step, and of the output of an inference, by the rule of
:mod:`fusedres.testing`. Then the harness runs in its quick form on the same photographs, model by model; torch.compile, which
takes longest, contends last and within a budget, in a process of its own and on noise. Interrupted (Ctrl-C), it writes the
report of what it has. Returns 1 where anything is not equal to eager.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import skimage.data
import torch
from rich.console import Console
from torch import Tensor

import fusedres
from fusedres import testing

from . import environment, models, report

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
MODELS = ("resnet50", "densenet121")
CONTENDERS = ("eager", "fused", "fused-recompute", "memory_efficient")
# on two cores torch.compile takes six minutes for a DenseNet-121
COMPILED = ("resnet50",)
# of ImageNet, with which torchvision's models are trained
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crops(batch: int, resolution: int, seed: int) -> Tensor:
    """``batch`` x 3 x ``resolution`` x ``resolution`` normalised random crops, each of another photograph as far as they go.

    A photograph is halved while its shorter side is more than twice the crop, so that a crop shows something.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(batch):
        photograph = torch.from_numpy(getattr(skimage.data, PHOTOGRAPHS[i % len(PHOTOGRAPHS)])()).permute(2, 0, 1)
        while min(photograph.shape[1:]) > 2 * resolution:
            photograph = torch.nn.functional.avg_pool2d(photograph.float(), 2)
        top, left = (
            int(torch.randint(side - resolution + 1, (), generator=generator)) for side in photograph.shape[1:]
        )
        found.append(photograph[:, top : top + resolution, left : left + resolution] / 255)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (torch.stack(found) - mean) / deviation


def prove(name: str, settings: models.Settings, console: Console, batch: int = 2, draws: int = 3) -> bool:
    """Whether a converted model is equal to eager in a training step and an inference; says it."""
    generator = torch.Generator().manual_seed(0)
    batches = [settings.place(crops(batch, settings.resolution, seed)) for seed in range(draws)]
    labels = [torch.randint(1000, (batch,), generator=generator).to(settings.device) for _ in batches]
    base = models.build_model(name, batches[0], settings)
    training = testing.measure(base.train(), fusedres.convert, list(zip(batches, labels, strict=True)))
    inference = testing.measure(base.eval(), fusedres.convert, [(images, None) for images in batches])
    for group in (*training, *inference):
        if not group.passed:
            console.print(f"{name}: parity FAILED for {group}")
    passed = all(group.passed for group in (*training, *inference))
    if passed:
        gradients = next(group for group in training if group.name == "gradients")
        console.print(f"{name}: parity passed: outputs and all {gradients.tensors} gradients")
        for group in training:
            console.print(f"  {group}", highlight=False)
    return passed


def compiled(name: str, seconds: float, settings: models.Settings, console: Console) -> list[dict]:
    """The records of torch.compile for a model, in a process of its own that is stopped after so many ``seconds``: those of the modes that
    it has measured by then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        options = {"--models": name, "--batch": settings.batch, "--resolution": settings.resolution, "--json": path}
        command = [sys.executable, "-m", "bench.models", "--quick", "--contenders", "eager", "compile"]
        process = subprocess.Popen(
            [*command, *(str(x) for pair in options.items() for x in pair)], start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            console.print(f"torch.compile was not ready with {name} within {seconds:.0f} s", highlight=False)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the compiler's workers as well
            process.wait()
        records = json.loads(path.read_text()) if path.exists() else []
    return [record for record in records if record["contender"] == "compile"]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--models", nargs="+", type=models.known_model, default=MODELS, help="torchvision models")
    parser.add_argument("--contenders", nargs="+", choices=models.CONTENDERS, default=CONTENDERS)
    parser.add_argument(
        "--compile", nargs="*", default=COMPILED, help="models that torch.compile contends for (default: %(default)s)"
    )
    parser.add_argument(
        "--compile-seconds", type=float, default=150, help="that it may take for a model (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=160, help="pixels")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = models.Settings(
        args.batch, args.resolution, device=device, rounds=args.rounds, seconds_per_round=0.0, parity_draws=0
    )
    console = models.new_console()

    proven, records = [], []
    where = environment.describe(device, environment.command("bench.demo", arguments))
    images = crops(args.batch, args.resolution, seed=0)
    try:
        for name in args.models:
            console.print(f"{name}: comparing a training step and an inference with eager, both against float64 ...")
            proven.append(prove(name, settings, console))
            found = models.run([name], ("train", "infer"), args.contenders, settings, where, console, images)
            console.print(models.table(found))
            records += found
        for name in args.compile:
            console.print(f"{name}: torch.compile, for at most {args.compile_seconds:.0f} s ...", highlight=False)
            records += compiled(name, args.compile_seconds, settings, console)
    except KeyboardInterrupt:
        console.print("interrupted: the report is of what was measured until now")
    if not records:
        return 1
    records.sort(key=lambda r: (args.models.index(r["model"]), r["mode"] != "train"))
    models.save(records, args.out / "records.json")
    if args.compile:
        console.print(models.table(records))
    names = list(dict.fromkeys(record["model"] for record in records))
    verdict = "Outputs, running statistics and every gradient are as right as eager's (against float64)."
    page, picture = report.write_report(
        records,
        args.out,
        f"{' and '.join(names)} on photographs",
        verdict if all(proven) else "**Parity with eager FAILED**; see the output of the command.",
    )
    console.print(f"report: {page} and {picture}")
    return 0 if all(proven) and len(proven) == len(args.models) else 1


if __name__ == "__main__":
    sys.exit(main())
