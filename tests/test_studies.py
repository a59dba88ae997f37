"""The studies: their closed forms, their networks beside eager, and that each runs, is drawn and says its figures."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import served

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
matplotlib_image = pytest.importorskip("matplotlib.image")

import fusedres  # noqa: E402
from bench import data, training  # noqa: E402
from bench.studies import __main__ as command  # noqa: E402
from bench.studies import gradients, lesions  # noqa: E402
from bench.studies import networks as built  # noqa: E402
from bench.studies.registry import STUDIES  # noqa: E402
from fusedres.testing import assert_fused, assert_parity  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.digits(data.Crop(1, -1.0)).first(256, 128)


def logits_and_parameters(model: torch.nn.Module, batches, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of training steps by SGD with momentum."""
    model = model.to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    outputs = []
    for batch, labels in batches:
        optimizer.zero_grad()
        logits = model(batch.to(dtype))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        outputs.append(logits.detach())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"logits": torch.stack(outputs), "parameters": flat}


CASES = [
    (name, network)
    for name, study in STUDIES.items()
    for network in study.networks(study.presets["toy"], data.digits())
]


@pytest.mark.parametrize("name, network", CASES, ids=[f"{name}-{network}" for name, network in CASES])
def test_its_networks_learn_as_eager_does_and_run_fused(name, network, images):
    served("cpp", torch.float32)
    study = STUDIES[name]
    build = study.networks(study.presets["toy"], images)[network]
    found = {"truth": [], "eager": [], "fused": []}
    for seed in range(3):
        torch.manual_seed(seed)
        fused = build()
        eager = copy.deepcopy(fusedres.export_plain(fused))
        batches = list(images.batches(32, torch.Generator().manual_seed(seed)))[:3]
        found["truth"].append(logits_and_parameters(copy.deepcopy(eager), batches, torch.float64))
        found["eager"].append(logits_and_parameters(eager, batches, torch.float32))
        found["fused"].append(logits_and_parameters(fused, batches, torch.float32))
        assert_fused(fused, "cpp")
        assert not any(row.fused for row in fusedres.report(eager))
    for what in ("logits", "parameters"):
        assert_parity(*([run[what] for run in found[arm]] for arm in ("fused", "eager", "truth")), what)
