"""Blocks whose forwards do more than compute: they set attributes, change what they keep, record gradients or not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from followed import Block, C
from torch import Tensor, nn


class StoresAMap(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.features = out
        return F.relu(out + x)


class StoresItsOutput(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        self.features = F.relu(self.body(x) + x)
        return self.features


class StoresSeveral(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        self.several = (out, [x, out.mean()], x.shape, "maps")
        self.copied = out.detach()
        out = self.bn2(self.conv2(out))
        return F.relu(out + x)


class StoresWhatIsOverwritten(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        self.features, self.seen = out, out.detach()
        out = F.relu(out, inplace=True)
        out = self.bn2(self.conv2(out))
        self.sum = out
        out += x
        return F.relu(out, inplace=True)


class StoresTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv1(x)
        first = self.features
        self.features = F.relu(self.bn1(first))
        return F.relu(self.bn2(self.conv2(self.features)) + x + first)


class Counts(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.body(x) + x)


class CountsOnATensor(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        out = self.body(x) * (1 + 0.1 * self.steps)
        self.calls = self.calls + 2
        return F.relu(out + x * 0.5**self.calls)


class Appends(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x.shape)
        return F.relu(self.body(x) + x)


class AppendsMaps(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        self.kept.append(out)
        self.fresh = [x]
        out = self.bn2(self.conv2(out))
        self.fresh.append(out)
        self.kept.extend([out.mean().item(), out])
        return F.relu(out + x)


class KeepsInADict(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.table["map"] = out
        self.table["sum"] = x.sum()
        return F.relu(out + x)


class ReadsADict(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * self.table["scale"] + x)


class UpdatesABuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(out.mean((0, 2, 3)), alpha=0.1)
        return F.relu(out + x)


class UpdatesABufferOutside(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.average.add_(1)
        return F.relu(self.body(x) + x - self.average.view(1, -1, 1, 1))


class ReplacesABuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * out.detach().mean((0, 2, 3))
        return F.relu(out + x - self.average[:, None, None])


class ReadsTheLastCall(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x) + self.last
        self.last = out.detach().mean()
        return F.relu(out + x)


class InOrder(Block):
    """Every effect reads what the one before has done."""

    def forward(self, x: Tensor) -> Tensor:
        self.average.add_(1)
        first = self.average.clone()
        out = F.relu(self.bn1(self.conv1(x)))
        self.average.mul_(2)
        self.kept.append(self.average.clone())
        out = self.bn2(self.conv2(out))
        self.average.sub_(first)
        self.kept.append(self.average + 0)
        return F.relu(out + x)


class WithoutGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class WithoutGradientInside(Block):
    """What is made with gradients recorded is read without, and then with them again."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        with torch.no_grad():
            self.features = out
            mean = out.mean((2, 3), keepdim=True)
            with torch.enable_grad():
                more = out * 2
            self.inside = out * 3
        return F.relu(self.bn2(self.conv2(out - mean)) + more)


class WithGradientInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Decorated(Block):
    @torch.no_grad()
    def frozen(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    @torch.enable_grad()
    def thawed(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.thawed(self.frozen(x)) + x)


class AsksForGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if torch.is_grad_enabled():
            out = out * 2
        return F.relu(out + x)


class AsksInside(Block):
    """The answer is known, however it is called."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        with torch.no_grad():
            scale = 1.0 if torch.is_grad_enabled() else 0.5
        return F.relu(out * scale + x)


class Inner(nn.Module):
    """Keeps what the block around it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.mean()
        return self.bn(self.conv(x))


class StoresInside(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        self.inner.calls = 3
        return F.relu(self.body(out) + x + self.inner.seen)


#: every kind
BESIDE: tuple[type[Block], ...] = (
    StoresAMap, StoresItsOutput, StoresSeveral, StoresWhatIsOverwritten, StoresTwice, Counts, CountsOnATensor, Appends, AppendsMaps,
    KeepsInADict, ReadsADict, UpdatesABuffer, UpdatesABufferOutside, ReplacesABuffer, ReadsTheLastCall, InOrder, WithoutGradient,
    WithoutGradientInside, WithGradientInTraining, Decorated, AsksForGradients, AsksInside, StoresInside,
)  # fmt: skip

_OF_EVERY_MODULE = frozenset({*nn.Module().__dict__, "_fusedres"})


def kept(model: nn.Module) -> dict[str, Any]:
    """What the modules of ``model`` keep as attributes of their own, by name."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name not in _OF_EVERY_MODULE and not isinstance(value, type(Block().config))
    }


def assert_same(found: Any, wanted: Any, what: str) -> None:
    """The same values, in tensors of the same shape, strides and need of gradients, in containers of the same types."""
    assert type(found) is type(wanted), what
    if isinstance(wanted, Tensor):
        # float64, summed in another order
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {m}")
        assert found.stride() == wanted.stride() and found.requires_grad == wanted.requires_grad, what
        assert found.is_leaf == wanted.is_leaf, what
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), what
        for key, value in wanted.items():
            assert_same(found[key], value, f"{what}[{key}]")
    elif isinstance(wanted, tuple | list):
        assert len(found) == len(wanted), what
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_same(a, b, f"{what}[{i}]")
    elif isinstance(wanted, float):
        assert abs(found - wanted) <= 1e-9 * abs(wanted) + 1e-11, what
    else:
        assert found == wanted, what
