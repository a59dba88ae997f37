"""The studies: their closed forms, their networks beside eager, and that each runs, is drawn and says its figures."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from support import served
from torch import nn

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
matplotlib_image = pytest.importorskip("matplotlib.image")

import fusedres  # noqa: E402
from bench import data, training  # noqa: E402
from bench.studies import __main__ as command  # noqa: E402
from bench.studies import degradation, dense, depth, gradients, lesions, refinement, running  # noqa: E402
from bench.studies import networks as built  # noqa: E402
from bench.studies.registry import STUDIES  # noqa: E402
from fusedres.nn import DenseBlock  # noqa: E402
from fusedres.testing import assert_fused, assert_parity  # noqa: E402

ROOT = Path(__file__).parents[1]
ORDER = running.Order("toy", "digits", 1, "here")
#: of the study whose networks' widths are found by building them, which is nothing for the collection of tests
DENSE = ["dense, k = 2", "residual, width 2", "dense, k = 4", "residual, width 4", "reuse"]


@functools.cache
def builders(name: str) -> dict[str, Callable[[], nn.Module]]:
    """A study's networks."""
    return STUDIES[name].networks(STUDIES[name].presets["toy"], data.digits())


def cases() -> Iterator[object]:
    """Every network of every study; those that another has but for its depth or width are slow."""
    seen = set()
    for name in STUDIES:
        for network in DENSE if name == "dense" else builders(name):
            # of one kind and a depth: whichever study builds it
            kind = ("" if re.search(r"-\d+$", network) else name, re.sub(r"\d+", "n", network))
            marks = [pytest.mark.slow] if kind in seen else []
            seen.add(kind)
            yield pytest.param(name, network, id=f"{name}-{network}", marks=marks)


@pytest.fixture(scope="module")
def images() -> data.Images:
    return data.digits(data.Crop(1, -1.0)).first(256, 128)


