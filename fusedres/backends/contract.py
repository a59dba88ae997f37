"""What a backend is: the primitives, what each may alias, and what may be left out.

Conventions shared by every backend
-----------------------------------
map          N x C x H x W, channels_last, possibly a channel slice of a wider channels_last buffer: ``stride(1) == 1`` and pixel
             ``(n, h, w)`` starts at ``((n * H + h) * W + w) * P`` with ``P >= C``, so that a map is a matrix of ``M = N * H * W`` rows of C
             values, P apart. dtype float16, bfloat16, float32 or float64.
accumulation float64 for float64 maps, float32 otherwise: the dtype of every per-channel tensor below and of all arithmetic.
scale_shift  ``[2, C]``: a normalised map is ``scale * raw + shift``, never stored.
mean_invstd  ``[2, C]``, with which ``xhat = (raw - mean) * invstd``.
stats        ``[2, C]`` (mean, M2): M2 is the sum of squared deviations from the mean, over the M rows.
coeff        ``[3, C]`` (p, q, r): the pending form of a gradient, ``p * grad + q * raw + r`` (cuDNN: eq_scale_dy, eq_scale_x, eq_bias).
sums         ``[2, C]`` (sum of dz, sum of dz * xhat), what a BatchNorm's backward needs from a pass.
act          a name of :mod:`fusedres.activations`; NaN passes, and where ReLU is NaN so does the gradient.
geometry     a :class:`~fusedres.specs.Geometry`; convolution padding is zero *after* scale, shift and activation.

Per-channel tensors may be column slices of wider ones (``stride(1) == 1``, any ``stride(0)``). What is passed in to be written (``out``,
``stats``, ``dx``, ``sums``, ``coeff``) is overwritten, or accumulated where said, and may hold NaN before; a map that is returned fresh is
channels_last. No primitive keeps a reference to its arguments, and no two of its outputs share memory. Where an output may be an input is
said with each primitive; elsewhere it may not.

The definition of every primitive in plain PyTorch is :mod:`fusedres.backends.eager`; ``tests/backends/test_contract.py`` holds every
registered backend to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod, update_abstractmethods
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry, Norm, Pool


class Reduction(Protocol):
    """Room for two reductions per channel, ``[2, C]``: a tensor, or a backend's own form of one, which leaves the merge of partial results
    to the C-sized primitive that reads it next (``bn_coefficients`` or ``bn_backward``). After ``bn_backward`` its rows can be read."""

    def __getitem__(self, row: int, /) -> Tensor: ...


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-channel tensors and of arithmetic for maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_activation(x: LazyMap, residual: LazyMap | None) -> None:
    """ValueError where an operand of an addition has an activation, which the pass would drop."""
    if x.act != "none" or (residual is not None and residual.act != "none"):
        raise ValueError("an operand of an addition has an activation of its own")


def is_relu(x: LazyMap) -> bool:
    """Whether a highway's transform has a ReLU. ValueError for an activation that its pass does not know."""
    if x.act not in ("none", "relu"):
        raise ValueError(f"a highway's pass knows the activations 'none' and 'relu', found {x.act!r}")
    return x.act == "relu"


def is_max(pool: Pool) -> bool:
    """Whether a pool takes the maximum. ValueError for a kind that no pass computes."""
    if pool.kind not in ("max", "mean"):
        raise ValueError(f"unknown pool {pool.kind!r}: expected 'max' or 'mean'")
    return pool.kind == "max"


