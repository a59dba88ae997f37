"""Whether modules hold the very same objects as before: in C++ and in Python alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusedres.blocks import unchanged as module
from fusedres.blocks.unchanged import Held, in_python

BOTH = [pytest.param(in_python, id="python")]
try:
    from fusedres._C import unchanged
except ImportError:
    BOTH.append(pytest.param(None, id="c++", marks=pytest.mark.skip(reason="the C++ extension is not there")))
else:
    BOTH.append(pytest.param(unchanged, id="c++"))


class Other(nn.BatchNorm2d):
    pass


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def held(net: nn.Module) -> Held:
    mappings = [d for m in net.modules() for d in (m.__dict__, m._parameters, m._buffers, m._modules, m._forward_hooks)]
    return Held(list(net.modules()), mappings)


def _other_dict(net: nn.Module) -> None:
    net[1].__dict__ = dict(net[1].__dict__)


def _swapped(net: nn.Module) -> None:
    own = net[1].__dict__
    own["eps"], own["momentum"] = own["momentum"], own["eps"]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "class": lambda net: setattr(net[1], "__class__", Other),
    "attribute": lambda net: setattr(net[1], "eps", 0.5),
    "new-attribute": lambda net: setattr(net[1], "more", None),
    "no-attribute": lambda net: delattr(net[1], "eps"),
    "parameter": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(3, 2, 1, 1))),
    "no-parameter": lambda net: setattr(net[0], "bias", None),
    "child": lambda net: setattr(net, "1", nn.Identity()),
    "hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "mode": lambda net: net.eval(),
    "dictionary": _other_dict,
    "order": _swapped,
}


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name, function, monkeypatch):
    monkeypatch.setattr(module, "unchanged", function)
    model = net()
    kept = held(model)
    assert kept.is_unchanged() and kept.is_unchanged()
    CHANGES[name](model)
    assert not kept.is_unchanged()


@pytest.mark.parametrize("function", BOTH)
def test_what_changes_inside_an_object_is_no_change(function, monkeypatch):
    monkeypatch.setattr(module, "unchanged", function)
    model = net()
    kept = held(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert kept.is_unchanged()


@pytest.mark.parametrize("function", BOTH)
def test_nothing_is_unchanged(function):
    assert function((), (), b"", ()) is True


def test_what_was_read_is_not_kept_alive():
    model = net()
    kept = held(model)
    model.kept, seen = kept, weakref.ref(model)
    del model, kept
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    "arguments, error",
    [
        (((), ({},), b"", ()), ValueError),
        (((), ({},), b"\1\0\0\0", ()), ValueError),
        (((), (1,), b"\0\0\0\0", ()), TypeError),
        (([], (), b"", ()), TypeError),
        (((), ()), TypeError),
    ],
)
def test_wrong_arguments_are_errors(arguments, error):
    function = pytest.importorskip("fusedres._C").unchanged
    with pytest.raises(error):
        function(*arguments)
