"""``python -m fusedres try``: it measures the model that it was asked about, says what is wrong with a question, and fails with parity."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedres.__main__ import main
from fusedres.trial import measure
from fusedres.trial.models import TrialError, input_channels_and_size, load_model
from fusedres.verify import Difference, Verification

MODELS = """
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 8))

def linear():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return {"features": [self.inner(x)], "count": x.shape[0]}

class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("a head for another size")

class Greedy(Named):
    def forward(self, x):
        if len(x) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return super().forward(x)

made = net()
number = 3

def fails():
    raise OSError("no disk")
"""


@pytest.fixture
def models(tmp_path):
    pytest.importorskip("torchvision")
    path = tmp_path / "my_models.py"
    path.write_text(MODELS)
    return path


def tried(model: str, folder, *arguments: str) -> tuple[int, dict | None]:
    """The exit status of the command for ``model``, and its JSON where it wrote any."""
    quick = ("--size", "6", "--batch", "4", "--seconds", "1", "--out", str(folder))
    status = main(["try", model, *quick, *arguments])
    path = folder / "trial.json"
    return status, json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(measure, "_TURN", 0.001)


@pytest.mark.parametrize("name", ["net", "made", "Named"])
def test_a_model_of_ones_own_is_compared_timed_and_weighed(models, tmp_path, name, capsys):
    status, found = tried(f"{models}:{name}", tmp_path)
    assert status == 0 and found is not None
    said = capsys.readouterr().out
    assert "basic block" in said and "parity, train: passed" in said and "parity, infer: passed" in said
    assert found["holds"] and found["parity"].keys() == {"train", "infer"}
    assert [block["fused"] for block in found["blocks"]] == [True, True]
    rows = {(row["mode"], row["contender"]): row for row in found["rows"]}
    assert rows.keys() == {
        ("train", "eager"), ("train", "fused"), ("train", "fused, recompute"), ("infer", "eager"), ("infer", "fused"),
    }  # fmt: skip
    for (mode, _), row in rows.items():
        assert row["failure"] is None and row["images_per_s"] > 0 and row["peak_bytes"] > 0
        assert (row["kept_bytes"] is not None) == (mode == "train")
    assert rows["train", "fused"]["kept_bytes"] < rows["train", "eager"]["kept_bytes"]
    assert (tmp_path / "trial.png").stat().st_size > 1000


def test_one_mode_alone_is_tried_when_asked_for(models, tmp_path):
    status, found = tried(f"{models}:net", tmp_path, "--infer", "--dtype", "bfloat16", "--nchw")
    assert status == 0 and found is not None
    assert {row["mode"] for row in found["rows"]} == {"infer"} and found["setting"]["dtype"] == "bfloat16"


def test_autocast_is_tried_when_asked_for(models, tmp_path):
    status, found = tried(f"{models}:net", tmp_path, "--amp", "--dtype", "bfloat16", "--train")
    assert status == 0 and found is not None and found["setting"]["amp"]


def test_a_model_without_any_block_is_measured_all_the_same(models, tmp_path, capsys):
    status, found = tried(f"{models}:linear", tmp_path)
    assert status == 0 and found is not None and found["blocks"] == []
    assert "no residual or dense block found" in capsys.readouterr().out


def test_a_difference_from_eager_is_the_exit_status(models, tmp_path, monkeypatch, capsys):
    wrong = Verification([Difference("output", 1.0, 1e-7, False)])
    monkeypatch.setattr(measure, "verify", lambda model, *example: wrong)
    status, found = tried(f"{models}:net", tmp_path, "--infer")
    assert status == 1 and found is not None and not found["holds"]
    assert "parity, infer: FAILED" in capsys.readouterr().out


def test_out_of_memory_halves_the_batch_and_says_so(models, tmp_path, capsys):
    status, found = tried(f"{models}:Greedy", tmp_path, "--infer")
    assert status == 0 and found is not None and found["setting"]["batch"] == 2
    assert "out of memory with 4 images: going on with 2" in capsys.readouterr().out


def test_a_model_that_does_not_run_is_told_from_one_that_fusedres_breaks(models, tmp_path, capsys):
    status, found = tried(f"{models}:Broken", tmp_path)
    assert status == 2 and found is None
    said = " ".join(capsys.readouterr().out.split())
    assert "the model itself fails on images of 4 x 3 x 6 x 6" in said and "a head for another size" in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet50", "expected torchvision:NAME"),
        ("nowhere.at_all:net", "cannot be imported"),
        ("missing.py:net", "there is no file missing.py"),
        ("torchvision:resnet7", "torchvision:resnet7 fails"),
        ("{models}:nothing", "has no 'nothing'"),
        ("{models}:number", "neither a model nor a function"),
        ("{models}:fails", "no disk"),
        ("math:pi", "neither a model nor a function"),
        ("math:tau_of", "has no 'tau_of'"),
    ],
)
def test_a_wrong_name_gets_one_sentence(models, name, sentence):
    with pytest.raises(TrialError, match=sentence):
        load_model(name.format(models=models))


def test_weights_are_read_from_a_file(models, tmp_path):
    wanted = load_model(f"{models}:net").state_dict()
    torch.save(wanted, tmp_path / "weights.pt")
    found = load_model(f"{models}:net", str(tmp_path / "weights.pt")).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    with pytest.raises(TrialError, match="there is no file"):
        load_model(f"{models}:net", str(tmp_path / "none.pt"))


def test_images_are_those_that_a_model_says_it_is_made_for():
    model = nn.Identity()
    assert input_channels_and_size(model) == (3, (224, 224))
    model.default_cfg = {"input_size": (1, 28, 32)}
    assert input_channels_and_size(model) == (1, (28, 32))


@pytest.mark.parametrize("arguments", [["--size", "0"], ["--size", "2by2"], ["--batch", "0"], ["--train", "--infer"]])
def test_wrong_options_are_refused(arguments):
    with pytest.raises(SystemExit):
        main(["try", "torchvision:resnet18", *arguments])


def test_a_device_that_is_not_there_gets_one_sentence(tmp_path, models, capsys):
    status, _ = tried(f"{models}:net", tmp_path, "--device", "cuda:77")
    assert status == 2 and "the device 'cuda:77' cannot be used" in capsys.readouterr().out
