"""The law of channel groups, on random graphs and on real ones: masked graph == sliced graph. And what pins, ties and balances."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt import ir, verify
from graphopt.analyses.channel_groups import ChannelGroups, Kept, channel_groups
from graphopt.edit import Editor, cleanup
from graphopt.elements import Node
from graphopt.equivalence import difference, generate_inputs
from graphopt.evaluate import Evaluator
from graphopt.models import path
from graphopt.pipeline import Pipeline

RUNS = settings(
    derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=list(HealthCheck)
)


# -------------------------------------------------------------------------------------------------------- the law


def choose(groups: ChannelGroups, rng: np.random.Generator, share: float) -> set[int]:
    """Some classes that may go together: balanced, no axis empty."""
    gone: set[int] = set()
    scores = {c: float(rng.random()) for c in groups.classes}
    for seed in rng.permutation(np.array(groups.classes, np.int64)).tolist():
        if len(gone) >= share * len(groups.classes):
            break
        left = [c for c in groups.classes if c not in gone]
        bundle = groups.bundle(seed, left, scores.__getitem__) if seed in left else None
        if bundle is not None and groups.is_balanced(Kept(groups, gone | set(bundle))):
            gone |= set(bundle)
    return gone


def sliced(model: ir.Model, gone: set[int], heads: bool = False) -> ir.Model:
    copy = model.clone()
    groups = channel_groups(copy, heads)  # atoms are numbered alike in equal models
    edit = Editor(copy)
    groups.apply(gone, edit)
    edit.commit()
    cleanup(copy)
    return copy


def masked(groups: ChannelGroups, gone: set[int]) -> ir.Model:
    """Zeroes where the channels are summed over, behind activations and all else."""
    copy = groups.model.clone()
    nodes = {node.name: node for node in copy.graph.nodes}
    edit = Editor(copy)
    kept = Kept(groups, gone)
    for contraction in groups.contractions:
        node = nodes[contraction.node.name]
        operand = node.inputs[contraction.operand]
        shape = [1] * (groups.shapes.rank(contraction.node.inputs[contraction.operand]) or 1)
        shape[contraction.axis] = -1
        mask = edit.constant("mask", kept.mask(contraction.atoms).astype(np.float32).reshape(shape))
        node.inputs[contraction.operand] = edit.variable("masked")
        edit.insert_before(node, Node("Mul", "mask", {}, [operand, mask], [node.inputs[contraction.operand]]))
    edit.commit()
    return copy


def check_law(model: ir.Model, seed: int, share: float, heads: bool = False) -> int:
    for number, node in enumerate(model.graph.nodes):
        node.name = node.name or f"n{number}"
    groups = channel_groups(model, heads)
    gone = choose(groups, np.random.default_rng(seed), share)
    small = sliced(model, gone, heads)
    assert verify.structure(small) == []
    assert verify.interface(model, small) == []
    feeds = generate_inputs(model.inputs, seed=seed)
    first, second = Evaluator(masked(groups, gone)), Evaluator(small)
    assert first.engine == second.engine == "onnxruntime"
    expected, found = first.run(feeds), second.run(feeds)
    for name, value in expected.items():
        # one product more or less in each sum of a few hundred terms: 64 roundings
        assert difference(name, value, found[name]).relative <= 64 * np.finfo(np.float32).eps, gone
    kept, after = Kept(groups, gone), channel_groups(small, heads)
    for what in ("macs", "params"):
        cost = groups.cost_model(what)
        cost.remove(gone)
        assert cost.total() == after.cost_model(what).total()
    for axis in groups.axes:
        assert kept.count(axis) >= 1
    return len(gone)


class Maker:
    """Random networks over [N, C, 4, 4] images: what exporters write between convolutions."""

    def __init__(self, draw: st.DrawFn, kinds: tuple[str, ...] | None = None) -> None:
        self.draw = draw
        self.kinds = kinds
        self.rng = np.random.default_rng(draw(st.integers(0, 99)))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.widths: dict[str, int] = {}

    def const(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(values, name))
        return name

    def random(self, *shape: int) -> str:
        return self.const((self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def emit(self, op: str, inputs: list[str], outputs: int = 1, **attrs: object) -> list[str]:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, name=f"node{len(self.nodes)}", **attrs))
        return names

    def image(self, name: str, width: int) -> str:
        self.widths[name] = width
        return name

    def rows(self, x: str) -> str:
        """The image as [N, 16, channels]."""
        flat = self.emit("Reshape", [x, self.ints(0, self.widths[x], 16)])[0]
        return self.emit("Transpose", [flat], perm=[0, 2, 1])[0]

    def back(self, rows: str, width: int) -> str:
        columns = self.emit("Transpose", [rows], perm=[0, 2, 1])[0]
        return self.image(self.emit("Reshape", [columns, self.ints(0, width, 4, 4)])[0], width)

    def dense(self, x: str, inside: int, width: int) -> str:
        return self.emit("Add", [self.emit("MatMul", [x, self.random(inside, width)])[0], self.random(width)])[0]

    def conv(self, x: str, width: int, group: int = 1, kernel: int = 1) -> str:
        w = self.random(width, self.widths[x] // group, kernel, kernel)
        bias = [self.random(width)] if self.draw(st.booleans()) else []
        pads = [kernel // 2] * 4
        return self.image(self.emit("Conv", [x, w, *bias], group=group, pads=pads)[0], width)

    def make(self) -> ir.Model:
        x = self.image("x", 2)
        x = self.conv(x, self.draw(st.sampled_from([4, 6, 8, 12])))
        for _ in range(self.draw(st.integers(1, 7))):
            x = self.step(x)
        self.head(x)
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "g",
            [info("x", onnx.TensorProto.FLOAT, ["N", 2, 4, 4])],
            [info("y", onnx.TensorProto.FLOAT, None)],
            self.weights,
        )
        return ir.from_proto(
            onnx.helper.make_model(
                graph,
                opset_imports=[
                    onnx.helper.make_opsetid("", 18 if self.kinds is None else 23),
                    onnx.helper.make_opsetid("com.microsoft", 1),
                ],
                ir_version=8 if self.kinds is None else 11,
            )
        )

    def step(self, x: str) -> str:
        width = self.widths[x]
        if self.kinds is not None:
            return self.new(x, self.draw(st.sampled_from(self.kinds)))
        kinds = ["conv", "act", "bn", "residual", "concat", "split", "shuffle", "depthwise", "grouped", "se", "scale"]
        kinds += [
            "slice",
            "gather",
            "pad",
            "prelu",
            "glu",
            "attention",
            "transposed",
            "space",
            "norm",
            "flat",
            "resize",
        ]
        match self.draw(st.sampled_from(kinds)):
            case "conv":
                return self.conv(x, self.draw(st.sampled_from([4, 6, 8])), kernel=self.draw(st.sampled_from([1, 3])))
            case "act":
                op = self.draw(st.sampled_from(["Relu", "Sigmoid", "Elu", "HardSwish", "Softplus", "Identity"]))
                return self.image(self.emit(op, [x])[0], width)
            case "bn":
                stats = [self.random(width), self.random(width), self.random(width)]
                var = self.const(self.rng.uniform(0.5, 2, width).astype(np.float32))
                return self.image(self.emit("BatchNormalization", [x, *stats, var])[0], width)
            case "residual":
                a = self.image(self.emit("Relu", [self.conv(x, 4)])[0], 4)
                b = self.conv(a, width)
                op = self.draw(st.sampled_from(["Add", "Sub", "Mul", "Max"]))
                return self.image(self.emit(op, self.draw(st.permutations([x, b])))[0], width)
            case "concat":
                parts = [self.conv(x, self.draw(st.sampled_from([2, 4]))) for _ in range(2)]
                parts += [x] * self.draw(st.booleans())
                joined = self.emit("Concat", parts, axis=self.draw(st.sampled_from([1, -3])))[0]
                return self.image(joined, sum(self.widths[p] for p in parts))
            case "split":
                first = self.draw(st.integers(1, width - 1))
                a, b = self.emit("Split", [x, self.ints(first, width - first)], 2, axis=1)
                a, b = self.image(a, first), self.image(b, width - first)
                c = self.emit("Concat", [self.emit("Relu", [a])[0], b][:: self.draw(st.sampled_from([1, -1]))], axis=1)
                return self.image(c[0], width)
            case "shuffle":
                g = self.draw(st.sampled_from([g for g in (1, 2, 3, 4) if width % g == 0]))
                a = self.emit("Reshape", [x, self.ints(0, g, width // g, 4, 4)])[0]
                b = self.emit("Transpose", [a], perm=[0, 2, 1, 3, 4])[0]
                return self.image(self.emit("Reshape", [b, self.ints(-1, width, 4, 4)])[0], width)
            case "depthwise":
                return self.conv(x, width * self.draw(st.sampled_from([1, 2])), width, 3)
            case "grouped":
                return self.conv(x, width, self.draw(st.sampled_from([g for g in (1, 2, 3) if width % g == 0])), 3)
            case "se":
                pooled = self.image(self.emit("GlobalAveragePool", [x])[0], width)
                hidden = self.image(self.emit("Relu", [self.conv(pooled, 3)])[0], 3)
                gate = self.emit("Sigmoid", [self.conv(hidden, width)])[0]
                return self.image(self.emit("Mul", [x, gate])[0], width)
            case "scale":
                return self.image(self.emit("Mul", [self.random(width, 1, 1), x])[0], width)
            case "slice":
                start = self.draw(st.integers(0, min(1, width - 2)))
                stop = self.draw(st.integers(start + 2, width))
                stop = self.draw(st.sampled_from([stop, stop - width])) if stop < width else stop
                cut = self.emit("Slice", [x, self.ints(start), self.ints(stop), self.ints(1)])[0]
                return self.image(cut, len(range(width)[start:stop]))
            case "gather":
                order = self.draw(st.permutations(range(width)))[: max(2, width - 1)]
                picked = self.emit("Gather", [x, self.ints(*order)], axis=1)[0]
                return self.image(picked, len(order))
            case "pad":
                return self.image(self.emit("Pad", [x, self.ints(0, 1, 0, 0, 0, 2, 0, 0)])[0], width + 3)
            case "prelu":
                return self.image(self.emit("PRelu", [x, self.random(width, 1, 1)])[0], width)
            case "glu":
                wide = self.conv(x, 8)
                a, b = self.emit("Split", [wide, self.ints(4, 4)], 2, axis=1)
                return self.image(self.emit("Mul", [a, self.emit("Sigmoid", [b])[0]])[0], 4)
            case "attention":
                return self.attention(x)
            case "transposed":
                w = self.random(width, 5, 3, 3)
                out = self.emit("ConvTranspose", [x, w, self.random(5)], pads=[1, 1, 1, 1])[0]
                return self.image(out, 5)
            case "space":
                wide = self.image(self.emit("SpaceToDepth", [x], blocksize=2)[0], width * 4)
                mode = self.draw(st.sampled_from(["DCR", "CRD"]))
                return self.image(self.emit("DepthToSpace", [wide], blocksize=2, mode=mode)[0], width)
            case "norm":
                rows = self.emit("Transpose", [x], perm=[0, 2, 3, 1])[0]
                normal = self.emit("LayerNormalization", [rows, self.random(width)], axis=-1)[0]
                return self.image(self.emit("Transpose", [normal], perm=[0, 3, 1, 2])[0], width)
            case "flat":
                flat = self.emit("Flatten", [x], axis=1)[0]
                dense = self.emit("Gemm", [flat, self.random(32, width * 16), self.random(32)], transB=1)[0]
                return self.image(self.emit("Reshape", [dense, self.ints(0, 2, 4, 4)])[0], 2)
            case _:
                sizes = self.ints(1, width, 4, 4)
                pooled = self.emit("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2])[0]
                del sizes
                scales = self.const(np.array([1, 1, 2, 2], np.float32))
                return self.image(self.emit("Resize", [pooled, "", scales], mode="nearest")[0], width)

    def new(self, x: str, kind: str) -> str:
        width = self.widths[x]
        match kind:
            case "groupnorm":
                x = self.conv(x, 8)
                folded = self.emit("Reshape", [x, self.ints(0, 4, -1)])[0]
                ones = self.const(np.ones(4, np.float32)), self.const(np.zeros(4, np.float32))
                normal = self.emit("InstanceNormalization", [folded, *ones])[0]
                image = self.emit("Reshape", [normal, self.emit("Shape", [x])[0]])[0]
                scaled = self.emit("Mul", [image, self.random(8, 1, 1)])[0]
                return self.image(self.emit("Add", [scaled, self.random(8, 1, 1)])[0], 8)
            case "groupnorm-op":
                x = self.conv(x, 8)
                return self.image(
                    self.emit("GroupNormalization", [x, self.random(8), self.random(8)], num_groups=4)[0], 8
                )
            case "transposed-groups":
                x = self.conv(x, 4)
                w, b = self.random(4, 3, 3, 3), self.random(6)
                return self.image(self.emit("ConvTranspose", [x, w, b], group=2, pads=[1, 1, 1, 1])[0], 6)
            case "transposed-depthwise":
                w, b = self.random(width, 2, 3, 3), self.random(2 * width)
                out = self.emit("ConvTranspose", [x, w, b], group=width, pads=[1, 1, 1, 1])[0]
                return self.image(out, 2 * width)
            case "einsum":
                mixed = self.emit("Einsum", [x, self.random(width, 6)], equation="nchw,cd->ndhw")[0]
                scores = self.emit("Einsum", [mixed, mixed], equation="ndhw,ndxy->nhwxy")[0]
                return self.image(self.emit("Einsum", [scores, mixed], equation="nhwxy,ndxy->ndhw")[0], 6)
            case "copies":
                shape = self.emit("Shape", [x])[0]
                one = self.emit("Expand", [self.const(np.float32([[[0.5]]])), shape])[0]
                count = self.emit("ConstantOfShape", [shape], value=onnx.numpy_helper.from_array(np.float32([2])))[0]
                return self.image(self.emit("Mul", [self.emit("Add", [x, one])[0], count])[0], width)
            case "wide-copies":
                pooled = self.emit("GlobalAveragePool", [x])[0]
                wide = self.emit("Expand", [pooled, self.ints(1, width, 4, 4)])[0]
                tiled = self.emit("Tile", [pooled, self.ints(1, 2, 4, 4)])[0]
                return self.image(self.emit("Concat", [wide, tiled], axis=1)[0], 3 * width)
            case "sizes":
                halves = self.emit("Shape", [x], start=0, end=2)[0]
                pooled = self.emit("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])[0]
                sizes = self.emit("Concat", [halves, self.ints(4, 4)], axis=0)[0]
                return self.image(self.emit("Resize", [pooled, "", "", sizes], mode="nearest")[0], width)
            case "qdq":
                codes = self.const(self.rng.integers(-127, 127, (6, width, 1, 1)).astype(np.int8))
                scale = self.const(self.rng.uniform(0.004, 0.01, 6).astype(np.float32))
                zero = self.const(np.zeros(6, np.int8))
                w = self.emit("DequantizeLinear", [codes, scale, zero], axis=0)[0]
                bias = self.const(self.rng.integers(-9, 9, 6).astype(np.int32))
                b = self.emit("DequantizeLinear", [bias, scale], axis=0)[0]
                step = [self.const(np.float32(0.02)), self.const(np.uint8(128))]
                q = self.emit("QuantizeLinear", [x, *step])[0]
                x = self.emit("DequantizeLinear", [q, *step])[0]
                return self.image(self.emit("Conv", [x, w, b])[0], 6)
            case "LSTM" | "GRU" | "RNN":
                gates, hidden = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 5
                both = self.draw(st.booleans())
                n = 1 + both
                rows = self.emit("Transpose", [self.rows(x)], perm=[1, 0, 2])[0]
                w, r = self.random(n, gates * hidden, width), self.random(n, gates * hidden, hidden)
                state = []
                if self.draw(st.booleans()):
                    batch = self.emit("Shape", [rows], start=1, end=2)[0]
                    dims = self.emit("Concat", [self.ints(n), batch, self.ints(hidden)], axis=0)[0]
                    state = ["", self.emit("ConstantOfShape", [dims])[0]]
                direction = "bidirectional" if both else "forward"
                operands = [rows, w, r, self.random(n, 2 * gates * hidden), *state]
                y, last = self.emit(kind, operands, 2, hidden_size=hidden, direction=direction)
                side = self.emit("Transpose", [y], perm=[2, 0, 1, 3])[0]
                flat = self.emit("Reshape", [side, self.ints(0, 16, n * hidden)])[0]
                one = self.emit("Slice", [last, self.ints(0), self.ints(1), self.ints(0)])[0]
                gate = self.dense(self.emit("Transpose", [one], perm=[1, 0, 2])[0], hidden, 3)
                return self.back(self.emit("Mul", [self.dense(flat, n * hidden, 3), gate])[0], 3)
            case "attention-op":
                heads, size = 4, 4
                parts = []
                for count in (heads, 2, 2):
                    split = self.emit(
                        "Reshape", [self.dense(self.rows(x), width, count * size), self.ints(0, 16, count, size)]
                    )
                    parts.append(self.emit("Transpose", split, perm=[0, 2, 1, 3])[0])
                mixed = self.emit("Attention", parts)[0]
                merged = self.emit("Transpose", [mixed], perm=[0, 2, 1, 3])[0]
                flat = self.emit("Reshape", [merged, self.ints(0, 16, heads * size)])[0]
                return self.back(self.dense(flat, heads * size, 5), 5)
            case "attention-rows":
                q, k, v = (self.dense(self.rows(x), width, n) for n in (16, 8, 8))
                mixed = self.emit("Attention", [q, k, v], q_num_heads=4, kv_num_heads=2)[0]
                return self.back(self.dense(mixed, 16, 5), 5)
            case "multi-head":
                q, k, v = (self.dense(self.rows(x), width, 16) for _ in range(3))
                operands = [q, k, v, self.random(48)]
                mixed = self.emit("MultiHeadAttention", operands, num_heads=4, domain="com.microsoft")[0]
                return self.back(self.dense(mixed, 16, 5), 5)
            case "packed":
                heads = self.draw(st.sampled_from([2, 4]))
                operands = [self.rows(x), self.random(width, 48), self.random(48)]
                sizes = {"qkv_hidden_sizes": [16, 16, 16]} if self.draw(st.booleans()) else {}
                mixed = self.emit("Attention", operands, num_heads=heads, domain="com.microsoft", **sizes)[0]
                wide = self.dense(mixed, 16, 5)
                gamma = [self.random(5), self.random(5)]
                skip = self.emit(
                    "SkipLayerNormalization", [wide, self.dense(mixed, 16, 5), *gamma], domain="com.microsoft"
                )
                inner = self.emit("MatMul", [skip[0], self.random(5, 8)])[0]
                gated = self.emit("BiasGelu", [inner, self.random(8)], domain="com.microsoft")[0]
                return self.back(self.dense(gated, 8, 5), 5)
            case "fused-qkv":
                heads, size = 2, 4
                wide = self.dense(self.rows(x), width, 3 * heads * size)
                split = self.emit("Reshape", [wide, self.ints(0, 16, 3, heads, size)])[0]
                moved = self.emit("Transpose", [split], perm=[2, 0, 3, 1, 4])[0]
                q, k, v = (self.emit("Gather", [moved, self.const(np.int64(i))], axis=0)[0] for i in range(3))
                scores = self.emit("MatMul", [q, self.emit("Transpose", [k], perm=[0, 1, 3, 2])[0]])[0]
                mixed = self.emit("MatMul", [self.emit("Softmax", [scores], axis=-1)[0], v])[0]
                merged = self.emit("Transpose", [mixed], perm=[0, 2, 1, 3])[0]
                flat = self.emit("Reshape", [merged, self.ints(0, 16, heads * size)])[0]
                return self.back(self.dense(flat, heads * size, 5), 5)
            case _:
                assert kind == "grouped-queries"
                rows = self.rows(x)
                parts = []
                for count in (4, 2, 2):
                    split = self.emit("Reshape", [self.dense(rows, width, count * 4), self.ints(0, 16, count, 4)])[0]
                    head = self.emit("Transpose", [split], perm=[0, 2, 1, 3])[0]
                    if count == 2:
                        five = self.emit("Unsqueeze", [head, self.ints(2)])[0]
                        batch = self.emit("Shape", [head], start=0, end=1)[0]
                        dims = self.emit("Concat", [batch, self.ints(2, 2, 16, 4)], axis=0)[0]
                        head = self.emit("Reshape", [self.emit("Expand", [five, dims])[0], self.ints(0, 4, 16, 4)])[0]
                    parts.append(head)
                q, k, v = parts
                scores = self.emit("MatMul", [q, self.emit("Transpose", [k], perm=[0, 1, 3, 2])[0]])[0]
                mixed = self.emit("MatMul", [self.emit("Softmax", [scores], axis=-1)[0], v])[0]
                merged = self.emit("Transpose", [mixed], perm=[0, 2, 1, 3])[0]
                flat = self.emit("Reshape", [merged, self.ints(0, 16, 16)])[0]
                return self.back(self.dense(flat, 16, 5), 5)

    def attention(self, x: str) -> str:
        width, heads, size = self.widths[x], 2, 4
        rows = self.emit("Transpose", [self.emit("Reshape", [x, self.ints(0, width, 16)])[0]], perm=[0, 2, 1])[0]
        parts = []
        for _ in range(3):
            linear = self.emit("MatMul", [rows, self.random(width, heads * size)])[0]
            linear = self.emit("Add", [linear, self.random(heads * size)])[0]
            split = self.emit("Reshape", [linear, self.ints(0, 16, heads, size)])[0]
            parts.append(self.emit("Transpose", [split], perm=[0, 2, 1, 3])[0])
        q, k, v = parts
        scores = self.emit("MatMul", [q, self.emit("Transpose", [k], perm=[0, 1, 3, 2])[0]])[0]
        mixed = self.emit("MatMul", [self.emit("Softmax", [scores], axis=-1)[0], v])[0]
        merged = self.emit("Reshape", [self.emit("Transpose", [mixed], perm=[0, 2, 1, 3])[0], self.ints(0, 16, 8)])[0]
        out = self.emit("MatMul", [merged, self.random(heads * size, width)])[0]
        back = self.emit("Reshape", [self.emit("Transpose", [out], perm=[0, 2, 1])[0], self.ints(0, width, 4, 4)])[0]
        return self.image(self.emit("Add", [x, back])[0], width)

    def head(self, x: str) -> None:
        kind = self.draw(st.sampled_from(["pool", "mean", "flatten", "image"]))
        width = self.widths[x]
        if kind == "image":
            self.conv(x, 3)
            self.nodes[-1].output[0] = "y"
            return
        if kind == "pool":
            x, taps = self.emit("Squeeze", [self.emit("GlobalAveragePool", [x])[0], self.ints(2, 3)])[0], 1
        elif kind == "mean":
            x, taps = self.emit("ReduceMean", [x, self.ints(2, 3)], keepdims=0)[0], 1
        else:
            x, taps = self.emit("Reshape", [x, self.ints(0, -1)])[0], 16
        self.emit("Gemm", [x, self.random(width * taps, 3), self.random(3)])
        self.nodes[-1].output[0] = "y"


@st.composite
def networks(draw: st.DrawFn, kinds: tuple[str, ...] | None = None) -> ir.Model:
    return Maker(draw, kinds).make()


KINDS = (
    *("groupnorm", "groupnorm-op", "transposed-groups", "transposed-depthwise", "einsum", "copies", "wide-copies"),
    *("sizes", "qdq", "LSTM", "GRU", "RNN", "attention-op", "attention-rows", "multi-head", "packed", "fused-qkv"),
    "grouped-queries",
)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_graph_is_sliced_graph_with(kind: str) -> None:
    removed = []

    @settings(RUNS, max_examples=4)
    @given(networks((kind,)), st.integers(0, 9), st.sampled_from([0.3, 0.6]))
    def law(model: ir.Model, seed: int, share: float) -> None:
        removed.append(check_law(model, seed, share))

    law()
    assert np.mean(removed) > 2


def test_masked_graph_is_sliced_graph_on_random_networks() -> None:
    removed = []

    @RUNS
    @given(networks(), st.integers(0, 9), st.sampled_from([0.2, 0.5, 0.9]))
    def law(model: ir.Model, seed: int, share: float) -> None:
        removed.append(check_law(model, seed, share))

    law()
    assert np.mean([n > 0 for n in removed]) > 0.8


@pytest.mark.parametrize(
    "name", ["resnet.legacy", "mobilenet.dynamo", "concat.legacy", "concat.dynamo", "vit.legacy", "vit.dynamo"]
)
def test_masked_graph_is_sliced_graph_on_digits_nets(name: str) -> None:
    model = Pipeline.parse("O2").run(ir.load(path(name))).model
    for seed in range(2):
        assert check_law(model, seed, 0.4) > 0.2 * len(channel_groups(model).classes)


# ---------------------------------------------------------------------------------------------------- single facts


def groups_of(text: str) -> ChannelGroups:
    model = ir.parse(text)
    for number, node in enumerate(model.graph.nodes):
        node.name = node.name or f"n{number}"
    return channel_groups(model)


def test_outputs_inputs_and_unknown_operators_pin_and_say_so() -> None:
    groups = groups_of("""
        <ir_version: 8, opset_import: ["": 17, "com.example": 1]>
        g (float[1,2,4,4] x) => (float[1,3,4,4] y)
        <float[3,2,1,1] a = {1,1,1,1,1,1}, float[3,3,1,1] b = {1,1,1,1,1,1,1,1,1}>
        { c = Conv (x, a)
          o = com.example.Odd (c)
          y = Conv (c, b) }
    """)
    assert groups.classes == ()
    reasons = "\n".join(groups.blocked())
    assert "(Odd) has no relation in the table" in reasons
    assert "3 channels stay" in reasons


def test_dimension_that_an_output_declares_by_name_keeps_its_name() -> None:
    model = ir.parse("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,2,4,4] x) => (float[1,C,4,4] y)
        <float[3,2,1,1] a = {1,1,1,1,1,1}, float[2,3,1,1] b = {1,1,1,1,1,1}>
        { c = Conv (x, a)
          y = Conv (c, b) }
    """)
    assert check_law(model, 0, 0.4) > 0


