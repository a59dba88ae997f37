"""The plan that is said for all convolutions of the triton backend, in the place of what was measured or is estimated."""

from __future__ import annotations

from typing import NamedTuple

from .plans import FUSED, LIBRARY, Plan


class Override(NamedTuple):
    """A plan for all convolutions, and one for both gradients by one kernel."""

    plan: Plan
    both: Plan


PLANS = {
    "fused": Override(FUSED, FUSED),
    "apart": Override(FUSED, LIBRARY),
    "library": Override(LIBRARY, LIBRARY),
    "auto": None,
}
_override: Override | None = None


def chosen_plan() -> Override | None:
    """What :class:`use_plan` says now, None where it says nothing."""
    return _override


class use_plan:
    """Choose how convolutions run inside a ``with``: ``"fused"``, ``"apart"`` (fused, and each gradient by a kernel of its own),
    ``"library"``, ``"auto"`` (measured plans, else :mod:`fusedres.tuning.estimate`), or one :class:`~fusedres.tuning.plans.Plan` for all,
    a tile of which is of kernels apart. ValueError for another word.

    For the whole process, as use_backend: autograd runs the backward of CUDA tensors on threads of its own, which a context variable or a
    thread's own would not reach. Tuning does not use it, so that it changes nothing for a model that trains beside it.
    """

    def __init__(self, plan: str | Plan) -> None:
        if isinstance(plan, str) and plan not in PLANS:
            raise ValueError(f"unknown plan {plan!r}: expected one of {', '.join(PLANS)}, or a Plan")
        apart = isinstance(plan, Plan) and plan.config is not None
        self._chosen = PLANS[plan] if isinstance(plan, str) else Override(plan, LIBRARY if apart else plan)

    def __enter__(self) -> None:
        global _override
        self._previous, _override = _override, self._chosen

    def __exit__(self, *exc: object) -> None:
        global _override
        _override = self._previous
