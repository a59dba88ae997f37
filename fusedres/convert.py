"""``convert`` and ``revert``: fusing an existing model in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .blocks import BlockState, adopt, is_converted, kind_key, release
from .errors import Unsupported
from .recognition import (
    MOST_IN_A_FLOW,
    ONE_MAP,
    Flow,
    Flows,
    Graphs,
    Hooked,
    Refused,
    block_ids,
    conv_runs,
    family_kind,
    inside,
    is_sequential,
    is_transition,
    layout,
    ops,
    program,
    read,
    read_flows,
    read_layers,
)
from .swap import KEY, original_class, resume, runs_fused, state_of
from .verify import Claim, disproved, prove, structure_of

#: kinds that hold whole blocks, which are converted one by one
_AROUND = ("stem", "head", "sequential")


class Recognised(NamedTuple):
    """The ``kind`` of block that a module can be, and the graphs or flows that say so. ``only_a_row``: whether that is general for what it
    does beside computing alone."""

    kind: str
    structure: Graphs | None = None
    layers: dict[str, Graphs] | None = None
    flows: Flows | None = None
    only_a_row: bool = False

    @property
    def is_row(self) -> bool:
        """Whether it is a row of modules, which a larger block may go through."""
        if self.kind == "residual":
            return self.structure is not None and all(graph.shortcut is None for graph in self.structure.values())
        return self.kind in ("sequential", "transition") or self.only_a_row


class Candidate(NamedTuple):
    """A module that is a block, or would be one but for the ``reason``."""

    path: str
    module: nn.Module
    found: Recognised | None
    reason: str | None = None


# ---- what a module can be --------------------------------------------------------------------------------------------


def _of_row(row: nn.Module, small: set[int]) -> Recognised | None:
    """What a Sequential can be: a dense block has any length, so that its last layer is asked."""
    children = list(row.children())
    if children and id(children[-1]) in small:
        layers = read_layers(row)
        if layers:
            return Recognised("dense", layers=layers)
    if len(children) in (3, 4) and _is_transition(row):
        return Recognised("transition")
    return Recognised("sequential") if conv_runs(children) else None


def _is_transition(row: nn.Module) -> bool:
    try:
        return is_transition(ops(row, tuple(row._modules)))
    except Unsupported:
        return False


def _by_structure(module: nn.Module, graphs: Graphs) -> Recognised | None:
    """What the ``graphs`` of ``module`` make of it; raises Refused where it adds what cannot be fused."""
    if any(graph.dense for graph in graphs.values()):
        return None
    is_row = all(graph.shortcut is None for graph in graphs.values())
    transition = is_row
    for training, graph in graphs.items():
        try:
            layout(module, graph, training)
            transition = transition and is_transition(ops(module, graph.main))
        except Hooked:
            transition = False
        except Unsupported as reason:
            if is_row:
                return None
            raise Refused(str(reason)) from None
    if is_row and not transition and not any(isinstance(child, nn.Conv2d) for child in module.children()):
        return None  # a network, maybe: its parts are rows themselves
    return Recognised("transition" if transition else "residual", graphs)


def _by_flow(module: nn.Module) -> Recognised | None:
    """What ``module`` can be by the calls of its forward, whatever its shape; raises Refused."""
    flows = read_flows(module)
    is_row = True
    try:
        for of_mode in flows.values():
            for flow in of_mode.values():
                assert isinstance(flow, Flow)
                found = program(module, flow)
                adds = any(piece.shortcut is not None for piece in found.pieces)
                is_row = is_row and not found.only_computes and not adds
    except Unsupported:
        return None
    return Recognised("general", flows=flows, only_a_row=is_row)


class _Recogniser:
    """Tells what the modules of a model can be, each once."""

    def __init__(self, model: nn.Module, proven: bool) -> None:
        """``proven``: leave alone what was found to differ."""
        self._proven = proven
        self._small, self._of_any_shape = block_ids(model), block_ids(model, MOST_IN_A_FLOW)
        self._known: dict[int, Recognised | Refused | None] = {}

    def __call__(self, module: nn.Module) -> Recognised | None:
        """What ``module``, not fused, can be; raises Refused."""
        if id(module) not in self._known:
            try:
                self._known[id(module)] = self._recognise(module)
            except Refused as why:
                self._known[id(module)] = Refused(*why.args)
        found = self._known[id(module)]
        if isinstance(found, Refused):
            raise found.anew()
        return found

    def _recognise(self, module: nn.Module) -> Recognised | None:
        if "forward" in module.__dict__ or original_class(module).forward is nn.Module.forward:
            return None  # overridden, or a container that is never called
        reason = disproved(module) if self._proven else None
        if reason is not None:
            raise Refused(reason)
        family = family_kind(module)
        if family is not None:
            return Recognised(family)
        if is_sequential(module):
            return _of_row(module, self._small)
        refused: Refused | None = None
        if id(module) in self._small:
            try:
                graphs = read(module)
            except Refused as why:
                refused = why
            except Unsupported:
                pass
            else:
                return _by_structure(module, graphs)
        if id(module) in self._of_any_shape and not self._holds_a_block(module):
            try:
                found = _by_flow(module)
                if found is not None or refused is None:
                    return found
            except Refused as why:
                refused = why  # which allows more, and says what is left
        if refused is not None:
            raise refused
        return None

    def _holds_a_block(self, module: nn.Module) -> bool:
        """Whether something inside is a block by itself, and more than a row: ``module`` is then what blocks stand in."""
        return any(self._is_a_block(child) or self._holds_a_block(child) for child in module.children())

    def _is_a_block(self, module: nn.Module) -> bool:
        state = state_of(resume(module))
        try:
            found = self(module) if state is None else _as_it_is(state)
        except Refused:
            return False
        return found is not None and not found.is_row and found.kind != "sync_norm"


def _as_it_is(state: BlockState) -> Recognised:
    """What a fused module is."""
    return Recognised(state.kind.key, state.structure, state.layers, state.flows)


def _again(module: nn.Module, kind: str) -> Recognised:
    """What a fused module can be: the same, read anew where it was read."""
    state = state_of(module)
    assert state is not None
    if state.structure is None and state.layers is None and state.flows is None:
        return Recognised(kind)
    found: Recognised | None
    if state.flows is not None:
        try:
            found = _by_flow(module)
        except Refused:
            found = None
        return Recognised(kind, flows=state.flows) if found is None else found
    if state.layers is not None:
        found = Recognised(kind, layers=read_layers(module))
        return found if found.layers else Recognised(kind, layers=state.layers)
    try:
        found = _by_structure(module, read(module))
    except Unsupported:
        found = None
    return Recognised(kind, state.structure) if found is None or found.kind != kind else found


def _belongs(module: nn.Module, found: Recognised) -> Iterator[nn.Module]:
    """What belongs to a block and is not converted on its own."""
    if found.structure is not None:
        for graph in found.structure.values():
            yield from inside(module, graph)
    elif found.flows is not None:
        flows = (flow for of_mode in found.flows.values() for flow in of_mode.values() if isinstance(flow, Flow))
        yield from (m for flow in flows for m in flow.inside(module) if m is not module)
    elif found.layers is not None:
        for name in found.layers:
            layer = module._modules.get(name)  # which may have been removed since
            yield from () if layer is None else layer.modules()
    elif found.kind not in _AROUND:
        yield from (m for m in module.modules() if m is not module)


def _walk(model: nn.Module, anew: bool, proven: bool = True) -> Iterator[Candidate]:
    """The blocks of ``model``, and what would be one; what stands inside of a block belongs to it. ``anew``: read what is fused again;
    ``proven``: leave alone what was found to differ."""
    taken: set[int] = set()
    recognise = _Recogniser(model, proven)
    for path, module in model.named_modules():
        if id(module) in taken:
            continue
        kind = kind_key(resume(module))
        if kind == "sync_norm":
            continue
        if kind is None:
            try:
                found = recognise(module)
            except Refused as reason:
                yield Candidate(path, module, None, str(reason))
                continue
        elif anew:
            found = _again(module, kind)
        else:
            state = state_of(module)
            assert state is not None
            found = _as_it_is(state)
        if found is not None:
            taken.update(map(id, _belongs(module, found)))
            yield Candidate(path, module, found)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """``(path, module, kind)`` of every block of ``model``, fused or not."""
    for candidate in _walk(model, anew=False):
        if candidate.found is not None:
            yield candidate.path, candidate.module, candidate.found.kind


def left_alone(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """``(path, module, reason)`` of what holds what a block is made of and is not converted, since its forward does what is not known to be
    harmless."""
    for candidate in _walk(model, anew=False):
        if candidate.reason is not None:
            yield candidate.path, candidate.module, candidate.reason


# ---- proofs ------------------------------------------------------------------------------------------------------------


def _adopt(module: nn.Module, found: Recognised, recompute: bool) -> None:
    kind, structure, layers, flows, _ = found
    adopt(module, kind, recompute=recompute, structure=structure, layers=layers, flows=flows)


def _steps(found: Recognised) -> tuple[object, ...]:
    """What tells two structures apart beside their modules: the steps of the graphs."""
    graphs = [*(found.structure or {}).items()]
    graphs += [item for of_layer in (found.layers or {}).values() for item in of_layer.items()]
    steps: list[object] = [(training, repr((graph.steps, graph.shared, graph.dense))) for training, graph in graphs]
    for training, of_mode in (found.flows or {}).items():
        steps += [(training, form, flow.outline()) for form, flow in of_mode.items() if isinstance(flow, Flow)]
    return tuple(dict.fromkeys(steps))


def _claims(candidate: Candidate, recompute: bool) -> Iterator[Claim]:
    """What has to hold for ``candidate`` to be fused."""
    module, found = candidate.module, candidate.found
    assert found is not None
    if found.kind == "sequential":
        children = list(module.children())
        runs = [children[start:stop] for start, stop in conv_runs(children)]
    elif found.kind == "stem":
        runs = [[module.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")]]
    elif found.kind == "head":
        runs = []
    else:
        if found.kind == "dense":  # however many layers of a kind it has
            modules: object = frozenset(map(structure_of, module.children()))
        else:
            modules = structure_of(module)
        structure = found.kind, recompute, original_class(module), modules, _steps(found)
        form, followed, asks = ONE_MAP, frozenset[str](), False
        if found.flows is not None:
            form = next(iter(found.flows[True]))
            flows = [of[form] for of in found.flows.values() if form in of]
            followed = frozenset({"", *(path for flow in flows if isinstance(flow, Flow) for path in flow.through)})
            asks = any(isinstance(flow, Flow) and flow.asks for flow in flows)
        of_copy = found._replace(
            flows=None
        )  # a flow holds parameters of the block's own, which a copy reads as its own
        yield Claim(module, module, structure, lambda twin: _adopt(twin, of_copy, recompute), form, followed, asks)
        return
    for run in runs:
        structure = "row", recompute, structure_of(*run)
        yield Claim(module, nn.Sequential(*run), structure, lambda twin: adopt(twin, "sequential", recompute=recompute))


def _proven(model: nn.Module, recompute: bool) -> list[Candidate]:
    """The blocks of ``model`` whose fused form computes what their modules do; those that do not are left alone, with a warning."""
    while True:
        found = [candidate for candidate in _walk(model, anew=True) if candidate.found is not None]
        wrong = prove(claim for candidate in found for claim in _claims(candidate, recompute))
        if not wrong:
            return found
        paths = {id(candidate.module): candidate.path for candidate in found}
        for module in wrong:
            release(module)
            name = paths[id(module)] or f"the {original_class(module).__name__}"
            warnings.warn(f"fusedres.convert leaves {name} alone: {disproved(module)}", RuntimeWarning, stacklevel=3)


# ---- what the user calls -----------------------------------------------------------------------------------------------


def convert(model: nn.Module, *, recompute: bool = False, verify: bool = True) -> nn.Module:
    """Fuse the residual and dense blocks of ``model`` in place, and return it.

    Modules keep their children, parameters, buffers, hooks and names: an optimizer made before goes on working and checkpoints load both
    ways. Nothing of the model runs, and nothing but classes changes. What cannot be fused runs its original modules;
    :func:`~fusedres.report` says why. Raises TypeError if ``model`` is no ``nn.Module``.

    ``recompute``: backward runs the 1x1 convolutions again instead of keeping their outputs, which saves about half of the memory kept for
    backward; statistics and running statistics are those of the first run. Convert a part of a model (or convert again) to set it there.

    ``verify``: prove each structure once, by a small copy with random values in float64, in training and evaluation; what differs from its
    modules is left alone, with a RuntimeWarning. :func:`~fusedres.verify` compares a whole model on your own input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert expects a torch.nn.Module, found {type(model).__name__}")
    for candidate in _proven(model, recompute) if verify else list(_walk(model, anew=True, proven=False)):
        if candidate.found is not None:
            _adopt(candidate.module, candidate.found, recompute)
    for module in reversed(list(model.modules())):  # what is inside first
        if original_class(module) is nn.SyncBatchNorm:
            adopt(module, "sync_norm")  # inside of blocks as well, for when those run their original modules
        elif kind_key(module) is None and is_sequential(module) and any(map(kind_key, module.children())):
            adopt(module, "sequential", recompute=recompute)  # its children hand their maps over
    return model


def export_plain(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that runs its original modules, on the very same parameters and buffers, whether its blocks were converted or are
    of :mod:`fusedres.nn`: for exporters to other runtimes, which do not know the operators of fused blocks.

    Raises TypeError if ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_plain expects a torch.nn.Module, found {type(model).__name__}")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    for module in plain.modules():
        # a class of a user's own, derived from one of fusedres.nn, says itself what it runs
        if runs_fused(type(resume(module))) and "forward" in vars(type(module)):
            module.__dict__.pop(KEY, None)
            module.__class__ = original_class(module)
    return plain


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert` in place, and return the model. Raises TypeError if ``model`` is no ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert expects a torch.nn.Module, found {type(model).__name__}")
    for module in model.modules():
        if is_converted(resume(module)):
            release(module)
    return model
