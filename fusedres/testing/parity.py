"""The one rule of every parity test: against float64, the error may be at most twice that of eager PyTorch in the same dtype."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

import fusedres
from fusedres.accuracy import allowance, error, holds
from fusedres.swap import FusedBlock, state_of
from fusedres.verify import copied

Results = dict[str, list[Tensor]]


def assert_parity(
    value: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    what: str = "result",
) -> None:
    """Assert that ``value`` is as right as ``eager``: both of one dtype and shape, ``truth`` in float64. ``what``: its name in the message.

    Given lists (fresh draws of one experiment), the medians over the draws are compared: one activation whose sign is decided by rounding
    moves a gradient of a deep chain by percents, in eager as in ours, and strikes one of them by chance. See :func:`allowance` for what is
    allowed on top.
    """
    values, eagers, truths = ([side] if isinstance(side, Tensor) else side for side in (value, eager, truth))
    for v, e in zip(values, eagers, strict=True):
        assert v.dtype == e.dtype, f"{what}: {v.dtype}, eager gives {e.dtype}"
        assert v.shape == e.shape, f"{what}: {tuple(v.shape)}, eager gives {tuple(e.shape)}"
    ours = [error(v, t) for v, t in zip(values, truths, strict=True)]
    theirs = [error(e, t) for e, t in zip(eagers, truths, strict=True)]
    allowed = allowance(values[0].dtype)
    for i, name in enumerate(("2-norm", "largest")):
        mine, other = (statistics.median(pair[i] for pair in pairs) for pairs in (ours, theirs))
        assert holds(mine, other, allowed), f"{what}: {name} error {mine:.3g}, eager's own {other:.3g}"


def run_training(model: nn.Module, x: Tensor, grad_seed: int = 0) -> dict[str, Tensor]:
    """The output, every gradient and every buffer after one step with a random output gradient, by name."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x)
    generator = torch.Generator().manual_seed(grad_seed)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    results = {"output": y, "input gradient": x.grad}
    results |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    results |= {f"buffer {n}": b for n, b in model.named_buffers()}
    return {name: value for name, value in results.items() if value is not None}


def assert_fused(model: nn.Module, backend: str) -> None:
    """Assert that there are fused blocks in ``model``, and that the last call of every one really ran on ``backend``."""
    named = model.named_modules()
    blocks = {name or "the model": cast(nn.Module, m) for name, m in named if isinstance(m, FusedBlock)}
    assert blocks, "nothing was converted"
    for name, block in blocks.items():
        state = state_of(block)
        outcome = None if state is None else state.outcome
        assert outcome is not None and outcome.backend == backend, f"{name} ({type(block).__name__}): {outcome}"


def assert_all_parity(truth: Results, eager: Results, fused: Results) -> None:
    """:func:`assert_parity` of every result of :func:`run_training`, over draws; what is not floating point has to be equal."""
    assert fused.keys() == eager.keys()
    for key, values in fused.items():
        if values[0].is_floating_point():
            assert_parity(values, eager[key], truth[key], key)
        else:
            assert all(torch.equal(a, b) for a, b in zip(values, eager[key], strict=True)), key


def randomize(model: nn.Module) -> None:
    """Fresh BatchNorm parameters and running statistics away from their initial zeros and ones, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor is not None and tensor.is_floating_point():
                    uniform = name in ("weight", "running_var")
                    with torch.no_grad():
                        tensor.uniform_(0.5, 1.5) if uniform else tensor.normal_(0, 0.3)


def compare(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    training: bool = True,
    recompute: bool = False,
    draws: int | None = None,
    device: str = "cpu",
    fuse: Callable[[nn.Module], nn.Module] | None = None,
) -> None:
    """Assert that a converted ``build()`` (a plain float32 module) is as right as itself unconverted, in ``dtype``, against float64, over
    fresh ``draws`` of inputs of ``shape`` and of parameters (more of them in low precision, where rounding flips more activations), and
    that every block of it ran on ``backend``. ``fuse`` makes a module fused where ``fusedres.convert`` is not to.

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
    results: dict[str, Results] = {"truth": {}, "eager": {}, "fused": {}}
    for seeds in (range(draws), range(draws, 6 * draws)):
        for seed in seeds:
            torch.manual_seed(seed)
            eager_model = build().double()
            randomize(eager_model)
            eager_model = eager_model.to(device, dtype)
            # all draws are of one structure, which is proven in the first of them
            made = fuse or functools.partial(fusedres.convert, recompute=recompute, verify=seed == 0)
            # the same rounded numbers for all three
            models = {
                "truth": copied(eager_model).double(),
                "eager": eager_model,
                "fused": made(copied(eager_model)),
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