class Backend(ABC):
    """The primitives, once for a device family. A subclass that lacks one cannot be registered (:func:`fusedres.backends.select.register`).

    May be left out, with what follows: ``new_reduction`` and ``parameter_grad`` (reductions are tensors, merged where they are made),
    ``ahead`` (each frozen BatchNorm has a step of its own), ``routes`` (``report`` shows no plan per convolution), ``tuner``
    (``fusedres.tune`` finds nothing to measure), ``run_schedule`` (schedules run in Python each time), ``keep_packed`` (weights are read as
    they are), ``distrusts`` (nothing is found out), ``notes`` (``doctor`` has nothing more to say).
    """

    #: what the user calls it
    name: ClassVar[str]
    #: which convolutions can be tuned, and how: None where there is nothing to choose
    tuner: ClassVar[Any] = None
    #: whether it is asked what all backends return, of tensors without values, where sizes may be symbols of a tracer
    stands_in: ClassVar[bool] = False

    @abstractmethod
    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where this backend serves maps of ``dtype`` on ``device``, else the reason in words that complete a sentence."""

    # ---- maps --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, x: Tensor, stats: Reduction) -> None:
        """``stats`` (mean, M2) of the map ``x`` per channel. Reads x."""

    @abstractmethod
    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        """The convolution of ``x`` with its epilogue; returns what was written. Reads x (and the residual), writes out."""

    @abstractmethod
    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(dx, dweight)`` of ``conv(x, weight)``, None where not needed: dx where ``target`` is None, dweight without ``need_dw``.

        With da the input gradient of the convolution, ``dz = da * act'(scale * raw + shift)``, rebuilt from x; dx and sums as
        :class:`~fusedres.operands.GradTarget` says. ``dweight`` has weight's shape and dtype. Deterministic. ``target.base`` may be
        ``grad.grad``. Reads grad, its raw, x; writes dx.
        """

    @abstractmethod
    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        """The pass after a library's input gradient ``da``, which it may overwrite: dz, sums and dx as :meth:`conv_backward` says."""

    @abstractmethod
    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: Reduction | None = None,
    ) -> Tensor:
        """``out = act(x + residual)``, one pass; ``stats`` are those of out. The operands' own ``act`` is "none": what is between a
        BatchNorm and an addition has no place here. Without residual it is :meth:`materialize`. ``out`` may be ``x.raw``. Reads raw and
        residual, writes out."""

    @abstractmethod
    def add_act_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        sums: Reduction | None = None,
        residual_sums: Reduction | None = None,
    ) -> Tensor:
        """``dz``, the gradient of ``x + residual`` under ``act``, and the sums that its BatchNorms need.

        The activation's derivative is rebuilt from the operands (the output is not needed, so nobody has to keep it). ``sums`` uses xhat of
        x, ``residual_sums`` that of residual. With ``act="none"`` the result is ``grad`` itself, not a copy. Reads grad, raw and residual,
        writes dz.
        """

    @abstractmethod
    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        """``out = t * x + (1 - t) * carry`` with the transform gate ``t = sigmoid(gate)`` (Srivastava et al. 2015, arXiv 1505.00387), one
        pass. ``x.act`` is "none" or "relu", ``gate.act`` "none". Reads raw, gate and carry, writes out: four maps."""

    @abstractmethod
    def highway_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        gate: LazyMap,
        carry: Tensor,
        *,
        sums: Reduction | None = None,
        gate_sums: Reduction | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dz, dgate, dcarry)``, the gradients of x's ``scale * raw + shift``, of the gate's and of carry by :meth:`highway_forward`, one
        pass. Reads grad, raw, gate and carry, writes the three: seven maps."""

    @abstractmethod
    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        """``p * grad + q * raw + r``, stored. ``out`` may be ``grad.grad``. Reads both, writes one."""

    @abstractmethod
    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Reduction | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``pool(x)`` and, for max, the uint8 position in the window of each maximum (``kh * KW + kw``, the first one in that order, NaN
        winning; channels_last), which costs an eighth of a map in bf16. ``stats`` are those of out. Reads x, writes out."""

    @abstractmethod
    def pool_backward(
        self,
        grad: Tensor,
        index: Tensor | None,
        x: LazyMap,
        pool: Pool,
        *,
        sums: Reduction | None = None,
        coeff: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor | None:
        """The backward of :meth:`pool_forward`, without ever storing dz: called once with ``sums`` and once with ``coeff``.

        dz is the gradient of ``scale * raw + shift``: pool's gradient times the activation's derivative. With ``sums`` it only reduces them
        (returns None); with ``coeff`` it returns ``dx = p * dz + q * raw + r`` (into ``dx`` if given). Reads grad and x, writes dx in the
        second call.
        """

    # ---- C numbers ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def bn_coefficients(self, norm: Norm, stats: Reduction, count: int) -> tuple[Tensor, Tensor]:
        """``(scale_shift, mean_invstd)`` of a BatchNorm in training from ``stats`` over ``count`` rows; updates the running statistics in
        place (unbiased variance, factor ``norm.momentum``) where there are any, past autograd's version counters: as in torch, whose own
        BatchNorm may have saved these two for a backward."""

    @abstractmethod
    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(scale_shift, mean_invstd)`` in accumulation ``dtype`` of a BatchNorm that normalises by its running statistics."""

    @abstractmethod
    def bn_backward(
        self, norm: Norm, sums: Reduction, count: int, mean_invstd: Tensor, coeff: Tensor, accumulate: bool = False
    ) -> None:
        """The pending form of the gradient of raw, from the ``sums`` over ``count`` rows: writes ``coeff``.

        p = gamma * invstd, and in training q = -p * invstd * mean(dz * xhat), r = -p * mean(dz) - q * mean (Ioffe and Szegedy 2015,
        section 3); not in training q = r = 0. With ``accumulate`` (several readers of one map, whose p the passes have applied already) q
        and r are added to those in ``coeff`` and p is left alone. The gradients of gamma and beta are ``sums[1]`` and ``sums[0]``.
        """

    # ---- what may be left out ----------------------------------------------------------------------------------------

    def new_reduction(self, channels: int, like: Tensor) -> Reduction:
        """Room for two reductions of a map like ``like`` that the next C-sized primitive reads."""
        return torch.empty(2, channels, dtype=accum_dtype(like.dtype), device=like.device)

    def parameter_grad(self, sums: Reduction, row: int, dtype: torch.dtype) -> Tensor:
        """A row of ``sums``, after ``bn_backward``, as the gradient of a BatchNorm's parameter of ``dtype``."""
        return sums[row].to(dtype)

    def ahead(self, norms: Sequence[Norm]) -> Backend:
        """This backend for one schedule, none of whose BatchNorms ``norms`` uses its batch: one that has computed :meth:`bn_frozen` of all
        of them in fewer steps. Itself where that gains nothing."""
        return self

    def routes(self, primitive: str, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Which way a call of ``conv_forward`` or ``conv_backward`` with these arguments runs, by ``"forward"``, ``"dgrad"`` and
        ``"wgrad"``: ``"fused"`` (a kernel of ours) or ``"library"`` (oneDNN's or cuDNN's between our passes). Empty where the backend has
        no choice. Takes meta tensors."""
        return {}

    def distrusts(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why what :meth:`supports` promises is not to be trusted there, as was found at its first use, in words that complete a sentence;
        None where nothing was."""
        return None

    def notes(self, device: torch.device) -> list[str]:
        """What ``doctor`` says of ``device`` besides, in lines: what was found out there, and what is not used for it."""
        return []

    def run_schedule(
        self,
        memo: dict[Any, Any],
        which: Hashable,
        maps: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        schedule: Callable[[], Sequence[Tensor | None]],
    ) -> Sequence[Tensor | None]:
        """``schedule()``: primitives of this backend in a row, on ``maps`` and on other ``tensors``. ``which`` tells apart the schedules of
        one ``memo``, and all constants of a schedule. What it makes depends on nothing else but the measures of its tensors, which are
        nearly always the same for one ``which`` and ``maps`` alike, and it has no other effects than on its tensors, so that a backend may
        keep in ``memo`` how it went for tensors like these and go the same way again."""
        return schedule()

    def keep_packed(self, weight: Tensor) -> Callable[[], None] | None:
        """Have the forward convolutions of ``weight`` keep it in the order in which they read it, from call to call, until torch counts a
        change of it, and return what ends that; None where they read it as it is. Who calls this holds the memory of ``weight`` until
        then."""
        return None

    # ---- shared ------------------------------------------------------------------------------------------------------

    def conv_norm_forward(
        self,
        x: LazyMap,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        norm: Norm,
        *,
        out: Tensor | None = None,
        residual: LazyMap | None = None,
        act: str = "none",
    ) -> Tensor:
        """``act(norm(conv(x)) + residual)`` for a ``norm`` that normalises by its running statistics; its own activation is left out.
        A backend may do both in one step."""
        scale_shift, _ = self.bn_frozen(norm, accum_dtype(x.raw.dtype))
        return self.conv_forward(x, weight, bias, geometry, Epilogue(out, None, scale_shift, residual, act))

    def materialize(self, x: LazyMap, *, out: Tensor | None = None, stats: Reduction | None = None) -> Tensor:
        """``x`` as a stored map; a copy where it is plain. Reads raw, writes out."""
        return self.add_act_forward(x.before_act, None, x.act, out=out, stats=stats)


#: the names of the primitives: everything that a backend must have, but for ``supports``
PRIMITIVES: tuple[str, ...] = tuple(sorted(Backend.__abstractmethods__ - {"supports"}))


class Wrapped(Backend):
    """A backend around another, for whoever counts, times, records or compares: override :meth:`call`, through which every primitive goes.

    It knows no argument lists; what it needs of one it reads with ``inspect.signature`` of the contract's method.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        # an instance's, where a backend's are its class's
        self.name = inner.name  # type: ignore[misc]
        self.tuner = inner.tuner  # type: ignore[misc]
        self.stands_in = inner.stands_in  # type: ignore[misc]

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        """Run ``primitive`` on the inner backend."""
        return getattr(self.inner, primitive)(*args, **kwargs)

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.inner.supports(device, dtype)

    def new_reduction(self, channels: int, like: Tensor) -> Reduction:
        return self.inner.new_reduction(channels, like)

    def parameter_grad(self, sums: Reduction, row: int, dtype: torch.dtype) -> Tensor:
        return self.inner.parameter_grad(sums, row, dtype)

    def routes(self, primitive: str, *args: Any, **kwargs: Any) -> dict[str, str]:
        return self.inner.routes(primitive, *args, **kwargs)

    def keep_packed(self, weight: Tensor) -> Callable[[], None] | None:
        return self.inner.keep_packed(weight)

    def distrusts(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self.inner.distrusts(device, dtype)


def _forwarding(primitive: str) -> Callable[..., Any]:
    def forward(self: Wrapped, *args: Any, **kwargs: Any) -> Any:
        return self.call(primitive, *args, **kwargs)

    forward.__name__, forward.__doc__ = primitive, f"See :meth:`Backend.{primitive}`."
    return forward


for _name in PRIMITIVES:
    setattr(Wrapped, _name, _forwarding(_name))
update_abstractmethods(Wrapped)
