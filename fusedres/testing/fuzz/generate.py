"""Random cases: common blocks, each with a few things about it that are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import changes, snippets, twins
from .actions import ACTIONS
from .description import (
    Act,
    Action,
    Block,
    Case,
    Conv,
    Dense,
    Effect,
    Gather,
    Join,
    Network,
    Norm,
    Residual,
    Row,
    Session,
    Step,
    Unit,
)

#: the orders of a main path's units, the common ones more often
_PATHS: tuple[tuple[str, ...], ...] = (
    ("cna", "cn"), ("cna", "cn"), ("cna", "cna", "cn"), ("cna", "cna", "cn"), ("cna", "cna"), ("nac", "nac"), ("nac", "nac", "nac"),
    ("can", "can"), ("cn", "cn"), ("cn",), ("cna",), ("nac",), ("ac", "ac"), ("nc", "nac", "n"), ("ncna", "cn"), ("can", "cn"),
    ("ca", "c"), ("cnac", "n"), ("cna", "cns"), ("cna", "cnd", "cn"), ("cnap", "cn"), ("pcna", "cn"), ("cna", "c"), ("a", "cna", "cn"),
    ("nac", "nac", "d"), ("cnai", "cni"), ("cnna", "cn"), ("cnaa", "cn"), ("ccna", "cn"), ("cnacn",), ("n", "cna", "cn"),
)  # fmt: skip
_LAYERS: tuple[tuple[str, ...], ...] = (
    ("nac", "nac"), ("nac", "nac"), ("nac",), ("nac", "nacd"), ("cna",), ("can",), ("nc",), ("nac", "cna"), ("nca", "nac"), ("c",),
)  # fmt: skip
_ROWS: tuple[tuple[str, ...], ...] = (
    ("cna",), ("cnap",), ("cna", "cna"), ("nac",), ("nacp",), ("nacp",), ("cn",), ("can",), ("cna", "cnap"), ("na",), ("pcna",),
    ("cna", "cna", "cna"), ("nap",), ("cnpa",), ("c",), ("dcna",),
)  # fmt: skip
_STEPS = ("train",) * 7 + ("no_grad", "inference", "penalty", "double")
_SERVED = ("no_grad", "no_grad", "inference")
_TRAINED = ("train",) * 5 + ("no_grad", "penalty", "double")
_ACTIVATIONS = tuple(snippets.ACTIVATIONS)
_FORMS = ("module", "module_", "function", "function_", "torch", "method", "method_")
#: what draws or branches by the sign of a value, which rounding decides in low precision
_BY_SIGN = ("Effect.kind=if_value", "Effect.kind=noise")


class Generator:
    """Draws cases; the same from the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.seed = seed

    def _maybe(self, probability: float) -> bool:
        return self._random.random() < probability

    def _pick(self, options: Sequence[Any]) -> Any:
        return self._random.choice(options)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def act(self, usual: str = "relu") -> Act:
        name = self._pick(_ACTIVATIONS) if self._maybe(0.25) else usual
        return Act(name, self._pick(_FORMS) if self._maybe(0.6) else "module")

    def conv(self) -> Conv:
        conv = Conv(self._pick((1, 3, 3, 3)))
        if self._maybe(0.2):
            conv = replace(conv, groups=self._pick((0, 2, 4)))
        if self._maybe(0.1):
            conv = replace(conv, dilation=2)
        if self._maybe(0.05):
            conv = replace(conv, kernel=5)
        if self._maybe(0.2):
            conv = replace(conv, bias=True)
        if self._maybe(0.03):
            conv = replace(conv, padding_mode=self._pick(("circular", "reflect", "replicate")))
        return conv

    def norm(self) -> Norm:
        norm = Norm()
        if self._maybe(0.15):
            norm = replace(norm, momentum=self._pick((None, None, 0.0, 1.0, 0.3)))
        if self._maybe(0.1):
            norm = replace(norm, eps=self._pick((1e-3, 0.1)))
        if self._maybe(0.06):
            norm = replace(norm, affine=False)
        if self._maybe(0.06):
            norm = replace(norm, track=False)
        if self._maybe(0.03):
            norm = replace(norm, kind=self._pick(("group", "instance")))
        return norm

    def unit(self, order: str, usual: str, home: str) -> Unit:
        unit = Unit(order, self.conv(), self.norm(), self.act(usual), home=home)
        if "p" in order:
            unit = replace(unit, pool=self._pick(("max", "avg", "lp")), pool_stride=self._pick((1, 2)))
        if self._maybe(0.08):
            unit = replace(unit, home=self._pick(("children", "sequential", "module")))
        if self._maybe(0.06) and "s" not in order and "p" not in order:
            unit = replace(unit, times=2)
        if "d" in order:
            unit = replace(unit, drop=self._pick((0.0, 0.3, 0.5)))
        return unit

    def units(self, orders: Sequence[str], usual: str) -> tuple[Unit, ...]:
        home = self._pick(("children", "children", "sequential", "module"))
        return tuple(self.unit(order, usual, home) for order in orders)

    def effects(self, probability: float, units: int) -> tuple[Effect, ...]:
        found = []
        while self._maybe(probability) and len(found) < 2:
            kinds = (*snippets.EFFECTS, *snippets.CONTEXTS, *snippets.METHODS)
            found.append(Effect(self._pick(kinds), self._random.randrange(units)))
        return tuple(found)

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def residual(self) -> Residual:
        usual = self._pick(("relu", "relu", "relu", "silu", "leaky_relu", "hardswish", "gelu"))
        main = self.units(self._pick(_PATHS), usual)
        if self._maybe(0.3):
            at = self._random.randrange(len(main))
            if "c" in main[at].order:
                strided = replace(main[at], conv=replace(main[at].conv, stride=2), times=1)
                main = (*main[:at], strided, *main[at + 1 :])
        ends_active = main[-1].order.endswith("a") or main[0].order.startswith("n")
        join = Join(after=None if ends_active or self._maybe(0.2) else self.act(usual))
        if self._maybe(0.3):
            join = replace(join, op=self._pick(tuple(snippets.JOINS)))
        else:
            join = replace(join, op=self._pick(("add", "add", "iadd", "torch")))
        if self._maybe(0.3):
            join = replace(join, flipped=True)
        if self._maybe(0.12):
            join = replace(join, main=self.act(usual))
        if self._maybe(0.08):
            join = replace(join, shortcut=self.act(usual))
        if self._maybe(0.08):
            join = replace(join, returns=self._pick(("pair", "shortcut", "before", "input")))
        prefix: tuple[Unit, ...] = ()
        if self._maybe(0.15):
            prefix = self.units((self._pick(("na", "n", "a", "cna")),), usual)
        shortcut = self._pick(("identity", "identity", "identity", "conv", "convbn", "convbn", "pool", "slice", "unit"))
        side = self.unit(self._pick(("cn", "cna", "nac", "c", "ac", "cnd")), usual, "children")
        return Residual(
            main,
            join,
            shortcut,
            side if shortcut == "unit" else Unit(),
            prefix,
            bool(prefix) and self._maybe(0.6),
            self.effects(0.2, len(main)),
            self._pick((8, 8, 4, 12, 5)),
            self._maybe(0.1),
            self._pick(snippets.STYLES) if self._maybe(0.25) else "",
        )

    def dense(self) -> Dense:
        usual = self._pick(("relu", "relu", "silu"))
        orders = self._pick(_LAYERS)
        layers = tuple(self.units(orders, usual) for _ in range(self._pick((1, 2, 3))))
        order = self._pick(("sequential",) * 4 + ("xy", "features", "loop", "yx"))
        return Dense(layers, order, self._pick((4, 4, 8, 3)), self.effects(0.1, len(orders)))

    def row(self) -> Row:
        usual = self._pick(("relu", "relu", "silu", "hardswish"))
        orders = self._pick(_ROWS)
        if orders == ("nacp",) and self._maybe(0.6):  # a transition
            norm, act = self.norm(), self.act(usual)
            return Row(
                (Unit("nacp", Conv(1), norm, act, "avg", 2),),
                act.form.startswith("module"),
                width=self._pick((8, 4, 6)),
            )
        return Row(self.units(orders, usual), self._maybe(0.6), self.effects(0.1, len(orders)), self._pick((8, 4, 12)))

    def gather(self) -> Gather:
        orders = self._pick((("cna",), ("cna", "cna"), ("cna", "cna", "cna"), ("cn", "cn"), ("nac",)))
        units = self.units(orders, "relu")
        last = self.unit(self._pick(("cna", "cn", "c")), "relu", "children")
        return Gather(units, last, self._maybe(0.7), self._maybe(0.4), self._maybe(0.4), self.effects(0.1, len(orders)))

    def network(self, blocks: int | None = None) -> Network:
        draws: tuple[Callable[[], Block], ...] = (
            self.residual, self.residual, self.residual, self.residual, self.dense, self.dense, self.row, self.row, self.gather,
        )  # fmt: skip
        made = tuple(self._pick(draws)() for _ in range(blocks or self._pick((1, 1, 2, 2, 3))))
        behind = tuple(self._pick(tuple(snippets.BEHIND)) if self._maybe(0.15) else "" for _ in made)
        return Network(
            made,
            behind if any(behind) else (),
            self._pick(("module", "sequential")),
            self._maybe(0.1),
            "linear" if self._maybe(0.2) else "",
            self._random.randrange(1, 1000) if self._maybe(0.3) else 0,
            self._maybe(0.4),
            self._pick((8, 8, 8, 4, 16, 6, 3)),
        )

    # ---- cases -------------------------------------------------------------------------------------------------------

    def steps(self) -> tuple[Step, ...]:
        found = []
        # a model that serves, or trains on, is called so often that blocks in a row are asked once for all
        serves = self._maybe(0.2)
        goes_on = serves or self._maybe(0.25)
        kinds = _SERVED if serves else _TRAINED if goes_on else _STEPS
        for number in range(self._pick((4, 5, 6) if goes_on else (1, 2, 2, 3))):
            kind = self._pick(kinds)
            training = not serves and (goes_on or not self._maybe(0.25)) and kind != "inference"
            changed = number > 0 and self._maybe(0.4 if goes_on else 0.6) or number == 0 and self._maybe(0.1)
            change = self._pick(tuple(changes.CHANGES)) if changed else ""
            found.append(Step(kind, training, change, self._random.randrange(64) if changed else 0))
        return tuple(found)

    def case(self) -> Case:
        """A random case."""
        return self._case(self.network(), self.steps())

    def session(self) -> Session:
        """A random session."""
        network = self.network(self._pick((1, 2)))
        found = [Action("convert")] if self._maybe(0.85) else [Action("train")]
        for _ in range(self._pick((3, 5, 8))):
            found.append(Action(self._pick(tuple(ACTIONS)), self._random.randrange(64)))
            if self._maybe(0.7):
                found.append(Action(self._pick(("train", "train", "train", "eval", "no_grad"))))
        return Session(self._case(network, (Step(),)), (*found, Action()))

    def _case(self, network: Network, steps: tuple[Step, ...]) -> Case:
        dtype = self._pick(("float64",) * 12 + ("float32", "float32", "bfloat16"))
        if any(feature in _BY_SIGN for feature in network.features()):
            dtype = "float64"
        return Case(
            network,
            steps,
            self._pick(("nchw", "nchw", "channels_last", self._pick(twins.LAYOUTS))),
            dtype,
            self._pick((2, 2, 3)),
            self._pick((5, 6, 8)),
            self._maybe(0.8),
            "channels_last" if self._maybe(0.2) else "nchw",
            self._maybe(0.1),
            self._maybe(0.2),
            self._maybe(0.15),
            self.seed,
        )
