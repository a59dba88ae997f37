"""The harness: its command lines, its records, its report, and that its bytes are those counted by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import served
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("rich")
matplotlib_image = pytest.importorskip("matplotlib.image")

import fusedres  # noqa: E402
from bench import conversion, models, report, roofline, sweep  # noqa: E402
from bench.networks import DRAWN, NETWORKS, OF_TIMM  # noqa: E402
from fusedres.testing import compare, networks  # noqa: E402
from fusedres.trial import memory  # noqa: E402

ROOT = Path(__file__).parents[1]

FIELDS = {
    "model", "mode", "contender", "device", "dtype", "amp", "batch", "resolution", "rounds", "images_per_s", "ratio_to_eager",
    "ratio_range", "kept_for_backward_bytes", "peak_bytes", "compile_s", "parity", "fused_blocks", "failure", "environment",
}  # fmt: skip


def broken(model: nn.Module) -> nn.Module:
    raise NotImplementedError("no such | thing\nand more")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The JSON of a tiny run with a contender that fails."""
    path = tmp_path_factory.mktemp("records") / "models.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "EAGER_RUNS", 2)
        patch.setitem(models.CONTENDERS, "broken", models.Contender(broken))
        status = models.main(
            [
                *("--models", "resnet18", "--contenders", "eager", "fused", "broken", "--device", "cpu", "--quick"),
                *("--batch", "2", "--resolution", "32", "--rounds", "2", "--json", str(path)),
                # one thread: other tests may run beside this one
                *("--threads", "1"),
            ]
        )
    torch.set_num_threads(threads)
    assert status == 0
    return path


@pytest.fixture
def records(measured) -> list[dict]:
    return json.loads(measured.read_text())


def test_a_run_has_a_record_per_mode_and_contender(records):
    found = [(r["mode"], r["contender"]) for r in records]
    assert found == [(mode, name) for mode in ("train", "infer") for name in ("eager", "fused", "broken")]


def test_records_have_the_promised_fields(records):
    for r in records:
        assert r.keys() >= FIELDS
        assert (r["model"], r["device"], r["dtype"], r["batch"], r["resolution"]) == (
            "resnet18",
            "cpu",
            "float32",
            2,
            32,
        )
        assert {"device", "threads", "torch", "fusedres", "commit", "date", "command"} <= r["environment"].keys()
        assert r["environment"]["command"].startswith("python -m bench.models --models resnet18")


def test_records_hold_measurements(records):
    for r in records:
        if r["contender"] == "broken":
            continue
        assert r["failure"] is None
        assert r["images_per_s"] > 0 and r["rounds"] == 2 and r["peak_bytes"] > 0
        assert (r["kept_for_backward_bytes"] is not None) == (r["mode"] == "train")
        low, high = r["ratio_range"]
        assert low <= r["ratio_to_eager"] <= high
        if r["contender"] == "eager":
            assert r["ratio_to_eager"] == 1 and r["parity"] is None
        else:
            assert r["parity"]["passed"]


def test_a_run_can_be_limited_to_a_part_of_the_cpu(tmp_path):
    file = tmp_path / "records.json"
    limited = ["--capability", "default", "--models", "resnet18", "--modes", "infer", "--contenders", "eager"]
    assert (
        models.main([*limited, "--rounds", "1", "--batch", "2", "--resolution", "32", "--quick", "--json", str(file)])
        == 0
    )
    where = json.loads(file.read_text())[0]["environment"]
    assert where["cpu_capability"] == "DEFAULT" and "--capability default" in where["command"]


def test_instruction_sets_are_not_compared_with_each_other(records, tmp_path):
    lesser = [r | {"environment": r["environment"] | {"cpu_capability": "SSE"}} for r in records]
    page, _ = report.write_report(records + lesser, tmp_path)
    titles = [line for line in page.read_text().splitlines() if line.startswith("## Training")]
    assert len(titles) == 2 and ", SSE: " in titles[1]


def test_fused_keeps_less_for_backward_than_eager(records):
    kept = {r["contender"]: r["kept_for_backward_bytes"] for r in records if r["mode"] == "train"}
    assert 0 < kept["fused"] < kept["eager"]


