"""Fused blocks: each kind is a mixin that puts its fused forward in front of a module class's own.

``convert`` gives an existing module the mixed class, so that its children, parameters, buffers, hooks and names stay the very objects they
were; ``fusedres.nn`` builds modules that have it from the start. Whatever cannot be fused at the moment of a call (a hook on an inner
module, a replaced child, an unusual input) runs the class's own forward, and the module remembers why.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from . import activations, describe, dispatch, memory, structure
from .backends import eager
from .memory import Part, Unsupported
from .schedules import chain, dense, norm_pool
from .schedules.common import Unit, functorch_active

_STATS = "_fusedres_stats"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in where ``x`` lives, None where it is off."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Call(NamedTuple):
    """What remains of a part's call: the block's mode, whether autograd recorded it, and what its maps were, but for their values.
    ``identities`` tell which of the maps of one block are the same."""

    mode: bool
    recorded: bool
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[torch.Size, ...]
    needed: tuple[bool, ...]
    identities: tuple[int, ...]


class FusedBlock:
    """What the kinds share. A kind gives ``kind`` (its name), ``read_block``, ``check_block`` and ``run_block``."""

    kind = ""
    #: whether backward recomputes cheap convolutions instead of keeping their outputs; set by convert
    _fusedres_recompute = False
    #: the outcome of the last call, for report: the backend's name, or why the original modules ran
    _fusedres_last: str | None = None
    #: what remains of the last call, part by part, None for one that ran its original modules; for report
    _fusedres_calls: tuple[Call | None, ...] = ()

    @classmethod
    def original_class(cls) -> type[nn.Module]:
        """The class whose forward is the original one."""
        # what stands before was put in front later, as FSDP does
        return cls.__mro__[cls.__mro__.index(FusedBlock) + 1]

    def read_block(self) -> Any:
        """What the block runs as: its one part, or what its forward makes of several; raises Unsupported."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """The parts that run fused, read anew; raises Unsupported."""
        return [self.read_block()]

    def inside(self) -> list[nn.Module]:
        """The modules, the block among them, on which ``read_block`` depends."""
        return list(self.modules())

    def check_block(self, description, x: Tensor, *beside: Tensor) -> None:
        """Check the description against the input (``beside``: other maps that it reads); raises Unsupported, or ValueError as torch
        would."""
        raise NotImplementedError

    def run_block(self, backend, description, x: Tensor, *beside: Tensor, **into: Tensor | None) -> Tensor:
        """Run the schedule; ``into`` may hold ``out``, the map that a kind which :func:`writes_into` one may write into."""
        raise NotImplementedError

    def label(self) -> str:
        """What ``report`` calls the block."""
        return self.kind

    def reading(self) -> Any:
        """``read_block()``, remembered while nothing inside changes; raises Unsupported."""
        if torch.compiler.is_compiling():
            raise Unsupported("torch.compile traces the original modules")
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            raise Unsupported("torch.jit traces the original modules")
        if functorch_active():
            raise Unsupported("torch.func transforms the original modules")
        if forward_ad._current_level >= 0:
            raise Unsupported("forward-mode differentiation goes through the original modules")
        if is_fx_symbolic_tracing():
            raise Unsupported("torch.fx traces the original modules")
        if describe.global_hooks():
            raise Unsupported("a global module hook is registered")
        return memory.recall(self, self.inside, self.read_block)

    def _prepare(self, part: Part, x: Tensor, *beside: Tensor):
        """``(backend, description, counters of BatchNorms, input, whether autocast is on)``; raises Unsupported."""
        cast = autocast_dtype(x) if isinstance(x, Tensor) else None
        description, counters = part.describe(cast)
        x = self.cast_input(x, cast)
        part.check(self.check_block, description, x, *beside)
        return _backend(description, x), description, counters, x, cast is not None

    def cast_input(self, x: Tensor, cast: torch.dtype | None) -> Tensor:
        """The input as autocast would hand it to the first convolution."""
        if cast is not None and x.dtype != cast:
            raise Unsupported(f"its input is {x.dtype} under autocast to {cast}")
        return x

    def fused_forward(self, part: Part, original, x: Tensor, *beside: Tensor, **into: Tensor | None) -> Tensor:
        """The output of a part: fused (and ``into`` a place, see :meth:`run_block`), or by ``original(x, *beside)`` where it cannot be."""
        try:
            backend, description, counters, prepared, autocast = self._prepare(part, x, *beside)
        except Unsupported as reason:
            return self.unfused(reason, original, x, *beside)
        maps = (prepared, *beside)
        call = Call(
            self.training,
            torch.is_grad_enabled(),
            prepared.device,
            prepared.dtype,
            tuple(m.shape for m in maps),
            tuple(m.requires_grad for m in maps),
            tuple(map(id, maps)),
        )
        self.__dict__.update(_fusedres_last=backend.name, _fusedres_calls=(call,))
        if counters:
            torch._foreach_add_([*counters], [*counters.values()])
        with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
            return self.run_block(backend, description, prepared, *beside, **into)

    def unfused(self, reason: Unsupported, original, *maps: Tensor) -> Tensor:
        """``original(*maps)``, with a note why."""
        self.__dict__.update(_fusedres_last=f"original modules: {reason}", _fusedres_calls=(None,))
        return original(*maps)

    def outcome(self) -> tuple[str, tuple[Call | None, ...]]:
        """How the last call of a part went."""
        return self._fusedres_last, self._fusedres_calls

    def settle(self, outcomes: list[tuple[str, tuple[Call | None, ...]]]) -> None:
        """Make the outcomes of its parts the block's: of the reasons the first, which says more than another part's success."""
        reasons = [last for last, _ in outcomes]
        last = next((reason for reason in reasons if reason.startswith("original")), reasons[-1])
        self.__dict__.update(_fusedres_last=last, _fusedres_calls=tuple(c for _, calls in outcomes for c in calls))

    def forward(self, x: Tensor, **into: Tensor | None) -> Tensor:
        original = super().forward
        try:
            part = self.reading()
        except Unsupported as reason:
            return self.unfused(reason, original, x)
        return self.fused_forward(part, original, x, **into)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the output for a map of ``shape``, None where it cannot be told."""
        return None

    def _get_name(self) -> str:
        return f"Fused{self.original_class().__name__}" if is_converted(self) else super()._get_name()

    def __reduce_ex__(self, protocol):
        make, arguments, *rest = super().__reduce_ex__(protocol)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != memory.KEY}
        if is_converted(self):
            # the mixed class is made at run time: pickle by what it is made of
            make, arguments = _rebuild, (type(self).kind, self.original_class())
        return (make, arguments, *rest)


