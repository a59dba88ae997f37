"""Everything else that a model does goes on working when it is converted: one test per promise, on whole models of their libraries."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from narrow import ResNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.swap import FusedBlock, original_class
from fusedres.testing import assert_parity, randomize, run_training

torchvision = pytest.importorskip("torchvision")
from torchvision.models import densenet, resnet  # noqa: E402
from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

pytestmark = pytest.mark.usefixtures("proven_once")

FUSED = "eager" if fusedres.backends()["cpp"] != "available" else "cpp"
#: large enough for every BatchNorm of the models to see more than a handful of values
IMAGE = (3, 3, 48, 48)


@pytest.fixture(autouse=True)
def one_fused_backend():
    """The compiled backend, or eager's schedules where there is no extension: never the original modules."""
    torch.manual_seed(0)
    with fusedres.use_backend(None if FUSED == "cpp" else FUSED):
        yield


# ---- the models ------------------------------------------------------------------------------------------------------


def small_resnet() -> nn.Module:
    return ResNet(resnet.BasicBlock, [1, 2, 1, 1])


def small_bottlenecks() -> nn.Module:
    return ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16)


def small_densenet(memory_efficient: bool = False) -> nn.Module:
    return densenet.DenseNet(8, (2, 3), 12, bn_size=2, num_classes=5, memory_efficient=memory_efficient)


MODELS = {"resnet": small_resnet, "bottlenecks": small_bottlenecks, "densenet": small_densenet}
each_model = pytest.mark.parametrize("name", MODELS)


def pair(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A plain model and its converted twin."""
    model = build()
    randomize(model)
    model.to(dtype)
    return model, fusedres.convert(copy.deepcopy(model))


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or IMAGE), dtype=dtype)


def blocks(model: nn.Module) -> list[FusedBlock]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def outcomes(model: nn.Module) -> set[str | None]:
    """What the blocks' last calls ran on; a Sequential that only hands maps over has no outcome where its children were called."""
    states = [block._fusedres for block in blocks(model)]
    assert states, "nothing was converted"
    ran = [state.outcome for state in states if state.outcome is not None or state.kind.key != "sequential"]
    return {None if outcome is None else str(outcome) for outcome in ran}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert parity of two steps in float64, and that what is counted is equal."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if value is None or not value.is_floating_point():
            assert value is theirs[key] or torch.equal(value, theirs[key]), key
        else:
            assert_parity(value, theirs[key], theirs[key], key)


def assert_trains_the_same(
    plain: nn.Module, model: nn.Module, x: Tensor, expected: set[str | None] | None = None
) -> None:
    """Assert that a step of ``model`` is that of ``plain``, and on what its blocks ran (default: all fused)."""
    assert_same(run_training(model, x), run_training(plain, x))
    assert outcomes(model) == ({FUSED} if expected is None else expected)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, fused=True),
        lambda p: torch.optim.RMSprop(p, 1e-3),
    ],
    ids=["adamw-foreach", "sgd-fused", "rmsprop"],
)
@each_model
def test_optimizers_made_before_go_on_with_their_state(name, make):
    plain = MODELS[name]()
    randomize(plain)
    plain.double()
    model = copy.deepcopy(plain)
    optimizers = [make(m.parameters()) for m in (plain, model)]
    for i in range(3):
        x = images()
        step(plain, optimizers[0], x)
        step(model, optimizers[1], x)
        if i == 0:
            fusedres.convert(model)
    assert outcomes(model) == {FUSED}
    # an adaptive optimizer divides by gradients of the size of roundings
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


# ---- feature extractors ----------------------------------------------------------------------------------------------

LAYERS = {
    "resnet": {"layer1": "low", "layer2.0.relu": "inside", "layer3": "high"},
    "bottlenecks": {"layer1.0.conv2": "inside", "layer4": "high"},
    "densenet": {"features.denseblock1": "low", "features.transition1.pool": "pooled", "flatten": "high"},
}