def test_axes_of_size_one_beside_heads_that_the_batch_holds_are_no_error() -> None:
    groups = groups_of("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N,4,2,3] x) => (float[M,3,1,2] y)
        <float[4,4,1,1] a = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}, int64[4] fold = {-1, 1, 2, 3}, int64[4] back = {-1, 4, 3, 2},
         int64[4] last = {-1, 3, 1, 2}>
        { c = Conv (x, a)
          f = Reshape (c, fold)
          t = Transpose <perm = [0, 3, 1, 2]> (f)
          b = Reshape (t, back)
          y = Reshape (b, last) }
    """)
    assert any("known at run time only" in why for why in groups.blocked())


def test_channel_read_by_a_body_stays() -> None:
    groups = groups_of("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,2,4,4] x, bool f) => (float[1,2,4,4] y, float[1,3,4,4] z)
        <float[3,2,1,1] a = {1,1,1,1,1,1}, float[2,3,1,1] b = {1,1,1,1,1,1}>
        { c = Conv (x, a)
          z = If (f) <then_branch = t () => (float[1,3,4,4] p) { p = Neg (c) }, else_branch = e () => (float[1,3,4,4] q) { q = Abs (c) }>
          y = Conv (c, b) }
    """)
    assert groups.classes == ()
    assert "inside a body" in "\n".join(groups.blocked())


