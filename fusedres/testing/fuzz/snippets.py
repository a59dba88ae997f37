"""The pieces of Python of which networks are written: activations, joins, effects, and what networks do behind a block.

In the statements ``{x}`` is the argument of forward, ``{y}`` the map that the main path is at, ``{s}`` that of the shortcut, ``{out}`` what
they become.
"""

from __future__ import annotations

HEADER = """\
import random
from types import SimpleNamespace

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SCALE = 1.0


def scaled(x):
    return x * SCALE


def same(x):
    return x
"""

#: module (with a place for inplace=True), function (the same; "" none), function of torch, method
ACTIVATIONS: dict[str, tuple[str, str, str, str]] = {
    "relu": ("nn.ReLU({})", "F.relu({}, {})", "torch.relu", "relu"),
    "relu6": ("nn.ReLU6({})", "F.relu6({}, {})", "", ""),
    "clip6": ("nn.Hardtanh(0, 6, {})", "F.hardtanh({}, 0.0, 6.0, {})", "", ""),
    "leaky_relu": ("nn.LeakyReLU(0.1, {})", "F.leaky_relu({}, 0.1, {})", "", ""),
    "hardswish": ("nn.Hardswish({})", "F.hardswish({}, {})", "", ""),
    "silu": ("nn.SiLU({})", "F.silu({}, {})", "", ""),
    "gelu": ("nn.GELU()", "F.gelu({})", "", ""),
    "gelu_tanh": ("nn.GELU(approximate='tanh')", "F.gelu({}, approximate='tanh')", "", ""),
    "mish": ("nn.Mish({})", "F.mish({}, {})", "", ""),
    "elu": ("nn.ELU(1.0, {})", "F.elu({}, 1.0, {})", "", ""),
    "sigmoid": ("nn.Sigmoid()", "F.sigmoid({})", "torch.sigmoid", "sigmoid"),
    "tanh": ("nn.Tanh()", "F.tanh({})", "torch.tanh", "tanh"),
    "prelu": ("nn.PReLU()", "", "", ""),
    "hardtanh": ("nn.Hardtanh({})", "F.hardtanh({}, {})", "", ""),
    "softplus": ("nn.Softplus()", "F.softplus({})", "", ""),
}

#: statements that join y and s as out; ``{gamma}`` is a parameter
JOINS: dict[str, tuple[str, ...]] = {
    "add": ("{out} = {y} + {s}",),
    "iadd": ("{y} += {s}", "{out} = {y}"),
    "torch": ("{out} = torch.add({y}, {s})",),
    "add_": ("{out} = {y}.add_({s})",),
    "alpha": ("{out} = torch.add({s}, {y}, alpha=0.5)",),
    "add_alpha": ("{out} = {s}.add({y}, alpha=0.5)",),
    "sub": ("{out} = {s} - {y}",),
    "rsub": ("{out} = torch.sub({y}, {s})",),
    "scale": ("{out} = {s} + 0.2 * {y}",),
    "scale_both": ("{out} = ({s} + {y}) * 0.5",),
    "gamma": ("{out} = {s} + {gamma} * {y}",),
    "negative": ("{out} = {s} + (-{y})",),
    "maximum": ("{out} = torch.maximum({y}, {s})",),
    "mul": ("{out} = {y} * {s}",),
    "gate": ("{out} = torch.sigmoid({y}) * {s}",),
    "twice": ("{out} = {y} + {s}", "{out} = {out} + {s}"),
    "twice_y": ("{out} = {y} + {s} + {y}",),
    "double": ("{out} = {y} + {y}",),
    "sum": ("{out} = sum([{y}, {s}])",),
    "stack": ("{out} = torch.stack([{y}, {s}]).sum(0)",),
    "mean": ("{out} = torch.stack([{y}, {s}]).mean(0)",),
    "constant": ("{out} = {y} + {s} + 1",),
    "cat": ("{out} = torch.cat([{y}, {s}], 1)",),
    "cat_s": ("{out} = torch.cat((torch.relu({y}), {s}), dim=1)",),
    "main": ("{out} = {y}",),
    "detach": ("{out} = {y} + {s}.detach()",),
    "clone": ("{out} = {y} + {s}.clone()",),
    "lerp": ("{out} = torch.lerp({s}, {y}, 0.3)",),
}
#: those in which the operands may be exchanged
SYMMETRIC = ("add", "torch", "maximum", "mul", "sum", "stack", "mean", "cat", "add_", "constant")