def assert_same_features(ours: dict | list, theirs: dict | list) -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert_parity(mine, other, other)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@each_model
def test_feature_extractors_of_torchvision_trace_the_original_modules(name, training):
    plain, model = (create_feature_extractor(m.train(training), dict(LAYERS[name])) for m in pair(MODELS[name]))
    x = images()
    assert_same_features(model.train(training)(x), plain.train(training)(x))
    for (key, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_feature_extractors_keep_fused_what_they_are_told_is_a_leaf():
    plain, model = (m.eval() for m in pair(small_resnet))
    leaves = {"tracer_kwargs": {"leaf_modules": [type(model.layer1[0])]}}
    extract = create_feature_extractor(model, {"layer2.1": "y"}, **leaves)
    x = images()
    assert_same_features(extract(x), create_feature_extractor(plain, {"layer2.1": "y"})(x))
    assert outcomes(extract.layer1) == outcomes(extract.layer2) == {FUSED}


def test_an_intermediate_layer_getter_returns_the_same_maps():
    plain, model = pair(small_resnet)
    wanted = {"layer1": "low", "layer3": "high"}
    getters = [IntermediateLayerGetter(m, wanted) for m in (plain, model)]
    x = images()
    assert_same_features(getters[1](x), getters[0](x))
    assert outcomes(getters[1]) == {FUSED}


@pytest.mark.parametrize("kind", ["list", "hook", "fx"])
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_features_only_models_of_timm_return_the_same_maps(name, kind):
    timm = pytest.importorskip("timm")
    if (name, kind) == ("densenet121", "list"):
        pytest.skip("timm makes a list of no DenseNet")
    arguments = {"out_indices": (1, 2, 3), "features_only": True, "feature_cls": kind}
    plain, model = pair(lambda: timm.create_model(name, **arguments))
    x = images(2, 3, 64, 64)
    assert_same_features(model(x), plain(x))
    # timm traces before we convert; where it hooks, what stands inside a hooked block is left to its modules
    if kind == "list":
        assert outcomes(model) == {FUSED}


# ---- frozen and eval-mode BatchNorms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False], ids=["trained-affine", "frozen-affine"])
@each_model
def test_eval_mode_batch_norms_inside_training_use_and_keep_their_running_statistics(name, affine):
    plain, model = pair(MODELS[name])
    for m in (plain, model):
        m.train()
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval().requires_grad_(affine)
    before = {key: value.clone() for key, value in model.named_buffers()}
    assert_trains_the_same(plain, model, images())
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())


@each_model
def test_a_frozen_backbone_gets_no_gradients_and_its_head_does(name):
    plain, model = pair(MODELS[name])
    for m in (plain, model):
        for key, parameter in m.named_parameters():
            parameter.requires_grad_(key.startswith(("fc", "classifier", "layer4", "features.denseblock2")))
    assert_trains_the_same(plain, model, images())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# ---- parametrised and weight-normed convolutions ---------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)


REWRITES = {
    "weight-norm": parametrizations.weight_norm,
    "spectral-norm": parametrizations.spectral_norm,
    "hook-weight-norm": old_weight_norm,
    "own": lambda module: parametrize.register_parametrization(module, "weight", Symmetric()),
}
#: gradients that the BatchNorm behind the convolution makes zero: they are roundings, of which no rule makes anything
SCALES = ("weight_g", "weight.original0")
PLACES = {
    "resnet": "layer2.0.conv1",
    "bottlenecks": "layer3.0.downsample.0",
    "densenet": "features.denseblock1.denselayer2.conv1",
}


@pytest.mark.parametrize("when", ["before", "after", "after-a-call"])
@pytest.mark.parametrize("rewrite", REWRITES)
@each_model
def test_parametrised_convolutions_compute_their_weights(name, rewrite, when):
    plain = MODELS[name]()
    randomize(plain)
    plain.double()
    model, x = copy.deepcopy(plain), images()
    if when != "before":
        fusedres.convert(model)
    if when == "after-a-call":
        assert_trains_the_same(plain, model, x)
        plain.zero_grad(), model.zero_grad()
    for m in (plain, model):
        torch.manual_seed(1)  # spectral norm starts from a random vector
        REWRITES[rewrite](m.get_submodule(PLACES[name]))
    if when == "before":
        fusedres.convert(model)
    for m in (plain, model):
        for key, parameter in m.named_parameters():
            parameter.requires_grad_(not key.endswith(SCALES) or rewrite == "spectral-norm")
    assert_same(run_training(model, x), run_training(plain, x))
    found = outcomes(model)
    assert FUSED in found, "the other blocks are fused"
    assert len(found) == 2 and any(reason.startswith("original modules") for reason in found)


