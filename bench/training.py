"""The training loop of everything here that learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres

from .data import Images


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9. The learning rate falls as a cosine over the epochs or, where there are ``milestones``, to a tenth when such a
    share of the epochs is over. Until the training error is below ``warm_until`` it is a tenth of what it would be."""

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 1e-4
    nesterov: bool = True
    milestones: tuple[float, ...] = ()
    warm_until: float = 1.0

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, without warming up."""
        if self.milestones:
            return self.learning_rate * 0.1 ** sum(epoch >= round(self.epochs * at) for at in self.milestones)
        return self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


#: that of He et al. 2015 for CIFAR-10: 64 000 steps of 128 images; the warming up is what 110 layers need
HE_2015 = Recipe(164, 128, 0.1, 1e-4, False, (0.5, 0.75), warm_until=0.8)


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to; training figures are means over its steps, errors are shares of the images."""

    train_loss: float
    train_error: float
    test_loss: float
    test_error: float


def assert_fused(model: nn.Module) -> None:
    """Raise RuntimeError where there is no fused block in the model, or the last call of one was not fused."""
    rows = fusedres.report(model)
    if not (rows and all(row.fused for row in rows)):
        raise RuntimeError(f"the model did not run fused:\n{rows}")


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 1000) -> tuple[float, float]:
    """Loss and error of the model, in evaluation."""
    loss, wrong = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(images), batch):
            logits, wanted = model.eval()(images[at : at + batch]), labels[at : at + batch]
            loss += F.cross_entropy(logits, wanted, reduction="sum").item()
            wrong += int((logits.argmax(1) != wanted).sum())
    return loss / len(images), wrong / len(images)


def train(model: nn.Module, images: Images, recipe: Recipe, generator: torch.Generator, fused: bool) -> Iterator[Epoch]:
    """Train the model, an epoch for every step of the iterator. Raises RuntimeError where it is to run ``fused`` and a block did not."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.learning_rate,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    warming = recipe.warm_until < 1
    for epoch in range(recipe.epochs):
        losses, wrong, seen = [], 0, 0
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch) / (10 if warming else 1)
        model.train()
        for batch, labels in images.batches(recipe.batch, generator):
            optimizer.zero_grad()
            logits = model(batch)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            wrong, seen = wrong + int((logits.detach().argmax(1) != labels).sum()), seen + len(labels)
        warming = warming and wrong / seen > recipe.warm_until
        if fused:
            assert_fused(model)
        found = evaluate(model, images.test_images, images.test_labels)
        if fused:
            assert_fused(model)
        yield Epoch(sum(losses) / len(losses), wrong / seen, *found)