def test_a_contender_that_fails_is_a_result(records):
    for r in records:
        if r["contender"] == "broken":
            assert r["failure"] == "NotImplementedError: no such | thing"
            assert r["images_per_s"] is r["ratio_to_eager"] is r["peak_bytes"] is r["parity"] is None


def assert_picture(path: Path) -> None:
    """Assert that the PNG opens and shows something."""
    pixels = matplotlib_image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert 0.01 < (pixels.min(axis=2) < 0.95).mean() < 0.9


def test_report_writes_page_and_picture(measured, tmp_path, capsys):
    assert report.main([str(measured), "--out", str(tmp_path / "new")]) == 0
    assert "report.md" in capsys.readouterr().out
    assert_picture(tmp_path / "new" / "report.png")
    page = (tmp_path / "new" / "report.md").read_text()
    for part in (
        "(report.png)",
        "## Training",
        "## Inference",
        "| resnet18 | fused |",
        "python -m bench.models",
        "passed",
    ):
        assert part in page
    assert r"failed: NotImplementedError: no such \| thing" in page


def wider(records: list[dict]) -> list[dict]:
    return records + [r | {"resolution": 64} for r in records[:2]]


@pytest.mark.parametrize(
    "change",
    [
        wider,
        lambda records: [r for r in records if r["contender"] != "eager"],
        lambda records: [
            r | {"ratio_to_eager": None, "ratio_range": None} for r in records if r["contender"] == "fused"
        ],
        lambda records: [r for r in records if r["contender"] == "broken"],
        lambda records: [r for r in records if r["mode"] == "infer"],
        lambda records: [r | {"contender": "another"} for r in records],
        lambda records: [r | {"environment": r["environment"] | {"commit": None}} for r in records],
    ],
    ids=["resolutions", "no eager", "no ratios", "only failures", "only inference", "unknown contender", "no checkout"],
)
def test_report_takes_records_as_they_come(records, tmp_path, change):
    page, picture = report.write_report(change(records), tmp_path, "A heading", "A *remark*.")
    assert page.read_text().startswith("# A heading\n\nA *remark*.\n")
    assert_picture(picture)


def test_report_marks_parity_that_failed(records, tmp_path):
    fused = next(r for r in records if r["contender"] == "fused")
    for group in fused["parity"]["groups"]:
        group["passed"] = group["name"] != "gradients"
    page, _ = report.write_report(records, tmp_path)
    assert "failed: gradients" in page.read_text()


def test_report_of_nothing_is_a_clear_error(tmp_path, capsys):
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "empty.json")])
    assert "no records" in capsys.readouterr().err


def test_kept_bytes_are_those_counted_by_hand():
    # the first dimension of the Linear's weight is the batch, and both of the last layers keep the ReLU's output
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 2))
    with memory.count_kept(model, 2) as kept:
        y = model(torch.randn(2, 3, 8, 8))
        assert kept() == 4 * (2 * 3 * 8 * 8 + 2 * 4 * 8 * 8)
        del y
        assert kept() == 0


def test_kept_bytes_count_whole_storages():
    whole = torch.randn(2, 6, 5)
    with memory.count_kept(nn.Module(), 2) as kept:
        y = (whole[:, :1] * nn.Parameter(torch.ones(1))).sum()
        assert kept() == whole.untyped_storage().nbytes()
        del y


def test_peak_bytes_are_those_counted_by_hand():
    # both ones and their sum are alive at once; what came before and goes after is not more
    assert memory.peak_bytes(lambda: torch.ones(1000) + torch.ones(1000), torch.device("cpu")) == 3 * 4000