#: statements of __init__ and of forward, behind y
EFFECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "store": ((), ("self.feat = {y}",)),
    "store_detached": ((), ("self.feat = {y}.detach()",)),
    "store_several": ((), ("self.feats = ({y}, {x}, [{y}.mean(), 0.5])",)),
    "store_list": ((), ("self.maps = [{x}]", "self.maps.append({y})")),
    "store_again": ((), ("self.feat = {y}", "{y} = {y} * 0.5", "self.feat = {y} + self.feat")),
    "store_inside": ((), ("with torch.no_grad():", "    self.feat = {y} * 2.0", "{y} = {y} + self.feat")),
    "overwrite_stored": ((), ("self.feat = {y}", "{y} = F.relu({y}, inplace=True)")),
    "append_map": (("self.maps = []",), ("self.maps.append({y})",)),
    "item": (("self.cache = {{}}",), ("self.cache['y'] = {y}", "self.cache['x'] = {x}.mean()")),
    "previous": (
        ("self.last = torch.zeros(())",),
        ("{y} = {y} + self.last.to({y}.dtype)", "self.last = {y}.detach().mean()"),
    ),
    "count_tensor": (
        ("self.register_buffer('steps', torch.zeros(()))",),
        ("self.steps += 1", "{y} = {y} * (1 + 0.1 * self.steps)"),
    ),
    "count_used": (("self.calls = 0",), ("self.calls = self.calls + 1", "{y} = {y} * (0.5 ** self.calls)")),
    "mean_no_grad": ((), ("with torch.no_grad():", "    m = {y}.mean((2, 3), keepdim=True)", "{y} = {y} - m")),
    "set_grad": (
        (),
        ("with torch.set_grad_enabled(self.training):", "    m = {y}.mean((2, 3), keepdim=True)", "{y} = {y} - m"),
    ),
    "append": (("self.log = []",), ("self.log.append({y}.detach().mean().item())",)),
    "count": (("self.calls = 0",), ("self.calls += 1",)),
    "count_global": ((), ("COUNTS['calls'] = COUNTS.get('calls', 0) + 1",)),
    "shape": (("self.seen = None",), ("self.seen = tuple({y}.shape)",)),
    "buffer": (
        ("self.register_buffer('ema', torch.zeros(()))",),
        ("with torch.no_grad():", "    self.ema.mul_(0.9).add_({y}.mean(), alpha=0.1)"),
    ),
    "buffer_in_place": (
        ("self.register_buffer('ema', torch.zeros(()))",),
        ("self.ema.mul_(0.9).add_({y}.detach().mean(), alpha=0.1)",),
    ),
    "buffer_used": (
        ("self.register_buffer('ema', torch.zeros(()))",),
        ("with torch.no_grad():", "    self.ema.mul_(0.9).add_({y}.mean(), alpha=0.1)", "{y} = {y} - self.ema"),
    ),
    "buffer_new": (
        ("self.register_buffer('ema', torch.zeros(()))",),
        ("self.ema = 0.9 * self.ema + 0.1 * {y}.detach().mean()",),
    ),
    "noise": ((), ("{y} = {y} + 0.1 * torch.randn_like({y})",)),
    "dropout": ((), ("{y} = F.dropout({y}, 0.3, self.training)",)),
    "dropout_always": ((), ("{y} = F.dropout({y}, 0.3)",)),
    "skip": ((), ("if self.training and torch.rand(1).item() < 0.5:", "    return {x}")),
    "random": ((), ("if random.random() < 0.5:", "    {y} = {y} * 2.0")),
    "numpy": ((), ("{y} = {y} * float(numpy.random.rand())",)),
    "if_training": ((), ("if self.training:", "    {y} = {y} * 0.5")),
    "if_grad": ((), ("if torch.is_grad_enabled():", "    {y} = {y} * 0.5")),
    "if_needs_grad": ((), ("if {x}.requires_grad:", "    {y} = {y} * 0.5")),
    "if_value": ((), ("if {y}[0, 0].sum() > 0:", "    {y} = {y} * 0.5")),
    "if_size": ((), ("if {x}.shape[0] > 1:", "    {y} = {y} * 0.5")),
    "if_dtype": ((), ("if {x}.dtype == torch.float64:", "    {y} = {y} * 0.5")),
    "if_flag": (("self.flag = True",), ("if self.flag:", "    {y} = {y} * 0.5")),
    "attribute": (("self.factor = 0.5",), ("{y} = {y} * self.factor",)),
    "class": ((), ("{y} = {y} * self.weighting",)),
    "global": ((), ("{y} = {y} * SCALE",)),
    "function": ((), ("{y} = scaled({y})",)),
    "same": ((), ("{y} = same({y})",)),
    "dict": (("self.settings = {{'factor': 0.5}}",), ("{y} = {y} * self.settings['factor']",)),
    "namespace": (("self.config = SimpleNamespace(factor=0.5)",), ("{y} = {y} * self.config.factor",)),
    "list": (("self.factors = [0.5, 2.0]",), ("for factor in self.factors:", "    {y} = {y} * factor")),
    "callable": (("self.call = torch.relu",), ("{y} = self.call({y})",)),
    "parameter": (("self.offset = nn.Parameter(torch.zeros(1))",), ("{y} = {y} + self.offset",)),
    "clamp_": ((), ("{y} = {y}.clamp_(-1.0, 1.0)",)),
    "mul_": ((), ("{y}.mul_(0.5)",)),
    "data": ((), ("{y}.data.mul_(0.5)",)),
    "detach": ((), ("{y} = {y}.detach()",)),
    "tensor_hook": ((), ("if {y}.requires_grad:", "    {y}.register_hook(lambda grad: grad * 2)")),
    "retain_grad": ((), ("if {y}.requires_grad:", "    {y}.retain_grad()", "    self.kept = {y}")),
    "contiguous": ((), ("{y} = {y}.contiguous()",)),
    "flip": ((), ("{y} = {y}.flip(3)",)),
    "transpose": ((), ("{y} = {y}.transpose(2, 3)",)),
    "swap": ((), ("first, second = {y}.chunk(2, 1)", "{y} = torch.cat([second, first], 1)")),
    "shuffle": ((), ("{y} = {y}[:, torch.arange({y}.shape[1] - 1, -1, -1)]",)),
    "try": ((), ("try:", "    {y} = {y} * 0.5", "finally:", "    self.tried = True")),
    "del": ((), ("kept = {y}", "del kept")),
    "assert": ((), ("assert {y}.shape[0] == {x}.shape[0]",)),
    "set_training": ((), ("self.training = self.training",)),
    "walrus": ((), ("{y} = (again := {y}) + again",)),
    "comprehension": ((), ("{y} = [part * 0.5 for part in [{y}]][0]",)),
    "unpack": ((), ("({y}, *_) = ({y} * 0.5, 1)",)),
}

