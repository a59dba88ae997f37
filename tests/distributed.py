"""What the processes of test_distributed.py run: module level and importable, so that spawned processes find it."""

from __future__ import annotations

import collections
import contextlib
import copy
import datetime
import io
import pathlib
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from compiling import operators, operators_in, parts
from support import ran
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import fusedres
from fusedres.blocks import FusedBlock, is_converted, kind_key
from fusedres.testing import randomize

Results = dict[str, Tensor]


Cases = Callable[[int, int, str], dict]


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """Run the cases that are asked for, until there are no more: what each returns, or an error as its text."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    while (asked := pipe.recv()) is not None:
        cases, name = asked
        try:
            found: object = cases(rank, world, name)
        except Exception:
            found = traceback.format_exc()
        memory = io.BytesIO()  # a tensor through a pipe would be shared, and gone with its process
        torch.save(found, memory)
        pipe.send_bytes(memory.getvalue())
    dist.destroy_process_group()


class Processes:
    """So many processes of one group, which are started when the first case is asked for, and run one case after another."""

    def __init__(self, world: int, folder: pathlib.Path) -> None:
        self.world, self.folder = world, folder
        self._started = 0
        self._running: list[tuple[BaseProcess, Connection]] = []

    def _start(self) -> None:
        self._started += 1
        context = mp.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, f"{self.folder}/store-{self._started}", theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def run(self, cases: Cases, name: str) -> list[dict]:
        """What ``cases(rank, world, name)`` returns in each of them."""
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((cases, name))
        found: dict[Connection, Any] = {}
        while len(found) < self.world:
            for pipe in wait([pipe for _, pipe in self._running if pipe not in found]):
                assert isinstance(pipe, Connection)
                try:
                    found[pipe] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
                except EOFError:
                    found[pipe] = "it ended"
                if isinstance(found[pipe], str):
                    # the others wait for it, or will: none of these is in step any more
                    self.stop(now=True)
                    raise AssertionError(f"{name}, in one of {self.world} processes: {found[pipe]}")
        return [found[pipe] for _, pipe in self._running]

    def stop(self, now: bool = False) -> None:
        """End them; the next case has new ones."""
        for process, pipe in self._running:
            if now:
                process.kill()
            else:
                pipe.send(None)
        for process, pipe in self._running:
            process.join()
            pipe.close()
        self._running.clear()


# ---- SyncBatchNorm ---------------------------------------------------------------------------------------------------


def basic(inplanes: int, planes: int, stride: int = 1) -> nn.Module:
    """A basic block, with a projection where it needs one."""
    shortcut = None
    if stride != 1 or inplanes != planes:
        shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride), nn.BatchNorm2d(planes))
    return fusedres.nn.BasicBlock(inplanes, planes, stride, shortcut)


def bottleneck(inplanes: int, width: int, stride: int = 1) -> nn.Module:
    """A bottleneck with a projection."""
    shortcut = nn.Sequential(nn.Conv2d(inplanes, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    return fusedres.nn.Bottleneck(inplanes, width, stride, shortcut)


def dense() -> nn.Module:
    """A dense block and its transition."""
    layers = fusedres.nn.DenseBlock(3, 5, bn_size=2, growth_rate=3, drop_rate=0.0)
    return nn.Sequential(layers, fusedres.nn.Transition(14, 7))


def stem() -> nn.Module:
    """A row with a pool and a biased convolution."""
    return nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


class Halve(nn.Module):
    """No schedule knows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def split() -> nn.Module:
    """A bottleneck with a module inside around which the schedule is split, and norms outside of any block."""
    block = bottleneck(5, 4, 2)
    block.conv2 = nn.Sequential(block.conv2, Halve())
    return nn.Sequential(nn.BatchNorm2d(5), block, nn.BatchNorm2d(16), nn.GELU())


