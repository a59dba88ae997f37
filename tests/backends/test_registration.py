"""What becomes a backend: a complete one alone, by a name of its own, in its place in the order of preference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusedres
from fusedres.backends import select
from fusedres.backends.contract import PRIMITIVES, Backend, Wrapped
from fusedres.backends.eager import EagerBackend
from fusedres.errors import BackendError
from fusedres.swap import state_of


class Mine(EagerBackend):
    """Complete, since eager is."""

    name = "mine"


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    before = select.names()
    yield
    for name in set(select.names()) - set(before):
        select.unregister(name)
    assert select.names() == before


def lacking(primitive: str) -> type[Backend]:
    """A backend with everything but one."""
    rest = {name: getattr(EagerBackend, name) for name in (*PRIMITIVES, "supports") if name != primitive}
    return type("Lacking", (Backend,), {"name": "lacking", **rest})


@pytest.mark.parametrize("primitive", [*PRIMITIVES, "supports"])
def test_a_backend_that_lacks_a_primitive_fails_at_registration_by_its_name(primitive, registry):
    with pytest.raises(BackendError, match=rf"backend 'lacking' is not complete: it lacks {primitive}$"):
        select.register(lacking(primitive))
    assert "lacking" not in select.names()
    with pytest.raises(TypeError, match=primitive):
        lacking(primitive)()


def test_a_registered_backend_is_chosen_by_its_name(registry):
    select.register(Mine)
    assert select.names()[-1] == "mine" and isinstance(select.get("mine"), Mine)
    assert fusedres.backends()["mine"] == "available"
    block = fusedres.nn.BasicBlock(5, 5)
    x = torch.randn(2, 5, 4, 4)
    block(x)
    assert state_of(block).outcome.backend != "mine"
    with fusedres.use_backend("mine"):
        block(x)
    assert state_of(block).outcome.backend == "mine"


def test_one_that_is_registered_first_for_a_device_is_taken_there(registry):
    select.register(Mine, ("cpu",), first=True)
    assert select.names()[0] == "mine"
    assert select.resolve(torch.device("cpu"), torch.float32).name == "mine"
    assert select.resolve(torch.device("cpu"), torch.int32) is None
    select.unregister("mine")
    assert select.resolve(torch.device("cpu"), torch.float32).name != "mine"


def test_names_are_taken_once_and_unknown_ones_are_errors(registry):
    select.register(Mine)
    with pytest.raises(ValueError, match="there is a backend 'mine' already"):
        select.register(Mine)
    with pytest.raises(ValueError, match="unknown backend 'nobodys': expected one of .*'auto' or None"):
        select.unregister("nobodys")
    with pytest.raises(ValueError, match="unknown backend 'nobodys'"):
        fusedres.use_backend("nobodys")


def test_a_proxy_forwards_every_primitive_and_what_may_be_left_out():
    seen: list[str] = []

    class Noted(Wrapped):
        def call(self, primitive, *args, **kwargs):
            seen.append(primitive)
            return None

    proxy = Noted(Mine())
    for primitive in PRIMITIVES:
        getattr(proxy, primitive)()
    assert seen == list(PRIMITIVES) and proxy.name == "mine"
    assert proxy.supports(torch.device("cpu"), torch.float32) is None
    assert proxy.new_reduction(3, torch.ones(1, 3, 2, 2)).shape == (2, 3) and proxy.routes("conv_forward") == {}


def test_observers_nest():
    """The inner one wraps what runs, the outer one wraps the result; afterwards there is none."""

    class Outer(Wrapped):
        pass

    class Inner(Wrapped):
        pass

    with fusedres.use_backend("eager"):
        with select.observe(Outer):
            with select.observe(Inner):
                found = select.resolve(torch.device("cpu"), torch.float32)
            assert isinstance(found, Outer) and isinstance(found.inner, Inner)
            found = select.resolve(torch.device("cpu"), torch.float32)
            assert isinstance(found, Outer) and isinstance(found.inner, EagerBackend)
        assert isinstance(select.resolve(torch.device("cpu"), torch.float32), EagerBackend)
