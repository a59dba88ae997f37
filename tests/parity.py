"""The one rule of every parity test: against float64, the error may be at most twice that of eager PyTorch in the same dtype."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import fusedres
from fusedres.blocks import FusedBlock


def error(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm, and the largest error relative to the largest value."""
    truth = truth.detach().double()
    difference = value.detach().double() - truth
    assert not difference.isnan().any(), "NaN in the result"
    norm, largest = truth.norm().item(), truth.abs().max().item()
    return difference.norm().item() / (norm or 1.0), difference.abs().max().item() / (largest or 1.0)


def assert_parity(
    value: Tensor | list[Tensor], eager: Tensor | list[Tensor], truth: Tensor | list[Tensor], what: str = "result"
) -> None:
    """Assert that ``value`` is as right as ``eager``: both of one dtype, ``truth`` in float64.

    Given lists (fresh draws of one experiment), the medians over the draws are compared: one activation whose sign is decided by rounding
    moves a gradient of a deep chain by percents, in eager as in ours, and strikes one of them by chance. The floor of one rounding of
    the dtype is for what eager gets right by luck (a single element, a sum of few terms). In float64 the truth is eager itself, so the
    rule has nothing to compare with: a fixed 1e-11 there, some thousand roundings.
    """
    if isinstance(value, Tensor):
        value, eager, truth = [value], [eager], [truth]
    for v, e in zip(value, eager, strict=True):
        assert v.dtype == e.dtype, f"{what}: {v.dtype}, eager gives {e.dtype}"
        assert v.shape == e.shape, f"{what}: {tuple(v.shape)}, eager gives {tuple(e.shape)}"
    dtype = value[0].dtype
    floor = 1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps
    ours = [error(v, t) for v, t in zip(value, truth, strict=True)]
    theirs = [error(e, t) for e, t in zip(eager, truth, strict=True)]
    for i, name in enumerate(("2-norm", "largest")):
        mine, other = (statistics.median(pair[i] for pair in pairs) for pairs in (ours, theirs))
        assert mine <= 2 * other + floor, f"{what}: {name} error {mine:.3g}, eager's own {other:.3g}"


def run_training(model: torch.nn.Module, x: Tensor, grad_seed: int = 0) -> dict[str, Tensor]:
    """The output, every gradient and every buffer after one step with a random output gradient."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x)
    generator = torch.Generator().manual_seed(grad_seed)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    results = {"output": y, "input gradient": x.grad}
    results |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    results |= {f"buffer {n}": b for n, b in model.named_buffers()}
    return results


def assert_fused(model: torch.nn.Module, backend: str) -> None:
    """Assert that every fused block's last call really ran on ``backend``."""
    blocks = [m for m in model.modules() if isinstance(m, FusedBlock)]
    assert blocks, "nothing was converted"
    for block in blocks:
        assert block._fusedres_last == backend, f"{type(block).__name__}: {block._fusedres_last}"


def compare(
    build,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    training: bool = True,
    recompute: bool = False,
    draws: int | None = None,
    device: str = "cpu",
    fuse: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
) -> None:
    """Compare a converted ``build()`` (a plain float32 module) with itself unconverted, in ``dtype``, against float64, over fresh
    ``draws`` of inputs and parameters (more of them in low precision, where rounding flips more activations). ``fuse`` makes a module
    fused where ``fusedres.convert`` is not to.

    In training: output, every gradient, running statistics; else the output without gradients, by running statistics.

    Among thousands of medians of a few draws some miss the rule by chance, where every draw's error is one flipped activation: where they
    do, six times as many draws decide.
    """
    if draws is None:
        draws = {torch.float64: 2, torch.float32: 5}.get(dtype, 9)
        if torch.finfo(dtype).bits == 16 and shape[0] > 1:
            # rounding flips about one activation in a hundred: with enough of them a draw's error is a mean of many flips, where that of
            # a map of 50 pixels is whether there was one, and the median of a coin's tosses says nothing
            shape = (8 * shape[0], *shape[1:])
    results: dict[str, dict[str, list[Tensor]]] = {"truth": {}, "eager": {}, "fused": {}}
    for seeds in (range(draws), range(draws, 6 * draws)):
        for seed in seeds:
            torch.manual_seed(seed)
            eager_model = build().double()
            randomize(eager_model)
            eager_model = eager_model.to(device, dtype)
            # the same rounded numbers for all three
            models = {
                "truth": copy.deepcopy(eager_model).double(),
                "eager": eager_model,
                "fused": (fuse or functools.partial(fusedres.convert, recompute=recompute))(copy.deepcopy(eager_model)),
            }
            x = torch.randn(shape).to(device, dtype)
            for name, model in models.items():
                model.train(training)
                value = x.double() if name == "truth" else x
                with fusedres.use_backend(backend if name == "fused" else None), torch.set_grad_enabled(training):
                    found = run_training(model, value, seed) if training else {"output": model(value)}
                for key, tensor in found.items():
                    results[name].setdefault(key, []).append(tensor.detach())
            assert_fused(models["fused"], backend)
        try:
            assert_all_parity(**results)
        except AssertionError:
            if seeds.start:
                raise
        else:
            return


def assert_all_parity(
    truth: dict[str, list[Tensor]], eager: dict[str, list[Tensor]], fused: dict[str, list[Tensor]]
) -> None:
    """:func:`assert_parity` of every result of :func:`run_training`; what is not floating point has to be equal."""
    assert fused.keys() == eager.keys()
    for key, values in fused.items():
        if values[0].is_floating_point():
            assert_parity(values, eager[key], truth[key], key)
        else:
            assert all(torch.equal(a, b) for a, b in zip(values, eager[key], strict=True)), key


def randomize(model: torch.nn.Module) -> None:
    """Fresh BatchNorm parameters and running statistics away from their initial zeros and ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor is not None and tensor.is_floating_point():
                    uniform = name in ("weight", "running_var")
                    with torch.no_grad():
                        tensor.uniform_(0.5, 1.5) if uniform else tensor.normal_(0, 0.3)