def test_a_removed_parametrisation_is_fused_again():
    plain, model = pair(small_resnet)
    for m in (plain, model):
        parametrizations.weight_norm(m.layer2[0].conv1)
        m(images())
        parametrize.remove_parametrizations(m.layer2[0].conv1, "weight")
    x = images()
    plain.load_state_dict(model.state_dict())
    assert_trains_the_same(plain, model, x)


# ---- shared modules --------------------------------------------------------------------------------------------------


class SharedBlock(nn.Module):
    """One block applied twice, and registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = resnet.BasicBlock(6, 6)
        self.again = self.first
        self.dense = densenet._DenseBlock(2, 6, 2, 3, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x))
        return self.dense(self.dense(x)[:, :6])


def shared_norm() -> nn.Module:
    """Two convolutions before one BatchNorm."""
    block = resnet.BasicBlock(6, 6)
    block.bn2 = block.bn1
    return block


def shared_convolution() -> nn.Module:
    """One convolution in two places of a block, and in another block."""
    first, second = resnet.BasicBlock(6, 6), resnet.BasicBlock(6, 6)
    first.conv2 = second.conv1 = first.conv1
    return nn.Sequential(first, second)


def shared_weight() -> nn.Module:
    """Two convolutions with one parameter."""
    block = resnet.BasicBlock(6, 6)
    block.conv2.weight = block.conv1.weight
    return block


@pytest.mark.parametrize("build", [SharedBlock, shared_norm, shared_convolution, shared_weight])
def test_shared_modules_are_one_module(build):
    plain, model = pair(build)
    x = images(3, 6, 7, 5)
    assert_trains_the_same(plain, model, x)
    assert_same({"output": model.eval()(x)}, {"output": plain.eval()(x)})
    counts = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts[0] == (1 if build in (shared_convolution, shared_weight) else 2)


# ---- copies ----------------------------------------------------------------------------------------------------------


@each_model
def test_an_ema_copy_averages_and_update_bn_measures_its_statistics(name):
    plain, model = pair(MODELS[name])
    averages = []
    data = [images(4, 3, 32, 32) for _ in range(3)]
    for m in (plain, model):
        average = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(m.parameters(), 0.01)
        for x in data:
            step(m, optimizer, x)
            average.update_parameters(m)
        torch.optim.swa_utils.update_bn(data, average)
        averages.append(average)
    assert outcomes(averages[1]) == {FUSED}
    assert not {id(p) for p in averages[1].parameters()} & {id(p) for p in model.parameters()}
    theirs = averages[0].state_dict()
    for key, value in averages[1].state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@each_model
def test_a_saved_model_loads_and_goes_on_training(name, trained):
    _, model = pair(MODELS[name])
    x = images()
    if trained:
        step(model, torch.optim.SGD(model.parameters(), 0.01), x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    model.zero_grad()
    ours, theirs = run_training(twin, x), run_training(model, x)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert outcomes(twin) == {FUSED}


def test_a_copy_made_inside_a_graph_is_independent():
    _, model = pair(small_resnet)
    y = model(images())
    twin = copy.deepcopy(model)
    y.sum().backward()
    assert all(p.grad is None for p in twin.parameters())
    del y
    gc.collect()
    assert twin(images()).requires_grad


# ---- checkpointing ---------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """``layers`` one after the other, each under a checkpoint."""

    def __init__(self, layers: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.layers, self.use_reentrant = layers, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def checkpointable() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        resnet.BasicBlock(8, 8),
        nn.Sequential(resnet.Bottleneck(8, 2), fusedres.nn.PreActBasicBlock(8, 8)),
        densenet._DenseBlock(2, 8, 2, 4, 0.0),
        densenet._Transition(16, 8),
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpoints_around_blocks_give_gradients_and_statistics_as_eager_does(use_reentrant, recompute):
    plain = Checkpointed(checkpointable(), use_reentrant)
    randomize(plain)
    plain.double()
    model = copy.deepcopy(plain)
    # a module of ours runs its plain forward where it is told to
    plain.layers[2][1].forward = original_class(plain.layers[2][1]).forward.__get__(plain.layers[2][1])
    fusedres.convert(model, recompute=recompute)
    x = images(2, 3, 9, 8)
    ours, theirs = run_training(model, x), run_training(plain, x)
    assert_same(ours, theirs)
    assert outcomes(model) == {FUSED}
    assert model.layers[1].bn1.num_batches_tracked == 2, "the forward ran twice, in eager as in ours"


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_memory_efficient_densenet_counts_a_batch_once(recompute):
    plain, model = (small_densenet(efficient) for efficient in (False, True))
    randomize(plain)
    model.load_state_dict(plain.state_dict())
    fusedres.convert(model.double(), recompute=recompute)
    # torchvision's checkpoint updates the running statistics twice a step: ours once, as the same model does without it
    assert_trains_the_same(plain.double(), model, images())


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "densenet121", "regnety_002"])
def test_grad_checkpointing_of_timm_gives_the_same_step(name):
    timm = pytest.importorskip("timm")
    plain, model = pair(lambda: timm.create_model(name, num_classes=5))
    for m in (plain, model):
        m.set_grad_checkpointing(True)
    # in the last stage 18 values of a channel: a BatchNorm of the two that 48 pixels leave magnifies roundings a millionfold
    x = images(2, 3, 96, 96)
    ours, theirs = run_training(model, x), run_training(plain, x)
    if name == "densenet121":  # timm's is torchvision's checkpoint inside of dense layers, see above
        ours, theirs = ({k: v for k, v in found.items() if not k.startswith("buffer")} for found in (ours, theirs))
    assert_same(ours, theirs)
    assert outcomes(model) == {FUSED}


# ---- precision and layout --------------------------------------------------------------------------------------------


def test_a_grad_scaler_scales_steps_and_skips_those_that_overflow():
    losses: list[list[float]] = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=5)
        if convert:
            fusedres.convert(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        x, labels = images(8, 3, 32, 32, dtype=torch.float32), torch.arange(8) % 5
        losses.append([])
        for i in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), labels)
            scaled = scaler.scale(loss)
            (scaled * float("inf") if i == 2 else scaled).backward()
            held = model.fc.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(held, model.fc.weight) == (i == 2)
            losses[-1].append(loss.item())
        assert scaler.get_scale() == 2.0**9
    assert outcomes(model) == {FUSED}
    assert losses[1][3] < losses[1][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "weights", [torch.contiguous_format, torch.channels_last], ids=["nchw-weights", "nhwc-weights"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@each_model
def test_both_memory_formats_give_the_same_step(name, layout, weights):
    plain, model = pair(MODELS[name])
    x = images()
    model.to(memory_format=weights)
    assert_trains_the_same(plain, model, x.to(memory_format=layout))
    parameters = [p for p in model.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=weights) for p in parameters)
    assert all(p.grad.shape == p.shape for p in parameters)


@pytest.mark.parametrize("order", ["cast-then-convert", "convert-then-cast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_model
def test_half_precision_weights_train_in_half_precision(name, dtype, order):
    if fusedres.backends(dtype=dtype).get(FUSED) != "available":
        pytest.skip(f"the {FUSED} backend does not serve {dtype}")
    plain = MODELS[name]()
    model = copy.deepcopy(plain)
    model = fusedres.convert(model.to(dtype)) if order == "cast-then-convert" else fusedres.convert(model).to(dtype)
    plain.to(dtype)
    truth = copy.deepcopy(plain).double()
    x = images(16, 3, 32, 32, dtype=dtype)
    found = {
        n: run_training(m, v) for n, m, v in (("ours", model, x), ("eager", plain, x), ("truth", truth, x.double()))
    }
    assert outcomes(model) == {FUSED}
    assert all(found["ours"][key].dtype == value.dtype for key, value in found["eager"].items())
    assert_parity(*(found[n]["output"] for n in ("ours", "eager", "truth")), "output")


# ---- construction and change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["to-empty", "assigned"])
@each_model
def test_a_model_built_on_the_meta_device_gets_its_tensors_later(name, assign):
    plain = MODELS[name]()
    randomize(plain)
    plain.double()
    with torch.device("meta"):
        model = MODELS[name]()
    fusedres.convert(model.double())
    assert all(not row.fused for row in fusedres.report(model)), "nothing runs on the meta device"
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=assign)
    if assign:
        assert not any(p.is_meta for p in model.parameters())
    assert_trains_the_same(plain, model, images())


@each_model
def test_train_and_eval_reach_single_modules(name):
    plain, model = pair(MODELS[name])
    x = images()
    parts = [path for path, block in model.named_modules() if isinstance(block, FusedBlock)]
    for part in parts:
        for m in (plain, model):
            m.train()
            m.get_submodule(part).eval()
            m.zero_grad()
        assert_trains_the_same(plain, model, x)


def append_block(model: nn.Module) -> None:
    model.layer1.append(resnet.BasicBlock(16, 16).to(model.fc.weight.dtype))


def replace_block(model: nn.Module) -> None:
    model.layer2[1] = resnet.BasicBlock(32, 32).to(model.fc.weight.dtype)


def remove_block(model: nn.Module) -> None:
    model.layer2[1] = nn.Identity()


def replace_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False, dtype=model.fc.weight.dtype)
    model.maxpool = nn.Identity()


def replace_shortcut(model: nn.Module) -> None:
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    model.layer2[0].downsample = pooled.to(model.fc.weight.dtype)


def replace_norm(model: nn.Module) -> None:
    model.layer3[0].bn1 = nn.GroupNorm(8, 64).to(model.fc.weight.dtype)


def replace_classifier(model: nn.Module) -> None:
    model.fc = nn.Linear(128, 9, dtype=model.fc.weight.dtype)


@pytest.mark.parametrize("called", [False, True], ids=["before-a-call", "after-a-call"])
@pytest.mark.parametrize(
    "change",
    [append_block, replace_block, remove_block, replace_stem, replace_shortcut, replace_norm, replace_classifier],
    ids=lambda change: change.__name__.replace("_", "-"),
)
def test_modules_added_or_replaced_after_conversion_are_used(change, called):
    plain, model = pair(small_resnet)
    x = images()
    if called:
        model(x), plain(x)
    for m in (plain, model):
        torch.manual_seed(1)
        change(m)
    for again in (False, True):
        if again:  # with the newcomers converted, too
            fusedres.convert(model)
        plain.zero_grad(), model.zero_grad()
        assert_same(run_training(model, x), run_training(plain, x))
    found = outcomes(model) - {FUSED}
    if change is replace_norm:  # its block cannot fuse what stands there now
        assert len(found) == 1 and found.pop().startswith("original modules: found ")
    else:
        assert not found


def test_a_dense_layer_added_after_conversion_reads_and_writes_its_channels():
    plain, model = pair(lambda: densenet._DenseBlock(2, 6, 2, 4, 0.0))
    x = images(2, 6, 5, 7)
    model(x), plain(x)
    for m in (plain, model):
        torch.manual_seed(1)
        m.add_module("denselayer3", densenet._DenseLayer(14, 4, 2, 0.0).double())
    assert_trains_the_same(plain, model, x)
    assert model(x).shape[1] == 18


# ---- stochastic depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet26", "resnetv2_18", "regnety_002"])
def test_stochastic_depth_drops_the_same_paths(name):
    timm = pytest.importorskip("timm")
    few = {} if name == "regnety_002" else {"layers": (1, 2, 2, 1), "channels": (16, 32, 48, 64)}
    plain, model = pair(lambda: timm.create_model(name, num_classes=5, drop_path_rate=0.5, **few))
    x = images(4, 3, 48, 48)
    found = []
    for m in (model, plain):
        torch.manual_seed(3)
        found.append(run_training(m, x))
    assert_same(*found)
    assert outcomes(model) == {FUSED}


# ---- several inputs --------------------------------------------------------------------------------------------------


class Root(nn.Module):
    """DLA's aggregation node: maps in a list, joined and convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.relu(self.bn(self.conv(torch.cat(maps, 1))))


def test_a_block_that_takes_a_list_of_maps_gets_it():
    plain, model = pair(Root)
    found = []
    for m in (model, plain):
        torch.manual_seed(1)
        maps = [torch.randn(2, channels, 5, 4, dtype=torch.float64, requires_grad=True) for channels in (3, 5)]
        y = m(maps)
        y.square().sum().backward()
        found.append({"output": y, **{f"gradient {i}": x.grad for i, x in enumerate(maps)}})
    assert_same(*found)
    assert outcomes(model) == {FUSED}
