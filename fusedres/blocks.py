"""Fused blocks: each kind is a mixin that puts its fused forward in front of a module class's own.

``convert`` gives an existing module the mixed class, so that its children, parameters, buffers, hooks and names stay the very objects they
were; ``fusedres.nn`` builds modules that have it from the start. Whatever cannot be fused at the moment of a call (a hook on an inner
module, a replaced child, an unusual input) runs the class's own forward, and the module remembers why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch import Tensor, nn

from . import describe, dispatch
from .describe import Unsupported
from .schedules import chain, dense, norm_pool
from .schedules.common import Norm

_STATS = "_fusedres_stats"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in where ``x`` lives, None where it is off."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class FusedBlock:
    """What the kinds share. A kind gives ``kind`` (its name), ``describe_block`` and ``run_block``."""

    kind = ""
    #: whether backward recomputes cheap convolutions instead of keeping their outputs; set by convert
    _fusedres_recompute = False
    #: the outcome of the last call, for report: the backend's name, or why the original modules ran
    _fusedres_last: str | None = None

    @classmethod
    def original_class(cls) -> type[nn.Module]:
        """The class whose forward is the original one."""
        return next(c for c in cls.__mro__ if not issubclass(c, FusedBlock))

    def describe_block(self, dtype: torch.dtype | None, part=None):
        """``(description, BatchNorm modules)``; raises Unsupported. ``dtype`` casts convolution weights, as autocast does; ``part``
        says which piece of the module is meant, where it has several."""
        raise NotImplementedError

    def check_block(self, description, x: Tensor) -> None:
        """Check the description against the input; raises Unsupported, or ValueError as torch would."""
        raise NotImplementedError

    def run_block(self, backend, description, x: Tensor) -> Tensor:
        """Run the schedule."""
        raise NotImplementedError

    def _prepare(self, x: Tensor, part):
        """``(backend, description, BatchNorms, input)``; raises Unsupported."""
        if torch.compiler.is_compiling():
            raise Unsupported("torch.compile traces the original modules")
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            raise Unsupported("torch.jit traces the original modules")
        if describe.global_hooks():
            raise Unsupported("a global module hook is registered")
        cast = _autocast_dtype(x) if isinstance(x, Tensor) else None
        description, norms = self.describe_block(cast, part)
        x = self.cast_input(x, cast)
        self.check_block(description, x)
        backend = dispatch.resolve(x.device, x.dtype)
        if backend is None:
            raise Unsupported(f"no fused backend serves {x.dtype} on {x.device}")
        return backend, description, norms, x

    def cast_input(self, x: Tensor, cast: torch.dtype | None) -> Tensor:
        """The input as autocast would hand it to the first convolution."""
        if cast is not None and x.dtype != cast:
            raise Unsupported(f"its input is {x.dtype} under autocast to {cast}")
        return x

    def fused_forward(self, x: Tensor, original, part=None) -> Tensor:
        """The block's output: fused, or by ``original(x)`` where it cannot be."""
        try:
            backend, description, norms, prepared = self._prepare(x, part)
        except Unsupported as reason:
            self.__dict__["_fusedres_last"] = f"original modules: {reason}"
            return original(x)
        self.__dict__["_fusedres_last"] = backend.name
        describe.count_batches(*norms)
        autocast = _autocast_dtype(prepared) is not None
        with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
            return self.run_block(backend, description, prepared)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x, super().forward)

    def _get_name(self) -> str:
        return f"Fused{self.original_class().__name__}" if is_converted(self) else super()._get_name()

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        if not is_converted(self):
            return reduced
        # the mixed class is made at run time: pickle by what it is made of
        return (_rebuild, (type(self).kind, self.original_class()), *reduced[2:])