def test_roofline_counts_totals_without_running(tmp_path, capsys):
    pytest.importorskip("triton")
    path, page = tmp_path / "count.json", tmp_path / "count.md"
    sizes = ("--batch", "64", "--dtype", "bfloat16", "--resolution", "64")
    roofline.main(["--model", "resnet18", *sizes, "--json", str(path), "--markdown", str(page)])
    printed = capsys.readouterr().out
    totals = re.findall(r"feature-map traffic per image: (\d+) MB, eager (\d+) MB", printed)
    assert len(totals) == 2 and all(int(ours) < int(theirs) for ours, theirs in totals)
    records = json.loads(path.read_text())
    assert [r["mode"] for r in records] == ["train", "infer"]
    assert all(f"## resnet18 {r['mode']}, batch 64" in page.read_text() for r in records)
    for counted in records:
        assert counted["bytes"] == sum(c["read"] + c["written"] for c in counted["calls"]) < counted["eager_bytes"]
        # what is launched moves what the schedule counts, and each call is a launch at least, but that frozen BatchNorms share one
        fused = counted["launches"]["fused"]
        assert fused["bytes"] == pytest.approx(counted["bytes"], rel=0.1)
        own = sum(counted["mode"] == "train" or c["label"] != "C-sized" for c in counted["calls"])
        assert fused["kernels"] + fused["operators"] >= own > 0
        # whose convolutions are the library's, between passes
        assert fused["bytes"] < counted["launches"]["cuda"]["bytes"] < counted["eager_bytes"]


def test_roofline_measures_where_it_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        roofline.main(["--count", "--device", "cpu"])
    assert "--device" in capsys.readouterr().err