def logits_and_parameters(model: nn.Module, batches, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of training steps by SGD with momentum: all logits, and the parameters behind the last step."""
    model = model.to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # random numbers of float64 are others
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    outputs = []
    for batch, labels in batches:
        optimizer.zero_grad()
        logits = model(batch.to(dtype))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        outputs.append(logits.detach())
    return {"logits": torch.stack(outputs), "parameters": torch.cat([p.detach().flatten() for p in model.parameters()])}


@pytest.mark.parametrize("name, network", list(cases()))
def test_its_networks_learn_as_eager_does_and_run_fused(name, network, images):
    served("cpp", torch.float32)
    build = builders(name)[network]
    found = {"truth": [], "eager": [], "fused": []}
    for seed in range(3):
        torch.manual_seed(seed)
        fused = build()
        eager = copy.deepcopy(fusedres.export_plain(fused))
        batches = list(images.batches(16, torch.Generator().manual_seed(seed)))[:2]
        found["truth"].append(logits_and_parameters(copy.deepcopy(eager), batches, torch.float64))
        found["eager"].append(logits_and_parameters(eager, batches, torch.float32))
        found["fused"].append(logits_and_parameters(fused, batches, torch.float32))
        assert_fused(fused, "cpp")
        assert not any(row.fused for row in fusedres.report(eager))
    for what in ("logits", "parameters"):
        assert_parity(*([run[what] for run in found[arm]] for arm in ("fused", "eager", "truth")), what)


def test_no_network_of_a_study_is_left_out():
    assert sorted(builders("dense")) == sorted(DENSE)


#: which of them are run whole by default, the others are slow: their networks and closed forms have tests of their own, "degradation" is
#: run by the command, and "lesions" on larger images
RUN = ("refinement", "dense")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in RUN else [pytest.mark.slow]) for name in STUDIES]
)
def test_it_runs_is_drawn_and_says_three_sentences(name, images, tmp_path):
    study, begun = STUDIES[name], []
    found = running.record(name, ORDER, images, begun.append)
    assert len(begun) == study.steps(study.presets["toy"])
    again = json.loads(json.dumps(found))
    assert again["data"] == {"name": "digits", "training": 256, "test": 128}
    assert again["sentences"] == list(study.sentences(again["result"])) and len(found["sentences"]) == 3
    for sentence in found["sentences"]:
        assert sentence.endswith(".") and re.search(r"\d", sentence) and "nan" not in sentence
    command.drawing.save(study.plot(again["result"]), tmp_path / "plot.png")
    picture = matplotlib_image.imread(tmp_path / "plot.png")
    assert picture.shape[1] >= 1200 and picture.std() > 0.05


def test_a_study_runs_on_larger_images_in_colour():
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(96, 3, 16, 16, generator=generator), torch.arange(96) % 10
    coloured = data.Images("noise", pixels, labels, pixels[:32], labels[:32], data.Crop(4, 0.0, mirrors=True))
    found = running.record("lesions", ORDER, coloured, lambda what: None)
    assert len(found["result"]["networks"]) == 3 and "nan" not in " ".join(found["sentences"])


def test_the_command_writes_and_says_what_it_found(tmp_path, capsys, monkeypatch, images):
    monkeypatch.setattr(running.Order, "images", lambda order, download: images)
    threads = torch.get_num_threads()
    assert command.main(["degradation", "--preset", "toy", "--threads", "1", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "degradation.json").read_text())
    assert found["environment"]["command"].startswith("python -m bench.studies degradation --preset toy")
    assert found["settings"]["depths"] == [8, 14] and (tmp_path / "degradation.png").exists()
    written = " ".join(capsys.readouterr().out.split())
    assert "1 of 8: degradation: plain-8, seed 0" in written
    assert all(sentence in written for sentence in found["sentences"])


@pytest.mark.slow
def test_a_study_in_a_process_of_its_own_finds_what_it_finds_here(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # for the process
    told, images, threads = [], ORDER.images(), torch.get_num_threads()
    (found,) = running.run(["refinement"], ORDER, images, 2, told.append)
    assert len(told) == STUDIES["refinement"].steps(STUDIES["refinement"].presets["toy"])
    torch.set_num_threads(1)
    assert found["environment"]["threads"] == 1 and found["sentences"]
    assert found["result"] == running.record("refinement", ORDER, images, lambda what: None)["result"]
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_several_studies_run_at_a_time_and_find_what_they_find_one_by_one(tmp_path):
    names = ["degradation", "refinement"]
    options = ["--preset", "toy", "--threads", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.studies", *names, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    images = ORDER.images()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["environment"]["threads"] == 1
        assert found["result"] == running.record(name, ORDER, images, lambda what: None)["result"]
        assert all(sentence in " ".join(done.stdout.split()) for sentence in found["sentences"])
    torch.set_num_threads(threads)


def test_an_unknown_study_is_a_clear_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["degradation", "lesion"])
    assert stopped.value.code == 2
    assert "no study 'lesion'; there are degradation, gradients, lesions" in capsys.readouterr().err


@pytest.mark.parametrize("name, folder", [("cifar10", "data"), ("somewhere", "somewhere")])
def test_cifar_that_is_not_there_is_a_clear_error(name, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(["degradation", "--data", name])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"no CIFAR-10 in {folder}" in error and "cifar-10-batches-py" in error and "--download" in error
    assert not any(tmp_path.iterdir())


def test_cifar_is_read_in_torchvisions_form_normalised_and_augmented(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": generator.integers(0, 256, (4, 3072), dtype=numpy.uint8), "labels": [1, 2, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # these few images are not the files whose checksums torchvision knows
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, checksum: Path(path).exists())
    found = data.cifar10(tmp_path)
    assert found.train_images.shape == (20, 3, 32, 32) and found.test_images.shape == (4, 3, 32, 32)
    pixels = pickle.loads((folder / "test_batch").read_bytes())["data"].reshape(4, 3, 32, 32)
    mean, deviation = (numpy.array(v).reshape(3, 1, 1) for v in (data.CIFAR_MEAN, data.CIFAR_DEVIATION))
    # float32 beside float64: an image's mean cancels most of a pixel's digits
    numpy.testing.assert_allclose(found.test_images, (pixels / 255 - mean) / deviation, rtol=1e-5, atol=1e-5)
    (batch, labels), *_ = found.batches(8, torch.Generator().manual_seed(0))
    assert batch.shape == (8, 3, 32, 32) and set(labels.tolist()) <= {1, 2, 3, 4}


def test_a_crop_is_a_shifted_and_perhaps_mirrored_image():
    images = torch.randn(256, 1, 5, 6)
    out = data.Crop(1, 7.0, mirrors=True)(images, torch.Generator().manual_seed(0))
    padded = F.pad(images, (1, 1, 1, 1), value=7.0)
    seen = set()
    for image, whole in zip(out, padded, strict=True):
        fits = [
            (down, right, mirrored)
            for down, right, mirrored in itertools.product(range(3), range(3), (False, True))
            if torch.equal(image, whole[:, down : down + 5, right : right + 6].flip(2 if mirrored else ()))
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 18  # every shift, each way


def test_a_chain_of_factors_vanishes_and_one_of_residual_steps_is_the_sum_over_its_paths():
    assert gradients.chain(0.9, 99, residual=False) == pytest.approx(0.9**99, rel=1e-12)
    assert 0.9**99 == pytest.approx(2.95e-5, rel=2e-3)
    for factor in (0.9, 0.01, -0.3):
        assert gradients.chain(factor, 99, residual=True) == pytest.approx((1 + factor) ** 99, rel=1e-12)
    assert gradients.over_paths(0.01, 99) == pytest.approx(1.01**99, rel=1e-12)
    # one by one: every path passes a factor or skips it
    each = [math.prod(0.3 if passed else 1.0 for passed in path) for path in itertools.product((0, 1), repeat=10)]
    assert math.fsum(each) == pytest.approx(gradients.over_paths(0.3, 10)) == pytest.approx(1.3**10)


def test_gradients_of_inputs_are_those_of_their_own_outputs(images):
    torch.manual_seed(0)
    network = built.of_blocks(built.residual, (2,), 4, 1)
    inputs = images.test_images[:6]
    found = gradients.input_gradients(network, inputs)
    for i in (0, 5):
        alone = inputs[i : i + 1].clone().requires_grad_()
        network(alone)[:, 0].sum().backward()
        # float32: in a batch of another size the convolutions add up in another order, through several layers
        torch.testing.assert_close(found[i], alone.grad.flatten().double(), rtol=1e-4, atol=1e-6)
    assert gradients.correlation(torch.tensor([[1.0, 0], [2.0, 0], [0, 3.0]])) == 0.5


def test_paths_have_binomial_lengths():
    by_hand = [0] * 9
    for path in itertools.product((0, 1), repeat=8):
        by_hand[sum(path)] += 1
    assert lesions.lengths(8) == by_hand and sum(lesions.lengths(54)) == 2**54
    shares = [count / 2**54 for count in lesions.lengths(54)]
    assert lesions.interval(shares, 0.95) in ((20, 34), (19, 34), (20, 35), (19, 35))


def test_the_gradients_of_all_paths_add_up_to_the_networks(images):
    torch.manual_seed(0)
    network = built.of_blocks(built.preact, (2, 1), 4, 1, activated=False)
    network.train()(images.train_images[:64])
    network.eval()
    start = network.stem(images.test_images[:32]).detach().requires_grad_()
    loss = F.cross_entropy(network.head(network.blocks(start)), images.test_labels[:32])
    (whole,) = torch.autograd.grad(loss, start)
    parts = [
        lesions.gradient_by_path(network, set(passed), images, 32)
        for count in range(4)
        for passed in itertools.combinations(range(3), count)
    ]
    # float32: eight parts, which cancel in places, in the order of the paths
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-7)


def test_a_lesion_leaves_the_shortcut_of_a_block_and_nothing_of_a_dense_layer(images):
    torch.manual_seed(0)
    x = images.test_images[:4]
    network = built.KINDS["residual"](14, 4, 1).eval()
    assert len(lesions.removals(network)) == 6 and lesions.swaps(network) == [(0, 1)]
    hurt = copy.deepcopy(network)
    for lesion in lesions.removals(hurt):
        lesion(hurt)
    before, after = network.states(x), hurt.states(x)
    assert torch.equal(after[2], before[0]) and after[3].shape == before[3].shape
    grown = built.KINDS["dense"](14, 4, 1).eval()
    assert len(lesions.removals(grown)) == 6
    layer = grown.layers[0][1]
    lesions.removals(grown)[1](grown)
    assert not layer(grown.states(x)[0].new_ones(1, layer.norm1.num_features, 8, 8)).any()
    # of a plain network, what keeps the size
    assert len(lesions.removals(built.KINDS["plain"](14, 4, 1))) == 4


def test_swapped_pairs_share_no_block():
    pairs = list(itertools.combinations(range(6), 2))
    chosen = lesions.disjoint(pairs, 3, random.Random(0))
    assert sorted(block for pair in chosen for block in pair) == list(range(6))
    assert lesions.disjoint(pairs, 4, random.Random(0)) is None


def test_a_step_down_the_gradient_has_cosine_one(images):
    class Downhill(nn.Module):
        def forward(self, x):
            return x - 0.5 * (x - 1)  # the loss below has the gradient x - 1

    network = built.of_blocks(built.preact, (1,), 2, 1, activated=False)
    network.blocks[0] = Downhill()
    network.head = nn.Flatten()

    def loss(maps, labels, reduction):
        # of x' = (x + 1) / 2, so that the gradient at x is that at x' times a half
        return (maps - 1).square().sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement.F, "cross_entropy", loss)
        found = refinement.refinements(network, images.test_images[:4], images.test_labels[:4])
    assert found["cosine"][0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_a_dense_block_has_a_connection_for_every_pair(layers):
    assert dense.connections(DenseBlock(layers, 6, 4, 3, 0.0), 3) == layers * (layers + 1) // 2


def test_memory_is_linear_in_one_buffer_and_quadratic_in_eager():
    served("cpp", torch.float32)
    counted = [
        {"layers": n, "eager": dense.kept(n, 8, 8, fused=False), "fused": dense.kept(n, 8, 8, fused=True)}
        for n in (24, 48)
    ]
    assert dense.exponent({"memory": counted}, "eager") > 1.6
    assert dense.exponent({"memory": counted}, "fused") < 1.1


def test_the_widths_of_equal_flops_are_the_nearest(images):
    def counted(width):
        return dense.flops(built.KINDS["residual"](dense.RESIDUAL_DEPTH, width, 1), images)

    wanted = counted(5) + 10
    assert dense.width_of(wanted, images) == 5


def test_the_deepest_within_a_budget_is_found_by_doubling_and_halving():
    tried = depth.deepest(lambda size: 3.0 * size, 40.0)
    assert max(size for size, value in tried.items() if value <= 40) == 13 and len(tried) < 9
    assert 14 in tried  # what comes next does not fit
    with pytest.raises(ValueError, match="no room for one block"):
        depth.deepest(lambda size: 3.0 * size, 2.0)


@pytest.mark.parametrize("kind", built.KINDS)
def test_a_network_has_the_layers_that_it_is_called_by(kind):
    network = built.KINDS[kind](20, 4, 1)
    gates = sum(1 for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and name.endswith("gate"))
    transitions = sum(1 for m in network.modules() if isinstance(m, fusedres.nn.Transition))
    convolutions = sum(1 for m in network.modules() if isinstance(m, nn.Conv2d)) - gates - transitions
    assert convolutions + 1 == 20
    with pytest.raises(ValueError, match="6 n . 2 layers"):
        built.per_stage(21)


def test_the_learning_rate_falls_at_milestones_and_warms_up():
    recipe = training.Recipe(100, learning_rate=0.1, milestones=(0.5, 0.75))
    assert [recipe.rate(e) for e in (0, 49, 50, 75)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert training.Recipe(4, learning_rate=1.0).rate(2) == pytest.approx(0.5)


def test_training_that_is_not_fused_where_it_is_to_be_is_an_error(images):
    torch.manual_seed(0)
    eager = fusedres.export_plain(built.KINDS["residual"](8, 4, 1))
    with pytest.raises(RuntimeError, match="did not run fused"):
        next(training.train(eager, images, training.Recipe(1), torch.Generator(), fused=True))


def test_final_errors_are_means_over_the_seeds():
    runs = [
        {"kind": "plain", "depth": 20, "seed": seed, "epochs": [{"train_error": 0.9}, {"train_error": value}]}
        for seed, value in enumerate((0.1, 0.3))
    ]
    assert degradation.final({"runs": runs}, "plain", 20, "train_error") == pytest.approx(20.0)


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_shows_and_says_what_the_committed_run_found(name):
    found = json.loads((ROOT / "results" / "studies" / f"{name}.json").read_text())
    assert found["sentences"] == list(STUDIES[name].sentences(found["result"])) and found["preset"] == "quick"
    page = " ".join((ROOT / "docs" / "studies.md").read_text().split())
    where = found["environment"]
    said = [
        *found["sentences"],
        f"results/studies/{name}.png",
        STUDIES[name].paper,
        where["command"],
        where["date"][:10],
    ]
    assert [text for text in (*said, where["device"], f"torch {where['torch']}") if text not in page] == []
    assert (ROOT / "results" / "studies" / f"{name}.png").stat().st_size < 150_000
