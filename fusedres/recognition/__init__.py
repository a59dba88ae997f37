"""From a module to the descriptions that run: one way, each step in a file of its own.

    source.py      the syntax of a Python function, checked against the bytecode that really runs
    evaluate.py    what a forward does: its code is followed step by step, never executed; what is not known to be harmless is refused
                   (harmless.py: what is known to be; lookup.py: names and attributes; calls.py: functions and modules)
    trace.py       what that leaves: Node, a call on a map, and Reads, everything that was read on the way
    graph.py       BlockGraph: the steps of a module in rows, every call in exactly one
    modules.py     torch's modules, one by one: convolution, BatchNorm, activation, pool, hooks, the code behind them
    ops.py         Op: what a step is
    layout.py      Layout: a block in the fewest pieces, every op in exactly one (pieces.py: Piece)
    effects.py     what a forward does beside computing: it sets attributes, changes what its modules keep, records gradients or not
    flow.py        Flow: a forward of any shape, all its calls in their order, for one form of its arguments
    regions.py     from a flow to its Program, a fixed order of pieces and of calls as they stand (actions.py)
    computing.py   which modules, as they stand, do nothing but compute
    lowering.py    the other descriptions: dense blocks, transitions, stems, a BatchNorm alone
    part.py        Part: a description as it runs, and its check against the input
    families.py    the only file that names torchvision and timm

Every function raises :class:`fusedres.errors.Unsupported` with the reason where something is not understood.

    read(module) -> Graphs                               the module's graph by mode: ``{True: BlockGraph, False: BlockGraph}``
    read_flows(module) -> Flows                          the module's flows by mode and form; follow(module, form, training) -> Flow
    program(module, flow) -> Program                     what it runs as
    read_layers(row) -> dict[str, Graphs]                those of the dense layers at the end of a Sequential; empty: none
    BlockGraph(main, shortcut, shared, after)            may be made by hand, for a module whose forward is ours
    computing(module) -> tuple[Flow, ...]                the flows by which a module that runs as it stands does nothing but compute
    graph.outside(), watched(classes_of(modules)) -> list   the code and the values behind a reading, to be compared by identity with before
    check_graph(block, graph, training=None)             raises where ``block`` is no longer what was read, or a hook waits inside
    check_family(block, kind)                            raises where a block that was told by its class has another forward
    layout(block, graph, training=None) -> Layout        a residual block or row in pieces; ``Layout.run(x, run_piece)`` goes through them
    dense_layer(layer, graph | None) -> list[Op]         what a dense layer does; None: by the families' names
    in_buffer(ops) -> bool                               whether a dense layer can write into the buffer
    dense_part, transition_part, stem_part, head_part, highway_part, norm_part, run_part -> Part
    layer_pieces(ops) -> tuple[Piece, ...]               a dense layer in pieces
    conv_runs(children) -> list[tuple[int, int]]         where conv-BN[-act][-max pool] stands in a row of modules
    shape_behind(module, shape) -> shape | None          the shape of a module's output
"""

from .actions import Fill, Fused, Getter, Plain, Program, Setter, Slot, filled
from .calls import is_sequential
from .computing import computing, functions_behind
from .families import check_family
from .families import kind_of as family_kind
from .flow import MAP, ONE_MAP, Flow, Flows, Form, arguments, follow, form_of, read_flows, read_form
from .flow import MOST_CONVOLUTIONS as MOST_IN_A_FLOW
from .graph import BlockGraph, FunctionStep, Graphs, block_ids, check_graph, follows, inside, read, read_layers
from .layout import Layout, layer_pieces, layout
from .lowering import (
    conv_runs,
    dense_layer,
    dense_part,
    head_part,
    highway_part,
    in_buffer,
    is_transition,
    last_norm,
    norm_part,
    run_part,
    stem_part,
    transition_part,
)
from .modules import (
    Hooked,
    child_of,
    classes_of,
    global_hooks,
    has_global_hooks,
    hooked,
    methods_of,
    norm_types,
    plain,
    shape_behind,
    watched,
)
from .ops import Op, ops
from .part import Part
from .pieces import Piece
from .regions import method, program
from .trace import Refused, is_plain

__all__ = [
    "BlockGraph",
    "Fill",
    "Flow",
    "Flows",
    "Form",
    "FunctionStep",
    "Fused",
    "Getter",
    "Graphs",
    "Hooked",
    "Layout",
    "MOST_IN_A_FLOW",
    "MAP",
    "ONE_MAP",
    "Op",
    "Part",
    "Piece",
    "Plain",
    "Program",
    "Refused",
    "Setter",
    "Slot",
    "arguments",
    "block_ids",
    "check_family",
    "check_graph",
    "child_of",
    "classes_of",
    "computing",
    "conv_runs",
    "dense_layer",
    "dense_part",
    "family_kind",
    "filled",
    "follow",
    "follows",
    "form_of",
    "functions_behind",
    "global_hooks",
    "has_global_hooks",
    "head_part",
    "highway_part",
    "hooked",
    "in_buffer",
    "inside",
    "is_plain",
    "is_sequential",
    "is_transition",
    "last_norm",
    "layer_pieces",
    "layout",
    "method",
    "methods_of",
    "norm_part",
    "norm_types",
    "ops",
    "plain",
    "program",
    "read",
    "read_flows",
    "read_form",
    "read_layers",
    "run_part",
    "shape_behind",
    "stem_part",
    "transition_part",
    "watched",
]
