"""A forward of any shape falls into pieces and calls as they stand, each call in exactly one, in the order of the forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from general_blocks import SHAPES, C, Draws, Optional, OverwritesRead, Res2Net, Root, Select, Selects, Tree, unit
from torch import Tensor, nn

import fusedres
from fusedres.blocks import kind_key
from fusedres.errors import Unsupported
from fusedres.recognition import Form, Fused, Plain, Program, Refused, follow, form_of, program, read_flows

MAP = torch.zeros(1)


def programs(block: nn.Module, *args: object) -> list[Program]:
    """What ``block`` runs as when it is called with ``args``, in training and not."""
    form, _ = form_of(args or (MAP,), {})
    return [program(block, follow(block, form, training)) for training in (True, False)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_call_is_in_one_action_and_pieces_are_as_few_as_can_be(name: str) -> None:
    build, pieces = SHAPES[name]
    block = build()
    for training in (True, False):
        flow = follow(block, form_of((MAP,), {})[0], training)
        found = program(block, flow)
        assert len(found.pieces) == pieces
        results = [action.result for action in found.actions]
        assert results == sorted(results)  # the order of the forward, of what is fused that of its last call
        called = {n.target for n in flow.nodes if n.op == "module"}
        plain = [a.call for a in found.actions if isinstance(a, Plain) and isinstance(a.call, nn.Module)]
        fused = [
            m for p in found.pieces for op in (*p.row, *(p.shortcut or ()), *([p.act] if p.act else [])) for m in op.run
        ]
        names = {module: name for name, module in block.named_modules()}
        ran = [names[m] for m in (*plain, *fused) if isinstance(m, nn.Module)]
        assert set(ran) == called
        assert len([r for r in ran if not isinstance(names.get(r), nn.ReLU)]) == len(
            [n for n in flow.nodes if n.op == "module"]
        )


def test_a_value_is_dropped_behind_its_last_reader() -> None:
    for found in programs(Res2Net()):
        alive = {0}
        for action in found.actions:
            reads = (
                {action.x, *([] if action.source is None else [action.source])}
                if isinstance(action, Fused)
                else {*action.reads}
            )
            assert reads <= alive
            alive = (alive | {action.result}) - set(action.done)
        assert alive == {found.output.at}


def test_several_maps_lists_and_defaults_are_forms_of_a_call() -> None:
    block, x, y = Optional(), torch.zeros(1), torch.zeros(1)
    assert form_of((x, y), {})[0] == form_of((y, x), {})[0] != form_of((x,), {})[0]
    assert form_of((x, None, [x, y]), {})[0] != form_of((x, None, [x]), {})[0]
    assert form_of((x,), {"shortcut": y})[1] == [x, y]
    for found in (*programs(block, x), *programs(block, x, y), *programs(block, x, None, [x, y])):
        (piece,) = found.pieces
        assert len(piece.units) == 2 and piece.shortcut == () and not found.unfused
    assert [action.source for found in programs(block, x, y) for action in found.actions] == [1, 1]


def test_a_form_is_found_without_a_call() -> None:
    (form,) = read_flows(Root())[True]
    assert form == form_of(([MAP],), {})[0]
    (form,) = read_flows(Select(False))[False]
    assert form == form_of(([MAP, MAP],), {})[0]


@pytest.mark.parametrize("value", [{}, object(), slice(None)])
def test_what_is_neither_map_nor_constant_is_no_form(value: object) -> None:
    with pytest.raises(Unsupported, match="is given a"):
        form_of((MAP, value), {})


def test_what_blocks_stand_in_is_left_to_them() -> None:
    tree = fusedres.convert(Tree())
    assert kind_key(tree) is None
    kinds = {name: kind_key(child) for name, child in tree.named_children()}
    assert kinds == {"project": "sequential", "left": "general", "right": "general", "root": "general"}
    both = fusedres.convert(Selects())
    assert (kind_key(both), kind_key(both.first), kind_key(both.second)) == (None, "general", "general")


def test_rows_inside_belong_to_the_block() -> None:
    block = fusedres.convert(Draws())
    assert kind_key(block) == "general" and kind_key(block.a) is None
    assert "dropout" in str(fusedres.report(block)) and "general block, unfused" in str(fusedres.report(block))


def test_converting_again_reads_anew_and_reverting_gives_it_back() -> None:
    block = fusedres.convert(Res2Net())
    assert kind_key(fusedres.convert(block)) == "general"
    assert type(fusedres.revert(block)) is Res2Net


def test_what_a_piece_has_read_must_not_be_overwritten() -> None:
    with pytest.raises(Unsupported, match="overwrites, by mul_"):
        programs(OverwritesRead())
    assert kind_key(fusedres.convert(OverwritesRead())) is None


class AppendsToArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = unit(C)

    def forward(self, x: list[Tensor]) -> Tensor:
        x.append(self.a(x[0]))
        return torch.cat(x, 1)


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = unit(C)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.a(x)}


class NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.bn(self.conv(x)), self.bn(x)), 1)


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.bn(x), F.relu(self.conv(x))), 1)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (AppendsToArgument, "changes a list that it is given"),
        (ReturnsDict, "does what cannot be followed"),
        (NormTwice, "a BatchNorm that stands twice"),
        (NoNorm, "no convolution with a BatchNorm"),
    ],
)
def test_what_is_not_fused_says_why(block: type[nn.Module], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        programs(block(), *([[MAP]] if block is AppendsToArgument else []))
    assert kind_key(fusedres.convert(block())) is None


def test_a_list_of_the_caller_is_not_returned() -> None:
    class Returns(nn.Module):
        def forward(self, x: list[Tensor]) -> list[Tensor]:
            return x

    with pytest.raises(Refused, match="a list that it is given"):
        follow(Returns(), form_of(([MAP],), {})[0], True)
    assert isinstance(form_of(([MAP],), {})[0], Form)