class Traced(nn.Module):
    """A block that is recognised by its structure."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


SYNCHRONISED: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: basic(5, 6, 2),
    "identity": lambda: basic(5, 5),
    "bottleneck": lambda: bottleneck(5, 3, 2),
    "preactivation": lambda: fusedres.nn.PreActBasicBlock(5, 5),
    "dense": dense,
    "stem": stem,
    "split": split,
    "traced": Traced,
    "frozen-convolutions": lambda: nn.Sequential(basic(5, 5), basic(5, 6).requires_grad_(False), basic(6, 6)),
}
#: samples in each process: even, uneven, one value per channel in one of them, none in one of them
BATCHES = {"even": (3, 3), "uneven": (5, 1), "empty": (4, 0), "four": (2, 1, 0, 3)}


def seeded(build: Callable[[], nn.Module], momentum: float | None = 0.1) -> nn.Module:
    """``build()`` in float64 with the same numbers in every process."""
    torch.manual_seed(0)
    model = build().double()
    randomize(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    return model


def batch(sizes: tuple[int, ...]) -> Tensor:
    """The samples of all processes, odd-sized."""
    return torch.randn(sum(sizes), 5, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3


def output_gradient(y: Tensor) -> Tensor:
    """The same numbers for a sample wherever it is."""
    return torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).sin().view_as(y[0]).expand_as(y) * (1 + y.detach().tanh())


def training_step(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Results:
    """The output, the gradients and the buffers after a step; ``call``: how the model is called, where not by itself."""
    x = x.detach().clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.backward(output_gradient(y) if len(y) else torch.zeros_like(y))
    found = {"output": y.detach(), "input gradient": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    return found | {f"buffer {n}": b for n, b in model.named_buffers()}


def parse(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...], str]:
    """``(block, samples of each process, what else happens)`` of a case; the last is recompute, cumulative (averages) or, in the last
    process alone, hook-in-one or backend-in-one."""
    block, sizes, *change = name.split("/")
    return SYNCHRONISED[block], BATCHES[sizes], "".join(change)


def momentum_of(change: str) -> float | None:
    """None is a cumulative average."""
    return None if change == "cumulative" else 0.1


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives inside a ``with``."""
    calls: list[str] = []
    originals = dist.all_gather, dist.all_reduce

    def count(name, original):
        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    dist.all_gather, dist.all_reduce = (count(n, o) for n, o in zip(("gather", "reduce"), originals, strict=True))
    try:
        yield calls
    finally:
        dist.all_gather, dist.all_reduce = originals


def synchronised(rank: int, world: int, name: str) -> dict:
    """A step of a converted model with SyncBatchNorm on this process's part of the batch."""
    build, sizes, change = parse(name)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(seeded(build, momentum_of(change)))
    model = fusedres.convert(model, recompute=change == "recompute")
    last, fired = rank == world - 1, []
    if change == "hook-in-one" and last:
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(lambda *_: fired.append(True))
    x = batch(sizes).split(sizes)[rank]
    chosen = "eager" if change == "backend-in-one" and last else None
    with fusedres.use_backend(chosen), counted() as calls:
        found = training_step(model, x)
    blocks = [m for m in model.modules() if isinstance(m, FusedBlock) and kind_key(m) != "sync_norm"]
    # a Sequential that only hands maps over has none where its children were called one by one
    outcomes = [ran(m) for m in blocks if m._fusedres.outcome is not None or kind_key(m) != "sequential"]
    found["inference"] = model.eval()(x).detach()
    return {"results": found, "calls": calls, "outcomes": outcomes, "fired": fired}


def in_groups(world: int, change: str) -> list[dist.ProcessGroup | None]:
    """The groups in which SyncBatchNorms share their statistics, one after another: that of all processes, or a named one, and then that
    of this process alone."""
    if change != "groups":
        return [None]
    together = dist.new_group(list(range(world)))
    alone = [dist.new_group([rank]) for rank in range(world)]
    return [together, alone[dist.get_rank()]]


def compiled(rank: int, world: int, name: str) -> dict:
    """A step of a converted model with SyncBatchNorm that is compiled, beside the same in eager, for every one of its groups, and an
    inference of both. A case is as in :func:`parse`; what else happens may also be inductor or groups."""
    build, sizes, change = parse(name)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(seeded(build, momentum_of(change)))
    model = fusedres.convert(model, recompute=change == "recompute")
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if change == "inductor" else "aot_eager")
    program = torch.compile(model, backend=counter, fullgraph=True)
    x = batch(sizes).split(sizes)[rank]
    calls, differs = [], []
    for group in in_groups(world, change):
        for module in (*model.modules(), *twin.modules()):
            if isinstance(module, nn.SyncBatchNorm):
                module.process_group = group
        steps = []
        for m, call in ((model, program), (twin, twin)):
            m.zero_grad()
            with counted() as own:
                steps.append(training_step(m, x, call))
            calls.append(own)
        differs += [n for n, value in steps[1].items() if not torch.equal(steps[0][n], value)]
    found = {"differs": differs, "calls": calls, "operators": operators(counter), "graphs": counter.frame_count}
    found["parts"] = parts(twin)
    with torch.no_grad():
        inferred, expected = program.eval()(x), twin.eval()(x)
    return found | {"infers": torch.equal(inferred, expected)}


