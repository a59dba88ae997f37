"""Fused Triton kernels: pending forms applied where a map is loaded, statistics and sums reduced where it is written.

Serves GPUs, and CPU tensors through Triton's interpreter (for tests: set TRITON_INTERPRET=1 before the first import). For each convolution
a plan chooses between the fused kernel and the library's convolution between this backend's passes: a measured one
(:mod:`fusedres.tuning.plans`), else an estimated one (:mod:`fusedres.tuning.estimate`); :class:`use_plan` overrides both. A kernel that
cannot be built for a convolution on this machine is said once: a smaller tile takes its place, or the library.
"""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .. import first_use
from ..activations import parse
from ..kernels import (
    batchnorm,
    conv_dgrad,
    conv_forward,
    conv_pointwise_backward,
    conv_pointwise_forward,
    conv_wgrad,
    elementwise,
    highway,
    launch,
    requests,
    tiles,
)
from ..kernels import pool as pooling
from ..kernels.launch import INTERPRETED, arch_of, build_fault, target_device
from ..kernels.reduce import Reduction
from ..kernels.tiles import ConvConfig
from ..operands import FRESH, PLAIN, Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry, Norm, Pool
from ..tuning import estimate, plans, selfcheck
from ..tuning.convolutions import (
    BOTH,
    TritonTuner,
    backward_problem,
    forward_problem,
    has_fused_form,
    has_one_kernel,
    operands,
)
from ..tuning.override import chosen_plan
from ..tuning.override import use_plan as use_plan  # where a user finds it
from ..tuning.plans import FUSED, LIBRARY, Plan, Problem
from . import library_conv, tape
from .contract import Backend, Wrapped, without_activation

#: where a primitive reduces to
Room = Tensor | Reduction
T = TypeVar("T")

#: what Triton raises where a kernel cannot be built, or does not fit this GPU
BUILD_ERRORS = (CompilationError, OutOfResources, PTXASError)


def _reason(error: BaseException) -> str:
    """What went wrong, in a line, without the source that the compiler quotes around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def _parsed(x: LazyMap) -> Any:
    """The operand as kernels take it: the activation's name replaced by what it says."""
    return LazyMap(x.raw, x.scale_shift, cast(Any, parse(x.act)), x.mean_invstd)


def _parsed_epilogue(epilogue: Epilogue) -> Any:
    """As :func:`_parsed`."""
    return epilogue._replace(act=parse(epilogue.act))


def _forward(x: Any, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Any, config: ConvConfig | None):
    """A convolution by our kernels: by tensor descriptors where ``config`` says so and they can, else by conv_forward's."""
    if config is not None and config.descriptors:
        y = conv_pointwise_forward.conv_pointwise_forward(x, weight, bias, geometry, epilogue, config)
        if y is not None:
            return y
    return conv_forward.conv_forward(x, weight, bias, geometry, epilogue, config)


def _otherwise(problem: Problem) -> str:
    """How it runs where not by its kernel."""
    return "gradient by gradient" if problem.op == "backward" else "by the library"


def _launcher() -> tape.Launcher:
    return tape.Launcher(requests.observed, launch.driver_launch(), requests.driver_launch_dependent())