def check_chain(description: chain.Chain, x: Tensor) -> None:
    """Check a residual chain against its input."""
    describe.check_map(x, description.units[0].conv.weight.dtype)
    shape = tuple(x.shape)
    for unit in description.units:
        shape = describe.check_conv(unit.conv, shape, x)
        describe.check_norm(unit.norm, shape, x)
    if description.projection is not None:
        other = describe.check_conv(description.projection.conv, tuple(x.shape), x)
        describe.check_norm(description.projection.norm, other, x)
        if other != shape:
            raise Unsupported(f"its shortcut gives {other}, its main path {shape}")
    elif description.identity and tuple(x.shape) != shape:
        raise Unsupported(f"its identity shortcut has shape {tuple(x.shape)}, its main path {shape}")
    if description.pool is not None:
        sizes = zip(shape[2:], description.pool.kernel, description.pool.padding, strict=True)
        if any(size + 2 * pad < kernel for size, kernel, pad in sizes):
            raise Unsupported("a pooling window larger than its input")


def check_dense(layers: tuple[dense.Layer, ...], x: Tensor) -> None:
    """Check the layers of a dense block against its input."""
    describe.check_map(x, layers[0].conv1.weight.dtype)
    shape = tuple(x.shape)
    for layer in layers:
        describe.check_norm(layer.norm1, shape, x)
        mid = describe.check_conv(layer.conv1, shape, x)
        describe.check_norm(layer.norm2, mid, x)
        out = describe.check_conv(layer.conv2, mid, x)
        if out[2:] != shape[2:] or mid[2:] != shape[2:]:
            raise Unsupported(f"a layer changes the spatial size from {shape[2:]} to {out[2:]}")
        shape = (shape[0], shape[1] + out[1], *shape[2:])


