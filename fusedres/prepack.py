"""Weights that stay packed, in the order in which kernels read them, for models that serve."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .backends import select
from .swap import state_of

Model = TypeVar("Model", bound=nn.Module)


class _Kept:
    """A weight stays packed as long as this lives."""

    def __init__(self, weight: Tensor, forget: Callable[[], None]) -> None:
        # its memory stays, whatever becomes of the parameter: another tensor at the same address would be taken for it
        weakref.finalize(self, _end, forget, weight.detach()).atexit = False


def _end(forget: Callable[[], None], memory: Tensor) -> None:
    forget()


#: by the weight
_kept = WeakIdKeyDictionary()


def prepack(model: Model, keep: bool = True) -> Model:
    """Keep the convolution weights of ``model`` packed from one inference to the next, and return ``model``.

    Kernels on CPU read a weight in an order of their own, into which every call brings it; the smaller the batch, the larger that share of
    the time. Of a converted ``model`` that is prepacked the first call keeps what it has packed (as many bytes as the weights; for a 3x3
    convolution that runs by Winograd's algorithm 16/9 or 25/9 of that, in bfloat16 50/9 or 8 times as many) and later ones read it, until
    the model is deleted or prepacked with ``keep=False``.
    Results are the same to the bit. Nothing happens where kernels read weights as they are, as on a GPU.

    A change that PyTorch counts (an operation in place, an optimizer's step, ``load_state_dict``) is noticed at the next call, which
    packs anew, as is one of all values, since some of them are looked at. **Another write that it does not count is not noticed**: of a few
    values through ``weight.data``, NumPy or another process. Prepack again after one, and after moves that give parameters other memory
    (``model.to``, ``weight.data = ...``), which end it. A copy of the model is not prepacked.

    Raises TypeError where ``model`` is no ``nn.Module``, ValueError where nothing in it is converted, or where a weight was made under
    ``torch.inference_mode()``, whose changes PyTorch does not count.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepack expects a torch.nn.Module, found {type(model).__name__}")
    blocks = [(name, module) for name, module in model.named_modules() if state_of(module) is not None]
    if not blocks:
        raise ValueError("prepack expects a converted model, but nothing in this one is: call fusedres.convert(model)")
    weights = {
        weight: f"{path}.{name}".strip(".")
        for path, block in blocks
        for name, weight in block.named_parameters()
        if weight.dim() == 4
    }
    uncounted = next((name for weight, name in weights.items() if weight.is_inference()), None)
    if keep and uncounted is not None:
        raise ValueError(
            f"{uncounted} was made under torch.inference_mode(), so that its changes would not be noticed: make the model outside of it"
        )
    for weight in weights:
        _kept.pop(weight, None)
        backend = select.resolve(weight.device, weight.dtype) if keep else None
        forget = None if backend is None else backend.keep_packed(weight)
        if forget is not None:
            _kept[weight] = _Kept(weight, forget)
    return model
