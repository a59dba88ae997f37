"""Inference without Python: programs of C++ primitives alone, the library that has them, and packages in a program of C++."""

from __future__ import annotations

import copy
import operator
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import general_blocks
import pytest
import torch
from narrow import ResNet
from torch import Tensor, nn

import fusedres
from fusedres.autograd.operators import inlined
from fusedres.backends import cpp
from fusedres.backends.layout import empty_map
from fusedres.serving import program_of_primitives
from fusedres.testing import assert_fused, assert_parity, randomize

pytest.importorskip("torchvision")
from torchvision.models import DenseNet, get_model  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(fusedres.backends()["cpp"] != "available", reason="the C++ extension is not built")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


class TwoMaps(nn.Module):
    """Two arguments, of which each goes through a block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (fusedres.nn.ConvBNAct(3, 8, 3) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.right(y)


def mixed() -> nn.Module:
    """Blocks of the other families and shapes, with an activation between them that is not fused."""
    return nn.Sequential(
        fusedres.nn.ConvBNAct(3, 8, 3, stride=2),
        nn.ELU(),
        fusedres.nn.HighwayBlock(8),
        fusedres.nn.PreActBasicBlock(8, 8),
        general_blocks.Res2Net(),
        general_blocks.OneShot(),
        fusedres.nn.ConvBNAct(8, 8, 3, groups=8),
    )


#: and how many convolutions they have
MODELS = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1]), 13),
    "densenet": (lambda: DenseNet(8, (2, 2), 8, bn_size=2, num_classes=5), 10),
    "mixed": (mixed, None),
}


def converted(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(dtype)
    randomize(model)
    return fusedres.convert(model.eval())


def images(batch: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = CHANNELS_LAST) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, 32, 32, generator=generator).to(dtype).contiguous(memory_format=layout)


def operators(program: torch.export.ExportedProgram | torch.fx.GraphModule) -> Counter[str]:
    """The operators that a program calls, by their names without overloads; an item of a list is none."""
    called = (n.target for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
    return Counter(".".join(str(target).split(".")[:2]) for target in called)


def assert_same(program: torch.export.ExportedProgram, model: nn.Module, *inputs: Tensor) -> None:
    """Assert that a program gives the very bits of the fused model."""
    with torch.no_grad():
        expected = model(*inputs)
        found = program.module()(*inputs)
    assert_fused(model, "cpp")
    assert torch.equal(found, expected)


# ---- the program -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(torch.float32, CHANNELS_LAST, id="float32-channels_last"),
        pytest.param(torch.float32, CONTIGUOUS, id="float32-contiguous", marks=pytest.mark.slow),
        pytest.param(torch.float64, CHANNELS_LAST, id="float64-channels_last", marks=pytest.mark.slow),
        pytest.param(torch.float64, CONTIGUOUS, id="float64-contiguous", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, CHANNELS_LAST, id="bfloat16-channels_last", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, CONTIGUOUS, id="bfloat16-contiguous"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_program_holds_primitives_and_gives_the_bits_of_the_model(name, dtype, layout):
    build, convolutions = MODELS[name]
    model = converted(build, dtype)
    program = program_of_primitives(model, images(1, dtype, layout))
    found = operators(program)
    assert {called.split(".")[0] for called in found} == {"aten", "fusedres_cpp"}
    ours = found["fusedres_cpp.conv_forward"] + found["fusedres_cpp.conv_norm_forward"]
    if convolutions is not None:
        assert ours + found["aten.convolution"] == convolutions
    if dtype == torch.float32:
        assert ours and (convolutions is None or not found["aten.convolution"])
    assert "aten.batch_norm" not in found
    for batch in (1, 5):
        assert_same(program, model, images(batch, dtype, layout))


def test_a_program_allocates_maps_in_an_order_that_compilers_keep():
    nodes = program_of_primitives(converted(MODELS["densenet"][0]), images(1)).graph.nodes
    empties = [node for node in nodes if str(node.target).startswith("aten.empty") and node.meta["val"].dim() == 4]
    assert empties and all(node.target is torch.ops.aten.empty_permuted.default for node in empties)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 4, 4), (0, 3, 4, 5), (2, 3, 4, 5, 6)], ids=str)
def test_an_empty_map_lies_as_torch_would_lay_it(shape):
    layout = CHANNELS_LAST if len(shape) == 4 else torch.channels_last_3d
    found, expected = empty_map(shape, torch.ones(1)), torch.empty(shape, memory_format=layout)
    assert found.stride() == expected.stride() and found.dtype == torch.float32


def test_a_program_of_a_fixed_batch_takes_that_batch_alone():
    model = converted(MODELS["resnet"][0])
    program = program_of_primitives(model, images(1), dynamic_batch=False)
    assert_same(program, model, images(1))
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(images(2))


def test_a_program_of_several_maps_has_one_batch():
    model = TwoMaps().eval()  # its blocks are fused, as they are in a program
    program = program_of_primitives(model, (images(1), images(1, layout=CONTIGUOUS)))
    assert operators(program)["fusedres_cpp.conv_norm_forward"] == 2
    assert_same(program, model, images(3), images(3, layout=CONTIGUOUS))


def test_what_runs_its_original_modules_is_traced_as_it_is():
    model = converted(MODELS["resnet"][0])
    called = []
    model.layer1[0].bn1.register_forward_hook(lambda *_: called.append(True))
    program = program_of_primitives(model, images(1))
    found = operators(program)
    assert found["aten.batch_norm"] == 3 and found["fusedres_cpp.conv_norm_forward"] == 7
    with torch.no_grad():
        assert_parity(program.module()(images(5)), expected := model(images(5)), expected)


def test_the_choice_of_primitives_is_one_thread_s_and_ends_with_its_context():
    model = converted(MODELS["resnet"][0])

    def exported() -> Counter[str]:
        with torch.no_grad():
            return operators(torch.export.export(model, (images(2),), strict=False))

    with inlined(cpp.BACKEND):
        mine = exported()
        with ThreadPoolExecutor(1) as thread:
            other = thread.submit(exported).result()
    assert "fusedres.residual_infer" not in mine and mine["fusedres_cpp.conv_norm_forward"]
    assert other == exported() and other["fusedres.residual_infer"] == 5


def test_what_dynamo_traces_keeps_its_operators():
    model, graphs = converted(MODELS["resnet"][0]), []

    def compiler(traced: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(traced)
        return traced.forward

    torch._dynamo.reset()
    with inlined(cpp.BACKEND), torch.no_grad():
        torch.compile(model, backend=compiler, fullgraph=True)(images(2))
    (graph,) = graphs
    assert operators(graph)["fusedres.residual_infer"] == 5


# ---- what is refused ---------------------------------------------------------------------------------------------------


def nothing() -> nn.Module:
    return nn.Identity().eval()


def in_training() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    model[1].train()
    return model


@pytest.mark.parametrize(
    ("build", "example", "name", "error", "says"),
    [
        (lambda: "a model", images(1), "m.pt2", TypeError, "expects a torch.nn.Module, found str"),
        (in_training, images(1), "m.pt2", ValueError, "but 1 is in training: call model.eval"),
        (nn.Identity, images(1), "m.pt2", ValueError, "the model is in training"),
        (nothing, (images(2), images(3)), "m.pt2", ValueError, "found 2, 3"),
        (nothing, (torch.tensor(1.0),), "m.pt2", ValueError, "found None"),
        (nothing, (1,), "m.pt2", ValueError, "found no tensor"),
        (nothing, images(1).to("meta"), "m.pt2", fusedres.BackendError, "run on CPU, not on meta"),
        (lambda: nn.Linear(1, 1, device="meta").eval(), images(1), "m.pt2", fusedres.BackendError, "not on meta"),
        (nothing, images(1), "m.so", ValueError, "ends in .pt2, found 'm.so'"),
        (nothing, images(1), "nowhere/m.pt2", FileNotFoundError, "there is no folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_packaged_is_refused_before_anything_is_compiled(build, example, name, error, says, tmp_path):
    with pytest.raises(error, match=re.escape(says)):
        fusedres.export_cpp(build(), example, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_the_extension_both_say_what_to_type():
    code = (
        "import sys; sys.modules['fusedres._C'] = None\n"
        "import torch, fusedres\n"
        "for call in (fusedres.library_path, lambda: fusedres.export_cpp(torch.nn.Identity().eval(), torch.ones(1), 'm.pt2')):\n"
        "    try: call()\n"
        "    except fusedres.BackendError as error: print(error)\n"
    )
    said = forked.python(["-c", code]).stdout.splitlines()
    assert len(said) == 2 and all("FUSEDRES_BUILD=cpu pip install" in line for line in said)


# ---- the library -------------------------------------------------------------------------------------------------------


def test_the_library_registers_its_operators_once():
    torch.ops.load_library(fusedres.library_path())
    assert torch.ops.fusedres_cpp.conv_norm_forward.default is not None


LOADER = """
#include <dlfcn.h>
#include <cstdio>
int main(int, char** paths) {
  while (*++paths)
    if (!dlopen(*paths, RTLD_NOW | RTLD_GLOBAL)) return std::puts(dlerror()), 1;
  return dlsym(RTLD_DEFAULT, "Py_Initialize") != nullptr;
}
"""


@COMPILER
def test_the_library_loads_where_there_is_no_python(tmp_path):
    (tmp_path / "loader.cpp").write_text(LOADER)
    subprocess.run(["g++", "loader.cpp", "-o", "loader", "-ldl"], cwd=tmp_path, check=True)
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    command = [tmp_path / "loader", torch_cpu, fusedres.library_path()]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- packages ----------------------------------------------------------------------------------------------------------


def sums(lines: str) -> list[Tensor]:
    """What the example's programs print of a batch, one tensor for each of them."""
    found = [(int(i), float(value)) for i, value in re.findall(r"image (\d+): (\S+)", lines)]
    starts = [at for at, (i, _) in enumerate(found) if i == 0]
    ends = [*starts[1:], len(found)]
    return [torch.tensor([value for _, value in found[a:b]]) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.slow
@COMPILER
@pytest.mark.skipif(not (ROOT / "examples").exists(), reason="the sources are not here")
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_the_guide_s_program_serves_a_package_without_python(name, tmp_path):
    guide = (ROOT / "docs" / "guide.md").read_text()
    (commands,) = re.findall(r"## Serving without Python.*?```bash\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    script = commands.replace("resnet50", name).replace("224", "64")
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fused, of = re.search(r"(\d+) of (\d+) blocks fused", done.stdout).groups()
    assert fused == of and int(of) > 0
    in_python, in_cpp = sums(done.stdout)
    torch.manual_seed(0)
    plain = get_model(name, weights=None).eval()
    exact = copy.deepcopy(plain).double()

    def of_eager(model: nn.Module, batch: int, dtype: torch.dtype) -> Tensor:
        values = torch.linspace(-1, 1, batch * 3 * 64 * 64).reshape(batch, 3, 64, 64)
        with torch.no_grad():
            return model(values.to(dtype)).double().sum(1).to(dtype)

    for batch, values in ((4, in_python), (4, in_cpp), (1, alone(name, 1, tmp_path)), (5, alone(name, 5, tmp_path))):
        assert_parity(values, of_eager(plain, batch, torch.float32), of_eager(exact, batch, torch.float64))


def alone(name: str, batch: int, folder: Path) -> Tensor:
    """What the example's program in C++ gives in an environment of nothing but the loader's report of what it loads."""
    command = ["build/serve", fusedres.library_path(), f"build/{name}.pt2", *map(str, (batch, 3, 64, 64))]
    environment = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(folder / "loaded")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    loaded = "".join(path.read_text() for path in folder.glob("loaded.*"))
    assert str(fusedres.library_path()) in loaded and "libpython" not in loaded and "libtorch_python" not in loaded
    (found,) = sums(done.stdout)
    return found
