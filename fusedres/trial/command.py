"""The command line of ``python -m fusedres try``."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import doctor
from .measure import Setting, run
from .models import FORMS, TrialError, input_channels_and_size, load_model

if TYPE_CHECKING:
    from rich.console import Console

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def _size(text: str) -> tuple[int, ...]:
    parts = re.fullmatch(r"(\d+)(?:x(\d+))?(?:x(\d+))?", text)
    if parts is None or 0 in (found := tuple(int(part) for part in parts.groups() if part)):
        raise argparse.ArgumentTypeError(f"expected pixels as 224, 224x192 or 32x32x32, found {text!r}")
    return found * 2 if len(found) == 1 else found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help=FORMS)
    parser.add_argument(
        "--weights", help="a file with a state_dict, a name of torchvision's weights, or 'pretrained' for timm"
    )
    parser.add_argument("--size", type=_size, help="pixels: 224, 224x192, 32x32x32 (default: the model's own, or 224)")
    parser.add_argument("--channels", type=_positive, help="of the images (default: the model's own, or 3)")
    parser.add_argument(
        "--batch", type=_positive, default=8, help="images (default: %(default)s); halved where memory is short"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--amp", action="store_true", help="compute in --dtype by autocast, with float32 weights")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--nchw", action="store_true", help="leave model and images contiguous (default: channels_last)"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--train", dest="modes", action="store_const", const=("train",), help="training steps only")
    modes.add_argument("--infer", dest="modes", action="store_const", const=("infer",), help="inference only")
    parser.add_argument("--compile", action="store_true", help="let torch.compile contend, which may take minutes")
    parser.add_argument("--seconds", type=_positive, default=20, help="of timing per mode (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("trial"), help="folder of trial.json and trial.png (default: %(default)s)"
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrialError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


class _Lines:
    """What goes on, line by line, where there is no terminal: of what differs by a number alone only the first, and one in ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._said, self._at = console, "", 0.0

    def __call__(self, what: str) -> None:
        without_numbers, now = re.sub(r"\d+", "", what), time.monotonic()
        if without_numbers != self._said or now - self._at > 10:
            self._console.print(what, highlight=False, markup=False)
            self._said, self._at = without_numbers, now


def main(args: argparse.Namespace) -> int:
    """Try a model; returns the exit status: 0 where it is as right as eager, 1 where it is not, 2 where the question was wrong."""
    # PyTorch's profiler, which measures the peak memory, announces every start on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        from rich.console import Console

        from . import page
    except ImportError as error:
        print(f"fusedres try shows its findings by rich and matplotlib ({error}): type pip install 'fusedres[try]'")
        return 2
    console = Console(width=None if Console().is_terminal else 140)
    torch.manual_seed(0)  # random weights are the same in every run
    try:
        model = load_model(args.model, args.weights)
        channels, size = input_channels_and_size(model)
        setting = Setting(
            args.batch,
            args.channels or channels,
            args.size or size,
            args.modes or ("train", "infer"),
            _DTYPES[args.dtype],
            args.amp,
            _device(args.device),
            not args.nchw,
            args.compile,
            args.seconds,
        )
        if console.is_terminal:
            with console.status(args.model) as status:
                trial = run(model, setting, status.update)
        else:
            trial = run(model, setting, _Lines(console))
    except TrialError as error:
        console.print(f"fusedres try: {error}", highlight=False, markup=False, style="red")
        return 2
    page.show(trial, console)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"model": args.model, **trial.as_json(), "environment": doctor.diagnose()}
    (args.out / "trial.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    page.draw(trial, args.model, args.out / "trial.png")
    console.print(f"written: {args.out / 'trial.json'} and {args.out / 'trial.png'}", highlight=False)
    return 0 if trial.holds else 1
