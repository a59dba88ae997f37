"""Fine-tune a DenseNet-121 for several labels at once, as for chest X-rays: first block frozen, BatchNorms kept as pretrained.

    python examples/finetune.py PATH --weights DEFAULT

PATH holds ``labels.csv``, whose lines are the name of an image in PATH and then a 0 or 1 for each label, and the images.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import fusedres

PREPARE = [
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


class Labelled(Dataset):
    """Images with several labels each."""

    def __init__(self, path: Path, size: int) -> None:
        with open(path / "labels.csv", newline="") as file:
            rows = list(csv.reader(file))
        self.names = [path / row[0] for row in rows]
        self.labels = torch.tensor([[float(value) for value in row[1:]] for row in rows])
        self.prepare = v2.Compose([v2.Resize((size, size)), *PREPARE])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.prepare(Image.open(self.names[i]).convert("RGB")), self.labels[i]


class Fake(Dataset):
    """Noise whose first label is whether it is bright."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(2, (32, 3), generator=generator).float()
        self.images = torch.randn(32, 3, size, size, generator=generator) + self.labels[:, :1, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.labels[i]


def build(labels: int, weights: str | None) -> nn.Module:
    """The network with a head for so many labels, and what stays as pretrained frozen."""
    model = torchvision.models.densenet121(weights=weights)
    model.classifier = nn.Linear(model.classifier.in_features, labels)
    for name in ("conv0", "norm0", "denseblock1", "transition1"):
        model.features.get_submodule(name).requires_grad_(False)
    return fusedres.convert(model.to(memory_format=torch.channels_last))  # <-- fusedres


def train_mode(model: nn.Module) -> nn.Module:
    """Training, but that BatchNorms go on normalising by what they were pretrained with: batches are small."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def main(arguments: list[str] | None = None) -> list[float]:
    """The command line; returns the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="folder with labels.csv and images")
    parser.add_argument("--fake", action="store_true", help="random images instead")
    parser.add_argument("--weights", help="of torchvision, DEFAULT for its best (default: random)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="file of the weights")
    args = parser.parse_args(arguments)
    if (args.path is None) != args.fake:
        parser.error("give a folder of images, or --fake")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Fake(args.size) if args.fake else Labelled(args.path, args.size)
    model = build(data.labels.shape[1], args.weights).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr)
    losses = []
    for epoch in range(args.epochs):
        found = []
        for images, labels in DataLoader(data, args.batch, shuffle=True):
            images = images.to(device, memory_format=torch.channels_last)
            loss = F.binary_cross_entropy_with_logits(train_mode(model)(images), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(sum(found) / len(found))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    print(fusedres.report(model))
    if args.out is not None:
        torch.save(model.state_dict(), args.out)
    return losses


if __name__ == "__main__":
    main()