def check_norm_pool(block: norm_pool.NormPool, x: Tensor) -> None:
    """Check a transition or head against its input."""
    describe.check_map(x, x.dtype if block.conv is None else block.conv.weight.dtype)
    describe.check_norm(block.norm, tuple(x.shape), x)
    pooled = tuple(size // k for size, k in zip(x.shape[2:], block.pool.kernel, strict=True))
    if min(pooled) < 1:
        raise Unsupported("a pooling window larger than its input")
    if block.conv is not None:
        describe.check_conv(block.conv, (*x.shape[:2], *pooled), x)


class _ChainKind(FusedBlock):
    def check_block(self, description, x):
        check_chain(description, x)

    def run_block(self, backend, description, x):
        if self._fusedres_recompute:
            description = dataclasses.replace(description, recompute=True)
        return chain.run(backend, description, x)


class FusedBasic(_ChainKind):
    """conv1-bn1-relu-conv2-bn2, ``downsample``, add, relu."""

    kind = "basic block"

    def describe_block(self, dtype, part=None):
        return describe.residual(self, [(self.conv1, self.bn1), (self.conv2, self.bn2)], dtype)


class FusedBottleneck(_ChainKind):
    """conv1-bn1-relu-conv2-bn2-relu-conv3-bn3, ``downsample``, add, relu."""

    kind = "bottleneck"

    def describe_block(self, dtype, part=None):
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        return describe.residual(self, pairs, dtype)


class FusedStem(_ChainKind):
    """A torchvision ResNet: its conv1-bn1-relu-maxpool run fused, then its layers."""

    kind = "resnet stem"

    def describe_block(self, dtype, part=None):
        return describe.stem([self.conv1, self.bn1, self.relu, self.maxpool], dtype)

    def cast_input(self, x, cast):
        return x if cast is None else x.to(cast)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.fused_forward(x, lambda x: self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def conv_runs(children: list[nn.Module]) -> list[tuple[int, int]]:
    """Where (start, stop) conv-BN[-act][-max pool] stands in a row of modules."""
    runs, i = [], 0
    while i < len(children) - 1:
        if isinstance(children[i], nn.Conv2d) and isinstance(children[i + 1], nn.BatchNorm2d):
            stop = i + 2
            for types in (nn.ReLU, nn.MaxPool2d):
                if stop < len(children) and isinstance(children[stop], types):
                    stop += 1
            runs.append((i, stop))
            i = stop
        else:
            i += 1
    return runs


class FusedSequential(_ChainKind):
    """A Sequential: every conv-BN[-act][-max pool] in it runs fused, the rest as it is."""

    kind = "sequential"

    def describe_block(self, dtype, part=None):
        convolution, batch_norm, *rest = part
        act = next((c for c in rest if isinstance(c, nn.ReLU)), None)
        pooling = next((c for c in rest if isinstance(c, nn.MaxPool2d)), None)
        return describe.stem([convolution, batch_norm, act, pooling], dtype)

    def cast_input(self, x, cast):
        return x if cast is None else x.to(cast)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_children(x, list(self))

    def run_children(self, x: Tensor, children: list[nn.Module]) -> Tensor:
        """``children`` in a row."""
        at = 0
        for start, stop in conv_runs(children):
            x = _in_a_row(x, children[at:start])
            run = children[start:stop]
            x = self.fused_forward(x, functools.partial(_in_a_row, children=run), part=run)
            at = stop
        return _in_a_row(x, children[at:])


def _in_a_row(x: Tensor, children: list[nn.Module]) -> Tensor:
    for child in children:
        x = child(x)
    return x


class FusedDenseBlock(FusedBlock):
    """A DenseNet block: a ModuleDict of layers, in one buffer."""

    kind = "dense block"

    def describe_block(self, dtype, part=None):
        layers, norms = [], []
        for layer in self.values():
            if describe.hooked(layer):
                raise Unsupported("a hook is registered on a layer")
            described, found = describe.dense_layer(layer, dtype)
            layers.append(described)
            norms += found
        if not layers:
            raise Unsupported("it has no layers")
        return tuple(layers), norms

    def check_block(self, description, x):
        check_dense(description, x)

    def run_block(self, backend, description, x):
        buffer, stats = dense.run(backend, description, x, self._fusedres_recompute)
        if stats is not None and not buffer.is_inference():
            # whoever normalises this very tensor next need not reduce it again; the version, which inference tensors do not have, tells
            # whether it was changed since
            setattr(buffer, _STATS, (buffer._version, stats))
        return buffer

    def forward(self, init_features: Tensor) -> Tensor:
        return self.fused_forward(init_features, super(FusedBlock, self).forward)


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

    def describe_block(self, dtype, part=None):
        return describe.transition(self, dtype)


class FusedHead(_NormPoolKind):
    """A torchvision DenseNet: its last norm-relu-mean run as one, behind its features."""

    kind = "densenet head"

    def describe_block(self, dtype, part=None):
        size = part or (1, 1)
        batch_norm = list(self.features)[-1]
        described: Norm = describe.norm(batch_norm, "relu")
        window = describe.Pool("mean", size, size, (0, 0))
        return norm_pool.NormPool(described, window, None), [batch_norm]

    def forward(self, x: Tensor) -> Tensor:
        children = list(self.features)
        try:
            describe.plain(children[-1], nn.BatchNorm2d)
            if describe.hooked(self.features):
                raise Unsupported("a hook is registered on its features")
        except Unsupported as reason:
            self.__dict__["_fusedres_last"] = f"original modules: {reason}"
            return super(FusedBlock, self).forward(x)
        if isinstance(self.features, FusedSequential):
            x = self.features.run_children(x, children[:-1])
        else:
            x = _in_a_row(x, children[:-1])
        x = self.fused_forward(
            x, lambda x: torch.relu(children[-1](x)).mean((2, 3), keepdim=True), part=tuple(x.shape[2:])
        )
        return self.classifier(torch.flatten(x, 1))


KINDS: dict[str, type[FusedBlock]] = {
    kind.kind: kind
    for kind in (
        FusedBasic, FusedBottleneck, FusedStem, FusedSequential, FusedDenseBlock, FusedTransition, FusedHead,
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