#: what stands around a unit: a statement, or a call of what the unit became
CONTEXTS = {
    "no_grad": "with torch.no_grad():",
    "enable_grad": "with torch.enable_grad():",
    "set_grad": "with torch.set_grad_enabled(not self.training):",
    "grad_in_no_grad": "with torch.no_grad(), torch.enable_grad():",
    "autocast": "with torch.autocast('cpu', dtype=torch.bfloat16):",
    "no_autocast": "with torch.autocast('cpu', enabled=False):",
    "profile": "with torch.profiler.record_function('unit'):",
    "loop": "for _ in range(1):",
    "true": "if True:",
}
METHODS = {
    "method": ("", "self.{name}({y})"),
    "method_no_grad": ("@torch.no_grad()", "self.{name}({y})"),
    "method_enable_grad": ("@torch.enable_grad()", "self.{name}({y})"),
    "method_autocast": ("@torch.autocast('cpu', dtype=torch.bfloat16)", "self.{name}({y})"),
    "checkpoint": ("", "checkpoint(self.{name}, {y}, use_reentrant=False)"),
}

#: what the network does behind a block
BEHIND: dict[str, tuple[str, ...]] = {
    "": (),
    "dropout": ("{x} = F.dropout({x}, 0.4, self.training)",),
    "relu_": ("{x} = F.relu({x}, inplace=True)",),
    "mul_": ("{x}.mul_(0.5)",),
    "data": ("{x}.data.clamp_(-0.5, 0.5)",),
    "view": ("{x} = {x}.view({x}.shape[0], -1).view({x}.shape)",),
    "reshape": ("{x} = {x}.reshape({x}.shape[0], -1).reshape({x}.shape)",),
    "store": ("self.maps.append({x})",),
    "detach": ("{x} = {x}.detach()",),
    "mean": ("{x} = {x} - {x}.mean()",),
    "slice": ("{x} = {x}[:, :, :-1]",),
    "set_": ("{x}[:, 0] = 0",),
}

#: how the class of a residual block is written: its forward assigns to its argument, is inherited, calls super().forward, has a default, a
#: star, an optional or an annotated argument, or the class is an nn.Sequential
STYLES = ("", "reassign", "inherit", "override", "default", "annotated", "star", "optional", "sequential")

#: the plain names of children, by the letter of what they are
NAMES_BY_LETTER = {
    "c": "conv",
    "n": "bn",
    "a": "act",
    "d": "drop",
    "p": "pool",
    "s": "se",
    "i": "identity",
    "u": "unit",
    "b": "block",
}
#: names that users give, and some that a fused class might be tempted to use
NAMES = tuple(
    "stem layers plan kind parts state reading outcome records structure recompute original norm conv bn act relu main shortcut "
    "downsample body tail head aside run check reference layer features residual block unit first second proj skip branch branch2a "
    "norm1 norm2 conv1 conv2 bn1 bn2 project expand squeeze m net f g h op ops convs res label read inside describe spec".split()
)