@pytest.mark.parametrize("main, option", [(models.main, "--models"), (roofline.main, "--model")])
def test_an_unknown_model_is_a_clear_error(main, option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([option, "resnet5"])
    assert stopped.value.code == 2
    assert re.search(r"no 'resnet5'; it has, among others, .*resnet50", capsys.readouterr().err)


def test_an_unknown_contender_is_a_clear_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        models.main(["--contenders", "eager", "fastest"])
    assert stopped.value.code == 2
    assert re.search(r"invalid choice: 'fastest' .*fused", capsys.readouterr().err)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", DRAWN)
def test_the_networks_of_the_sweep_run_fused_and_are_as_right_as_eager(name, training):
    served("cpp", torch.float64)
    compare(DRAWN[name], (2, 3, 32, 32), torch.float64, "cpp", training)


@pytest.mark.parametrize("name", OF_TIMM)
def test_what_the_sweep_takes_of_timm_runs_fused(name):
    pytest.importorskip("timm")
    served("cpp", torch.float32)
    model = fusedres.convert(NETWORKS[name]().eval(), verify=False)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert all(row.fused for row in fusedres.report(model))


@pytest.mark.slow
def test_the_sweep_tables_every_model_at_every_size(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # batch 1 at 32 px would leave one value per channel, with which no BatchNorm trains
    sizes = ("--batch", "1", "2", "--resolution", "64", "--rounds", "2", "--device", "cpu")
    assert sweep.main(["--models", "resnet18", *sizes, "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    records = json.loads((tmp_path / "sweep.json").read_text())
    assert len(records) == 2 * 2 * 2
    text = (tmp_path / "sweep.md").read_text()
    assert text.count("| model | 1 x 64 px | 2 x 64 px |") == 2 and text.count("| resnet18 |") == 2
    for mode in ("train", "infer"):
        least = min(r["ratio_to_eager"] for r in records if (r["mode"], r["contender"]) == (mode, "fused"))
        assert f"Smallest: {least:.3f}x (resnet18, batch " in text
    assert "ratio to eager" in capsys.readouterr().out


@pytest.fixture
def dependent():
    pytest.importorskip("triton")
    from bench import dependent

    return dependent


QUICK = ("--device", "cpu", "--quick", "--models", "resnet18", "--rounds", "1")


def test_dependent_launches_are_compared_and_timed(dependent, tmp_path, capsys):
    path = tmp_path / "pdl.json"
    assert dependent.main([*QUICK, "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert [r["mode"] for r in records] == ["train", "infer"]
    for r in records:
        assert r["failure"] is None and r["repeatable"] and r["different"] == []
        assert len(r["off_seconds"]) == len(r["on_seconds"]) == 1 and min(*r["off_seconds"], *r["on_seconds"]) > 0
    assert sum("the same" in line for line in dependent.markdown(records)) == 2
    # on a GPU that has them, launches that are not dependent are a fault
    assert dependent.is_wrong(records[0] | {"launches": 9, "dependent": 8}, True)
    assert not dependent.is_wrong(records[0] | {"launches": 9, "dependent": 9}, True)


def test_a_bit_that_a_dependent_launch_changes_is_found(dependent, monkeypatch, capsys):
    """Of a running mean, in one step of several."""
    from fusedres.kernels import launch

    original, turns = dependent.step, []

    def step(model, forward, x, mode):
        y = original(model, forward, x, mode)
        turns.append(launch.dependent)
        if launch.dependent and sum(turns) == 4:
            model.bn1.running_mean[3].mul_(1 + 2**-20)
        return y

    monkeypatch.setattr(dependent, "step", step)
    assert dependent.main([*QUICK, "--modes", "infer"]) == 1
    assert "1 tensors differ, bn1.running_mean first" in capsys.readouterr().out


@pytest.fixture
def equivalence():
    pytest.importorskip("sklearn")
    from bench import equivalence

    return equivalence


@pytest.mark.slow
def test_training_equivalence_is_judged_and_drawn(equivalence, tmp_path):
    size = ("--models", "ResNet-20", "--epochs", "2", "--seeds", "2", "--batch", "128", "--threads", "1")
    threads = torch.get_num_threads()
    status = equivalence.main([*size, "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    content = json.loads((tmp_path / "equivalence.json").read_text())
    # two seeds and twenty steps from the start, where runs part fastest, prove nothing either way
    assert status == (0 if all(v["passed"] for v in content["verdicts"]) else 1)
    assert content["settings"]["epochs"] == 2 and content["environment"]["command"].endswith(str(tmp_path))
    assert [(r["seed"], r["arm"]) for r in content["runs"]] == [(s, arm) for s in range(2) for arm in equivalence.ARMS]
    assert all(len(r["train_loss"]) == 2 and r["train_loss"][-1] < r["train_loss"][0] for r in content["runs"])
    assert [v["quantity"] for v in content["verdicts"]] == list(equivalence.CURVES)
    assert "| ResNet-20 | converted |" in (tmp_path / "equivalence.md").read_text()
    assert_picture(tmp_path / "equivalence.png")


@pytest.mark.parametrize("wrong", ["bias", "spread", None])
def test_training_that_differs_is_outside_the_noise(equivalence, wrong):
    generator = torch.Generator().manual_seed(0)

    def curve(seed: int, arm: str) -> list[float]:
        noise = 0.02 * torch.randn(12, generator=generator)
        if arm == "converted" and wrong == "bias":
            noise += 0.2
        if arm == "converted" and wrong == "spread":
            noise *= 20
        return torch.exp(noise - torch.arange(12) / 4).tolist()

    def run(seed: int, arm: str) -> object:
        return equivalence.Run("ResNet-20", arm, seed, curve(seed, arm), curve(seed, arm), [0.97 + seed / 1000] * 12)

    verdicts = equivalence.judge([run(seed, arm) for seed in range(5) for arm in equivalence.ARMS])
    assert [v.passed for v in verdicts] == [wrong is None, wrong is None, True]


def test_wilsons_interval_is_that_of_the_textbook(equivalence):
    low, high = equivalence.wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490162, abs=1e-5), pytest.approx(0.943318, abs=1e-5))


def test_conversion_is_timed_with_its_proof_and_without(tmp_path, capsys):
    conversion.main(["--models", "resnet18", "--repeats", "1", "--output", str(tmp_path)])
    assert "| resnet18 | 11.7 M | " in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "conversion.json").read_text())["models"]
    assert "Command: `python -m bench.conversion --models resnet18" in (tmp_path / "conversion.md").read_text()
    assert 0 < record["without"] and 0 < record["with_proof"]
    with pytest.raises(SystemExit, match="has no model|has a model"):
        conversion.main(["--models", "nonsense", "--output", str(tmp_path)])
