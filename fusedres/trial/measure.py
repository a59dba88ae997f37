"""A model beside its converted self: whether both compute the same, how fast they are, and in how much memory."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import Report, convert, report, verify
from ..verify import Verification, named_tensors
from . import memory
from .models import TrialError, first_line
from .timing import Step, in_turns, seconds_per_call

#: seconds of one contender's turn, at least: shorter ones measure the clock
_TURN = 0.1
_ROUNDS = range(5, 31)
#: images on which parity is measured: in float64 as well, and gradients of one image say as much as those of many
_PARITY_BATCH = 2


@dataclass(frozen=True)
class Setting:
    """How a model is tried: on ``batch`` images of ``channels`` x ``size`` in ``dtype`` (``amp``: by autocast, with float32 weights), in
    ``modes``. ``seconds``: what the timing of a mode may take, warming up excluded. ``compile``: whether torch.compile contends."""

    batch: int
    channels: int
    size: tuple[int, ...]
    modes: tuple[str, ...] = ("train", "infer")
    dtype: torch.dtype = torch.float32
    amp: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    channels_last: bool = True
    compile: bool = False
    seconds: float = 20.0

    def place(self, value: Any) -> Any:
        """A model or images where and as they are computed."""
        memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}.get(len(self.size))
        dtype = torch.float32 if self.amp else self.dtype
        if self.channels_last and memory_format is not None:
            return value.to(self.device, dtype, memory_format=memory_format)
        return value.to(self.device, dtype)

    def images(self, batch: int, seed: int = 0) -> Tensor:
        """So many images of noise."""
        generator = torch.Generator().manual_seed(seed)
        return self.place(torch.randn(batch, self.channels, *self.size, generator=generator))

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast where it was asked for."""
        return torch.autocast(self.device.type, self.dtype) if self.amp else nullcontext()


@dataclass
class Row:
    """One contender in one mode: images per second, the median of the ratios to eager round by round with their range, and the bytes kept
    for backward and at the peak of a step; ``failure`` where it did not run."""

    mode: str
    contender: str
    images_per_s: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass
class Trial:
    """Everything that was found out about a model. ``parity`` by mode; ``batch`` as it was measured, after halving."""

    setting: Setting
    convert_s: float
    report: Report
    parity: dict[str, Verification]
    rows: list[Row]

    @property
    def holds(self) -> bool:
        """Whether the converted model is as right as eager wherever it was compared."""
        return all(verification.holds for verification in self.parity.values())

    def as_json(self) -> dict[str, Any]:
        """The same of JSON types."""
        s = self.setting
        return {
            "setting": asdict(s) | {"dtype": str(s.dtype).removeprefix("torch."), "device": str(s.device)},
            "convert_s": self.convert_s,
            "blocks": [asdict(row) for row in self.report],
            "parity": {mode: [d._asdict() for d in found] for mode, found in self.parity.items()},
            "holds": self.holds,
            "rows": [asdict(row) for row in self.rows],
        }


def run(model: nn.Module, setting: Setting, say: Callable[[str], None]) -> Trial:
    """Try ``model``, of which copies are used; ``say`` hears what is going on. Raises TrialError where the model itself does not run."""
    model = copy.deepcopy(model)
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):  # memory formats are those of weights that are there
        with torch.no_grad():
            model(torch.randn(setting.batch, setting.channels, *setting.size))
    model = setting.place(model)
    setting = _that_fits(model, setting, say)
    say("converting, with a proof of every structure")
    start = time.perf_counter()
    fused = convert(copy.deepcopy(model))
    convert_s = time.perf_counter() - start
    parity = {}
    for mode in setting.modes:
        say(f"{mode}: comparing with eager, both against float64")
        parity[mode] = verify(fused.train(mode == "train"), setting.images(_PARITY_BATCH))
    while True:
        try:
            rows = [row for mode in setting.modes for row in _measured(model, mode, setting, say)]
            break
        except _OutOfMemory:
            setting = _halved(setting, say)
    _step(fused, setting.images(setting.batch), setting.modes[0], setting)()
    return Trial(setting, convert_s, report(fused), parity, rows)


class _OutOfMemory(Exception):
    """A step did not find the memory it wanted."""


