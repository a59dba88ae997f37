"""Train a U-Net (Ronneberger et al. 2015) whose encoder is a ResNet of torchvision: encoder and decoder are converted as one model.

    python examples/segment.py PATH --model resnet34 --classes 21

PATH holds ``images`` and ``masks``, files of the same names; a mask's values are the classes of its pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

import fusedres

NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Up(nn.Module):
    """A stage of the decoder: twice the size, beside what the encoder had there, and two convolutions."""

    def __init__(self, channels: int, beside: int, out: int) -> None:
        super().__init__()

        def row(channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
            )

        self.rows = nn.Sequential(*row(channels + beside), *row(out))

    def forward(self, x: Tensor, beside: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0)
        return self.rows(x if beside is None else torch.cat([x, beside], 1))


class UNet(nn.Module):
    """Maps N x 3 x H x W to N x ``classes`` x H x W; H and W are multiples of 32."""

    def __init__(self, classes: int, model: str, weights: str | None) -> None:
        super().__init__()
        net = torchvision.models.get_model(model, weights=weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu)
        self.pool = net.maxpool
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        widths = [net.conv1.out_channels, *(self._width(stage) for stage in self.stages)]
        outs = (256, 128, 64, 32, 16)
        channels = (widths[-1], *outs[:-1])
        beside = (*widths[-2::-1], 0)
        self.ups = nn.ModuleList([Up(c, b, o) for c, b, o in zip(channels, beside, outs, strict=True)])
        self.head = nn.Conv2d(outs[-1], classes, 1)

    @staticmethod
    def _width(stage: nn.Module) -> int:
        return [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for i, stage in enumerate(self.stages):
            seen.append(stage(self.pool(seen[-1]) if i == 0 else seen[-1]))
        h = seen.pop()
        for up in self.ups:
            h = up(h, seen.pop() if seen else None)
        return self.head(h)


class Masked(Dataset):
    """Images with their masks."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, [size, size]
        self.names = sorted(file.name for file in (path / "images").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = VF.pil_to_tensor(Image.open(self.path / "images" / self.names[i]).convert("RGB"))
        mask = VF.pil_to_tensor(Image.open(self.path / "masks" / self.names[i]))
        image = NORMALIZE(VF.to_dtype(VF.resize(image, self.size), torch.float32, scale=True))
        return image, VF.resize(mask, self.size, v2.InterpolationMode.NEAREST)[0].long()


def fake(size: int) -> Dataset:
    """Noise whose classes are whether a pixel is bright."""
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, (images.mean(1) > 0).long())


def main(arguments: list[str] | None = None) -> list[float]:
    """The command line; returns the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="folder with images/ and masks/")
    parser.add_argument("--fake", action="store_true", help="random images instead")
    parser.add_argument("--model", default="resnet34", help="of torchvision")
    parser.add_argument("--weights", help="of torchvision, DEFAULT for its best (default: random)")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="file of the weights")
    args = parser.parse_args(arguments)
    if (args.path is None) != args.fake:
        parser.error("give a folder of images, or --fake")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = UNet(args.classes, args.model, args.weights).to(device, memory_format=torch.channels_last)
    fusedres.convert(model)  # <-- fusedres
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    data = fake(args.size) if args.fake else Masked(args.path, args.size)
    losses = []
    for epoch in range(args.epochs):
        found = []
        for images, masks in DataLoader(data, args.batch, shuffle=True):
            images = images.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), masks.to(device))
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
