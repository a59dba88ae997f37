"""Train a ResNet with PyTorch Lightning, converted by a callback: the LightningModule knows nothing of it.

    python examples/lightning_classify.py PATH --model resnet50 --epochs 90

PATH holds a folder of images per label. Needs ``pip install lightning``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fusedres

NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Fuse(lightning.Callback):
    """Converts the model before anything is done with it, and says what became of it when training is over. Checkpoints are those of the
    model as it was: they load with this callback and without."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        fusedres.convert(pl_module)  # <-- fusedres

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            print(fusedres.report(pl_module))


class Classifier(lightning.LightningModule):
    """A ResNet of torchvision and its loss."""

    def __init__(self, model: str, labels: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        net = torchvision.models.get_model(model, num_classes=labels)
        self.net = net.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images.to(memory_format=torch.channels_last)), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)


def images(path: Path, size: int) -> tuple[Dataset, int]:
    """The pictures of a folder, and how many labels they have."""
    crop = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    found = ImageFolder(path, v2.Compose([crop, v2.ToDtype(torch.float32, scale=True), NORMALIZE]))
    return found, len(found.classes)


def fake(size: int) -> tuple[Dataset, int]:
    """Noise whose label is whether a picture is bright."""
    found = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(0))
    label = torch.arange(32) % 2
    return TensorDataset(found + label.view(-1, 1, 1, 1), label), 2


def main(arguments: list[str] | None = None) -> lightning.Trainer:
    """The command line; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="folder with a folder of images per label")
    parser.add_argument("--fake", action="store_true", help="random images instead")
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--precision", default="32-true", help="Lightning's, for instance bf16-mixed")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of the checkpoints")
    args = parser.parse_args(arguments)
    if (args.path is None) != args.fake:
        parser.error("give a folder of images, or --fake")
    data, labels = fake(args.size) if args.fake else images(args.path, args.size)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        callbacks=[Fuse()],
        default_root_dir=args.out,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(args.model, labels, args.lr), DataLoader(data, args.batch, shuffle=True))
    trainer.save_checkpoint(args.out / "last.ckpt")
    return trainer


if __name__ == "__main__":
    main()
