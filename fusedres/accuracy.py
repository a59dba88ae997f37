"""How right a number is: against float64, its error may be at most twice that of eager PyTorch in the same dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def error(value: Tensor, truth: Tensor, least: float = 0.0) -> tuple[float, float]:
    """The relative error in the 2-norm, and the largest error relative to the largest value, where norm and value count as ``least`` at
    least; infinite where value is not finite and truth is."""
    truth = truth.detach().double()
    difference = (value.detach().double() - truth).abs()
    if difference.numel() == 0:
        return 0.0, 0.0
    pairs = (difference.norm(), truth.norm()), (difference.max(), truth.abs().max())
    found = [mine.item() / (max(scale.item(), least) or 1.0) for mine, scale in pairs]
    norm, largest = (e if math.isfinite(e) else math.inf for e in found)
    return norm, largest


def allowance(dtype: torch.dtype) -> float:
    """What the rule allows on top of twice eager's error: one rounding of the dtype, for what eager gets right by luck (a single element, a
    sum of few terms). In float64 the truth is eager itself, so that the rule has nothing to compare with: 1e-11 there, some thousand
    roundings."""
    return 1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps


def holds(mine: float, eager: float, allowed: float) -> bool:
    """The rule, for an error, eager's own and what is ``allowed`` on top; what is not finite never passes."""
    return math.isfinite(mine) and mine <= 2 * eager + allowed
