"""Other people's inference engines as contenders of :mod:`bench.models`: OpenVINO and ONNX Runtime, on the CPU (extra ``bench-peers``).

Each is told as many threads as PyTorch has and the dtype of the images, compiles for the shape of the images at the first call, and is
handed them in the layout that it takes (NCHW), which is not timed.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: what makes an engine's outputs of the images that it is given
Run = Callable[[Tensor], Tensor]


def _needed(name: str) -> ModuleType:
    """A module of the extra; raises RuntimeError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{name} is not installed: pip install 'fusedres[bench-peers]' ({error})") from None


class Engine(nn.Module):
    """A model behind an engine, which ``make(model, images)`` compiles for each shape and dtype of images that comes."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module, Tensor], Run]) -> None:
        super().__init__()
        self._model, self._make = model.eval(), make
        self._runs: dict[Any, Run] = {}
        self._images, self._given = torch.empty(0), torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        """The model's output."""
        if images is not self._images:
            self._images, self._given = images, images.contiguous()
        key = images.shape, images.dtype
        if key not in self._runs:
            self._runs[key] = self._make(self._model, self._given)
        return self._runs[key](self._given)


def _openvino(model: nn.Module, images: Tensor) -> Run:
    openvino = _needed("openvino")
    if images.dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError(f"OpenVINO computes in float32 and bfloat16 on a CPU, not {images.dtype}")
    # a graph in float32, computed in what is asked for: unasked it takes bfloat16 where the CPU has it
    precision = str(images.dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "f32")
    shown = images.float()
    graph = openvino.convert_model(torch.export.export(model.float(), (shown,)))
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def run(given: Tensor) -> Tensor:
        found = request.infer([given.float().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0].copy()).to(given.dtype)

    return run


def _onnxruntime(model: nn.Module, images: Tensor) -> Run:
    runtime = _needed("onnxruntime")
    for name in ("onnx", "onnxscript"):
        _needed(name)
    if images.dtype != torch.float32:
        raise RuntimeError(f"ONNX Runtime computes in float32 on a CPU, not {images.dtype}")
    file = io.BytesIO()
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


def openvino(model: nn.Module) -> nn.Module:
    """``model`` behind OpenVINO; RuntimeError at the first call where it is not installed."""
    return Engine(model, _openvino)


def onnxruntime(model: nn.Module) -> nn.Module:
    """``model`` behind ONNX Runtime; RuntimeError at the first call where it is not installed."""
    return Engine(model, _onnxruntime)
