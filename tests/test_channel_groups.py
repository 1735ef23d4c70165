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


def sliced(model: ir.Model, gone: set[int]) -> ir.Model:
    copy = model.clone()
    groups = channel_groups(copy)  # atoms are numbered alike in equal models
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


def check_law(model: ir.Model, seed: int, share: float) -> int:
    for number, node in enumerate(model.graph.nodes):
        node.name = node.name or f"n{number}"
    groups = channel_groups(model)
    gone = choose(groups, np.random.default_rng(seed), share)
    small = sliced(model, gone)
    assert verify.structure(small) == []
    assert verify.interface(model, small) == []
    feeds = generate_inputs(model.inputs, seed=seed)
    first, second = Evaluator(masked(groups, gone)), Evaluator(small)
    assert first.engine == second.engine == "onnxruntime"
    expected, found = first.run(feeds), second.run(feeds)
    for name, value in expected.items():
        # one product more or less in each sum of a few hundred terms: 64 roundings
        assert difference(name, value, found[name]).relative <= 64 * np.finfo(np.float32).eps, gone
    kept, after = Kept(groups, gone), channel_groups(small)
    for what in ("macs", "params"):
        cost = groups.cost_model(what)
        cost.remove(gone)
        assert cost.total() == after.cost_model(what).total()
    for axis in groups.axes:
        assert kept.count(axis) >= 1
    return len(gone)


class Maker:
    """Random networks over [N, C, 4, 4] images: what exporters write between convolutions."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
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
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
        )

    def step(self, x: str) -> str:
        width = self.widths[x]
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
def networks(draw: st.DrawFn) -> ir.Model:
    return Maker(draw).make()


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
