"""The beginning and the end of whole networks, around blocks that are converted one by one."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Unsupported
from ..recognition import Part, check_family, head_part, last_norm, norm_part, stem_part
from ..swap import original_class, state_of
from .base import Kind, Original, behind_convolutions, note, run_part
from .handover import Handover, is_direct
from .plan import Planner
from .residual import SinglePart
from .sequential import SEQUENTIAL, in_a_row, pass_on
from .state import BlockState
from .stretch import Steps, as_one, through


class StemKind(Kind):
    """A torchvision ResNet: its conv1-bn1-relu-maxpool run fused, then its layers."""

    key, title = "stem", "resnet stem"
    casts = True

    @staticmethod
    def stem(block: Any) -> list[nn.Module]:
        """What runs as one, as far as it is there."""
        found = map(block._modules.get, ("conv1", "bn1", "relu", "maxpool"))
        return [module for module in found if module is not None]

    def read(self, block: Any, state: BlockState) -> Part:
        check_family(block, self.key)
        stem = self.stem(block)
        if len(stem) < 4:
            raise Unsupported("a module of its stem is missing")
        return stem_part(stem)

    def parts(self, found: Part) -> list[Part]:
        return [found]

    def inside(self, block: Any, state: BlockState) -> list[nn.Module]:
        return [block, *self.stem(block)]

    def run(
        self, block: Any, state: BlockState, found: Part, original: Original, given: Handover, place: Tensor | None
    ) -> Handover:
        layers = [block.layer1, block.layer2, block.layer3, block.layer4, block.avgpool]

        def calls(at: int, plain: bool) -> list[nn.Module] | None:
            return [] if at == 0 else through(layers[at - 1 : at], plain)

        def run(start: int, stop: int, given: Handover) -> Handover:
            if start == 0:
                one_by_one = functools.partial(in_a_row, children=self.stem(block))
                ran = run_part(self, block, state, found, one_by_one, given)
                note(state, [ran])
                given, start = ran.y, 1
            return pass_on(given, layers[start - 1 : stop - 1])

        pooled = as_one(block, state, given, Steps(1 + len(layers), calls, run))
        return Handover(block.fc(torch.flatten(pooled.leave(), 1)))

    def tell(self, block: Any, state: BlockState, found: Part, planner: Planner) -> Any:
        x = planner.fused(found, 0, None, behind_convolutions, planner.in_a_row(self.stem(block)))
        for layer in (block.layer1, block.layer2, block.layer3, block.layer4, block.avgpool):
            x = planner.child(layer, x)
        return ("slot", planner.call(block.fc, ("slot", planner.call(torch.flatten, ("slot", x), ("constant", 1)))))


@dataclass(frozen=True)
class _Head:
    """The last BatchNorm of a network's features, and it with ReLU and the mean over a size, by that size: the last one used."""

    norm: nn.Module
    parts: dict[tuple[int, ...], Part] = field(default_factory=dict)

    def part(self, size: tuple[int, ...]) -> Part:
        """The head for maps of ``size``."""
        if size not in self.parts:
            self.parts.clear()
            self.parts[size] = head_part(self.norm, size)
        return self.parts[size]


class HeadKind(Kind):
    """A torchvision DenseNet: its last norm-relu-mean run as one, behind its features."""

    key, title = "head", "densenet head"

    def read(self, block: Any, state: BlockState) -> _Head:
        check_family(block, self.key)
        features = block._modules.get("features")
        if features is None or original_class(features).forward is not nn.Sequential.forward or not len(features):
            raise Unsupported(f"its features are a {type(features).__name__}, not a Sequential")
        return _Head(last_norm(features))

    def parts(self, found: _Head) -> list[Part]:
        return list(found.parts.values()) or [found.part((1, 1))]

    def inside(self, block: Any, state: BlockState) -> list[nn.Module]:
        features = block._modules.get("features")
        if features is None:
            return [block]
        is_row = isinstance(features, nn.Sequential) and len(features) > 0
        return [block, features, features[-1]] if is_row else [block, features]

    def run(
        self, block: Any, state: BlockState, found: _Head, original: Original, given: Handover, place: Tensor | None
    ) -> Handover:
        features, norm = block.features, found.norm
        inner = state_of(features) if is_direct(features) else None
        row = inner if inner is not None and inner.kind is SEQUENTIAL else None

        def calls(at: int, plain: bool) -> list[nn.Module] | None:
            if row is None:
                return through(list(features)[:-1], plain)
            return SEQUENTIAL.calls_but_last(features, row, plain)

        def end(x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(F.relu(norm(x), inplace=True), (1, 1))

        def run(start: int, stop: int, given: Handover) -> Handover:
            if row is None:
                given = pass_on(given, list(features)[:-1])
            else:
                given = SEQUENTIAL.run_but_last(features, row, given)
            ran = run_part(self, block, state, found.part(tuple(given.x.shape[2:])), end, given)
            note(state, [ran])
            return ran.y

        pooled = as_one(block, state, given, Steps(1, calls, run))
        return Handover(block.classifier(torch.flatten(pooled.leave(), 1)))

    def tell(self, block: Any, state: BlockState, found: _Head, planner: Planner) -> Any:
        features, x = block.features, 0
        *before, last = list(features)
        inner = state_of(features) if planner.is_direct(features) else None
        if inner is not None and inner.kind is SEQUENTIAL:
            x = SEQUENTIAL.tell_but_last(features, inner, planner)
        else:
            for child in before:
                x = planner.child(child, x)
        end = planner.in_a_row(
            (
                last,
                functools.partial(F.relu, inplace=True),
                functools.partial(F.adaptive_avg_pool2d, output_size=(1, 1)),
            )
        )
        x = planner.fused(head_part(found.norm, ()), x, None, behind_convolutions, end)
        flat = planner.call(torch.flatten, ("slot", x), ("constant", 1))
        return ("slot", planner.call(block.classifier, ("slot", flat)))


class SyncNormKind(SinglePart):
    """A SyncBatchNorm that no block runs: by the autograd block, too, on every device, as its neighbours in other processes may do in
    theirs."""

    key, title = "sync_norm", "sync batch norm"

    def read(self, block: Any, state: BlockState) -> Part:
        return norm_part(block)

    def cast(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return x  # autocast leaves a BatchNorm its input's dtype
