"""The examples run as they stand, at toy size: fused, resumed, in several processes, and on files as their users have them."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_one_line_of_each_is_ours_and_it_is_marked(script):
    ours = [line for line in script.read_text().splitlines() if "fusedres.convert" in line]
    assert len(ours) == 1 and ours[0].endswith("# <-- fusedres")


def picture(channels: int, values: int = 256) -> Image.Image:
    """Noise as a picture."""
    return to_pil_image(torch.randint(values, (channels, 40, 40), dtype=torch.uint8))


def assert_all_fused(said: str) -> None:
    fused, of = re.search(r"(\d+) of (\d+) blocks fused", said).groups()
    assert fused == of and int(of) > 0, said


def test_classification_goes_on_where_it_was(tmp_path, capsys):
    classify = load("classify")
    quick = ["--fake", "--model", "resnet18", "--size", "32", "--batch", "32", "--amp", "--out", str(tmp_path)]
    classify.main([*quick, "--epochs", "1"])
    assert "epoch 1" in capsys.readouterr().out
    classify.main([*quick, "--epochs", "2"])
    said = capsys.readouterr().out
    assert "epoch 2" in said and "epoch 1:" not in said
    assert_all_fused(said)


def test_classification_reads_folders(tmp_path, capsys):
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(2):
                picture(3).save(folder / f"{i}.png")
    quick = ["--model", "resnet18", "--size", "32", "--batch", "2", "--epochs", "1", "--out", str(tmp_path / "run")]
    load("classify").main([str(tmp_path), *quick])
    assert_all_fused(capsys.readouterr().out)


def in_two_processes(script: str, *arguments: str) -> str:
    """What an example says, run by two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(EXAMPLES / f"{script}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_classification_runs_in_two_processes(tmp_path):
    quick = ["--fake", "--model", "resnet18", "--size", "32", "--batch", "16", "--epochs", "1", "--out", str(tmp_path)]
    assert_all_fused(in_two_processes("classify", *quick))


SHARDED = ["--fake", "--model", "resnet18", "--size", "32", "--batch", "8", "--epochs", "3", "--lr", "0.01"]


def assert_sharded_training(said: str, weights: Path) -> None:
    """Everything ran fused, and what was gathered is a whole model's."""
    assert_all_fused(said)
    first, *_, last = map(float, re.findall(r"epoch \d: loss ([\d.]+)", said))
    assert last < first
    resnet18(num_classes=2).load_state_dict(torch.load(weights, weights_only=True))


def test_a_sharded_model_trains(tmp_path, capsys, monkeypatch):
    """By one process, which holds all parts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    load("shard").main([*SHARDED, "--out", str(tmp_path / "weights.pt")])
    assert_sharded_training(capsys.readouterr().out, tmp_path / "weights.pt")


@pytest.mark.slow
def test_a_sharded_model_trains_in_two_processes(tmp_path):
    weights = tmp_path / "weights.pt"
    assert_sharded_training(in_two_processes("shard", *SHARDED, "--out", str(weights)), weights)


LIGHTNING = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import lightning_classify as example
from fusedres.blocks import is_converted
trainer = example.main(sys.argv[2:])
assert trainer.global_step == 4 and trainer.callback_metrics["loss"].isfinite()
# the checkpoint is that of the model as it was
plain = example.Classifier.load_from_checkpoint(sys.argv[-1] + "/last.ckpt", weights_only=False, map_location="cpu")
assert not any(is_converted(module) for module in plain.modules())
assert all(torch.equal(a, b.cpu()) for a, b in zip(plain.parameters(), trainer.model.parameters(), strict=True))
"""


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")
def test_a_callback_of_lightning_converts(tmp_path):
    """In a process of its own: what lightning does when it is imported changes what other tests see of torch.compile."""
    quick = ["--fake", "--model", "resnet18", "--size", "32", "--batch", "16", "--epochs", "2", "--out", str(tmp_path)]
    done = forked.python(["-c", LIGHTNING, str(EXAMPLES), *quick])
    assert done.returncode == 0, done.stderr
    assert_all_fused(done.stdout)


def test_fine_tuning_leaves_what_is_frozen_and_learns(tmp_path, capsys):
    finetune = load("finetune")
    torch.manual_seed(0)
    losses = finetune.main(["--fake", "--size", "32", "--epochs", "2", "--out", str(tmp_path / "weights.pt")])
    assert losses[-1] < losses[0]
    assert_all_fused(capsys.readouterr().out)
    torch.manual_seed(0)
    saved, before = torch.load(tmp_path / "weights.pt", weights_only=True), finetune.build(3, None).state_dict()
    frozen = "features.denseblock1.denselayer1.conv1.weight"
    assert torch.equal(saved[frozen], before[frozen])
    statistics = "features.denseblock4.denselayer1.norm1.running_mean"
    assert torch.equal(saved[statistics], before[statistics])
    learned = "features.denseblock4.denselayer1.conv1.weight"
    assert not torch.equal(saved[learned], before[learned])


def test_segmentation_learns(capsys):
    torch.manual_seed(0)
    losses = load("segment").main(["--fake", "--model", "resnet18", "--size", "32", "--epochs", "3"])
    assert losses[-1] < losses[0]
    assert_all_fused(capsys.readouterr().out)


def test_fine_tuning_and_segmentation_read_files(tmp_path, capsys):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        picture(3).save(tmp_path / f"{i}.png")
        picture(3).save(tmp_path / "images" / f"{i}.png")
        picture(1, 2).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "labels.csv").write_text("".join(f"{i}.png,{i % 2},1\n" for i in range(4)))
    quick = [str(tmp_path), "--size", "32", "--epochs", "1", "--batch", "2"]
    load("finetune").main(quick)
    assert_all_fused(capsys.readouterr().out)
    load("segment").main([*quick, "--model", "resnet18"])
    assert_all_fused(capsys.readouterr().out)
