"""Why skip connections work: the papers' claims, run on fused blocks.

    python -m bench.studies                                 all of them, in the quick form, on scikit-learn's digits
    python -m bench.studies degradation lesions             two of them
    python -m bench.studies --preset full --data FOLDER     the papers' sizes, on the CIFAR-10 in FOLDER

Each study writes NAME.json and NAME.png, and says three sentences with its figures beside the published ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .. import data, environment, models
from ..progress import progress
from . import drawing, running
from .registry import STUDIES
from .study import NAMES


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
        help=f"CIFAR-10 is read from FOLDER, cifar10 means {running.CIFAR_FOLDER}/; default: %(default)s",
    )
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into its folder")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of all studies; default: %(default)s"
    )
    parser.add_argument("--jobs", type=int, help="studies at a time, which share the threads; default: one per thread")
    parser.add_argument("--out", type=Path, default=Path("results/studies"), help="folder; default: %(default)s")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in STUDIES:
            parser.error(f"no study {name!r}; there are {', '.join(STUDIES)}")
    chosen = list(dict.fromkeys(args.names or STUDIES))
    jobs = min(args.jobs or args.threads, len(chosen))
    if jobs < 1 or args.threads < 1:
        parser.error("--threads and --jobs have to be 1 or more")
    command = environment.command("bench.studies", arguments)
    order = running.Order(args.preset, args.data, max(1, args.threads // jobs), command)
    try:
        images = order.images(args.download)
    except data.DataError as error:
        parser.error(str(error))
    console = models.new_console()
    args.out.mkdir(parents=True, exist_ok=True)
    total = sum(STUDIES[name].steps(STUDIES[name].presets[args.preset]) for name in chosen)
    with progress(console, total) as advance:
        for found in running.run(chosen, order, images, jobs, advance):
            study = STUDIES[found["study"]]
            path = args.out / f"{found['study']}.json"
            path.write_text(json.dumps(found) + "\n")
            drawing.save(study.plot(found["result"]), path.with_suffix(".png"))
            console.print(f"\n{study.title}: {path.with_suffix('.png')}", style="bold", highlight=False)
            for sentence in found["sentences"]:
                console.print(f"- {sentence}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
