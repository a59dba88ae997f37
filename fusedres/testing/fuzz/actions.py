"""Sessions: what users do to a model, in random order, on a converted model and on its plain twin.

What only concerns the converted one (convert, revert, report, the choice of a backend) is done to it alone; everything else to both. After
each action both have to be in the same state, and every step has to give the same.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch._dynamo
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fusedres

from .build import Built
from .changes import CHANGES, SHARED
from .check import Result, fused_kinds, raised, reported
from .description import Action, Session, Step
from .twins import Difference, Invalid, compare, compare_states, generators, run_step, seed_everything, state

#: what takes a model and gives the model that is used from then on
Replace = Callable[[nn.Module, int], nn.Module]
#: how a model is run
STEPS: dict[str, Step] = {
    "train": Step("train"),
    "eval": Step("train", training=False),
    "no_grad": Step("no_grad"),
    "inference": Step("inference", training=False),
    "penalty": Step("penalty"),
    "double": Step("double"),
}


def _pick(model: nn.Module, where: int, kind: type[nn.Module]) -> nn.Module | None:
    found = [m for m in model.modules() if isinstance(m, kind)]
    return found[where % len(found)] if found else None


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """``model`` with ``new`` in every place of ``old``."""
    if old is model:
        return new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def _deepcopy(model: nn.Module, where: int) -> nn.Module:
    return copy.deepcopy(model)


def _copy(model: nn.Module, where: int) -> nn.Module:
    return copy.copy(model)


def _pickle(model: nn.Module, where: int) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _save(model: nn.Module, where: int) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _own_state(model: nn.Module, where: int) -> nn.Module:
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    model.load_state_dict(saved)
    return model


def _half_state(model: nn.Module, where: int) -> nn.Module:
    """Load a state in which every floating-point value is halved, by assignment or by copy."""
    saved = {n: t * 0.5 if t.is_floating_point() else t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(saved, assign=bool(where % 2))
    return model


def _cast(model: nn.Module, where: int) -> nn.Module:
    """To another dtype and back; what is lost is lost in the same way only where nothing was rounded before, so the values are those of a
    formula afterwards."""
    model.to(torch.float32 if where % 2 else torch.bfloat16).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.linspace(0.2, 5.0, tensor.numel(), dtype=torch.float64).cos().square().reshape(tensor.shape)
                )
                if tensor.dim() > 1:
                    tensor.sub_(0.5)
    return model


def _slice(model: nn.Module, where: int) -> nn.Module:
    row = _pick(model, where, nn.Sequential)
    if not isinstance(row, nn.Sequential) or len(row) < 2:
        return model
    part = row[: 1 + where % (len(row) - 1)] if where % 2 else row[where % (len(row) - 1) :]
    return _put(model, row, part)


def _rename(model: nn.Module, where: int) -> nn.Module:
    row = _pick(model, where, nn.Sequential)
    if row is None:
        return model
    return _put(model, row, nn.Sequential(OrderedDict((f"part_{name}", child) for name, child in row.named_children())))


def _wrap(model: nn.Module, where: int) -> nn.Module:
    child = _pick(model, where, nn.Module)
    assert child is not None
    return _put(model, child, nn.DataParallel(child) if where % 2 else nn.Sequential(child))


def _append(model: nn.Module, where: int) -> nn.Module:
    return nn.Sequential(model, nn.Dropout(0.3)) if where % 2 else nn.Sequential(nn.Identity(), model)


def _again(model: nn.Module, where: int) -> nn.Module:
    """A new module of the same class in the place of one of the network's own."""
    own = [m for m in model.modules() if type(m).__module__.startswith("fusedres_fuzzed")]
    if not own:
        return model
    old = own[where % len(own)]
    new = type(old)().to(next((p.dtype for p in model.parameters()), torch.float64))
    new.load_state_dict(old.state_dict())
    return _put(model, old, new.train(old.training))


def _weight_norm(model: nn.Module, where: int) -> nn.Module:
    conv = _pick(model, where, nn.Conv2d)
    if conv is not None and not hasattr(conv, "parametrizations"):
        parametrizations.weight_norm(conv)
    return model


def _prune(model: nn.Module, where: int) -> nn.Module:
    conv = _pick(model, where, nn.Conv2d)
    if conv is not None and "weight" in conv._parameters:
        prune.l1_unstructured(conv, "weight", amount=0.3)
    return model


def _grouped(model: nn.Module, where: int) -> nn.Module:
    """GroupNorm in the place of a BatchNorm, as those who train with small batches do."""
    norm = _pick(model, where, nn.BatchNorm2d)
    if norm is None:
        return model
    return _put(model, norm, nn.GroupNorm(1, norm.num_features, dtype=torch.float64))  # type: ignore[arg-type]


def _checkpointed(model: nn.Module, where: int) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False)

    return Checkpointed(model)


