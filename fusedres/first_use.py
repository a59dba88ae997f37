"""What the checks of kernels at their first use on a GPU share: whether they are on, and when a kernel is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from .accuracy import allowance, error

#: times the other's error and a rounding: what is no matter of roundings. A wrong kernel is off by orders of magnitude.
FACTOR = 8
#: of so many draws one has to be right: an activation whose sign a rounding decides makes any kernel look wrong, in few of them
DRAWS = 3


def is_on() -> bool:
    """Whether kernels are compared: not where ``FUSEDRES_SELF_CHECK=0`` says so."""
    return os.environ.get("FUSEDRES_SELF_CHECK", "1") != "0"


def are_right(mine: Iterable[Tensor], others: Iterable[Tensor], truths: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether results in ``dtype`` are about as near to the truth as those of somebody else."""
    allowed = allowance(dtype)
    return all(
        error(own, true)[0] <= FACTOR * (error(other, true)[0] + allowed)
        for own, other, true in zip(mine, others, truths, strict=True)
    )
