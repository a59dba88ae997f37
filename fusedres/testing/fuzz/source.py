"""From a description to the Python that a user would have written."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from .description import Act, Block, Conv, Dense, Effect, Gather, Join, Network, Norm, Residual, Row, Unit
from .snippets import ACTIVATIONS, BEHIND, CONTEXTS, EFFECTS, HEADER, JOINS, METHODS, NAMES, NAMES_BY_LETTER, SYMMETRIC


@dataclass
class _Class:
    """A class in the making."""

    name: str
    names: Iterator[str] | None
    base: str = "nn.Module"
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    argument: str = "x"
    signature: str = ""
    returns: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def name_for(self, letter: str) -> str:
        if self.names is not None:
            return next(self.names)
        number = self.counts[letter] = self.counts.get(letter, 0) + 1
        return f"{NAMES_BY_LETTER[letter]}{number}"

    def child(self, letter: str, expression: str) -> str:
        """Give the class a child; how forward reads it."""
        name = self.name_for(letter)
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def text(self) -> str:
        lines = [f"class {self.name}({self.base}):", *(f"    {line}" for line in self.attributes)]
        lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in self.init)]
        signature = self.signature or f"self, {self.argument}"
        lines += ["", f"    def forward({signature}){self.returns}:", *(f"        {line}" for line in self.body)]
        return "\n".join([*lines, *self.methods, ""])


class Writer:
    """Writes the classes of one network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.classes: list[str] = []
        self._random = random.Random(network.names)
        self._number = itertools.count(1)

    # ---- names -------------------------------------------------------------------------------------------------------

    def _class(self, kind: str, base: str = "nn.Module") -> _Class:
        names = None
        argument = "x"
        if self.network.names:
            pool = list(NAMES)
            self._random.shuffle(pool)
            names = iter([*pool, *(f"name{i}" for i in range(200))])
            argument = self._random.choice(["x", "input", "inputs", "features", "hidden"])
        return _Class(f"{kind}{next(self._number)}", names, base, argument=argument)

    def _done(self, made: _Class) -> str:
        self.classes.append(made.text())
        return f"{made.name}()"

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _act(self, made: _Class, act: Act, x: str) -> str:
        """The expression of an activation of ``x``."""
        module, function, of_torch, method = ACTIVATIONS[act.name]
        inplace = "inplace=True" if act.form.endswith("_") else "inplace=False"
        if act.form.startswith("function") and function:
            return function.format(x, inplace)
        if act.form == "torch" and of_torch:
            return f"{of_torch}({x})"
        if act.form.startswith("method") and method:
            return f"{x}.{method}{'_' if act.form.endswith('_') else ''}()"
        return f"{made.child('a', module.format(inplace))}({x})"

    def _conv(self, conv: Conv, into: int, out: int) -> str:
        groups = {0: into, 1: 1}.get(conv.groups, conv.groups)
        if conv.groups == 0:
            out = into
        if into % groups or out % groups:
            groups = 1
        pad = conv.dilation * (conv.kernel - 1) // 2
        mode = conv.padding_mode if pad else "zeros"
        return (
            f"nn.Conv2d({into}, {out}, {conv.kernel}, stride={conv.stride}, padding={pad}, dilation={conv.dilation}, "
            f"groups={groups}, bias={conv.bias}, padding_mode={mode!r})"
        )

    def _norm(self, norm: Norm, channels: int) -> str:
        if norm.kind == "group":
            return f"nn.GroupNorm({2 if channels % 2 == 0 else 1}, {channels}, eps={norm.eps}, affine={norm.affine})"
        given = f"{channels}, eps={norm.eps}, momentum={norm.momentum}, affine={norm.affine}, track_running_stats={norm.track}"
        return f"nn.{'InstanceNorm2d' if norm.kind == 'instance' else 'BatchNorm2d'}({given})"

    def _pool(self, unit: Unit) -> str:
        size = 3 if unit.pool_stride == 1 else 2
        pad = (size - 1) // 2
        ceil = unit.ceil and unit.pool_stride > 1
        if unit.pool == "lp":
            return f"nn.LPPool2d(2, 1, {unit.pool_stride})"
        name = "MaxPool2d" if unit.pool == "max" else "AvgPool2d"
        return f"nn.{name}({size}, {unit.pool_stride}, {pad}, ceil_mode={ceil})"

    def _modules(self, unit: Unit, into: int, out: int) -> tuple[list[tuple[str, str]], int]:
        """``(letter, the expression that makes its module)`` for every step, and the channels behind them."""
        made = []
        for letter in unit.order:
            if letter == "c":
                conv = unit.conv
                made.append((letter, self._conv(conv, into, out)))
                into = into if conv.groups == 0 else out
            elif letter == "n":
                made.append((letter, self._norm(unit.norm, into)))
            elif letter == "a":
                inplace = f"inplace={unit.act.form.endswith('_')}"
                made.append((letter, ACTIVATIONS[unit.act.name][0].format(inplace)))
            elif letter == "d":
                made.append((letter, f"nn.Dropout({unit.drop})"))
            elif letter == "p":
                made.append((letter, self._pool(unit)))
            elif letter == "s":
                gate = f"nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d({into}, {into}, 1), nn.Sigmoid())"
                made.append((letter, gate))
            else:
                made.append((letter, "nn.Identity()"))
        return made, into

    def _rows(self, made: _Class, unit: Unit, x: str, into: int, out: int) -> tuple[list[str], int]:
        """The statements of a unit that read and assign ``x``, and its channels."""
        modules, channels = self._modules(unit, into, out)
        plain = unit.act.form.startswith("module") or "a" not in unit.order
        if unit.home == "sequential" and plain and "s" not in unit.order:
            child = made.child("u", f"nn.Sequential({', '.join(module for _, module in modules)})")
            return [f"{x} = {child}({x})"] * unit.times, channels
        lines, value = [], x
        for letter, module in modules:
            if letter == "s" or not self.network.expressions:
                lines += [] if value == x else [f"{x} = {value}"]
                value = x
            if letter == "a" and not plain:
                value = self._act(made, unit.act, value)
            else:
                called = f"{made.child(letter, module)}({value})"
                value = f"{x} * {called}" if letter == "s" else called
        lines += [] if value == x else [f"{x} = {value}"]
        return lines * unit.times, channels

    def unit(self, made: _Class, unit: Unit, x: str, into: int, out: int) -> tuple[list[str], int]:
        """The same, with the unit in the home that it asks for."""
        if unit.home != "module":
            return self._rows(made, unit, x, into, out)
        own = self._class("Unit")
        rows, channels = self._rows(own, Unit(**{**unit.__dict__, "times": 1, "home": "children"}), "y", into, out)
        own.body = [f"y = {own.argument}", *rows, "return y"]
        child = made.child("u", self._done(own))
        return [f"{x} = {child}({x})"] * unit.times, channels

    def _path(
        self,
        made: _Class,
        units: tuple[Unit, ...],
        effects: tuple[Effect, ...],
        y: str,
        into: int,
        width: int,
        out: int,
    ) -> int:
        """Write a row of units that reads and assigns ``y``, with effects; its channels."""
        convs = [i for i, unit in enumerate(units) if "c" in unit.order]
        for i, unit in enumerate(units):
            target = out if convs and i == convs[-1] else width
            if unit.times > 1:
                target = into
            lines, into = self.unit(made, unit, y, into, target)
            around = [e.kind for e in effects if e.at == i]
            for kind in around:
                if kind in CONTEXTS:
                    lines = [CONTEXTS[kind], *(f"    {line}" for line in lines)]
                elif kind in METHODS:
                    decorator, call = METHODS[kind]
                    name = f"_part{len(made.methods)}"
                    made.methods += ["", f"    {decorator}"] if decorator else [""]
                    made.methods += [
                        f"    def {name}(self, {y}):",
                        *(f"        {line}" for line in lines),
                        f"        return {y}",
                    ]
                    lines = [f"{y} = {call.format(name=name, y=y)}"]
            made.body += lines
            for kind in around:
                if kind in EFFECTS:
                    self._effect(made, kind, y)
        return into

    def _effect(self, made: _Class, kind: str, y: str) -> None:
        init, after = EFFECTS[kind]
        if kind == "class" and not made.attributes:
            made.attributes.append("weighting = 0.5")
        made.init += [line.format() for line in init if line.format() not in made.init]
        made.body += [line.format(x=made.argument, y=y) for line in after]

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def residual(self, block: Residual, channels: int) -> tuple[str, int]:
        """``(the expression that makes the block, its channels)``."""
        made = self._class("Residual")
        x, stride = made.argument, 1
        for unit in (*block.prefix, *block.main):
            if unit.times == 1:
                stride *= unit.conv.stride ** unit.order.count("c") * unit.pool_stride ** unit.order.count("p")
        if block.style == "sequential" and stride == 1:
            return self._sequential_subclass(block, channels), channels
        source, y = x, "y"
        if block.style == "reassign":
            source, y = "identity", x
        made.body.append(f"identity = {x}" if block.style == "reassign" else f"y = {x}")
        into = self._path(made, block.prefix, (), y, channels, channels, channels)
        if block.prefix and block.from_prefix:
            source = "z"
            made.body.append(f"z = {y}")
            for unit in block.prefix:
                stride //= unit.conv.stride ** unit.order.count("c") * unit.pool_stride ** unit.order.count("p")
        out = self._path(made, block.main, block.effects, y, into, block.width, channels)
        side = into if source == "z" else channels
        self._shortcut(made, block, source, side, out, stride)
        self._join(made, block.join, y, out)
        returned = {
            "out": "out",
            "pair": f"(out, {y})",
            "shortcut": "(out, s)",
            "before": "(out, before)",
            "input": f"(out, {source})",
        }
        made.body.append(f"return {returned[block.join.returns]}")
        expression = self._done(self._styled(made, block.style))
        if block.style in ("inherit", "override"):
            derived = f"Derived{next(self._number)}"
            body = (
                "    pass"
                if block.style == "inherit"
                else "    def forward(self, x):\n        return super().forward(x)"
            )
            self.classes.append(f"class {derived}({made.name}):\n{body}\n")
            expression = f"{derived}()"
        return expression, 2 * out if block.join.op.startswith("cat") else out

    def _styled(self, made: _Class, style: str) -> _Class:
        """The class with the signature that a style asks for."""
        x = made.argument
        if style == "default":
            made.signature = f"self, {x}, factor=0.5"
            made.body.insert(-1, "out = out * factor")
        elif style == "annotated":
            made.signature, made.returns = f"self, {x}: torch.Tensor", " -> torch.Tensor"
            made.body.insert(0, '"""A residual block."""')
        elif style == "star":
            made.signature = "self, *args"
            made.body.insert(0, f"{x} = args[0]")
        elif style == "optional":
            made.signature = f"self, {x}, other=None"
            made.body.insert(0, "if other is not None:")
            made.body.insert(1, f"    {x} = {x} + other")
        return made

    def _sequential_subclass(self, block: Residual, channels: int) -> str:
        """A block that is an nn.Sequential of its main path, and whose forward adds the input."""
        made = self._class("Residual", "nn.Sequential")
        modules: list[str] = []
        into = channels
        convs = [i for i, unit in enumerate(block.main) if "c" in unit.order]
        for i, unit in enumerate(block.main):
            found, into = self._modules(unit, into, channels if convs and i == convs[-1] else block.width)
            modules += [module for letter, module in found if letter != "s"]
        x = made.argument
        made.body = [f"y = super().forward({x})", f"s = {x}"]
        self._join(made, Join(block.join.op), "y", channels)
        made.body.append("return out")
        self.classes.append(made.text().replace("super().__init__()", f"super().__init__({', '.join(modules)})", 1))
        return f"{made.name}()"

    def _join(self, made: _Class, join: Join, y: str, channels: int) -> None:
        """Write how ``y`` and ``s`` become ``out``."""
        if join.main is not None:
            made.body.append(f"{y} = {self._act(made, join.main, y)}")
        if join.shortcut is not None:
            made.body.append(f"s = {self._act(made, join.shortcut, 's')}")
        if join.op == "gamma":
            made.init.append(f"self.gamma = nn.Parameter(torch.full(({channels}, 1, 1), 0.3))")
        first, second = ("s", y) if join.flipped and join.op in SYMMETRIC else (y, "s")
        made.body += [line.format(out="out", y=first, s=second, gamma="self.gamma") for line in JOINS[join.op]]
        if join.returns == "before":
            made.body.append("before = out")
        if join.after is not None:
            made.body.append(f"out = {self._act(made, join.after, 'out')}")

    def _shortcut(self, made: _Class, block: Residual, source: str, side: int, out: int, stride: int) -> None:
        kind = block.shortcut
        if kind == "identity" and (stride > 1 or side != out):
            kind = "convbn"
        if kind == "identity":
            made.body.append(f"s = {source}")
        elif kind == "slice" and out >= side:
            sliced = f"{source}[:, :, ::{stride}, ::{stride}]"
            made.body.append(
                f"s = F.pad({sliced}, (0, 0, 0, 0, {(out - side) // 2}, {out - side - (out - side) // 2}))"
            )
        elif kind == "unit":
            unit = block.side if "c" in block.side.order else Unit()
            conv = Conv(**{**unit.conv.__dict__, "stride": stride, "groups": unit.conv.groups or 1})
            unit = Unit(**{**unit.__dict__, "conv": conv, "times": 1, "order": unit.order.replace("p", "")})
            made.body.append(f"s = {source}")
            made.body += self.unit(made, unit, "s", side, out)[0]
        else:
            steps = [f"nn.AvgPool2d({stride}, {stride}, ceil_mode=True)"] if kind == "pool" and stride > 1 else []
            taken = 1 if kind == "pool" else stride
            steps.append(f"nn.Conv2d({side}, {out}, 1, stride={taken}, bias={kind == 'conv'})")
            if kind != "conv":
                steps.append(f"nn.BatchNorm2d({out})")
            child = made.child("u", f"nn.Sequential({', '.join(steps)})")
            made.body.append(f"s = {child}({source})")

    def dense(self, block: Dense, channels: int) -> tuple[str, int]:
        made = self._class("Dense")
        x = made.argument
        layers = []
        made.body.append("features = [" + x + "]" if block.order == "features" else f"y = {x}")
        for number, units in enumerate(block.layers):
            own = self._class("Layer")
            effects = block.effects if number == 0 else ()
            if block.order == "features":
                own.body.append(f"y = torch.cat({own.argument}, 1)")
            else:
                own.body.append(f"y = {own.argument}")
            new = self._path(own, units, effects, "y", channels, 2 * block.growth, block.growth)
            joined = f"torch.cat([{own.argument}, y], 1)"
            joined = {"xy": joined, "sequential": joined, "yx": f"torch.cat([y, {own.argument}], 1)"}.get(
                block.order, "y"
            )
            own.body.append(f"return {joined}")
            layers.append(self._done(own))
            layer = made.child("u", layers[-1])
            if block.order == "features":
                made.body.append(f"features.append({layer}(features))")
            elif block.order == "loop":
                made.body.append(f"y = torch.cat([y, {layer}(y)], 1)")
            else:
                made.body.append(f"y = {layer}(y)")
            channels += new
        if block.order == "sequential":
            return f"nn.Sequential({', '.join(layers)})", channels
        made.body.append("return torch.cat(features, 1)" if block.order == "features" else "return y")
        return self._done(made), channels

    def row(self, block: Row, channels: int) -> tuple[str, int]:
        if block.sequential and not block.effects:
            steps = []
            for unit in block.units:
                modules, channels = self._modules(unit, channels, block.width)
                steps += [module for letter, module in modules if letter != "s"]
            return f"nn.Sequential({', '.join(steps)})", channels
        made = self._class("Row")
        made.body.append(f"y = {made.argument}")
        channels = self._path(made, block.units, block.effects, "y", channels, block.width, block.width)
        made.body.append("return y")
        return self._done(made), channels

    def gather(self, block: Gather, channels: int) -> tuple[str, int]:
        made = self._class("Gather")
        x = made.argument
        split = block.split and channels % 2 == 0
        made.body.append(f"first, y = {x}.chunk(2, 1)" if split else f"y = {x}")
        found, into, total = (["first"] if split else [x] if block.keep else []), channels // (1 + split), 0
        total = into if found else 0
        for i, unit in enumerate(block.units):
            effects = tuple(Effect(e.kind, 0) for e in block.effects if e.at == i)
            plain = Unit(**{**unit.__dict__, "conv": Conv(**{**unit.conv.__dict__, "stride": 1}), "pool_stride": 1})
            into = self._path(made, (plain,), effects, "y", into, into, into)
            made.body.append(f"part{i} = y")
            found.append(f"part{i}")
            total += into
        made.body.append(f"out = torch.cat([{', '.join(found)}], 1)")
        last = block.last if "c" in block.last.order else Unit()
        last = Unit(**{**last.__dict__, "conv": Conv(1), "times": 1, "order": last.order.replace("p", "")})
        lines, out = self.unit(made, last, "out", total, channels)
        made.body += lines
        made.body.append(f"return out + {x}" if block.residual else "return out")
        return self._done(made), out

    def block(self, block: Block, channels: int) -> tuple[str, int]:
        write = {Residual: self.residual, Dense: self.dense, Row: self.row, Gather: self.gather}[type(block)]
        return write(block, channels)  # type: ignore[operator]

    def write(self) -> str:
        """The text of the module; its class ``Net`` is the network."""
        network, channels = self.network, self.network.channels
        expressions = []
        for block in network.blocks:
            expression, channels = self.block(block, channels)
            if isinstance(block, Residual) and block.nested:
                expression = f"nn.Sequential({expression})"
            expressions.append(expression)
        plain = not any(network.behind) and not network.keyword and not network.head
        pairs = [isinstance(b, Residual) and b.join.returns != "out" for b in network.blocks]
        if network.container == "sequential" and plain and not any(pairs):
            body = "\n".join(f"            {expression}," for expression in expressions)
            self.classes.append(
                f"def Net():\n    return nn.Sequential(\n{body}\n    )\n".replace("            ", "        ")
            )
            return self._text()
        net = self._class("Net")
        net.name, x = "Net", net.argument
        net.body.append("also = []")
        for i, (expression, pair, block) in enumerate(zip(expressions, pairs, network.blocks, strict=True)):
            child = net.child("b", expression)
            key = f"{self._keyword(block)}=" if network.keyword and self._keyword(block) else ""
            net.body.append(f"{x} = {child}({key}{x})")
            if pair:
                net.body += [f"{x}, more = {x}", "also.append(more)"]
            behind = network.behind[i] if i < len(network.behind) else ""
            if behind == "store":
                net.init.append("self.maps = []")
            net.body += [line.format(x=x) for line in BEHIND[behind]]
        if network.head:
            channels_in = channels
            net.init.append(f"self.fc = nn.Linear({channels_in}, 3)")
            net.body.append(f"{x} = self.fc(F.adaptive_avg_pool2d({x}, 1).flatten(1))")
        net.body.append(f"return [{x}, *also]" if any(pairs) else f"return {x}")
        self._done(net)
        return self._text()

    def _keyword(self, block: Block) -> str:
        is_sequential = (
            isinstance(block, Row) and block.sequential or isinstance(block, Dense) and block.order == "sequential"
        )
        return "" if is_sequential or self.network.names else "x"

    def _text(self) -> str:
        return "\n\n".join([HEADER + "\n\nCOUNTS = {}\n", *self.classes])
