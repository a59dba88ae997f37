"""SyncBatchNorm: what processes exchange. Everything is C-sized, in a fixed order, the same bits in every process."""

from __future__ import annotations

from typing import cast
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

#: the groups that :func:`name_of` has been asked of, by their names
_named: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


def name_of(group: dist.ProcessGroup) -> str:
    """The name under which :func:`group_of` finds ``group``: that of all processes is nameless, since it may be left and joined again."""
    if group is dist.group.WORLD:
        return ""
    _named[group.group_name] = group
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The group of that name. Raises RuntimeError where it is no more."""
    group = cast("dist.ProcessGroup | None", dist.group.WORLD) if name == "" else _named.get(name)
    if group is None:
        raise RuntimeError(
            "fusedres: the processes with which a SyncBatchNorm shared its statistics are no group any more"
        )
    return group


def gather_stats(stats: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """``(stats, rows)`` of the maps of all processes of ``group`` together, each with its own number of ``rows``, some with none; the same
    bits in every process, because each merges the same numbers in the same order.

    Chan's formula, around the mean of the process with the most rows, so that large means cost no digits.
    """
    own = torch.cat([stats.flatten(), stats.new_full((1,), rows)])
    found = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(found.unbind()), own, group)
    rows_of = found[:, -1:]
    # the moments of no rows are NaN
    means, m2s = torch.where(rows_of > 0, found[:, :-1], 0.0).unflatten(1, stats.shape).unbind(1)
    total = rows_of.sum()
    about = means.index_select(0, rows_of.argmax(0))[0]
    mean = about + (rows_of * (means - about)).sum(0) / total
    return torch.stack([mean, (m2s + rows_of * (means - mean).square()).sum(0)]), total


def mean_sums(sums: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """``sums`` over the ``rows`` of all processes of ``group``, divided by the number of those rows, which is known on the device alone."""
    total = torch.cat([sums.flatten(), sums.new_full((1,), rows)])
    dist.all_reduce(total, group=group)
    return (total[:-1] / total[-1]).view_as(sums)
