"""What following a forward gives: rows of steps in which every call stands once, what was read to find them, and the syntax that runs."""

from __future__ import annotations

import copy
import importlib.util
import linecache
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.errors import Unsupported
from fusedres.recognition import FunctionStep, Refused, layout, ops, read
from fusedres.recognition.pieces import Piece
from fusedres.recognition.source import syntax

C = 4


class Parts(nn.Module):
    """Parts for forwards of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(C, C, 3, padding=1) for _ in range(3))
        self.m, self.n, self.o = (nn.BatchNorm2d(C) for _ in range(3))
        self.relu, self.silu, self.drop = nn.ReLU(), nn.SiLU(), nn.Dropout(0.5)
        self.rows = nn.ModuleList([nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)) for _ in range(2)])
        self.named = nn.ModuleDict({"first": nn.Conv2d(C, C, 1), "second": nn.BatchNorm2d(C)})
        self.none, self.flag, self.sizes = None, False, (0, 1)


def with_forward(forward: Callable[..., object]) -> nn.Module:
    return type("Block", (Parts,), {"forward": forward})()


def calls_by_name(self, x):
    h = x
    for i in self.sizes:
        h = self.rows[i](h)
    return F.relu(h + x)


def loops(self, x):
    h = x
    for row in self.rows:
        h = row(h)
    h += x
    return self.relu(h)


def goes_through_a_dict(self, x):
    h = x
    for name, module in self.named.items():
        h = module(h) if name != "third" else x
    return h + x


def looks_up_by_key(self, x):
    return self.named["second"](self.named["first"](x)) + x


def builds_names(self, x):
    h = x
    for i, name in enumerate("ab"):
        h = getattr(self, f"{name}")(h)
        h = getattr(self, "mn"[i])(h)
    return h + x


def has_inner_functions(self, x):
    def unit(h, conv, norm, act=None):
        h = norm(conv(h))
        return h if act is None else act(h)

    return unit(unit(x, self.a, self.m, self.relu), self.b, self.n) + x


def comprehends(self, x):
    first, second = [(c, n) for c, n in zip((self.a, self.b), (self.m, self.n), strict=True) if c is not None]
    h = first[1](first[0](x))
    return second[1](second[0](h)) + x


def branches_on_what_is_known(self, x: Tensor) -> Tensor:
    residual = x
    h = self.m(self.a(x))
    if self.none is not None:
        h = self.none(h)
    elif not self.flag and isinstance(x, Tensor) and len(self.sizes) == 2:
        h = self.relu(h)
    h = self.n(self.b(h))
    return (h if x is None else h) + residual


def walks(self, x):
    h = self.m((a := self.a)(x)) if not self.flag else x
    del a
    parts = [h]
    parts.append(x)
    left, right = parts
    return left + right


FOLLOWED = [
    calls_by_name, loops, goes_through_a_dict, looks_up_by_key, builds_names, has_inner_functions, comprehends,
    branches_on_what_is_known, walks,
]  # fmt: skip


@pytest.mark.parametrize("forward", FOLLOWED, ids=lambda f: f.__name__)
def test_a_forward_is_followed_to_what_it_computes(forward):
    torch.manual_seed(0)
    block = with_forward(forward).double()
    x = torch.randn(2, C, 5, 5, dtype=torch.float64)
    for training in (True, False):
        block.train(training)
        graph = read(block)[training]
        assert graph.shortcut is not None and graph.argument == "x"
        wanted = copy.deepcopy(block)(x)
        found = layout(copy.deepcopy(block), graph).run(x, lambda piece, x, source: piece.original(x, source))
        assert torch.equal(found, wanted)


REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "beside": (lambda s, x: (s.o(x), s.m(s.a(x)) + x)[1], "computes o beside what it returns"),
    "a-read-outside": (lambda s, x: (lambda h: s.n(s.b(h)) + h + h)(s.m(s.a(x))), "no row of steps"),
    "two-maps": (lambda s, x: (s.m(s.a(x)) + x, x), "no row of steps"),
    "gated": (lambda s, x: s.m(s.a(x)) * x, "no row of steps"),
    "alpha": (lambda s, x: torch.add(s.m(s.a(x)), x, alpha=2), "no row of steps"),
    "in-place-on-the-input": (lambda s, x: s.m(s.a(F.relu(x, inplace=True))) + x, "overwrites"),
    "in-place-on-a-view": (lambda s, x: s.m(s.a(x)) + x[:, :, ::1].relu_(), "overwrites"),
    "in-place-on-what-is-read": (lambda s, x: (lambda h: s.b(h.relu_()) + s.c(h))(x), "overwrites"),
    "of-the-shape": (lambda s, x: s.m(s.a(x)) + x if x.shape[1] > 3 else x, "compares"),
    "of-a-value": (lambda s, x: s.m(s.a(x)) + x if x.mean() else x, "branches on a map"),
    "shadowed-super": (lambda s, x: super(Parts, s).forward(x), "forward"),
    "no-such-attribute": (lambda s, x: s.nothing(x), "not there"),
    "generators": (lambda s, x: sum([s.m(s.a(x)), x]), "calls sum"),
    "starred": (lambda s, x: s.m(s.a(*[x], **{})) + x, "cannot be followed"),
    "a-module-of-others": (lambda s, x: STRANGER(s.m(s.a(x))) + x, "no part of it"),
    "mangled": (lambda s, x: s.m(s.a(x)) * s.__scale + x, "mangles"),
}
STRANGER = nn.ReLU()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_graph_says_why(name):
    forward, words = REFUSED[name]
    with pytest.raises(Unsupported, match=words):
        read(with_forward(forward))


@pytest.mark.parametrize(
    ("forward", "main_first"),
    [
        (lambda s, x: s.n(s.b(s.m(s.a(x)))) + s.o(s.c(x)), True),
        (lambda s, x: (lambda r: s.n(s.b(s.m(s.a(x)))) + r)(s.o(s.c(x))), False),
        (lambda s, x: (lambda h, r: s.n(s.b(h)) + s.o(r))(s.m(s.a(x)), s.c(x)), None),
    ],
    ids=["main-first", "shortcut-first", "alternating"],
)
def test_the_order_of_the_paths_is_kept(forward, main_first):
    assert read(with_forward(forward))[True].main_first is main_first


def test_random_steps_that_alternate_leave_the_block_alone():
    block = with_forward(
        lambda s, x: (lambda h, r: s.n(s.b(F.dropout(h, 0.5))) + F.relu(r))(
            s.m(s.a(F.dropout(x, 0.1))), F.dropout(x, 0.2)
        )
    )
    with pytest.raises(Unsupported, match="alternate"):
        layout(block, read(block)[True])


def test_constants_stand_in_the_steps():
    graph = read(with_forward(lambda s, x: F.pad(s.m(s.a(x)), (0, 0), value=0.0) * 2.0 + x))[True]
    pad, scale = (step for step in graph.main if isinstance(step, FunctionStep))
    assert pad.arguments("input", "pad") == {"input": None, "pad": (0, 0), "value": 0.0}
    assert scale(torch.tensor(3.0)) == 6.0


def test_the_name_of_the_argument_is_told():
    def forward(self, inputs):
        return self.m(self.a(inputs)) + inputs

    assert read(with_forward(forward))[False].argument == "inputs"


# ---- every op in one piece -----------------------------------------------------------------------------------------------


def test_a_piece_takes_all_of_its_row_or_is_none():
    block = with_forward(lambda s, x: s.relu(s.m(s.a(x))))
    conv, norm, act = (ops(block, (name,))[0] for name in ("a", "m", "silu"))
    Piece((conv, norm), None, ((conv, norm),))
    with pytest.raises(Unsupported, match="cannot all be fused"):
        Piece((conv, norm, act), None, ((conv, norm),))
    with pytest.raises(Unsupported, match="in front of the addition"):
        (activated,) = ops(block, ("m", "silu"))
        Piece((conv, activated), None, ((conv, activated),), shortcut=())


@pytest.mark.parametrize(
    ("forward", "pieces"),
    [
        (lambda s, x: F.relu(s.n(s.b(F.relu(s.m(s.a(x))))) + x), 1),
        (lambda s, x: F.relu(F.relu(s.n(s.b(F.relu(s.m(s.a(x)))))) + x), 2),
        (lambda s, x: F.relu(s.n(s.b(F.relu(s.m(s.a(x))))) + F.silu(s.o(s.c(x)))), 2),
        (lambda s, x: F.relu(F.relu(s.n(s.b(F.relu(s.m(s.a(x)))))) + F.silu(s.o(s.c(x)))), 3),
        (lambda s, x: s.b(F.relu(s.n(s.a(F.relu(s.m(x)))))) + x, 1),
        (lambda s, x: F.relu(s.b(F.relu(s.n(s.a(F.relu(s.m(x))))))) + x, 3),
    ],
    ids=["plain", "act-in-front", "act-on-the-shortcut", "both", "pre-activation", "pre-activation-and-act"],
)
def test_an_activation_in_front_of_the_addition_splits_the_block(forward, pieces):
    block = with_forward(forward)
    laid = layout(block, read(block)[True])
    assert len(laid.pieces) == pieces
    acts = sum(op.kind == "act" or op.kind == "norm" and op.value != "none" for p in laid.pieces for op in p.row)
    acts += sum(op.kind == "norm" and op.value != "none" for p in laid.pieces for op in p.shortcut or ())
    acts += sum(piece.act is not None for piece in laid.pieces)
    assert acts == str(read(block)[True].steps).count("relu") + str(read(block)[True].steps).count("silu")


# ---- what was read -------------------------------------------------------------------------------------------------------


def test_graphs_are_shared_by_copies_and_no_part_of_a_pickle():
    block = fusedres.convert(Parts2())
    twin = copy.deepcopy(block)
    assert twin._fusedres.structure is block._fusedres.structure
    again = pickle.loads(pickle.dumps(block))
    assert again._fusedres.structure is None
    x = torch.randn(2, C, 5, 5)
    torch.testing.assert_close(again.eval()(x), block.eval()(x))
    assert again._fusedres.outcome.fused


class Parts2(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.m(self.a(x)) + x)


def test_what_a_forward_does_not_read_may_change():
    block = fusedres.convert(Parts2())
    x = torch.randn(2, C, 5, 5)
    block(x)
    block.flag, block.counter, block.silu = True, 3, nn.Identity()
    block(x)
    assert block._fusedres.outcome.fused


def test_reading_is_cheap_to_repeat():
    block = fusedres.convert(Parts2())
    graph = block._fusedres.structure[True]
    first, second = graph.outside(), graph.outside()
    assert len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


# ---- the syntax that runs ------------------------------------------------------------------------------------------------


def module_of(path, text: str, name: str):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_a_file_that_was_edited_since_is_not_read(tmp_path):
    module = module_of(tmp_path / "edited_one.py", "def f(x):\n    return x + 1\n", "edited_one")
    assert syntax(module.f).name == "f"
    linecache.clearcache()
    (tmp_path / "edited_one.py").write_text("def f(x):\n    return x + 2\n")
    module_again = module_of(tmp_path / "edited_two.py", "def g(x):\n    return x + 1\n", "edited_two")
    linecache.clearcache()
    (tmp_path / "edited_two.py").write_text("def g(x):\n    return x + 2\n")
    with pytest.raises(Unsupported, match="source of its g cannot be read"):
        syntax(module_again.g)


def test_code_without_a_file_is_not_read():
    space: dict[str, Callable] = {}
    exec("def f(x):\n    return x\n", space)
    with pytest.raises(Unsupported, match="cannot be read"):
        syntax(space["f"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="columns of code are known from Python 3.11 on")
def test_functions_of_one_line_are_told_apart():
    one, two = (lambda x: x + 1), (lambda x: x * 2)
    assert [type(syntax(f).body.op).__name__ for f in (one, two)] == ["Add", "Mult"]
    outer = lambda x: (lambda y: y - 1)(x)  # noqa: E731
    inner = outer.__code__.co_consts[1]
    assert type(syntax(outer).body).__name__ == "Call" and inner.co_name == "<lambda>"


def test_a_decorated_function_is_what_its_decorator_makes_of_it():
    def shout(function):
        def around(x):
            return 2 * function(x)

        return around

    @shout
    def f(x):
        return x

    assert syntax(f).name == "around"


def test_reasons_name_the_forward_and_what_it_does():
    class Remembers(Parts):
        def forward(self, x):
            self.last = x
            return self.m(self.a(x)) + x

    with pytest.raises(Refused, match=r"Remembers\.forward stores self\.last"):
        read(Remembers())
