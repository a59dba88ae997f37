"""Real images to train on: scikit-learn's handwritten digits, and CIFAR-10 from a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
#: what is done to a batch of training images, N x C x H x W, before it is learnt from
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
# of CIFAR-10's training images, by colour
CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class DataError(Exception):
    """Data that is not where it is said to be; the message says what to do."""


def shift_together(images: Tensor, generator: torch.Generator) -> Tensor:
    """All images of a batch moved by the same pixel, up to one each way; what comes in is -1."""
    height, width = images.shape[2:]
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1), value=-1.0)[:, :, down : down + height, right : right + width]


@dataclass(frozen=True)
class Crop:
    """Each image moved by up to so many ``pixels`` each way, ``fill`` coming in, and mirrored in one case of two where it ``mirrors``."""

    pixels: int
    fill: float
    mirrors: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The augmented batch."""
        count, _, height, width = images.shape
        down, right = torch.randint(2 * self.pixels + 1, (2, count, 1, 1), generator=generator)
        rows, columns = down + torch.arange(height).view(1, -1, 1), right + torch.arange(width)
        if self.mirrors:
            mirrored = torch.randint(2, (count, 1, 1), generator=generator).bool()
            columns = torch.where(mirrored, columns.flip(2), columns)
        padded = F.pad(images, (self.pixels,) * 4, value=self.fill)
        return padded[torch.arange(count).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Images:
    """Training and test images, float32 N x C x H x W, with their labels, and how the training images are augmented."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augment: Augmentation

    @property
    def channels(self) -> int:
        """Of an image: 1 or 3."""
        return self.train_images.shape[1]

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch in a random order, augmented; what does not fill a batch is left out."""
        order = torch.randperm(len(self.train_images), generator=generator)
        for at in range(0, len(order) - size + 1, size):
            chosen = order[at : at + size]
            yield self.augment(self.train_images[chosen], generator), self.train_labels[chosen]

    def first(self, training: int, test: int) -> Images:
        """The first ``training`` training and ``test`` test images, or as many as there are; both are in a random order."""
        return replace(
            self,
            train_images=self.train_images[:training],
            train_labels=self.train_labels[:training],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )


def digits(augment: Augmentation = shift_together, size: int = 8) -> Images:
    """The 1797 digits of scikit-learn, 8 x 8 pixels in -1 to 1, a quarter of them kept for the test; enlarged to ``size`` pixels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    if size != images.shape[2]:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    parts = train_test_split(images.numpy(), found.target, test_size=0.25, random_state=0, stratify=found.target)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Images("digits", train_images, train_labels, test_images, test_labels, augment)


def cifar10(folder: Path, download: bool = False) -> Images:
    """CIFAR-10 from ``folder``, in the form in which torchvision keeps it there; fetched into it where ``download`` says so.

    Training images are padded by four pixels, cropped and mirrored (He et al. 2015). Raises DataError where it is not there.
    """
    try:
        parts = [torchvision.datasets.CIFAR10(str(folder), train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(
            f"no CIFAR-10 in {folder}: torchvision keeps it as {folder / 'cifar-10-batches-py'}; name the folder that has it, or add "
            "--download to fetch it there"
        ) from error
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_DEVIATION))

    def tensors(part: torchvision.datasets.CIFAR10) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(numpy.ascontiguousarray(part.data)).permute(0, 3, 1, 2) / 255
        return (pixels - mean) / deviation, torch.tensor(part.targets)

    (train_images, train_labels), (test_images, test_labels) = map(tensors, parts)
    return Images("CIFAR-10", train_images, train_labels, test_images, test_labels, Crop(4, 0.0, mirrors=True))


def epochs_of(steps: int, images: Images, batch: int) -> int:
    """In how many epochs there are ``steps`` batches, at least."""
    return math.ceil(steps / (len(images.train_images) // batch))