def _backend(description, x: Tensor):
    """The backend that runs ``description``; raises Unsupported.

    Where processes share statistics they have to exchange the same numbers in the same order, or all wait for ever. The schedule is that
    order, whatever the backend, so that what may differ between processes only chooses the backend: the size of a batch, empty ones
    included, and what is installed. Whether the schedule runs at all follows from the model, its modes and the dtype, which are
    the same everywhere, or a SyncBatchNorm could not work either. A hook may be one process's own: where it makes a block run its
    original modules their SyncBatchNorms are :class:`FusedSyncNorm`, which exchange what the schedule would, in the order of the block's
    forward and of autograd: the same one, except where a forward computes a normalised shortcut first.
    """
    backend = dispatch.resolve(x.device, x.dtype) if x.numel() else None
    if backend is None:
        if not describe.exchanges(description):
            raise Unsupported(f"no fused backend serves {x.dtype} on {x.device}")
        backend = eager
    return backend


def check_chain(description: chain.Chain, x: Tensor, source: Tensor | None = None) -> None:
    """Check a residual chain against its input, and what its shortcut reads where that is another map."""
    units, first, shortcut = description.units, description.first, description.shortcut
    activations.parse(description.act)
    dtype = next((unit.conv.weight.dtype for unit in description.all_units), x.dtype)
    describe.check_map(x, dtype, description)
    shape = tuple(x.shape)
    if first is not None:
        describe.check_norm(first, shape, x)
    for unit in units:
        shape = check_unit(unit, shape, x)
    if shortcut is not None:
        other = x if source is None else source
        describe.check_map(other, dtype, description)
        beside = shortcut.pooled(tuple(other.shape))
        if shortcut.subsample is not None:
            beside = shortcut.subsample.out_shape(beside)
        if min(beside[2:]) < 1:
            raise Unsupported("a pooling window larger than its input")
        if shortcut.unit is not None:
            beside = check_unit(shortcut.unit, beside, other)
        if beside != shape:
            raise Unsupported(f"its {'gate' if shortcut.gated else 'shortcut'} gives {beside}, its main path {shape}")
        if shortcut.gated:
            check_gated(description, shape, other)
    if description.pool is not None:
        sizes = zip(shape[2:], description.pool.kernel, description.pool.padding, strict=True)
        if any(size + 2 * pad < kernel for size, kernel, pad in sizes):
            raise Unsupported("a pooling window larger than its input")