def _in_thread(model: nn.Module, where: int) -> nn.Module:
    class Threaded(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            found: list[Any] = []
            enabled = torch.is_grad_enabled()

            def run() -> None:
                with torch.set_grad_enabled(enabled):
                    try:
                        found.append(self.inner(x))
                    except Exception as error:
                        found.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if isinstance(found[0], Exception):
                raise found[0]
            return found[0]

    return Threaded(model)


def _functional(model: nn.Module, where: int) -> nn.Module:
    class Functional(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            parameters = {name: p * 0.75 for name, p in self.inner.named_parameters()}
            return torch.func.functional_call(self.inner, parameters, (x,))

    return Functional(model)


def _compile(model: nn.Module, where: int) -> nn.Module:
    """Compiled without code generation, which computes as the model does: what a tracer makes of it, with its autograd or without."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model
    torch._dynamo.reset()
    return cast(nn.Module, torch.compile(model, backend="aot_eager" if where % 2 else "eager"))


def _block_of_batch_norms(model: nn.Module, where: int) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
            module.momentum = 0.01
    return model


BOTH: dict[str, Replace] = {
    "deepcopy": _deepcopy,
    "copy": _copy,
    "pickle": _pickle,
    "save": _save,
    "own_state": _own_state,
    "half_state": _half_state,
    "cast": _cast,
    "slice": _slice,
    "rename": _rename,
    "wrap": _wrap,
    "append": _append,
    "again": _again,
    "weight_norm": _weight_norm,
    "prune": _prune,
    "group_norm": _grouped,
    "checkpoint": _checkpointed,
    "thread": _in_thread,
    "functional": _functional,
    "freeze_norms": _block_of_batch_norms,
    "compile": _compile,
}


def _convert(model: nn.Module, where: int) -> nn.Module:
    return fusedres.convert(model, recompute=where % 4 == 3, verify=where % 5 == 4)


def _convert_part(model: nn.Module, where: int) -> nn.Module:
    part = _pick(model, where, nn.Module)
    assert part is not None
    fusedres.convert(part, verify=where % 5 == 4)
    return model


def _revert(model: nn.Module, where: int) -> nn.Module:
    return fusedres.revert(model)


def _revert_part(model: nn.Module, where: int) -> nn.Module:
    part = _pick(model, where, nn.Module)
    assert part is not None
    fusedres.revert(part)
    return model


def _backend(model: nn.Module, where: int) -> nn.Module:
    available = [name for name in ("cpp", "eager") if fusedres.backends(dtype=torch.float64)[name] == "available"]
    fusedres.use_backend([*available, "auto"][where % (len(available) + 1)])
    return model


def _report(model: nn.Module, where: int) -> nn.Module:
    str(fusedres.report(model))
    return model


#: done to the converted model alone; convert and revert more often than others
OURS: dict[str, Replace] = {
    "convert": _convert,
    "convert_part": _convert_part,
    "revert": _revert,
    "revert_part": _revert_part,
    "backend": _backend,
    "report": _report,
}
ACTIONS = (*STEPS, *BOTH, *OURS, *OURS, *CHANGES)


def _do(action: Action, models: list[nn.Module], built: Built, compiles_both: bool) -> None:
    """Do something to the models, of which the first is the plain one; raises Invalid where that cannot be done to it."""
    if action.kind in OURS:
        models[1] = OURS[action.kind](models[1], action.where)
        return
    for i in (0,) if action.kind in SHARED else (0, 1):
        try:
            if action.kind == "compile" and i == 0 and not compiles_both:
                # the names of a compiled one alone
                models[i] = torch._dynamo.OptimizedModule(models[i], cast(Any, torch._dynamo.disable()))
            elif action.kind in BOTH:
                seed_everything(action.where)
                models[i] = BOTH[action.kind](models[i], action.where)
            else:
                CHANGES[action.kind](models[i], action.where, built.module)
        except Exception as error:
            if i == 0:
                raise Invalid(f"{action.kind}: {error}") from error
            raise


def _step(session: Session, step: Step, number: int, models: list[nn.Module], built: Built) -> list[Difference]:
    records = []
    for i, model in enumerate(models):
        model.train(step.training) if step.training is False or number % 3 == 0 else None
        built.module.COUNTS.clear()
        try:
            records.append(run_step(model, session.case, step, number, session.case.network.channels))
        except Exception as error:
            if i == 0:
                raise Invalid(str(error)) from error
            return [raised(error)]
        records[-1].state["COUNTS"] = dict(built.module.COUNTS)
    return compare(records[1], records[0])


def check_session(session: Session, backend: str | None = None) -> Result:
    """Run a session on a network and on its twin, which begins on ``backend``, and compare; never raises because of either.

    Compiled, a twin may do as the compiled network does or as the network itself: there are changes that torch.compile overlooks, such as
    hooks that are set later, and a converted network does not. Behind the action at which these two part a session says nothing."""
    result = _check_session(session, backend, True)
    if result.differences and any(action.kind == "compile" for action in session.actions):
        with_itself = _check_session(session, backend, False)
        if not with_itself.differences or with_itself.at != result.at:
            result.differences = []
    return result


def _check_session(session: Session, backend: str | None, compiles_both: bool) -> Result:
    result = Result()
    try:
        built = Built(session.case.network)
    except Exception as error:
        result.invalid = f"{type(error).__name__}: {error}"
        return result
    with built, fusedres.use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_everything(session.case.seed)
        try:
            eager = built.make().double()
            models = [eager, copy.deepcopy(eager)]
        except Exception as error:
            result.invalid = f"{type(error).__name__}: {error}"
            return result
        for number, action in enumerate(session.actions):
            result.at, before = number, generators()
            try:
                if action.kind in STEPS:
                    result.differences = _step(session, STEPS[action.kind], number, models, built)
                    result.fused |= fused_kinds(models[1])
                else:
                    _do(action, models, built, compiles_both)
                    result.differences = list(compare_states(state(models[1]), state(models[0]), 1e-9))
                    if action.kind in OURS and generators() != before:
                        result.differences.append(Difference("generator", action.kind, "moved"))
            except Invalid as reason:
                result.invalid = str(reason) if number == 0 else None
                return result
            except Exception as error:
                found = raised(error)
                result.differences = [Difference("raises", f"{action.kind}: {found.where}", found.detail)]
            if result.differences:
                break
        if session.case.report and not result.differences:
            result.differences = reported(models[1])
    return result
