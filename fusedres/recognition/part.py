"""A piece of a block as it runs: its description, read as often as it changes, and checked as often as its input does."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import Unsupported
from ..specs import BlockSpec, instances

_measures = operator.attrgetter("dtype", "device", "shape")

#: gives ``(a description, its BatchNorms)``, with convolution weights cast to a dtype or as they are
Read = Callable[[torch.dtype | None], tuple[BlockSpec, Sequence[nn.Module]]]


class Part:
    """A piece of a block that runs as one description, which ``read`` gives or raises Unsupported."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._known: tuple[BlockSpec, dict[Tensor, int], list[Tensor]] | str | None = None
        self._passed: list[Any] | None = None

    def describe(self, dtype: torch.dtype | None) -> tuple[BlockSpec, dict[Tensor, int]]:
        """``(description, counters of the BatchNorms that are about to use a batch, with how often)``; raises Unsupported. ``dtype`` casts
        convolution weights, as autocast does."""
        known = self._known if dtype is None else None
        if isinstance(known, str):
            raise Unsupported(known)
        if known is None:
            try:
                spec, modules = self._read(dtype)
            except Unsupported as reason:
                self._known = self._known or str(reason)
                raise
            norms = [norm for norm in modules if isinstance(norm, _BatchNorm)]  # a frozen one has no state
            known = spec, _counters(norms), list(instances(spec, Tensor))
            # a cast weight is another one in each step, and so is the momentum of a cumulative average; process groups come and go
            if dtype is None and not any(n.momentum is None or isinstance(n, nn.SyncBatchNorm) for n in norms):
                self._known = known
        return known[:2]

    @property
    def lasting(self) -> BlockSpec | None:
        """What :meth:`describe` gives as long as nothing of the piece changes; None where each call has one of its own."""
        known = self._known
        return known[0] if isinstance(known, tuple) else None

    def check(self, spec: BlockSpec, *maps: Tensor) -> None:
        """``spec.check(*maps)``, unless it has passed for maps and tensors like these."""
        known, measures = self._known, None
        if isinstance(known, tuple) and known[0] is spec and {Tensor}.issuperset(map(type, maps)):
            measures = [*map(_measures, maps), *map(_measures, known[2])]
            if measures == self._passed:
                return
        spec.check(*maps)
        self._passed = measures


def _counters(norms: Iterable[_BatchNorm]) -> dict[Tensor, int]:
    return Counter(
        norm.num_batches_tracked
        for norm in norms
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    )