class TritonBackend(Backend):
    """See the module."""

    name = "triton"

    def __init__(self) -> None:
        self.tuner = TritonTuner(self)  # type: ignore[misc]  # an instance's, where the contract's is a class's
        # what runs in the place of a kernel that could not be built: one in a smaller tile, or the library
        self._fallen: dict[Problem, Plan] = {}
        self._checker = selfcheck.Checker(self)

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """See the contract."""
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"its kernels compute in float16, bfloat16 and float32, not {dtype}"
        if device.type == "cpu":
            if not INTERPRETED:
                return (
                    "its kernels run on GPUs (on CPU tensors for tests only, where TRITON_INTERPRET=1 is set at import)"
                )
            return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
        if device.type != "cuda":
            return f"its kernels run on GPUs, not on {device.type}"
        if INTERPRETED:
            return "TRITON_INTERPRET=1 is set, with which its kernels run on CPU tensors only"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need compute capability 8.0 or newer"
        return build_fault()

    # ---- convolutions ------------------------------------------------------------------------------------------------

    def _plan(self, problem: Callable[[], Problem], device: torch.device) -> Plan:
        """The plan for a problem where none is overridden: what has taken a failed kernel's place, else measured, else estimated. Under
        interpretation the fused kernel where nothing else is said, since that is what is to be tested."""
        measured = plans.table(target_device(device))
        if INTERPRETED and not measured and not self._fallen:
            return FUSED
        key = problem()
        if key in self._fallen:
            return self._fallen[key]
        if key in measured:
            plan = measured[key]
        else:
            plan = FUSED if INTERPRETED or estimate.is_fused(key, arch_of(device)) else LIBRARY
        return plan if self._is_trusted(key, plan, device) else self._fallen[key]

    def _is_trusted(self, problem: Problem, plan: Plan, device: torch.device) -> bool:
        """Whether the kernel of ``plan`` computes on this device what the library does; where not, that is said and the library's turn."""
        if not plan.fused or not self.checks(device):
            return True
        try:
            found = self._checker.compare(problem, plan, device)
        except BUILD_ERRORS:  # which are dealt with where the kernel is to run
            return True
        if found == selfcheck.RIGHT:
            return True
        self._fallen[problem] = LIBRARY
        self._say(problem, f"{found} on this GPU", f"which runs {_otherwise(problem)}")
        return False

    def checks(self, device: torch.device) -> bool:
        """Whether kernels are compared at their first use there: on a GPU, but not while a graph is captured or launches are listed."""
        return (
            device.type == "cuda"
            and not INTERPRETED
            and first_use.is_on()
            and not launch.is_recording()
            and not torch.cuda.is_current_stream_capturing()
        )

    def notes(self, device: torch.device) -> list[str]:
        """See the contract."""
        known = selfcheck.known(device)
        wrong = [f for f in known.values() if f.found != selfcheck.RIGHT]
        head = [f"{len(known)} kernels known here, {len(wrong)} of them not used"] if known else []
        return [*head, *(f"{f.what}: {f.found}" for f in wrong)]

    def forward_plan(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue
    ) -> Plan:
        """How such a call of :meth:`conv_forward` runs. ValueError where :class:`use_plan` gives a tile to what has no fused form."""
        override = chosen_plan()
        if not has_fused_form(epilogue):
            if override is not None and override.plan.config is not None:
                raise ValueError(
                    "use_plan gives a tile to a convolution that runs by the library: statistics of a sum have no kernel"
                )
            return LIBRARY
        if override is not None:
            return override.plan
        return self._plan(lambda: forward_problem(x, weight, bias, geometry, epilogue), x.raw.device)

    def backward_plans(
        self, grad: LazyGrad, x: LazyMap, weight: Tensor, geometry: Geometry, target: GradTarget | None, need_dw: bool
    ) -> dict[str, Plan]:
        """How such a call of :meth:`conv_backward` runs: by ``"dgrad"`` and ``"wgrad"``, those that are needed; or by ``"backward"`` alone,
        which is both by one kernel."""
        device, override = x.raw.device, chosen_plan()

        def plan(op: str) -> Plan:
            if override is not None:
                return override.both if op == "backward" else override.plan
            return self._plan(
                functools.partial(backward_problem, op, grad, x, weight, geometry, target, need_dw), device
            )

        if has_one_kernel(x, weight, geometry, target, need_dw, arch_of(device)):
            both = plan("backward")
            if both.fused:
                return {"backward": both}
        needed = (("dgrad", target is not None), ("wgrad", need_dw))
        return {op: plan(op) for op, need in needed if need}

    def routes(self, primitive: str, *args: Any, **kwargs: Any) -> dict[str, str]:
        """See the contract."""
        if primitive == "conv_forward":
            chosen = {"forward": self.forward_plan(**operands(primitive, *args, **kwargs))}
        elif primitive == "conv_backward":
            chosen = self.backward_plans(**operands(primitive, *args, **kwargs))
            if "backward" in chosen:
                chosen = dict.fromkeys(BOTH, chosen["backward"])
        else:
            chosen = {}
        return {op: "fused" if plan.fused else "library" for op, plan in chosen.items()}

    def conv_forward(
        self, x: LazyMap, weight: Tensor, bias: Tensor | None, geometry: Geometry, epilogue: Epilogue = PLAIN
    ) -> Tensor:
        """See the contract."""
        plan = self.forward_plan(x, weight, bias, geometry, epilogue)
        return self.forward_by(plan, x, weight, bias, geometry, epilogue, strict=chosen_plan() is not None)

    def forward_by(
        self,
        plan: Plan,
        x: LazyMap,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        epilogue: Epilogue,
        *,
        strict: bool = True,
    ) -> Tensor:
        """:meth:`conv_forward` by ``plan``. A kernel that cannot be built raises if ``strict``, else a smaller tile or the library takes
        its place."""
        if plan.fused:
            y = self._attempt(
                strict,
                x.raw.device,
                plan.config,
                lambda config: _forward(_parsed(x), weight, bias, geometry, _parsed_epilogue(epilogue), config),
                lambda: forward_problem(x, weight, bias, geometry, epilogue),
            )
            if y is not None:
                return y
        return library_conv.conv_forward(self, x, weight, bias, geometry, epilogue)

    def conv_backward(
        self,
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None = FRESH,
        need_dw: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See the contract."""
        chosen = self.backward_plans(grad, x, weight, geometry, target, need_dw)
        return self.backward_by(chosen, grad, x, weight, geometry, target, need_dw, strict=chosen_plan() is not None)

    def backward_by(
        self,
        chosen: Mapping[str, Plan],
        grad: LazyGrad,
        x: LazyMap,
        weight: Tensor,
        geometry: Geometry,
        target: GradTarget | None,
        need_dw: bool,
        *,
        strict: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`conv_backward` by the plans of ``"dgrad"`` and ``"wgrad"``, of those that are needed, or of ``"backward"`` alone. A kernel
        that cannot be built raises if ``strict``, else a smaller tile or the library takes its place, and of one for both gradients the
        plans of each."""

        def problem(op: str) -> Callable[[], Problem]:
            return functools.partial(backward_problem, op, grad, x, weight, geometry, target, need_dw)

        dx = dweight = None
        parsed = _parsed(x)
        if target is not None and "backward" in chosen:
            both = self._attempt(
                strict,
                x.raw.device,
                chosen["backward"].config,
                lambda config: conv_pointwise_backward.conv_pointwise_backward(grad, parsed, weight, target, config),
                problem("backward"),
            )
            if both is not None:
                return both
            chosen = self.backward_plans(grad, x, weight, geometry, target, need_dw)
        if need_dw and chosen["wgrad"].fused:
            dweight = self._attempt(
                strict,
                x.raw.device,
                chosen["wgrad"].config,
                lambda config: conv_wgrad.conv_wgrad(grad, parsed, weight, geometry, config),
                problem("wgrad"),
            )
        # what is left to the library is one call, which shares the materialised gradient
        library_dw = need_dw and dweight is None
        fused_dx = target is not None and chosen["dgrad"].fused
        if library_dw or (target is not None and not fused_dx):
            goal = None if fused_dx else target
            dx, found = library_conv.conv_backward(self, grad, x, weight, geometry, goal, library_dw)
            dweight = found if library_dw else dweight
        # last, because dx may be written into what the others read
        if target is not None and fused_dx:
            dx = self._attempt(
                strict,
                x.raw.device,
                chosen["dgrad"].config,
                lambda config: conv_dgrad.conv_dgrad(grad, parsed, weight, geometry, target, config),
                problem("dgrad"),
            )
            if dx is None:
                dx, _ = library_conv.conv_backward(self, grad, x, weight, geometry, target, False)
        return dx, dweight

    def _attempt(
        self,
        strict: bool,
        device: torch.device,
        config: ConvConfig | None,
        run: Callable[[ConvConfig | None], T],
        problem: Callable[[], Problem],
    ) -> T | None:
        """``run(config)``. Where that kernel cannot be built, and unless ``strict``, the result of the nearest smaller tile that fits this
        GPU, or None where something else is to take its place: that is remembered and said once."""
        try:
            return run(config)
        except BUILD_ERRORS as error:
            if strict:
                raise
            failed, reason = problem(), error
        result, plan = None, LIBRARY
        if isinstance(reason, OutOfResources):
            for tile in tiles.smaller(config or tiles.conv_config(failed.op, failed.size, arch_of(device))):
                try:
                    result, plan = run(tile), Plan(True, tile)
                except OutOfResources:
                    continue
                except BUILD_ERRORS:
                    pass
                break
        self._fallen[failed] = plan
        if not plan.fused and self.checks(device):
            self._checker.note(failed, Plan(True, config), device, f"cannot be built: {_reason(reason)}")
        instead = _otherwise(failed) if plan.config is None else f"in a tile of {plan.config}"
        self._say(failed, "cannot be built here", f"which runs {instead}", _reason(reason))
        return result

    def _say(self, problem: Problem, what: str, instead: str, reason: str = "") -> None:
        x, weight = ("x".join(map(str, sizes)) for sizes in (problem.x, problem.weight))
        warnings.warn(
            f"fusedres: the fused {problem.op} kernel of a convolution (input {x}, weight {weight}, {problem.dtype}) {what}, "
            f"{instead} from now on{': ' if reason else ''}{reason}",
            RuntimeWarning,
            stacklevel=3,
        )

    # ---- passes ------------------------------------------------------------------------------------------------------

    def new_reduction(self, channels: int, like: Tensor) -> Reduction:
        """See the contract: partial results, merged by the C-sized kernel that reads them."""
        return Reduction(channels, like.device)

    def parameter_grad(self, sums: Room, row: int, dtype: torch.dtype) -> Tensor:
        """See the contract: the merge has rounded to the parameter's dtype already."""
        return sums[row].to(dtype) if isinstance(sums, Tensor) else sums.as_gradient(row, dtype)

    def statistics(self, x: Tensor, stats: Room) -> None:
        """See the contract."""
        elementwise.statistics(x, stats)

    def dgrad_epilogue(self, da: Tensor, x: LazyMap, target: GradTarget = FRESH) -> Tensor:
        """See the contract."""
        return elementwise.dgrad_epilogue(da, _parsed(x), target)

    def add_act_forward(
        self,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        out: Tensor | None = None,
        stats: Room | None = None,
    ) -> Tensor:
        """See the contract."""
        without_activation(x, residual)
        return elementwise.add_act_forward(x, residual, parse(act), out=out, stats=stats)

    def add_act_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        residual: LazyMap | None = None,
        act: str = "none",
        *,
        sums: Room | None = None,
        residual_sums: Room | None = None,
    ) -> Tensor:
        """See the contract."""
        without_activation(x, residual)
        return elementwise.add_act_backward(grad, x, residual, parse(act), sums=sums, residual_sums=residual_sums)

    def highway_forward(self, x: LazyMap, gate: LazyMap, carry: Tensor, *, out: Tensor | None = None) -> Tensor:
        """See the contract."""
        return highway.highway_forward(_parsed(x), _parsed(gate), carry, out=out)

    def highway_backward(
        self,
        grad: Tensor,
        x: LazyMap,
        gate: LazyMap,
        carry: Tensor,
        *,
        sums: Room | None = None,
        gate_sums: Room | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the contract."""
        return highway.highway_backward(grad, _parsed(x), _parsed(gate), carry, sums=sums, gate_sums=gate_sums)

    def apply_grad_coeff(self, grad: LazyGrad, *, out: Tensor | None = None) -> Tensor:
        """See the contract."""
        return elementwise.apply_grad_coeff(grad, out=out)

    def pool_forward(
        self, x: LazyMap, pool: Pool, *, out: Tensor | None = None, stats: Room | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See the contract."""
        return pooling.pool_forward(_parsed(x), pool, out=out, stats=stats)

    def pool_backward(
        self,
        grad: Tensor,
        index: Tensor | None,
        x: LazyMap,
        pool: Pool,
        *,
        sums: Room | None = None,
        coeff: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> Tensor | None:
        """See the contract."""
        return pooling.pool_backward(grad, index, _parsed(x), pool, sums=sums, coeff=coeff, dx=dx)

    # ---- schedules ---------------------------------------------------------------------------------------------------

    def run_schedule(
        self,
        memo: dict[Any, Any],
        which: Hashable,
        maps: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        schedule: Callable[[], Sequence[Tensor | None]],
    ) -> Sequence[Tensor | None]:
        """See the contract: launches that were recorded, where the C++ extension is there to play them."""
        x = maps[0]
        if x is None or type(x) not in (Tensor, Parameter) or not tape.can_play():
            return schedule()
        stream = launch.stream_to_play_on(x.device)
        if stream is None:
            return schedule()
        # everything that decides how the maps' convolutions run
        settings = (
            self.name, x.device, chosen_plan(), plans.edition, launch.edition, launch.dependent, len(self._fallen),
            launch.product_precision(x.dtype),
        )  # fmt: skip
        return tape.run(
            memo, (which, settings, *map(tape.measures, maps)), (*maps, *tensors), schedule, _launcher(), stream
        )

    # ---- C numbers ---------------------------------------------------------------------------------------------------

    def bn_coefficients(self, norm: Norm, stats: Room, count: int) -> tuple[Tensor, Tensor]:
        """See the contract."""
        return batchnorm.bn_coefficients(norm, stats, count)

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See the contract."""
        return batchnorm.bn_frozen(norm)

    def ahead(self, norms: Sequence[Norm]) -> Backend:
        """See the contract."""
        return _Ahead(self, norms) if len(norms) > 1 else self

    def bn_backward(
        self, norm: Norm, sums: Room, count: int, mean_invstd: Tensor, coeff: Tensor, accumulate: bool = False
    ) -> None:
        """See the contract."""
        batchnorm.bn_backward(norm, sums, count, mean_invstd, coeff, accumulate)


class _Ahead(Wrapped):
    """The backend with what ``bn_frozen`` says of some BatchNorms."""

    def __init__(self, inner: TritonBackend, norms: Sequence[Norm]) -> None:
        super().__init__(inner)
        # by identity: descriptions are compared by the values of their tensors
        self._found = {id(norm): found for norm, found in zip(norms, batchnorm.bn_frozen_together(norms), strict=True)}

    def bn_frozen(self, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See the contract."""
        found = self._found.get(id(norm))
        return self.inner.bn_frozen(norm, dtype) if found is None else found


BACKEND = TritonBackend()
