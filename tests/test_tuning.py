"""Measured plans: kept on disk, safe from other processes and from what cannot be read, and followed by the backend."""

from __future__ import annotations

import dataclasses
import json
import os

import forked
import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
pytest.importorskip("triton")

import fusedres  # noqa: E402
from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels.launch import INTERPRETED, record  # noqa: E402
from fusedres.kernels.tiles import ConvConfig  # noqa: E402
from fusedres.operands import GradTarget, LazyGrad, LazyMap  # noqa: E402
from fusedres.specs import Geometry  # noqa: E402
from fusedres.tuning import plans  # noqa: E402
from fusedres.tuning.plans import FUSED, LIBRARY, Plan, Problem  # noqa: E402
from fusedres.tuning.precompile import followed  # noqa: E402
from fusedres.tuning.step import run_step  # noqa: E402
from fusedres.tuning.tune import record as recorded  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
PROBLEM = Problem(
    "forward", "float32", (2, 8, 6, 6), 8, 8, (8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1, ("scale_shift", "relu")
)
CONFIG = ConvConfig(32, 16, 16, 2, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered from before; of float32 the problems without TF32."""
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    plans.forget()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield tmp_path
    plans.forget()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(cache):
    table = {PROBLEM: Plan(True, CONFIG), PROBLEM._replace(op="dgrad", features=()): LIBRARY}
    path = cache / "folder" / plans.file_name("Some GPU (80 GB)")
    plans.write(path, "Some GPU (80 GB)", table)
    assert path.name == "some-gpu-80-gb.json"
    assert plans.read(path, "Some GPU (80 GB)", plans.versions()) == table
    assert plans.read(path, "another", plans.versions()) == {}
    plans.write(path, "Some GPU (80 GB)", {PROBLEM: LIBRARY})
    assert plans.read(path, "Some GPU (80 GB)", plans.versions()) == table | {PROBLEM: LIBRARY}
    assert {file.suffix for file in path.parent.iterdir()} == {".json", ".lock"}


BROKEN = {
    "empty": "",
    "cut off": '{"device": "cpu", "plans": [{"prob',
    "no object": "[1, 2]",
    "no plans": '{"device": "cpu"}',
    "plans of another form": '{"device": "cpu", "plans": [{"problem": {"op": "forward"}, "fused": true, "config": null}]}',
    "nothing but null": "null",
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_an_unreadable_file_is_ignored_and_rewritten(cache, content):
    path = cache / plans.file_name(plans.device_name(DEVICE))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert plans.table(DEVICE) == {}
    assert plans.remember(DEVICE, {PROBLEM: LIBRARY}) == path
    plans.forget()
    assert plans.table(DEVICE) == {PROBLEM: LIBRARY}


CONFIG_FIELDS = {
    "BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 2, "num_stages": 2, "descriptors": False, "registers": 0,
}  # fmt: skip
BAD_ENTRIES = {
    "a tile by position": {"config": list(CONFIG_FIELDS.values())},
    "an unknown field of a tile": {"config": {**CONFIG_FIELDS, "num_ctas": 2}},
    "a field of a tile missing": {"config": {"BLOCK_M": 32}},
    "no yes or no": {"config": {**CONFIG_FIELDS, "descriptors": 1}},
    "no tile": {"config": {**CONFIG_FIELDS, "BLOCK_M": 24}},
    "more warps than a 3x3 may have": {"config": {**CONFIG_FIELDS, "num_warps": 8}},
    "a tile for the library": {"fused": False},
    "an unknown field of a plan": {"note": "mine"},
}


@pytest.mark.parametrize("change", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_table_with_a_bad_plan_is_ignored(cache, change):
    path = plans.remember(DEVICE, {PROBLEM: Plan(True, CONFIG)})
    content = json.loads(path.read_text())
    assert content["plans"][0]["config"] == CONFIG_FIELDS, "by the names of the fields"
    plans.forget()
    assert plans.table(DEVICE) == {PROBLEM: Plan(True, CONFIG)}
    content["plans"][0].update(change)
    path.write_text(json.dumps(content))
    plans.forget()
    assert plans.table(DEVICE) == {}


def test_the_packages_own_tables_are_found(cache, monkeypatch):
    """Behind the user's own, and for any version of torch and triton."""
    folder = cache / "package" / "tables"
    path = folder / plans.file_name(plans.device_name(DEVICE))
    other = PROBLEM._replace(groups=2)
    monkeypatch.setattr(plans, "__file__", str(cache / "package" / "tuning" / "plans.py"))
    plans.write(path, plans.device_name(DEVICE), {PROBLEM: FUSED, other: FUSED})
    path.write_text(path.read_text().replace(torch.__version__, "0.0"))
    plans.remember(DEVICE, {other: LIBRARY})
    plans.forget()
    assert plans.table(DEVICE) == {PROBLEM: FUSED, other: LIBRARY}


@pytest.mark.parametrize("which", ["torch", "triton", "fusedres", "format"])
def test_other_versions_are_stale(cache, which):
    path = plans.remember(DEVICE, {PROBLEM: LIBRARY})
    content = json.loads(path.read_text())
    content[which] = "0.0"
    path.write_text(json.dumps(content))
    plans.forget()
    assert plans.table(DEVICE) == {}
    other = PROBLEM._replace(groups=2)
    plans.remember(DEVICE, {other: FUSED})
    assert plans.read(path, plans.device_name(DEVICE), plans.versions()) == {other: FUSED}


#: two of them
WRITERS = """
import os
import sys
from pathlib import Path
from fusedres.tuning import plans
writer = os.fork() and 1
problem = plans.Problem("forward", "float32", (1, 8, 6, 6), 8, 8, (8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1, ())
for i in range(40):
    table = {problem._replace(x=(i, writer, 6, 6)): plans.FUSED}
    plans.write(Path(sys.argv[1]), "cpu", table)
if writer:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_two_processes_lose_nothing(cache):
    path = cache / "cpu.json"
    done = forked.python(["-c", WRITERS, str(path)])
    assert done.returncode == 0, done.stderr
    found = plans.read(path, "cpu", plans.versions())
    assert {p.x[:2] for p in found} == {(i, writer) for i in range(40) for writer in range(2)}


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("FUSEDRES_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(plans.cache_folder()) == "/somewhere/fusedres"


# ---- dispatch --------------------------------------------------------------------------------------------------------


GEOMETRY = Geometry((1, 1), (1, 1), (1, 1), 1)


def lazy(batch: int = 2) -> LazyMap:
    x = torch.randn(batch, 8, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return LazyMap(x, torch.rand(2, 8, device=DEVICE), "relu", torch.rand(2, 8, device=DEVICE))


def kernels_of(call) -> dict[str, dict]:
    """The arguments of what ``call`` launches, by kernel."""
    with record() as launches:
        call()
    return {launch.kernel.__name__.removesuffix("_kernel"): launch.arguments for launch in launches}


def test_the_backend_follows_the_plan():
    def launched(batch=2):
        weight = torch.randn(8, 8, 3, 3, device=DEVICE)
        return kernels_of(lambda: BACKEND.conv_forward(lazy(batch), weight, None, GEOMETRY))

    before = launched()
    plans.remember(DEVICE, {PROBLEM: LIBRARY})
    assert "conv_forward" not in launched() and "add_act_forward" in launched()
    plans.remember(DEVICE, {PROBLEM: Plan(True, CONFIG)})
    found = launched()["conv_forward"]
    names = {field.name for field in dataclasses.fields(ConvConfig)} - {"descriptors", "registers"}
    assert ConvConfig(**{name: found[name] for name in names}) == CONFIG
    # another size is another problem; and an override overrides
    assert launched(3).keys() == before.keys()
    with use_plan("library"):
        assert "conv_forward" not in launched()


@pytest.mark.parametrize("dgrad", [True, False])
@pytest.mark.parametrize("wgrad", [True, False])
def test_the_two_gradients_have_plans_of_their_own(dgrad, wgrad):
    x, weight, coeff = lazy(), torch.randn(8, 8, 3, 3, device=DEVICE), torch.rand(3, 8, device=DEVICE)
    grad = LazyGrad(torch.randn_like(x.raw), torch.randn_like(x.raw), coeff)
    sums = torch.empty(2, 8, device=DEVICE)
    given = (grad, x, weight, GEOMETRY, GradTarget(sums=sums))
    with use_plan("library"):
        expected = BACKEND.conv_backward(*given)
    expected_sums = sums.clone()
    chosen = {"dgrad": Plan(dgrad, CONFIG if dgrad else None), "wgrad": Plan(wgrad, CONFIG if wgrad else None)}
    problems = BACKEND.tuner.problems("conv_backward", *given)
    assert [p.op for p in problems] == ["dgrad", "wgrad"]
    plans.remember(DEVICE, {p: chosen[p.op] for p in problems})
    found = kernels_of(lambda: BACKEND.conv_backward(*given))
    assert ("conv_dgrad" in found, "conv_wgrad" in found) == (dgrad, wgrad)
    for ours, theirs in zip(BACKEND.conv_backward(*given), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # in another order: numbers around 10 are what is left of products that add up to hundreds
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-4)


# ---- tune ------------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return fusedres.convert(model.to(DEVICE))


def measure(call) -> float:
    """Stands in for a clock: tiles of 32 columns win forward, the library wins both gradients."""
    found = kernels_of(call)
    if "conv_forward" in found:
        return 1.0 if found["conv_forward"]["BLOCK_N"] == 32 else 2.0
    return 4.0 if {"conv_dgrad", "conv_wgrad"} & found.keys() else 3.0


def test_tune(cache):
    model = network().train()
    x = torch.randn(2, 8, 6, 6, device=DEVICE, requires_grad=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept
    with fusedres.use_backend("triton"):
        report = fusedres.tune(model, x, measure=measure)
    assert [(row.problem.op, row.plan.fused) for row in report] == [
        ("forward", True),
        ("dgrad", False),
        ("wgrad", False),
    ]
    assert report[0].plan.config.BLOCK_N == 32 and report[0].seconds == 1.0 and report[0].library_seconds == 3.0
    assert report.file.parent == cache and "3 convolutions" in str(report)
    # nothing of the model's has changed
    assert model[0].weight.grad is kept
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # a later process follows what was measured, and measures nothing again
    plans.forget()
    with fusedres.use_backend("triton"):
        found = kernels_of(lambda: model(x))
        assert found["conv_forward"]["BLOCK_N"] == 32
        again = fusedres.tune(model, x, measure=measure)
        assert not again and "again=True" in str(again)
        assert len(fusedres.tune(model, x, measure=measure, again=True)) == 3
        # inference is another problem
        assert [row.problem.op for row in fusedres.tune(model.eval(), x, measure=measure)] == ["forward"]


@pytest.mark.parametrize("spent", [4.0, 5.0], ids=["faster", "slower"])
def test_one_kernel_for_both_gradients_is_measured_against_the_best_of_two(spent):
    """Which are 2.5 of the library's dgrad and 2 of our wgrad here; what was found is what runs."""
    seconds = {"conv_forward": 1.0, "conv_dgrad": 3.0, "conv_wgrad": 2.0, "conv_pointwise_backward": spent}

    def measure(call) -> float:
        ours = [seconds[name] for name in kernels_of(call) if name in seconds]
        # by the library both are one call, too slow to be taken together
        return sum(ours) or (9.0 if len(results_of(call)) > 1 else 2.5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    model = fusedres.convert(model.to(DEVICE)).train()
    x = torch.randn(2, 8, 6, 6, device=DEVICE, requires_grad=True)
    with fusedres.use_backend("triton"):
        rows = {row.problem.op: row for row in fusedres.tune(model, x, measure=measure)}
        assert {op: row.plan.fused for op, row in rows.items()} == {
            "forward": True, "dgrad": False, "wgrad": True, "backward": spent < 4.5,
        }  # fmt: skip
        assert rows["backward"].library_seconds == 4.5 and rows["backward"].seconds == min(spent, 4.5)
        found = kernels_of(lambda: run_step(model, (x,), {}))
    assert ("conv_pointwise_backward" in found, "conv_wgrad" in found) == (spent < 4.5, spent > 4.5)


def results_of(call) -> list[torch.Tensor]:
    """The gradients that a call of conv_backward gives."""
    found = call()
    return [t for t in found if t is not None] if isinstance(found, tuple) else [found]


def test_a_configuration_that_fails_is_not_chosen():
    def failing(call) -> float:
        found = kernels_of(call)
        if found.get("conv_forward", {}).get("BLOCK_N") == 32:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if "conv_forward" in found else 2.0

    with fusedres.use_backend("triton"):
        (row,) = fusedres.tune(network().eval(), torch.randn(2, 8, 6, 6, device=DEVICE), measure=failing)
    assert row.plan.fused and (row.plan.config is None or row.plan.config.BLOCK_N != 32)


def test_nothing_to_tune_says_why():
    model = network().eval()
    with fusedres.use_backend("eager"):
        report = fusedres.tune(model, torch.randn(2, 8, 6, 6, device=DEVICE), measure=measure)
    assert not report and "ran on eager" in str(report) and report.file is None
    assert "no fused block ran" in str(fusedres.tune(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(TypeError, match="Module"):
        fusedres.tune(lambda x: x, torch.ones(1))


# ---- precompile ------------------------------------------------------------------------------------------------------


def described(launches) -> list[tuple]:
    """The launches as far as compilation goes: kernels, sizes, and of a tensor its dtype."""
    return [
        (
            launch.kernel.__name__, launch.grid,
            tuple((k, v.dtype if isinstance(v, torch.Tensor) else v) for k, v in launch.arguments.items()),
        )
        for launch in launches
    ]  # fmt: skip


@pytest.mark.parametrize("measured", [False, True], ids=["guessed", "measured"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "infer"])
def test_a_step_is_followed_without_running(training, measured):
    """What precompile compiles is what the step launches, by the plans of the device; and nothing has run or changed."""
    model = network().train(training)
    x = torch.randn(2, 8, 6, 6, device=DEVICE, requires_grad=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with fusedres.use_backend("triton"):
        if measured:
            found, _ = recorded(model, (x,), {})
            plans.remember(DEVICE, {p: Plan(True, CONFIG) if p.op == "wgrad" else LIBRARY for p in found[DEVICE]})
        ahead = followed(BACKEND, model, (x,), {}, DEVICE)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        # the backward of CUDA tensors on this thread, whose launches are recorded
        with record() as launches, torch.autograd.set_multithreading_enabled(False):
            run_step(model, (x,), {})
    assert described(ahead) == described(launches)
    names = {launch.kernel.__name__ for launch in ahead}
    assert ("conv_forward_kernel" in names) != measured and ("conv_wgrad_kernel" in names) == training
    tensors = [v for launch in ahead for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    assert tensors and all(tensor.is_meta for tensor in tensors)


def test_precompile_where_nothing_compiles():
    """Interpreted kernels do not compile, other backends have none, and what is no module is refused."""
    x = torch.randn(2, 8, 6, 6, device=DEVICE)
    with fusedres.use_backend("eager"):
        assert fusedres.precompile(network(), x) == 0
    if INTERPRETED:
        with fusedres.use_backend("triton"):
            assert fusedres.precompile(network(), x) == 0
    else:
        assert fusedres.precompile(network(), x) > 0
    with pytest.raises(TypeError, match="Module"):
        fusedres.precompile(lambda x: x, x)