def check_gated(description: chain.Chain, shape: tuple[int, ...], carry: Tensor) -> None:
    """Check what is particular to a highway, whose main path gives ``shape``."""
    last, gate = description.behind(len(description.units)), description.projection.norm
    if gate is not None and gate.act != "none":
        raise Unsupported(f"a highway whose gate has {gate.act} in front of its sigmoid")
    if description.act != "none" or last not in ("none", "relu"):
        raise Unsupported(
            f"a highway whose candidate ends in {last} and its join in {description.act}, not in ReLU or nothing"
        )
    if tuple(carry.shape) != shape:
        raise Unsupported(f"a highway carries {tuple(carry.shape)} past a main path that gives {shape}")


def check_unit(unit: Unit, shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    """Check a unit against its input; returns the shape of its output."""
    shape = describe.check_conv(unit.conv, shape, like)
    if unit.norm is not None:
        describe.check_norm(unit.norm, shape, like)
    return shape


def check_dense(layers: tuple[dense.Layer, ...], x: Tensor) -> None:
    """Check the layers of a dense block against its input."""
    dims = layers[0].conv1.weight.dim()
    describe.check_map(x, layers[0].conv1.weight.dtype, layers, dims)
    shape = tuple(x.shape)
    for layer in layers:
        describe.check_norm(layer.norm1, shape, x)
        mid = out = describe.check_conv(layer.conv1, shape, x)
        if layer.conv2 is not None:
            describe.check_norm(layer.norm2, mid, x)
            out = describe.check_conv(layer.conv2, mid, x)
        if out[2:] != shape[2:] or mid[2:] != shape[2:]:
            raise Unsupported(f"a layer changes the spatial size from {shape[2:]} to {out[2:]}")
        shape = (shape[0], shape[1] + out[1], *shape[2:])


def check_norm_pool(block: norm_pool.NormPool, x: Tensor) -> None:
    """Check a transition or head against its input."""
    describe.check_map(x, x.dtype if block.conv is None else block.conv.weight.dtype, block)
    describe.check_norm(block.norm, tuple(x.shape), x)
    pooled = tuple(size // k for size, k in zip(x.shape[2:], block.pool.kernel, strict=True))
    if min(pooled) < 1:
        raise Unsupported("a pooling window larger than its input")
    if block.conv is not None:
        describe.check_conv(block.conv, (*x.shape[:2], *pooled), x)


class _ChainKind(FusedBlock):
    def check_block(self, description, x, source=None):
        check_chain(description, x, source)

    def run_block(self, backend, description, x, source=None, *, out=None):
        if self._fusedres_recompute:
            description = description.recomputing
        stats = None if description.first is None else carried_stats(x)
        if out is not None and (out.shape != description.out_shape(x.shape) or out.dtype != x.dtype):
            out = None  # whoever offered it sees that it was not taken
        return carry(*chain.run(backend, description, x, source, stats, out))

    def steps(self) -> list[Part | nn.Module | None]:
        """What the forward goes through one after the other: parts that run as chains, modules, and what is neither (None)."""
        return [self.reading()]

    def out_shape(self, shape):
        if not writes_into(self):
            return None
        try:
            for step in self.steps():
                if isinstance(step, Part):
                    shape = step.describe(None)[0].out_shape(shape)
                else:
                    shape = None if step is None else describe.shape_behind(step, shape)
                if shape is None:
                    return None
        except Unsupported:
            return None
        return shape


class FusedResidual(_ChainKind):
    """A block of which :mod:`fusedres.structure` knows a plan: one schedule, or several around what no schedule knows."""

    kind = "residual block"
    #: the plans by mode, read by convert; kinds whose names are known give their plan themselves
    _fusedres_plans: dict[bool, structure.Plan] | None = None

    def plan(self) -> structure.Plan:
        """The steps of the block as it stands."""
        return self._fusedres_plans[self.training]

    def label(self):
        if self._fusedres_plans is None:
            return self.kind
        plan = self.plan()
        steps = [self.get_submodule(step) for step in plan.main if isinstance(step, str)]
        if plan.shortcut is None:
            return "conv-bn row"
        convolutions = sum(isinstance(m, nn.Conv2d) for m in steps)
        name = {2: "basic block", 3: "bottleneck"}.get(convolutions, self.kind)
        return f"pre-activation {name}" if steps and isinstance(steps[0], structure.norm_types()) else name

    def read_block(self) -> describe.Layout:
        return describe.layout(self, self.plan())

    def parts(self):
        return [piece.part for piece in self.read_block().pieces if piece.is_chain]

    def steps(self):
        found = self.reading()
        return [piece.part if piece.is_chain else None for piece in (*found.head, *found.body, *found.tail)]

    def forward(self, x: Tensor, **into: Tensor | None) -> Tensor:
        original = super(FusedBlock, self).forward
        try:
            found = self.reading()
        except Unsupported as reason:
            return self.unfused(reason, original, x)
        if len(found.pieces) == 1:
            return self.fused_forward(found.body[0].part, original, x, **into)
        return self.in_pieces(x, found, **into)

    def in_pieces(self, x: Tensor, found: describe.Layout, **into: Tensor | None) -> Tensor:
        """The output of a block that is split: chains fused, what stands between as it is."""
        outcomes = []
        last = (*found.body, *found.tail)[-1]

        def run(piece: describe.Piece, x: Tensor, source: Tensor | None = None) -> Tensor:
            if not piece.is_chain:
                return piece.original(x)
            beside = () if source is None else (source,)
            x = self.fused_forward(piece.part, piece.original, x, *beside, **(into if piece is last else {}))
            outcomes.append(self.outcome())
            return x

        for piece in found.head:
            x = run(piece, x)
        source = x
        for piece in found.aside:
            source = run(piece, source)
        *body, join = found.body
        for piece in body:
            x = run(piece, x)
        x = run(join, x, None if source is x or join.shortcut is None else source)
        for piece in found.tail:
            x = run(piece, x)
        self.settle(outcomes)
        return x


class _FusedNamed(FusedResidual):
    """A kind whose plan is known by the names of its children."""

    main: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    shared = 0

    def plan(self):
        aside = () if self.downsample is None else ("downsample",)
        return structure.Plan(self.main, aside, self.shared if aside else 0, self.behind)


class FusedBasic(_FusedNamed):
    """conv1-bn1-relu-conv2-bn2, ``downsample``, add, relu."""

    kind = "basic block"
    main, behind = ("conv1", "bn1", "relu", "conv2", "bn2"), ("relu",)


class FusedBottleneck(_FusedNamed):
    """conv1-bn1-relu-conv2-bn2-relu-conv3-bn3, ``downsample``, add, relu."""

    kind = "bottleneck"
    main, behind = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), ("relu",)


class FusedPreActBasic(_FusedNamed):
    """bn1-relu-conv1-bn2-relu-conv2, ``downsample`` of the activated input, add."""

    kind = "pre-activation basic block"
    main, shared = ("bn1", "relu", "conv1", "bn2", "relu", "conv2"), 2


class FusedPreActBottleneck(_FusedNamed):
    """bn1-relu-conv1-bn2-relu-conv2-bn3-relu-conv3, ``downsample`` of the activated input, add."""

    kind = "pre-activation bottleneck"
    main, shared = ("bn1", "relu", "conv1", "bn2", "relu", "conv2", "bn3", "relu", "conv3"), 2


class FusedPlain(FusedResidual):
    """conv1-bn1-relu-conv2-bn2-relu: no shortcut."""

    kind = "plain block"

    def plan(self):
        return structure.Plan(("conv1", "bn1", "relu", "conv2", "bn2", "relu"))


class FusedHighway(_ChainKind):
    """conv1-bn1-relu, and beside it ``gate`` (with ``gate_bn`` behind it or not) and sigmoid, which mixes that with the input."""

    kind = "highway block"

    def read_block(self):
        return Part(functools.partial(describe.highway, self))


class FusedStem(_ChainKind):
    """A torchvision ResNet: its conv1-bn1-relu-maxpool run fused, then its layers."""

    kind = "resnet stem"

    def stem(self) -> list[nn.Module]:
        """What runs as one."""
        return [self.conv1, self.bn1, self.relu, self.maxpool]

    def read_block(self):
        return Part(functools.partial(describe.stem, self.stem()))

    def inside(self):
        return [self, *self.stem()]

    def cast_input(self, x, cast):
        return x if cast is None else x.to(cast)

    def _forward_impl(self, x: Tensor) -> Tensor:
        original = functools.partial(_in_a_row, children=self.stem())
        try:
            part = self.reading()
        except Unsupported as reason:
            x = self.unfused(reason, original, x)
        else:
            x = self.fused_forward(part, original, x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def conv_runs(children: list[nn.Module]) -> list[tuple[int, int]]:
    """Where (start, stop) conv-BN[-act][-max pool] stands in a row of modules."""
    runs, i, norms = [], 0, structure.norm_types()
    while i < len(children) - 1:
        if isinstance(children[i], nn.Conv2d) and isinstance(children[i + 1], norms):
            stop = i + 2
            if stop < len(children) and activations.of_module(children[stop]) is not None:
                stop += 1
            if stop < len(children) and isinstance(children[stop], nn.MaxPool2d):
                stop += 1
            runs.append((i, stop))
            i = stop
        else:
            i += 1
    return runs


class FusedSequential(_ChainKind):
    """A Sequential: every conv-BN[-act][-max pool] in it runs fused, the rest as it is."""

    kind = "sequential"

    def read_block(self) -> list[tuple[int, int, Part]]:
        """Where each run begins and ends, and its part."""
        children = list(self)
        return [(start, stop, _run_part(children[start:stop])) for start, stop in conv_runs(children)]

    def parts(self):
        return [part for _, _, part in self.read_block()]

    def inside(self):
        children = list(self)
        return [self, *(child for start, stop in conv_runs(children) for child in children[start:stop])]

    def cast_input(self, x, cast):
        return x if cast is None else x.to(cast)

    def steps(self):
        found, at, children = [], 0, list(self)
        for start, stop, part in self.reading():
            found += [*children[at:start], part]
            at = stop
        return [*found, *children[at:]]

    def forward(self, x: Tensor, **into: Tensor | None) -> Tensor:
        return self.run_children(x, len(self), **into)

    def run_children(self, x: Tensor, count: int, **into: Tensor | None) -> Tensor:
        """The first ``count`` children in a row; ``into`` is for the last of them."""
        children = list(self)[:count]
        try:
            runs = self.reading()
        except Unsupported as reason:
            return self.unfused(reason, functools.partial(_in_a_row, children=children), x)
        at, outcomes = 0, []
        for start, stop, part in runs:
            if stop <= count:
                x = _in_a_row(x, children[at:start])
                original = functools.partial(_in_a_row, children=children[start:stop])
                x = self.fused_forward(part, original, x, **(into if stop == count else {}))
                outcomes.append(self.outcome())
                at = stop
        if outcomes:
            self.settle(outcomes)
        return _in_a_row(x, children[at:])


#: the forwards of chains that can write their output where they are told (a subclass may have another)
_INTO = (_ChainKind.forward, FusedResidual.forward, FusedSequential.forward)


def writes_into(module: nn.Module) -> bool:
    """Whether ``module(x, out=place)`` may write its output into ``place``, a channel slice of a map; it then returns ``place`` itself."""
    return isinstance(module, _ChainKind) and type(module).forward in _INTO


def _run_part(run: list[nn.Module]) -> Part:
    convolution, batch_norm, *rest = run
    act = next((c for c in rest if not isinstance(c, nn.MaxPool2d)), None)
    pooling = next((c for c in rest if isinstance(c, nn.MaxPool2d)), None)
    return Part(functools.partial(describe.stem, [convolution, batch_norm, act, pooling]))


def _in_a_row(x: Tensor, children: list[nn.Module]) -> Tensor:
    for child in children:
        x = child(x)
    return x


class FusedDenseBlock(FusedBlock):
    """A DenseNet block: layers that each read everything before them, in one buffer; with dropout in them, layer by layer."""

    kind = "dense block"
    #: the plans of the layers by mode, where they put their channels behind their input's by themselves and end a Sequential
    _fusedres_layers: dict[str, dict[bool, structure.Plan]] | None = None

    def layers(self) -> list[list[describe.Token]]:
        """What every layer does to what it reads; raises Unsupported."""
        plans = self._fusedres_layers
        if plans is None:
            found = [describe.dense_layer(layer) for layer in self.values()]
        elif list(plans) != list(self._modules)[-len(plans) :]:
            raise Unsupported("it has changed since it was converted; fusedres.convert reads it anew")
        else:
            children = ((self._modules[name], of_layer) for name, of_layer in plans.items())
            found = [describe.dense_layer(child, of_layer[child.training]) for child, of_layer in children]
        if not found:
            raise Unsupported("it has no layers")
        return found

    def read_block(self) -> Part | list[list[describe.Piece]]:
        """One part where all layers can write into the buffer, else the layers in pieces."""
        layers = self.layers()
        if all(map(describe.in_buffer, layers)):
            return Part(functools.partial(describe.layers, layers))
        return [describe.row(found) for found in layers]

    def parts(self):
        found = self.read_block()
        return [found] if isinstance(found, Part) else [p.part for pieces in found for p in pieces if p.is_chain]

    def check_block(self, description, x):
        check = check_chain if isinstance(description, chain.Chain) else check_dense
        check(description, x)

    def run_block(self, backend, description, x):
        if isinstance(description, chain.Chain):
            return chain.run(backend, description, x)[0]
        return carry(*dense.run(backend, description, x, self._fusedres_recompute))

    def forward(self, init_features: Tensor) -> Tensor:
        x, original = init_features, super(FusedBlock, self).forward
        try:
            found = self.reading()
        except Unsupported as reason:
            return self.unfused(reason, original, x)
        if self._fusedres_layers is not None:
            children = list(self._modules.values())
            first = len(children) - len(self._fusedres_layers)
            x = _in_a_row(x, children[:first])
            original = functools.partial(_in_a_row, children=children[first:])
        if isinstance(found, Part):
            return self.fused_forward(found, original, x)
        return self.in_pieces(x, found)

    def in_pieces(self, x: Tensor, layers: list[list[describe.Piece]]) -> Tensor:
        """The output where layers are split: each reads a concatenation, as in the original."""
        features, outcomes = [x], []
        for pieces in layers:
            h = torch.cat(features, 1)
            for piece in pieces:
                if piece.is_chain:
                    h = self.fused_forward(piece.part, piece.original, h)
                    outcomes.append(self.outcome())
                else:
                    h = piece.original(h)
            features.append(h)
        self.settle(outcomes)
        return torch.cat(features, 1)


def carry(x: Tensor, stats: Tensor | None) -> Tensor:
    """``x`` with its statistics: whoever normalises this very tensor next need not reduce it again; the version, which inference tensors do
    not have, tells whether it was changed since."""
    if stats is not None and not x.is_inference():
        setattr(x, _STATS, (x._version, stats))
    return x


def carried_stats(x: Tensor) -> Tensor | None:
    """The statistics that the writer of ``x`` left with it, where x is still what it wrote."""
    version, stats = getattr(x, _STATS, (None, None))
    return stats if stats is not None and version == x._version else None


class _NormPoolKind(FusedBlock):
    def check_block(self, description, x):
        check_norm_pool(description, x)

    def run_block(self, backend, description, x):
        return norm_pool.run(backend, description, x, carried_stats(x))


class FusedTransition(_NormPoolKind):
    """A DenseNet transition: norm-relu-conv(1x1)-pool(mean), the mean taken first."""

    kind = "transition"
    #: the plans by mode, where it is no Sequential
    _fusedres_plans: dict[bool, structure.Plan] | None = None

    def read_block(self):
        plan = (
            structure.Plan(tuple(self._modules))
            if self._fusedres_plans is None
            else self._fusedres_plans[self.training]
        )
        describe.check_stamps(self, plan)
        return Part(functools.partial(describe.transition, describe.tokens(self, plan.main)))


class FusedHead(_NormPoolKind):
    """A torchvision DenseNet: its last norm-relu-mean run as one, behind its features."""

    kind = "densenet head"

    def read_block(self) -> nn.Module:
        """The last module of its features."""
        last = list(self.features)[-1]
        describe.plain(last, *structure.norm_types())
        if describe.hooked(self.features):
            raise Unsupported("a hook is registered on its features")
        return last

    def parts(self):
        return [_head_part(self.read_block(), (1, 1))]

    def inside(self):
        return [self, self.features, list(self.features)[-1]]

    def forward(self, x: Tensor) -> Tensor:
        try:
            last = self.reading()
        except Unsupported as reason:
            return self.unfused(reason, super(FusedBlock, self).forward, x)
        before = len(self.features) - 1
        if isinstance(self.features, FusedSequential):
            x = self.features.run_children(x, before)
        else:
            x = _in_a_row(x, list(self.features)[:before])
        part = _head_part(last, tuple(x.shape[2:]))
        x = self.fused_forward(part, lambda x: torch.relu(last(x)).mean((2, 3), keepdim=True), x)
        return self.classifier(torch.flatten(x, 1))


def _head_part(last: nn.Module, size: tuple[int, ...]) -> Part:
    """BatchNorm, ReLU and the mean over ``size``."""

    def read(dtype: torch.dtype | None):
        window = describe.Pool("mean", size, size, (0, 0))
        return norm_pool.NormPool(describe.norm(last, "relu"), window, None), [last]

    return Part(read)


class FusedSyncNorm(_ChainKind):
    """A SyncBatchNorm that no block runs: by the schedule, too, on every device, as its neighbours in other processes may do in theirs."""

    kind = "sync batch norm"

    def read_block(self):
        return Part(functools.partial(describe.lone_norm, self))

    def cast_input(self, x, cast):
        return x  # autocast leaves a BatchNorm its input's dtype


KINDS: dict[str, type[FusedBlock]] = {
    kind.kind: kind
    for kind in (
        FusedResidual, FusedBasic, FusedBottleneck, FusedPreActBasic, FusedPreActBottleneck, FusedPlain, FusedHighway,
        FusedStem, FusedSequential, FusedDenseBlock, FusedTransition, FusedHead, FusedSyncNorm,
    )
}  # fmt: skip
_classes: dict[tuple[str, type], type] = {}


def fused_class(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    """``original`` with the fused forward of ``kind`` in front."""
    key = (kind, original)
    if key not in _classes:
        names = {"__module__": original.__module__, "__doc__": original.__doc__, "_fusedres_converted": True}
        _classes[key] = type(original.__name__, (KINDS[kind], original), names)
    return _classes[key]


def is_converted(module: nn.Module) -> bool:
    """Whether ``convert`` gave ``module`` its class (and ``revert`` can take it back)."""
    return getattr(type(module), "_fusedres_converted", False)


def _rebuild(kind: str, original: type[nn.Module]) -> nn.Module:
    cls = fused_class(kind, original)
    return cls.__new__(cls)
