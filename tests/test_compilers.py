"""Converted models under compilers, exporters and transforms: what they make of them is right, whether they see operators of fused blocks
or, as torch.jit and torch.func do, the original modules. How blocks run compiled: ``test_compiled*.py``."""

from __future__ import annotations

import copy
import shutil
from collections import Counter

import pytest
import torch
from narrow import ResNet
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import fusedres
from fusedres.swap import FusedBlock
from fusedres.testing import assert_fused, assert_parity, randomize, run_training

pytest.importorskip("torchvision")
from torchvision.models import DenseNet  # noqa: E402
from torchvision.models.resnet import BasicBlock, resnet18  # noqa: E402

pytestmark = pytest.mark.usefixtures("proven_once")

MODELS = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
    "densenet": lambda: DenseNet(8, (2, 2), 8, bn_size=2, num_classes=5),
}
FULL = {"resnet18": lambda: resnet18(num_classes=5), "densenet": MODELS["densenet"]}
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")


def pair(build, training: bool) -> tuple[nn.Module, nn.Module]:
    """A plain model in float64 and its converted twin."""
    torch.manual_seed(0)
    model = build().double()
    randomize(model)
    model.train(training)
    return model, fusedres.convert(copy.deepcopy(model))


def images(batch: int = 3, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def assert_same_step(model: nn.Module, plain: nn.Module, x: Tensor, training: bool) -> None:
    """Assert that both compute the same output, and in training the same gradients and running statistics."""
    if not training:
        with torch.no_grad():
            assert_parity(model(x), expected := plain(x), expected)
        return
    plain.zero_grad(), model.zero_grad()
    theirs = run_training(plain, x)
    for name, value in run_training(model, x).items():
        expected = theirs[name.replace("_orig_mod.", "")]
        if value.is_floating_point():
            assert_parity(value, expected, expected, name)
        else:
            assert torch.equal(value, expected), name


def assert_compiles(build, training: bool, backend: str) -> None:
    """Assert that one graph serves every batch size and computes what the plain model does."""
    torch._dynamo.reset()
    plain, model = pair(build, training)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 2):
            assert_same_step(Marked(compiled), plain, images(batch), training)


class Marked(nn.Module):
    """Marks the batch of what it gives to a compiled model as dynamic."""

    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        self._orig_mod = compiled

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        return self._orig_mod(x)


# ---- torch.compile, torch.export, AOTInductor, torch.jit -------------------------------------------------------------


# networks that recompile as batches come are in test_compiled_networks.py
@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param("resnet", True, id="resnet-training"),
        pytest.param("densenet", False, id="densenet-inference"),
        pytest.param("resnet", False, id="resnet-inference", marks=pytest.mark.slow),
        pytest.param("densenet", True, id="densenet-training", marks=pytest.mark.slow),
    ],
)
def test_torch_compile_makes_one_graph_for_every_batch(name, training):
    assert_compiles(MODELS[name], training, "aot_eager")


@pytest.mark.slow
@COMPILER
@MODES
@pytest.mark.parametrize("name", FULL)
def test_inductor_makes_one_graph_for_every_batch(name, training):
    assert_compiles(FULL[name], training, "inductor")


def exported(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (images(2),), dynamic_shapes=shapes, strict=strict)


def operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """The fused operators of a program, by kind."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return dict(Counter(name.split(".")[1] for name in names if name.startswith("fusedres.")))


def exports() -> list:
    """Every model, with gradients and without, traced by either front end: half of the combinations see every pair, the others are slow."""
    return [
        pytest.param(
            name, gradients, strict, id=f"{name}-{'grad' if gradients else 'no-grad'}-{'strict' if strict else 'not-strict'}",
            marks=[] if (turn + gradients + strict) % 2 == 0 else [pytest.mark.slow],
        )
        for turn, name in enumerate(MODELS)
        for gradients in (True, False)
        for strict in (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "gradients", "strict"), exports())
def test_torch_export_gives_a_program_of_operators_for_every_batch(name, gradients, strict, tmp_path):
    plain, model = pair(MODELS[name], False)
    model(images())  # what a block remembers of a call is nothing to the exporter
    with fusedres.use_backend("eager"), torch.set_grad_enabled(gradients):
        found = exported(model, strict)
    of_resnet, of_densenet = {"residual_infer": 5}, {"residual_infer": 1, "dense_infer": 2, "transition_infer": 2}
    assert operators(found) == (of_resnet if name == "resnet" else of_densenet)
    torch.export.save(found, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (2, 4):
        assert_same_step(program, plain, images(batch), False)


@pytest.mark.parametrize("name", MODELS)
def test_export_plain_gives_the_original_modules_on_the_same_weights(name):
    plain, model = pair(MODELS[name], False)
    original = fusedres.export_plain(model)
    assert [type(m) for m in original.modules()] == [type(m) for m in plain.modules()]
    assert all(mine is other for mine, other in zip(original.parameters(), model.parameters(), strict=True))
    assert operators(exported(original)) == {}
    assert_same_step(original, plain, images(), False)
    assert any(isinstance(m, FusedBlock) for m in model.modules())


def test_export_plain_takes_blocks_that_are_fused_from_the_start():
    model = nn.Sequential(fusedres.nn.BasicBlock(3, 3), fusedres.nn.ConvBNAct(3, 4)).double().eval()
    original = fusedres.export_plain(model)
    assert not any(isinstance(m, FusedBlock) for m in original.modules())
    assert operators(exported(original)) == {} != operators(exported(model))
    assert_same_step(model, original, images(), False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_torch_jit_scripts_the_original_modules(name):
    plain, model = pair(MODELS[name], False)
    scripted = torch.jit.script(model)
    for batch in (3, 4):
        assert_same_step(scripted, plain, images(batch), False)
    assert_same_step(model, plain, images(), False)


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("name", FULL)
def test_aot_inductor_packages_a_converted_model(name, tmp_path):
    plain, model = pair(FULL[name], False)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    program = torch._inductor.aoti_load_package(package)
    for batch in (2, 4):
        assert_same_step(program, plain, images(batch), False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODELS)
def test_torch_jit_traces_a_converted_model(name):
    plain, model = pair(MODELS[name], False)
    traced = torch.jit.trace(model, images())
    for batch in (3, 4):
        assert_same_step(traced, plain, images(batch), False)
    assert_same_step(model, plain, images(), False)
    if fusedres.backends(dtype=torch.float64)["cpp"] == "available":
        assert_fused(model, "cpp")


# ---- transforms ------------------------------------------------------------------------------------------------------


def scalar(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def with_weights(model: nn.Module):
    """The model as a function of its parameters."""
    return lambda weights: scalar(lambda x: functional_call(model, weights, (x,)), images(2))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


TRANSFORMS = {
    "vmap": lambda model: vmap(model)(images(6).unflatten(0, (3, 2))),
    "grad": lambda model: grad(lambda x: scalar(model, x))(images(2)),
    "grad-of-weights": lambda model: grad(with_weights(model))(weights_of(model)),
    "per-sample-gradients": lambda model: vmap(grad(lambda x: scalar(model, x[None])))(images(3)),
    "jvp": lambda model: jvp(model, (images(2),), (images(2).flip(0),)),
    "jacrev": lambda model: jacrev(model)(images(1)),
    "grad-of-grad": lambda model: grad(lambda x: grad(lambda x: scalar(model, x))(x).sum())(images(2)),
    "dual": lambda model: dual(model, images(2), images(2).flip(0)),
}


def dual(model: nn.Module, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent


def leaves(value) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_transforms_of_torch_func_go_through_the_original_modules(name, transform):
    plain, model = pair(MODELS[name], False)
    ours, theirs = (leaves(TRANSFORMS[transform](m)) for m in (model, plain))
    for mine, other in zip(ours, theirs, strict=True):
        assert_parity(mine, other, other, transform)
    details = {row.detail for row in fusedres.report(model)}
    assert all("torch.func" in detail or "forward-mode" in detail for detail in details), details


def batched_gradients(model: nn.Module) -> Tensor:
    """Two rows of a Jacobian by one batched backward."""
    x = images(2).requires_grad_()
    y = model(x)
    return torch.autograd.grad(y, x, torch.eye(2, 2 * 5, dtype=y.dtype).view(2, *y.shape), is_grads_batched=True)[0]


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batched_backward_equals_autograd(name, backend):
    if fusedres.backends()[backend] != "available":
        pytest.skip(fusedres.backends()[backend])
    plain, model = pair(MODELS[name], False)
    with fusedres.use_backend(backend):
        ours = batched_gradients(model)
    assert_fused(model, backend)
    assert_parity(ours, expected := batched_gradients(plain), expected)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("name", MODELS)
def test_a_cuda_graph_of_a_converted_model_replays_what_it_captured(name, training):
    model = pair(MODELS[name], training)[1].float().cuda().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)  # is run as it is, as often as the other
    x = images(4).float().cuda()
    fixed, fresh = x.clone(), x.flip(0)

    def step(m: nn.Module, x: Tensor) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [m(x)]
        y = m(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels, fills caches
            step(model, fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(model, fixed)
    assert_fused(model, "triton")
    for _ in range(3):
        step(twin, x)
    for now in (x, fresh):
        fixed.copy_(now)
        graph.replay()
        for mine, other in zip(found, step(twin, now), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
