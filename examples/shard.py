"""Train a ResNet of torchvision that FSDP2 shards over processes: each holds a part of every parameter, gradient and optimizer state.

    torchrun --nproc-per-node 8 examples/shard.py PATH --model resnet152 --epochs 90

PATH holds a folder of images per label. Every stage is sharded as a whole, so that a process holds one stage's parameters at a time. On
CPU it runs too, over gloo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fusedres

NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def shard(model: nn.Module, device: str) -> None:
    """Shard ``model`` over all processes, stage by stage; what is left, stem and classifier, together."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4, model):
        fully_shard(stage, mesh=mesh)


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


def mean(loss: Tensor) -> float:
    """The mean of a number over processes."""
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="folder with a folder of images per label")
    parser.add_argument("--fake", action="store_true", help="random images instead")
    parser.add_argument("--model", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="file of the weights, of all processes together")
    args = parser.parse_args(arguments)
    if (args.path is None) != args.fake:
        parser.error("give a folder of images, or --fake")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    data, labels = fake(args.size) if args.fake else images(args.path, args.size)
    torch.manual_seed(0)  # the same first numbers everywhere
    # FSDP2 takes no weights in channels_last; the maps, below, are what has to be
    model = torchvision.models.get_model(args.model, num_classes=labels).to(device)
    fusedres.convert(model)  # <-- fusedres
    shard(model, device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    sampler = DistributedSampler(data)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        found = []
        for x, y in DataLoader(data, args.batch, sampler=sampler):
            x = x.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), y.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        loss = mean(torch.stack(found).mean())
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss:.3f}")
    # every process has a part in it; the first one gets it all
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print(fusedres.report(model))
        if args.out is not None:
            torch.save(weights, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
