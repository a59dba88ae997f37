"""Train a torchvision model on a folder of images: autocast, EMA, several processes with SyncBatchNorm, checkpoints and resuming.

    python examples/classify.py PATH --model resnet50 --epochs 90 --out run
    torchrun --nproc-per-node 8 examples/classify.py PATH --model resnet50 --epochs 90 --out run

PATH holds ``train`` and ``val``, each with a folder of images per class. Started again with the same ``--out`` it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import v2

import fusedres

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dataset(args: argparse.Namespace, train: bool) -> Dataset:
    """Training or validation images as normalised tensors."""
    spatial = [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip()] if train else [v2.CenterCrop(args.size)]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
    if args.path is None:
        return datasets.FakeData(64, (3, args.size, args.size), num_classes=4, transform=v2.Compose(to_tensor))
    return datasets.ImageFolder(args.path / ("train" if train else "val"), v2.Compose([*spatial, *to_tensor]))


def loader(data: Dataset, args: argparse.Namespace, train: bool) -> DataLoader:
    """Batches of this process's share."""
    sampler = DistributedSampler(data, shuffle=train) if dist.is_initialized() else None
    shuffle = train and sampler is None
    return DataLoader(
        data,
        args.batch,
        shuffle,
        sampler,
        num_workers=args.workers,
        drop_last=train,
        pin_memory=args.device.type == "cuda",
    )


def accuracy(model: nn.Module, batches: DataLoader, args: argparse.Namespace) -> float:
    """Of all processes' validation images, the share that is classified right."""
    model.eval()
    counted = torch.zeros(2, device=args.device)
    with torch.inference_mode():
        for images, labels in batches:
            images = images.to(args.device, memory_format=torch.channels_last)
            right = model(images).argmax(1).cpu() == labels
            counted += torch.tensor([right.sum(), len(labels)], device=args.device)
    if dist.is_initialized():
        dist.all_reduce(counted)
    return float(counted[0] / counted[1])


def train_epoch(
    model: nn.Module,
    ema: AveragedModel,
    batches: DataLoader,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
) -> float:
    """One epoch; returns the mean loss of this process."""
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    losses: list[Tensor] = []
    for images, labels in batches:
        images = images.to(args.device, memory_format=torch.channels_last, non_blocking=True)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            loss = criterion(model(images), labels.to(args.device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def main(arguments: list[str] | None = None) -> float:
    """The command line; returns the accuracy of the averaged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="folder with train/ and val/")
    parser.add_argument("--fake", action="store_true", help="random images instead")
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--amp", action="store_true", help="bfloat16 by autocast")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of the checkpoint")
    args = parser.parse_args(arguments)
    if (args.path is None) != args.fake:
        parser.error("give a folder of images, or --fake")

    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    first = not dist.is_initialized() or dist.get_rank() == 0
    train_data, val_data = dataset(args, True), dataset(args, False)
    batches, val_batches = loader(train_data, args, True), loader(val_data, args, False)

    model = torchvision.models.get_model(args.model, num_classes=4 if args.fake else len(train_data.classes))
    model = model.to(args.device, memory_format=torch.channels_last)
    if dist.is_initialized() and cuda:  # which DistributedDataParallel takes on GPUs alone
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fusedres.convert(model)  # <-- fusedres
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model

    checkpoint, begin = args.out / "checkpoint.pt", 0
    kept = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        begin = saved["epoch"]
        for name, thing in kept.items():
            thing.load_state_dict(saved[name])
    for epoch in range(begin, args.epochs):
        if isinstance(batches.sampler, DistributedSampler):
            batches.sampler.set_epoch(epoch)
        loss = train_epoch(wrapped, ema, batches, optimizer, args)
        schedule.step()
        found = accuracy(ema, val_batches, args)
        if first:
            print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy of the average {found:.3f}")
            args.out.mkdir(parents=True, exist_ok=True)
            torch.save({"epoch": epoch + 1} | {name: thing.state_dict() for name, thing in kept.items()}, checkpoint)
    if first:
        print(fusedres.report(model))
    found = accuracy(ema, val_batches, args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