def _halved(setting: Setting, say: Callable[[str], None]) -> Setting:
    if setting.batch == 1:
        raise TrialError("out of memory with a single image: give a smaller --size")
    say(f"out of memory with {setting.batch} images: going on with {setting.batch // 2}")
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return replace(setting, batch=setting.batch // 2)


def _is_out_of_memory(error: Exception) -> bool:
    # on CPU torch has no class for it
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _that_fits(model: nn.Module, setting: Setting, say: Callable[[str], None]) -> Setting:
    """``setting`` with a batch for which ``model`` runs as it is. Raises TrialError where it does not run at all."""
    while True:
        try:
            for mode in setting.modes:
                _step(model.train(mode == "train"), setting.images(setting.batch), mode, setting)()
            model.zero_grad(set_to_none=True)
            return setting
        except TrialError:
            raise
        except Exception as error:
            if not _is_out_of_memory(error):
                shape = " x ".join(map(str, (setting.batch, setting.channels, *setting.size)))
                raise TrialError(
                    f"the model itself fails on images of {shape}, before anything is converted: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        setting = _halved(setting, say)


def _step(model: nn.Module, images: Tensor, mode: str, setting: Setting) -> Callable[[], None]:
    """A training step without optimizer (forward, a loss of the outputs' means, backward), or an inference."""

    def train() -> None:
        model.zero_grad(set_to_none=True)
        _loss(model, images, setting).backward()

    def infer() -> None:
        with torch.no_grad(), setting.autocast():
            model(images)

    return train if mode == "train" else infer


def _loss(model: nn.Module, images: Tensor, setting: Setting) -> Tensor:
    with setting.autocast():
        found = [y.float().mean() for _, y in named_tensors(model(images), "output") if y.requires_grad]
    if not found:
        raise TrialError("the model's output holds no tensor that can be differentiated: try it with --infer")
    return torch.stack(found).sum()


def _contenders(mode: str, setting: Setting) -> Iterator[tuple[str, Callable[[nn.Module], nn.Module]]]:
    yield "eager", lambda model: model
    yield "fused", convert
    if mode == "train":
        yield "fused, recompute", lambda model: convert(model, recompute=True)
    if setting.compile:
        yield "torch.compile", lambda model: torch.compile(model)  # type: ignore[return-value]


def _measured(model: nn.Module, mode: str, setting: Setting, say: Callable[[str], None]) -> list[Row]:
    """The rows of one mode. Raises _OutOfMemory."""
    images, rows, steps, models = setting.images(setting.batch), [], [], []
    for name, build in _contenders(mode, setting):
        say(f"{mode}: warming up {name}")
        rows.append(Row(mode, name))
        try:
            models.append(build(copy.deepcopy(model).train(mode == "train")))
            call = _step(models[-1], images, mode, setting)
            call()
            steps.append(Step(call, math.ceil(_TURN / seconds_per_call(call, 1, setting.device))))
        except Exception as error:
            if _is_out_of_memory(error):
                raise _OutOfMemory from error
            if name in ("eager", "fused"):
                raise
            rows[-1].failure = f"{type(error).__name__}: {first_line(error)}"  # a compiler may fail in any way
    ran = [row for row in rows if row.failure is None]
    turn = sum(seconds_per_call(step.call, step.calls, setting.device) * step.calls for step in steps)
    rounds = min(max(int(setting.seconds / turn), _ROUNDS.start), _ROUNDS.stop - 1)
    in_turns(steps, rounds, setting.device, lambda i: say(f"{mode}: round {i + 1} of {rounds}"))
    for row, step, contender in zip(ran, steps, models, strict=True):
        say(f"{mode}: memory of {row.contender}")
        ratios = [theirs / mine for theirs, mine in zip(steps[0].seconds, step.seconds, strict=True)]
        row.images_per_s = setting.batch / statistics.median(step.seconds)
        row.ratio, row.ratio_range = statistics.median(ratios), (min(ratios), max(ratios))
        if mode == "train":
            contender.zero_grad(set_to_none=True)
            with memory.count_kept(contender, setting.batch) as kept:
                loss = _loss(contender, images, setting)
                row.kept_bytes = kept()
            del loss
        row.peak_bytes = memory.peak_bytes(step.call, setting.device)
    return rows
