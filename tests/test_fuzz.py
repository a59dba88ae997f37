"""Random networks and random sessions compute, converted, what they compute unconverted; and the fuzzer finds what is wrong where something
is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedres import activations
from fusedres.backends import tape
from fusedres.backends.contract import Backend, Wrapped
from fusedres.backends.select import observe
from fusedres.blocks import stretch
from fusedres.testing.fuzz import actions, changes, snippets
from fusedres.testing.fuzz.__main__ import main
from fusedres.testing.fuzz.build import Built
from fusedres.testing.fuzz.campaign import Campaign, explain, run
from fusedres.testing.fuzz.description import (
    Act,
    Action,
    Case,
    Conv,
    Dense,
    Description,
    Effect,
    Join,
    Network,
    Residual,
    Row,
    Session,
    Step,
    Unit,
    parse,
)
from fusedres.testing.fuzz.generate import Generator
from fusedres.testing.fuzz.shrink import shrink
from fusedres.testing.fuzz.source import Writer


@pytest.fixture(autouse=True)
def from_the_second_step_on_tapes(monkeypatch) -> None:
    """Cases are short: what a schedule does is recorded at its first run, of blocks in a row, too, and soon again after a change."""
    monkeypatch.setattr(tape, "RUNS_BEFORE_RECORDING", 0)
    monkeypatch.setattr(stretch, "RUNS_BEFORE", 0)
    monkeypatch.setattr(stretch, "RUNS_AFTER_FAILURE", 1)


UNITS = (Unit("cna"), Unit("cn"))
RELU = Act("relu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal(description: Case | Session) -> set[str]:
    """Assert that converting changes nothing; the kinds that ran fused. Where eager raises there is nothing to compare."""
    result = run(description)
    assert not result.differences, explain(description, result.differences)[0]
    return result.fused


# ---- converting changes nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_random_networks_compute_the_same_converted(part: int) -> None:
    campaign = Campaign(seed=100 + part, most_faults=1, quiet=True)
    campaign.run_networks(count=35)
    assert not campaign.faults, explain(campaign.faults[0].smallest, campaign.faults[0].differences)[0]
    assert campaign.networks.fused > 18, "a fuzzer in which little is fused proves little"
    assert campaign.networks.invalid < 7


@pytest.mark.parametrize("part", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_random_sessions_compute_the_same_converted(part: int) -> None:
    campaign = Campaign(seed=200 + part, most_faults=1, quiet=True)
    campaign.run_sessions(count=15)
    assert not campaign.faults, explain(campaign.faults[0].smallest, campaign.faults[0].differences)[0]
    assert campaign.sessions.fused > 5


def block(**given: Any) -> Case:
    return Case(
        Network((Residual(**{"main": UNITS, "join": Join(after=RELU), **given}),)), (Step(), Step("inference", False))
    )


@pytest.mark.parametrize("op", snippets.JOINS)
def test_every_join_computes_the_same_converted(op: str) -> None:
    assert_equal(block(join=Join(op, after=RELU)))
    assert_equal(block(join=Join(op, flipped=True, main=RELU, shortcut=RELU, returns="pair"), shortcut="convbn"))


@pytest.mark.parametrize("kind", [*snippets.EFFECTS, *snippets.CONTEXTS, *snippets.METHODS])
def test_every_effect_of_a_forward_stays(kind: str) -> None:
    changed = (Step(), Step(change="attributes"), Step(change="class_attribute"), Step("inference", False))
    assert_equal(dataclasses.replace(block(effects=(Effect(kind, 1),)), steps=changed))
    assert_equal(
        dataclasses.replace(block(effects=(Effect(kind),)), steps=(Step("double", change="global_scale", where=1),))
    )


@pytest.mark.parametrize("name", snippets.ACTIVATIONS)
def test_every_activation_computes_the_same_converted(name: str) -> None:
    for forms in (("module", "function", "torch"), ("module_", "function_", "method_")):
        first, second, after = (Act(name, form) for form in forms)
        assert_equal(block(main=(Unit("cna", act=first), Unit("cna", act=second), Unit("cn")), join=Join(after=after)))


@pytest.mark.parametrize("behind", snippets.BEHIND)
def test_what_stands_behind_a_block_gets_what_it_got(behind: str) -> None:
    blocks = (Residual(UNITS), Dense(order="sequential"), Row(UNITS))
    for layout in ("nonleaf", "channels_last"):
        assert_equal(Case(Network(blocks, (behind,) * 3), layout=layout))


@pytest.mark.parametrize("change", changes.CHANGES)
def test_every_change_between_two_steps_is_seen(change: str) -> None:
    for where in (0, 2):
        assert_equal(
            dataclasses.replace(block(), steps=(Step(), Step(change=change, where=where), Step("no_grad", False)))
        )


@pytest.mark.parametrize("kind", [k for k in dict.fromkeys(actions.ACTIONS) if k not in changes.CHANGES])
def test_every_action_leaves_what_the_model_computes(kind: str) -> None:
    for where in (0, 3):
        assert_equal(Session(block(), (Action("convert"), Action(), Action(kind, where), Action(), Action("eval"))))


def test_common_blocks_run_fused() -> None:
    assert assert_equal(block()) == {"residual"}
    assert "dense" in assert_equal(
        Case(Network((Dense(((Unit("nac", Conv(1)), Unit("nac")),) * 2, order="sequential"),)))
    )
    transition = Row((Unit("nacp", Conv(1), pool="avg", pool_stride=2, ceil=False),), sequential=True)
    assert assert_equal(Case(Network((transition,)))) == {"transition"}


# ---- the fuzzer can fail ---------------------------------------------------------------------------------------------


class Scaled(Wrapped):
    """A backend whose sums are a thousandth too large."""

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        result = super().call(primitive, *args, **kwargs)
        return result.mul_(1.001) if primitive == "add_act_forward" else result


def units(description: Case | Session) -> int:
    case = description if isinstance(description, Case) else description.case
    return sum(len(b.main) + len(b.prefix) for b in case.network.blocks if isinstance(b, Residual)) + sum(
        len(b.units) for b in case.network.blocks if isinstance(b, Row)
    )


def assert_found(campaign: Campaign, what: str) -> None:
    assert campaign.faults, "the planted fault was not found"
    fault = campaign.faults[0]
    assert fault.what == what
    assert units(fault.smallest) <= 2, fault.smallest
    assert repr(fault.smallest) in campaign.summary()


def scaled(backend: Backend | None) -> Backend | None:
    return None if backend is None else Scaled(backend)


def test_a_backend_that_is_wrong_is_found_and_shrunk() -> None:
    campaign = Campaign(most_faults=1, quiet=True)
    with observe(scaled):
        campaign.run_networks(count=50)
        assert_found(campaign, "output")
        assert explain(campaign.faults[0].smallest)[1]
    assert not explain(campaign.faults[0].smallest)[1], "without the fault it is none"


def test_a_recognition_that_is_wrong_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    right = activations.of_module

    def wrong(module: nn.Module) -> str | None:
        name = right(module)
        return "silu" if name == "relu" else name

    monkeypatch.setattr(activations, "of_module", wrong)
    campaign = Campaign(most_faults=1, quiet=True)
    campaign.run_networks(count=50)
    assert_found(campaign, "output")


def test_sessions_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = Campaign(most_faults=1, quiet=True)
    with observe(scaled):
        campaign.run_sessions(count=50)
    assert_found(campaign, "output")
    session = campaign.faults[0].smallest
    assert isinstance(session, Session) and [a.kind for a in session.actions] == ["convert", "train"]


def doubled(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    args[0].data.mul_(2)


def drawn(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    torch.rand(1)


@pytest.mark.parametrize(
    "alter, what",
    [
        (lambda model: model.register_buffer("more", torch.zeros(1)), "conversion"),
        (lambda model: torch.rand(1), "conversion"),
        (
            lambda model: model.register_forward_hook(lambda m, a, y: y.contiguous(memory_format=torch.channels_last)),
            "layout",
        ),
        (lambda model: model.register_forward_hook(lambda m, a, y: y.detach()), "gradient"),
        (lambda model: model.register_forward_hook(doubled), "input"),
        (lambda model: model.register_forward_hook(drawn), "generator"),
        (lambda model: model.register_forward_hook(lambda m, a, y: setattr(m, "seen", 1)), "attribute"),
        (lambda model: model.register_forward_hook(lambda m, a, y: y.missing), "raises"),
    ],
)
def test_every_kind_of_difference_is_seen(alter: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: nn.Module, **options: Any) -> nn.Module:
        with torch.no_grad():
            alter(model)
        return model

    monkeypatch.setattr("fusedres.convert", convert)
    # the hook itself is a difference that conversion must not make: only what it does is looked at here
    monkeypatch.setattr("fusedres.testing.fuzz.twins.HOOKS", ())
    assert what in {d.what for d in run(Case()).differences}


OVERLOOKED = (Action("convert"), Action("compile"), Action(), Action("patch_class"), Action())


def test_where_a_compiled_network_parts_from_itself_its_twin_may_do_as_either() -> None:
    """torch.compile overlooks the patch. The hook makes the twin's graph anew, with the patch; the network's keeps to its old code."""
    assert_equal(Session(actions=(*OVERLOOKED, Action("forward_pre_hook", 54), Action())))


def test_a_compiled_twin_that_does_as_neither_is_found() -> None:
    with observe(scaled):
        result = run(Session(actions=OVERLOOKED))
    assert result.differences and result.at == 2


# ---- its parts -------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_case_and_its_repr_gives_it_back() -> None:
    for seed in range(60):
        case, session = Generator(seed).case(), Generator(seed).session()
        assert case == Generator(seed).case() and session == Generator(seed).session()
        assert parse(repr(case)) == case and parse(repr(session)) == session
        assert Writer(case.network).write() == Writer(case.network).write()


def test_parse_takes_nothing_but_cases() -> None:
    with pytest.raises(ValueError, match="expected the repr of a Case"):
        parse("Unit()")
    with pytest.raises(NameError):
        parse("open('file')")


def test_the_source_of_a_network_is_there_for_inspect_until_it_is_closed() -> None:
    with Built(Network()) as built:
        model = built.make()
        assert inspect.getsource(type(model)) in built.text
        assert "self.conv1(y)" in inspect.getsource(type(model.block1).forward)
        module = inspect.getmodule(type(model))
        assert module is built.module
    assert inspect.getmodule(type(model)) is not built.module


def test_shrinking_ends_in_the_smallest_that_still_fails() -> None:
    def fails(description: Description) -> bool:
        return "Act.name=silu" in set(description.features())

    case = next(c for c in (Generator(seed).case() for seed in range(1000)) if fails(c) and len(c.network.blocks) > 1)
    assert len(list(shrink(case, fails).features())) == 1


def test_the_command_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--networks", "3", "--actions", "2", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 networks" in printed and "2 sessions" in printed and "0 faults" in printed
    assert main(["--case", repr(Case())]) == 0
    assert "no difference" in capsys.readouterr().out
    with observe(scaled):
        assert main(["--case", repr(Case())]) == 1
        assert "differs: output" in capsys.readouterr().out
