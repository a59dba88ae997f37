"""The main job, on photographs: a ResNet-50 and a DenseNet-121 converted, proven equal to eager, timed, and a report of it.

    python -m bench.demo --out demo

The photographs are those that scikit-image ships; batches are random crops of them. Parity is that of the output, the
running statistics and every gradient of a training step, and of the output of an inference, by the rule of
:mod:`fusedres.testing`. Then the harness runs in its quick form on the same photographs. Returns 1 where anything is not
equal to eager.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import skimage.data
import torch
from rich.console import Console
from torch import Tensor

import fusedres
from fusedres import testing

from . import environment, models, report

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
MODELS = ("densenet121", "resnet50")
CONTENDERS = ("eager", "fused", "fused-recompute", "memory_efficient")
# cores from which torch.compile has a DenseNet-121 ready while one waits; on two it takes six minutes
CORES_FOR_DENSENET = 8
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


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--models", nargs="+", type=models.known_model, default=MODELS, help="torchvision models")
    parser.add_argument("--contenders", nargs="+", choices=models.CONTENDERS, default=CONTENDERS)
    compiled = MODELS if (os.cpu_count() or 1) >= CORES_FOR_DENSENET else ("resnet50",)
    parser.add_argument(
        "--compile",
        nargs="*",
        default=compiled,
        help="models that torch.compile contends for (default here: %(default)s)",
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

    proven = True
    for name in args.models:
        console.print(f"{name}: comparing a training step and an inference with eager, both against float64 ...")
        proven &= prove(name, settings, console)
    where = environment.describe(device, environment.command("bench.demo", arguments))
    images = crops(args.batch, args.resolution, seed=0)
    records = []
    for name in args.models:
        contenders = [*args.contenders, *(["compile"] if name in args.compile else [])]
        records += models.run([name], ("train", "infer"), contenders, settings, where, console, images)
    models.save(records, args.out / "records.json")
    console.print(models.table(records))
    left_out = [name for name in args.models if name not in args.compile]
    if left_out:
        console.print(
            f"torch.compile was left out for {', '.join(left_out)}, which takes it minutes on {os.cpu_count()} cores; "
            f"--compile {' '.join(args.models)} has it contend."
        )
    heading = f"{' and '.join(args.models)} on photographs"
    verdict = "Outputs, running statistics and every gradient are as right as eager's (against float64)."
    page, picture = report.write_report(
        records,
        args.out,
        heading,
        verdict if proven else "**Parity with eager FAILED**; see the output of the command.",
    )
    console.print(f"report: {page} and {picture}")
    return 0 if proven else 1


if __name__ == "__main__":
    sys.exit(main())