# ---- DistributedDataParallel, FSDP2 ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem, a residual and a dense block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(5, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.basic = basic(8, 12, 2)
        self.bottleneck = bottleneck(12, 3)
        self.dense = fusedres.nn.DenseBlock(2, 12, bn_size=2, growth_rate=4, drop_rate=0.0)
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dense(self.bottleneck(self.basic(self.stem(x)))).mean((2, 3)))


def net(normalise: str) -> nn.Module:
    """A :class:`Net` whose BatchNorms make one process's samples each other's (``sync``) or not (``eval``)."""
    model = seeded(Net).train(normalise == "sync")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if normalise == "sync" and dist.is_initialized() else model


def losses(model: nn.Module, x: Tensor, target: Tensor, steps: int = 4) -> Tensor:
    """The loss of each step of gradient descent with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def task(world: int) -> tuple[Tensor, Tensor]:
    """Two samples for each process."""
    return batch((2,) * world), torch.arange(2 * world) % 3


def shard(model: nn.Module, *parts: nn.Module) -> nn.Module:
    """``model`` under FSDP2 on CPU, ``parts`` on their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp-before": lambda model: fusedres.convert(DistributedDataParallel(model)),
    "ddp-after": lambda model: DistributedDataParallel(fusedres.convert(model)),
    "fsdp-before": lambda model: fusedres.convert(shard(model, model.basic, model.dense)),
    "fsdp-after": lambda model: shard(fusedres.convert(model), model.basic, model.dense),
    "fsdp-inner": lambda model: shard(fusedres.convert(model), model.basic.conv1, model.bottleneck.conv2),
}


def compiled_parts(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    """``model`` with its fused blocks compiled one by one."""
    for part in (model.basic, model.bottleneck, model.dense):
        part.compile(backend=counter)
    return model


WRAPPED_COMPILED: dict[str, Callable[[nn.Module, CompileCounterWithBackend], nn.Module]] = {
    "ddp": lambda model, counter: torch.compile(DistributedDataParallel(fusedres.convert(model)), backend=counter),
    "ddp-parts": lambda model, counter: DistributedDataParallel(compiled_parts(fusedres.convert(model), counter)),
    "fsdp": lambda model, counter: torch.compile(
        shard(fusedres.convert(model), model.basic, model.dense), backend=counter
    ),
    "fsdp-parts": lambda model, counter: shard(
        compiled_parts(fusedres.convert(model), counter), model.basic, model.dense
    ),
}


def wrapped_and_compiled(rank: int, world: int, name: str) -> dict:
    """Some steps of a wrapped model that is compiled, or whose blocks are, on this process's part of the batch; by aot_eager, or as
    ``way/backend``."""
    torch._dynamo.reset()
    way, *backend = name.split("/")
    counter = CompileCounterWithBackend("".join(backend) or "aot_eager")
    model = WRAPPED_COMPILED[way](net("eval"), counter)
    x, target = (t.chunk(world)[rank] for t in task(world))
    found = losses(model, x, target)
    dist.all_reduce(found)
    kinds = collections.Counter()
    for graph in counter.graphs:
        kinds.update(operators_in(graph))
    return {"losses": found / world, "operators": dict(kinds)}


def wrapped(rank: int, world: int, name: str) -> dict:
    """Some steps of a wrapped model on this process's part of the batch."""
    way, normalise = name.split("/")
    model = WRAPPED[way](net(normalise))
    x, target = (t.chunk(world)[rank] for t in task(world))
    found = losses(model, x, target)
    dist.all_reduce(found)
    outcomes = {r.path.removeprefix("module."): r.detail for r in fusedres.report(model)}
    reverted = fusedres.revert(model)
    kinds = [type(m).__name__ for m in reverted.modules() if is_converted(m)]
    return {"losses": found / world, "outcomes": outcomes, "left": kinds}
