"""Why skip connections work: the papers' claims, run on fused blocks.

    python -m bench.studies                                 all of them, in the quick form, on scikit-learn's digits
    python -m bench.studies degradation lesions             two of them
    python -m bench.studies --preset full --data FOLDER     the papers' sizes, on the CIFAR-10 in FOLDER

Each study writes NAME.json and NAME.png, and says three sentences with its figures beside the published ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from .. import data, environment, models
from ..data import Images
from ..progress import progress
from . import drawing
from .registry import STUDIES
from .study import NAMES, Result, Study

#: where ``--data cifar10`` looks
CIFAR_FOLDER = Path("data")


def images_of(name: str, download: bool) -> Images:
    """The data of the option ``--data``. Raises DataError where they are not there."""
    if name == "digits":
        return data.digits(data.Crop(1, -1.0))
    return data.cifar10(CIFAR_FOLDER if name == "cifar10" else Path(name), download)


def record(name: str, study: Study, preset: str, images: Images, where: dict, advance: Callable[[str], None]) -> dict:
    """Run a study; what its JSON holds."""
    settings = study.presets[preset]
    result: Result = study.run(settings, images, lambda what: advance(f"{name}: {what}"))
    # plots and sentences see what a file would give them
    result = json.loads(json.dumps(result))
    return {
        "study": name,
        "preset": preset,
        "data": {"name": images.name, "training": len(images.train_labels), "test": len(images.test_labels)},
        "settings": asdict(settings),
        "environment": where,
        "sentences": list(study.sentences(result)),
        "result": result,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDIES)}; default all")
    parser.add_argument("--preset", choices=NAMES, default="quick", help="default: %(default)s")
    parser.add_argument(
        "--data",
        default="digits",
        metavar="digits|cifar10|FOLDER",
        help=f"CIFAR-10 is read from FOLDER, cifar10 means {CIFAR_FOLDER}/; default: %(default)s",
    )
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into its folder")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--out", type=Path, default=Path("results/studies"), help="folder; default: %(default)s")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in STUDIES:
            parser.error(f"no study {name!r}; there are {', '.join(STUDIES)}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        images = images_of(args.data, args.download)
    except data.DataError as error:
        parser.error(str(error))
    chosen = {name: STUDIES[name] for name in args.names or STUDIES}
    where = environment.describe(torch.device("cpu"), environment.command("bench.studies", arguments))
    console = models.new_console()
    args.out.mkdir(parents=True, exist_ok=True)
    total = sum(study.steps(study.presets[args.preset]) for study in chosen.values())
    with progress(console, total) as advance:
        for name, study in chosen.items():
            found = record(name, study, args.preset, images, where, advance)
            path = args.out / f"{name}.json"
            path.write_text(json.dumps(found) + "\n")
            drawing.save(study.plot(found["result"]), path.with_suffix(".png"))
            console.print(f"\n{study.title}: {path.with_suffix('.png')}", style="bold", highlight=False)
            for sentence in found["sentences"]:
                console.print(f"- {sentence}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