def test_weight_of_two_nodes_is_sliced_for_both() -> None:
    model = ir.parse("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,2,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z)
        <float[3,2,1,1] a = {1,2,3,4,5,6}, float[2,3,1,1] b = {1,2,3,4,5,6}>
        { c = Conv (x, a)
          r = Relu (c)
          s = Sigmoid (c)
          y = Conv (r, b)
          z = Conv (s, b) }
    """)
    assert check_law(model, 0, 0.4) == 2
    assert len(channel_groups(model).groups) == 1


def test_initializer_that_a_caller_may_override_stays() -> None:
    groups = groups_of("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,2,4,4] x, float[3,2,1,1] a = {1,1,1,1,1,1}) => (float[1,2,4,4] y)
        <float[2,3,1,1] b = {1,1,1,1,1,1}>
        { c = Conv (x, a)
          y = Conv (c, b) }
    """)
    assert groups.classes == ()


def test_size_read_at_run_time_stays_and_another_axis_of_the_shape_does_not_matter() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N,2,4,4] x) => (float[N,2,4,4] y, int64 n)
        <float[3,2,1,1] a = {1,1,1,1,1,1}, float[2,3,1,1] b = {1,1,1,1,1,1}, int64 i = {AXIS}>
        { c = Conv (x, a)
          s = Shape (c)
          n = Gather (s, i)
          y = Conv (c, b) }
    """
    assert len(groups_of(text.replace("AXIS", "0")).classes) == 3
    assert groups_of(text.replace("AXIS", "1")).classes == ()


def test_groups_of_a_convolution_lose_equally_many_but_not_the_same_places() -> None:
    groups = groups_of("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,1,1,1] x) => (float[1,1,1,1] y)
        <float[4,1,1,1] a = {1,1,1,1}, float[4,2,1,1] b = {1,1,1,1,1,1,1,1}, float[1,4,1,1] c = {1,1,1,1}>
        { p = Conv (x, a)
          q = Conv <group = 2> (p, b)
          y = Conv (q, c) }
    """)
    assert len(groups.classes) == 8
    first, second = groups.classes[:2], groups.classes[2:4]
    scores = dict.fromkeys(groups.classes, 1.0) | {second[1]: 0.5}
    bundle = groups.bundle(first[0], groups.classes, scores.__getitem__)
    assert bundle == (first[0], second[1])
    assert groups.bundle(first[0], first, scores.__getitem__) is None
    assert not groups.is_balanced(Kept(groups, [first[0]]))
    assert groups.is_balanced(Kept(groups, bundle))


def test_group_prints_where_it_is_sliced_and_who_reads_it() -> None:
    groups = groups_of(
        """
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,2,4,4] x) => (float[1,5] y)
        <float[3,2,1,1] a = {1,1,1,1,1,1}, float[48,5] b>
        { c = Conv (x, a)
          f = Flatten (c)
          y = MatMul (f, b) }
    """.replace("float[48,5] b", "float[48,5] b = {" + ",".join(["1"] * 240) + "}")
    )
    assert [str(g) for g in groups.groups] == ["a: 3 channels; sliced: a[axis 0], b[axis 0] x16; read by: n2"]
