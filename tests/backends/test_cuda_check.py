"""The CUDA C++ kernels are compared with PyTorch at their first use: on the host build, whole and with a fault in one kernel."""

from __future__ import annotations

import warnings

import host_kernels
import pytest
import torch

import fusedres
from fusedres.backends import cuda_check, nvrtc, select
from fusedres.backends.cuda import CudaBackend
from fusedres.errors import BackendError
from fusedres.nn import BasicBlock

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    select.why_not(host_kernels.NAME, CPU, torch.float32) is not None, reason="no compiler for the host"
)


@pytest.mark.parametrize("dtype", nvrtc.DTYPES, ids=str)
def test_right_kernels_are_found_right(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert host_kernels.HostBackend().distrusts(CPU, dtype) is None


def wrong_sums(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """A backend whose backward pass reduces half of what it should."""
    backend = host_kernels.HostBackend()
    original = backend.add_act_backward

    def wrong(grad, x, *args, sums=None, **kwargs):
        return original(grad * 0.5, x, *args, sums=sums, **kwargs)

    monkeypatch.setattr(backend, "add_act_backward", wrong)
    return backend


def test_a_kernel_that_computes_something_else_is_not_used_and_that_is_said_once(monkeypatch):
    backend = wrong_sums(monkeypatch)
    with pytest.warns(
        UserWarning, match="is not used for torch.float32, since its kernels compute something else.*an addition"
    ):
        reason = backend.distrusts(CPU, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.distrusts(CPU, torch.float32) == reason
    assert backend.notes(CPU) == [f"not used for float32: {reason}"]
    assert backend.supports(CPU, torch.float32) is None, "doctor is told by the notes"


@pytest.mark.parametrize("channels", cuda_check.CHANNELS, ids=["wide", "narrow"])
def test_a_fault_of_one_width_is_found(channels, monkeypatch):
    backend = host_kernels.HostBackend()
    original = backend.highway_forward

    def wrong(x, gate, carry):
        y = original(x, gate, carry)
        return y.neg_() if y.shape[1] == channels else y

    monkeypatch.setattr(backend, "highway_forward", wrong)
    assert cuda_check.differing(backend, CPU, torch.float32) == f"a highway block of {channels} channels in float32"


def test_every_kernel_is_launched():
    launched = set()

    class Watched(host_kernels.Host):
        def load(self, program, device):
            found = super().load(program, device)

            class Handles(dict):
                def __getitem__(self, name):
                    launched.add(name)
                    return super().__getitem__(name)

            return found._replace(handles=Handles(found.handles))

    assert cuda_check.differing(CudaBackend(Watched()), CPU, torch.float16) is None
    assert launched == {name for names in nvrtc.KERNELS.values() for name in names}


def test_a_program_that_cannot_be_built_is_a_reason(monkeypatch):
    class Unbuilt(host_kernels.Host):
        def load(self, program, device):
            raise BackendError("no such instruction")

    with pytest.warns(UserWarning, match="cannot be built: no such instruction"):
        assert "no such instruction" in (CudaBackend(Unbuilt()).distrusts(CPU, torch.float64) or "")


def test_blocks_run_elsewhere_then(monkeypatch):
    backend = wrong_sums(monkeypatch)
    monkeypatch.setitem(select._loaded, host_kernels.NAME, backend)
    block, x = fusedres.convert(BasicBlock(8, 8)), torch.randn(1, 8, 4, 4)
    with fusedres.use_backend(host_kernels.NAME), pytest.warns(UserWarning):
        with pytest.raises(BackendError, match="compute something else than PyTorch"):
            block(x)


def test_nothing_is_compared_where_that_is_switched_off(monkeypatch):
    monkeypatch.setenv("FUSEDRES_SELF_CHECK", "0")
    monkeypatch.setattr(cuda_check, "differing", lambda *_: pytest.fail("compared"))
    assert host_kernels.HostBackend().distrusts(CPU, torch.float32) is None


def test_what_is_compared_is_drawn_with_random_states_of_its_own():
    before = torch.get_rng_state()
    assert cuda_check.differing(host_kernels.HostBackend(), CPU, torch.float32) is None
    assert torch.equal(torch.get_rng_state(), before)
