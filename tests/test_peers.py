"""Other engines as contenders: what they are handed, that they are as right as eager, and what is said where they are not installed."""

import importlib.util
import io
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("rich")

from rich.console import Console  # noqa: E402
from torchvision.models.resnet import BasicBlock, ResNet  # noqa: E402

from bench import models, peers  # noqa: E402

ENGINES = ("openvino", "onnxruntime")


def test_an_engine_compiles_once_for_each_shape_and_gets_its_layout():
    made, given = [], []

    def make(model, images):
        made.append(tuple(images.shape))

        def run(images):
            given.append(images)
            return model(images)

        return run

    model = nn.Conv2d(3, 4, 3)
    engine = peers.Engine(model, make)
    small, large = (torch.rand(2, 3, n, n).to(memory_format=torch.channels_last) for n in (8, 16))
    for images in (small, small, large, small):
        assert torch.equal(engine(images), model(images))
    assert made == [(2, 3, 8, 8), (2, 3, 16, 16)]
    assert all(images.is_contiguous() for images in given)
    assert given[0] is given[1], "the images were brought into another layout in every call"


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_installed_is_a_failure_that_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    settings = models.Settings(batch=2, resolution=32, rounds=1, seconds_per_round=0.0, parity_draws=1)
    found = models.run_case("resnet18", "infer", [name], settings, {"device": "here", "threads": 1})
    (record,) = found
    assert record["images_per_s"] is None
    shown = io.StringIO()
    Console(width=300, file=shown).print(models.table(found))
    assert "pip install 'fusedres[bench-peers]'" in shown.getvalue()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "openvino")) for name in ENGINES]
)
def test_an_engine_is_measured_beside_eager_and_as_right(name, monkeypatch):
    needed = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}[name]
    if any(importlib.util.find_spec(module) is None for module in needed):
        pytest.skip("the extra bench-peers is not installed")
    settings = models.Settings(batch=2, resolution=32, rounds=1, seconds_per_round=0.0, parity_draws=1)
    monkeypatch.setitem(models.NETWORKS, "small", lambda: ResNet(BasicBlock, [1, 1, 1, 1]))
    eager, engine = models.run_case("small", "infer", ["eager", name], settings, {"device": "here", "threads": 1})
    assert engine["failure"] is None and engine["parity"]["passed"] and engine["images_per_s"] > 0
    assert engine["peak_bytes"] is None, "PyTorch does not see what it allocates"
