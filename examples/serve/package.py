"""Package a torchvision model for programs without Python, and print what it makes of the batch that serve.cpp runs it on.

python examples/serve/package.py --model resnet50 --size 224 --batch 4 --out resnet50.pt2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import fusedres


def images(batch: int, size: int) -> Tensor:
    """In the place of images: the same numbers as in serve.cpp."""
    values = torch.linspace(-1, 1, batch * 3 * size * size).reshape(batch, 3, size, size)
    return values.contiguous(memory_format=torch.channels_last)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--weights", help="of torchvision, DEFAULT for its best (default: random)")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=4, help="of what is printed; the package takes any")
    parser.add_argument("--out", type=Path, required=True, help="the package, which ends in .pt2")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=args.weights)
    model = fusedres.convert(model.to(memory_format=torch.channels_last)).eval()  # <-- fusedres
    fusedres.export_cpp(model, images(1, args.size), args.out)  # <-- fusedres
    with torch.inference_mode():
        sums = model(images(args.batch, args.size)).double().flatten(1).sum(1)
    for i, value in enumerate(sums.tolist()):
        print(f"image {i}: {value:.9g}")
    print(fusedres.report(model))


if __name__ == "__main__":
    main()
