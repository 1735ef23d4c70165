"""A graph as SVG: layers from top to bottom, nodes as boxes, tensors as curves; large graphs in blocks, cut where few tensors pass.

The layout is Sugiyama's: longest-path layers, dummy nodes on edges that skip layers, barycentre sweeps against crossings. Text from the
model is untrusted and escaped; colours are classes, so that the page's style sheet decides (and light and dark differ).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

import onnx_graphsurgeon as gs

from graphopt.graph_diff import node_text, type_text
from graphopt.ir import Graph, Node, subgraphs

_ALONE: Final = 60  # nodes of a graph that is drawn in one piece
_BLOCK: Final = (14, 40)  # least and most nodes of a block
_DRAWN: Final = 1500  # nodes of a graph that are drawn; what lies behind is only counted
_SWEEPS: Final = 6
_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 34, 14, 26, 10  # pixels
_CHAR: Final = 6.3  # pixels of a letter, about
_MOST_CHARS: Final = 26

KINDS: Final = {
    "linear": "Conv ConvTranspose ConvInteger Gemm MatMul MatMulInteger Einsum LSTM GRU RNN Attention QLinearConv QLinearMatMul FusedConv",
    "norm": "BatchNormalization LayerNormalization InstanceNormalization GroupNormalization RMSNormalization LpNormalization LRN "
    "Softmax LogSoftmax Dropout",
    "activation": "Relu LeakyRelu PRelu Sigmoid HardSigmoid HardSwish Tanh Elu Selu Gelu Clip Softplus Softsign Mish Swish Erf Exp",
    "pool": "MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceMax ReduceSum ReduceMin ReduceL2 TopK ArgMax Resize Upsample",
    "quantize": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear Cast CastLike",
    "shape": "Reshape Transpose Flatten Squeeze Unsqueeze Shape Slice Gather GatherND Concat Split Expand Pad Tile Constant ConstantOfShape "
    "Identity Range SpaceToDepth DepthToSpace ScatterND Size NonZero Where",
    "control": "If Loop Scan SequenceConstruct SequenceAt SplitToSequence ConcatFromSequence",
    "arithmetic": "Add Sub Mul Div Pow Sqrt Neg Abs Min Max Sum Mean Reciprocal Equal Less Greater And Or Not",
}
_KIND_OF: Final = {op: kind for kind, ops in KINDS.items() for op in ops.split()}


def kind(op: str) -> str:
    """The class of an operator, which decides its colour."""
    return _KIND_OF.get(op, "other")


@dataclass
class Block:
    """A run of nodes in topological order."""

    number: int
    nodes: list[Node]
    like: int | None = None  # an earlier block with the same operators, drawn there
    svg: str = ""  # empty where it is not drawn
    through: int = 0  # tensors that go on to later blocks

    @property
    def operators(self) -> list[tuple[str, int]]:
        """Operators and how many of each, the most frequent first."""
        return sorted(Counter(n.op for n in self.nodes).items(), key=lambda item: (-item[1], item[0]))

    @property
    def shares(self) -> list[tuple[str, int]]:
        """Kinds and how many nodes of each."""
        return sorted(Counter(kind(n.op) for n in self.nodes).items())


def draw(graph: Graph) -> list[Block]:
    """The graph in blocks that are drawn by themselves; one block where it is small."""
    blocks = [Block(number, nodes) for number, nodes in enumerate(_cut(list(graph.nodes)), 1)]
    seen: dict[tuple[str, ...], int] = {}
    drawn = 0
    last = {id(t): i for i, b in enumerate(blocks) for n in b.nodes for t in n.inputs}
    for index, block in enumerate(blocks):
        block.through = sum(last.get(id(t), -1) > index for n in block.nodes for t in n.outputs)
        form = tuple(n.op for n in block.nodes)
        block.like = seen.get(form)
        if block.like is None and drawn < _DRAWN:
            block.svg = _svg(block.nodes)
            seen[form] = block.number
            drawn += len(block.nodes)
    return blocks


def _cut(nodes: list[Node]) -> list[list[Node]]:
    """Runs of nodes, cut where the fewest computed tensors pass."""
    if len(nodes) <= _ALONE:
        return [nodes]
    place = {id(n): i for i, n in enumerate(nodes)}
    until = [max((place.get(id(r), i) for t in n.outputs for r in t.outputs), default=i) for i, n in enumerate(nodes)]
    passing = [0] * (len(nodes) + 1)  # tensors that pass behind node i, as differences first
    for i, end in enumerate(until):
        passing[i] += 1
        passing[end] -= 1
    for i in range(1, len(passing)):
        passing[i] += passing[i - 1]
    least, most = _BLOCK
    blocks, at = [], 0
    while len(nodes) - at > most:
        cut = min(range(at + least - 1, at + most), key=lambda i: (passing[i], i))
        blocks.append(nodes[at : cut + 1])
        at = cut + 1
    blocks.append(nodes[at:])
    return blocks


@dataclass
class _Place:
    """A box, or a bend of an edge that skips layers."""

    layer: int
    width: float
    node: Node | None = None
    x: float = 0.0
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)


def _svg(nodes: Sequence[Node]) -> str:
    places = {id(n): _Place(0, _width(n), n) for n in nodes}
    sources: dict[int, list[Node]] = {id(n): [] for n in nodes}
    for node in nodes:
        for inner in _readers(node):
            for tensor in inner.inputs:
                for producer in tensor.inputs:
                    if id(producer) in places and producer is not node and producer not in sources[id(node)]:
                        sources[id(node)].append(producer)
        ranks = [places[id(p)].layer + 1 for p in sources[id(node)]]
        places[id(node)].layer = max(ranks, default=0)
    for node in reversed(nodes):  # what reads constants only stands right above its first reader
        readers = [places[id(n)].layer for n in nodes if any(p is node for p in sources[id(n)])]
        if not sources[id(node)] and readers:
            places[id(node)].layer = min(readers) - 1
    layers: list[list[_Place]] = [[] for _ in range(max((p.layer for p in places.values()), default=0) + 1)]
    for node in nodes:
        layers[places[id(node)].layer].append(places[id(node)])
    edges: list[list[_Place]] = []
    for node in nodes:
        for producer in sources[id(node)]:
            path = [places[id(producer)]]
            for layer in range(path[0].layer + 1, places[id(node)].layer):
                path.append(_Place(layer, 4))
                layers[layer].append(path[-1])
            path.append(places[id(node)])
            for a, b in itertools.pairwise(path):
                a.below.append(b)
                b.above.append(a)
            edges.append(path)
    _arrange(layers)
    left = min(p.x - p.width / 2 for layer in layers for p in layer)
    right = max(p.x + p.width / 2 for layer in layers for p in layer)
    width = right - left + 2 * _MARGIN
    height = len(layers) * (_HEIGHT + _GAP_Y) - _GAP_Y + 2 * _MARGIN
    shift = _MARGIN - left
    parts = [
        f'<svg class="graph" viewBox="0 0 {width:.0f} {height:.0f}" style="--w:{width:.0f}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{len(nodes)} nodes</title>'
    ]
    parts += [_curve(path, shift) for path in edges]
    parts += [_box(p, shift) for layer in layers for p in layer if p.node is not None]
    return "".join([*parts, "</svg>"])


def _readers(node: Node) -> list[Node]:
    """The node and all nodes in its bodies, which may read what is outside."""
    found, pending = [node], [node]
    while pending:
        for body in subgraphs(pending.pop()):
            found += body.nodes
            pending += body.nodes
    return found


def _arrange(layers: list[list[_Place]]) -> None:
    """Order each layer by the mean place of its neighbours, then move boxes above each other without letting them overlap."""
    for layer in layers:
        _spread(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            wanted = []
            for place in layer:
                beside = place.above if down else place.below
                wanted.append(sum(p.x for p in beside) / len(beside) if beside else place.x)
            order = sorted(range(len(layer)), key=lambda i, w=wanted: (w[i], i))  # type: ignore[misc]
            layer[:] = [layer[i] for i in order]
            _spread(layer, [wanted[i] for i in order])


def _spread(layer: list[_Place], wanted: list[float]) -> None:
    """Places near `wanted`, in this order, without overlap, with the least mean shift."""
    x = float("-inf")
    for place, wish in zip(layer, wanted, strict=True):
        place.x = max(wish, x + place.width / 2)
        x = place.x + place.width / 2 + _GAP_X
    if layer:
        shift = sum(p.x - w for p, w in zip(layer, wanted, strict=True)) / len(layer)
        for place in layer:
            place.x -= shift


def _top(place: _Place) -> float:
    return _MARGIN + place.layer * (_HEIGHT + _GAP_Y)


def _curve(path: list[_Place], shift: float) -> str:
    """A curve from the bottom of the first place, through the bends, to the top of the last."""
    x, y = path[0].x + shift, _top(path[0]) + _HEIGHT
    text = f"M{x:.0f},{y:.0f}"
    for place in path[1:]:
        to_x, to_y = place.x + shift, _top(place)
        bend = (to_y - y) / 2
        text += f"C{x:.0f},{y + bend:.0f} {to_x:.0f},{to_y - bend:.0f} {to_x:.0f},{to_y:.0f}"
        x, y = to_x, to_y
        if place.node is None:
            y = to_y + _HEIGHT
            text += f"V{y:.0f}"
    return f'<path class="edge" d="{text}"/>'


def _box(place: _Place, shift: float) -> str:
    node = place.node
    assert node is not None
    x, y = place.x + shift - place.width / 2, _top(place)
    middle = place.x + shift
    bodies = sum(len(body.nodes) for body in subgraphs(node))
    label = f"{node.op} ({bodies} inside)" if bodies else node.op
    told = _told(node)
    lines = f'<text x="{middle:.0f}" y="{y + (14 if told else 21):.0f}">{clean(_short(label))}</text>'
    if told:
        lines += f'<text class="type" x="{middle:.0f}" y="{y + 27:.0f}">{clean(_short(told))}</text>'
    return (
        f'<g class="node {kind(node.op)}"><title>{clean(node_text(node))}</title>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{place.width:.0f}" height="{_HEIGHT}" rx="6"/>'
        f"{lines}</g>"
    )


def _told(node: Node) -> str:
    tensor = next((t for t in node.outputs if t.name), None)
    if tensor is None or isinstance(tensor, gs.Constant) or tensor.dtype is None:
        return ""
    return type_text(tensor)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 1]}…"


def _width(node: Node) -> float:
    return max(len(_short(node.op)) * _CHAR * 1.15, len(_short(_told(node))) * _CHAR * 0.9, 40) + 16


def clean(text: str) -> str:
    """Text for HTML and SVG: escaped, and without characters that neither can hold."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))
