"""merge-transposes and sink-transposes: laws on random graphs of ops that a permutation passes through, and a model as tf2onnx writes it.

The text cases are in tests/cases/merge-transposes.txt, sink-transposes.txt and sink-transposes-through-sums.txt.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from graphopt import equivalence, ir
from graphopt.analyses import layouts
from graphopt.analyses.min_cut import MinCut
from graphopt.evaluate import Evaluator
from graphopt.instruments import FullCheck, Verify
from graphopt.pipeline import Pipeline, Result

RUNS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


def run(text: str, model: ir.Model) -> Result:
    return Pipeline.parse(text).run(model, instruments=[Verify(), FullCheck()])


def count(model: ir.Model, op: str = "Transpose") -> int:
    return sum(node.op == op for node in model.nodes())


# --------------------------------------------------------------------------------------------------------- algebra


def test_permutations_compose_and_undo_as_transposes_do() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    for p, q in itertools.product(itertools.permutations(range(3)), repeat=2):
        assert np.array_equal(x.transpose(p).transpose(q), x.transpose(layouts.compose(p, q)))
        assert layouts.compose(p, layouts.inverse(p)) == (0, 1, 2)


def test_dropping_an_axis_undoes_lifting_over_it() -> None:
    for perm in itertools.permutations(range(3)):
        for axes in itertools.combinations(range(5), 2):
            assert layouts.drop(layouts.lift(perm, axes), axes) == perm


@RUNS
@given(st.data())
def test_minimum_cut_is_the_best_of_all_answers(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    cut = MinCut()
    choices = [cut.choice() for _ in range(size)]
    arcs = data.draw(
        st.lists(st.tuples(st.integers(0, size + 1), st.integers(0, size + 1), st.integers(1, 3)), max_size=16)
    )
    for no, yes, cost in arcs:
        cut.cost_if_differ(no, yes, cost)

    def total(answers: tuple[bool, ...]) -> int:
        return sum(cost for no, yes, cost in arcs if not answers[no] and answers[yes])

    every = [(False, True, *rest) for rest in itertools.product((False, True), repeat=size)]
    best = min(total(answers) for answers in every)
    found = tuple(cut.solve())
    assert len(found) == len(choices) + 2
    assert total(found) == best
    assert sum(found) == min(sum(answers) for answers in every if total(answers) == best)


# ---------------------------------------------------------------------------------------------------- random graphs


class _Maker:
    """Graphs of transparent operators over tensors of up to 64 elements, with Transposes between."""

    def __init__(self, draw: st.DrawFn, rank: int) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 9)))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.number = 0
        self.shapes: dict[str, tuple[int, ...]] = {
            "x": tuple(draw(st.sampled_from([(1, 2, 3, 2), (2, 3, 2, 2)])))[:rank]
        }

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def stored(self, values: Any) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def emit(self, op: str, inputs: list[str], *shapes: tuple[int, ...], **attrs: Any) -> None:
        outputs = [f"t{self.number + i}" for i in range(len(shapes))]
        self.number += len(shapes)
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, **attrs))
        self.shapes.update(zip(outputs, shapes, strict=True))

    def transpose(self, name: str) -> None:
        shape = self.shapes[name]
        perm = self.draw(st.permutations(range(len(shape))))
        if self.pick(True, False):  # the usual pair, so that many cancel
            perm = self.pick([0, *range(2, len(shape)), 1], [0, len(shape) - 1, *range(1, len(shape) - 1)])
        self.emit("Transpose", [name], tuple(shape[a] for a in perm), perm=perm)

    def step(self) -> None:
        name = self.draw(st.sampled_from(sorted(self.shapes)))
        shape = self.shapes[name]
        rank = len(shape)
        axis = self.draw(st.integers(-rank, rank - 1)) if rank else 0
        same = sorted(n for n, s in self.shapes.items() if s == shape)
        kinds = ["unary", "binary", "constant", "row", "clip", "where", "prelu"]
        if rank >= 2:
            kinds += ["transpose"] * 8 + [
                "concat",
                "split",
                "slice",
                "pad",
                "softmax",
                "argmax",
                "reduce",
                "squeeze",
                "resize",
            ]
        if 0 < rank < 5:
            kinds.append("unsqueeze")
        match self.pick(*kinds):
            case "transpose":
                self.transpose(name)
            case "unary":
                self.emit(
                    self.pick("Relu", "Neg", "Abs", "Floor", "Identity", "HardSigmoid", "LeakyRelu"), [name], shape
                )
            case "binary":
                self.emit(self.pick("Add", "Mul", "Sub", "Max"), [name, self.pick(*same)], shape)
            case "constant":
                values = self.rng.standard_normal([self.pick(1, d) for d in shape]).astype(np.float32)
                self.emit("Add", [name, self.stored(values)][:: self.pick(1, -1)], shape)
            case "row":
                self.emit(
                    "Mul", [name, self.stored(self.rng.standard_normal(shape[rank // 2 :]).astype(np.float32))], shape
                )
            case "clip":
                self.emit("Clip", [name, self.stored(np.float32(-1)), self.stored(np.float32(1))], shape)
            case "where":
                mask = self.stored(self.rng.integers(0, 2, shape[-1:]).astype(bool))
                self.emit("Where", [mask, name, self.pick(*same)], shape)
            case "prelu" if rank:
                self.emit("PRelu", [name, self.stored(np.float32([0.5, 2] * shape[-1])[: shape[-1]])], shape)
            case "concat":
                changed = list(shape)
                changed[axis] *= 2
                if changed[axis] <= 8:
                    self.emit("Concat", [name, self.pick(*same)], tuple(changed), axis=axis)
            case "split" if shape[axis] > 1:
                left, right = list(shape), list(shape)
                left[axis], right[axis] = 1, shape[axis] - 1
                self.emit(
                    "Split", [name, self.stored(np.array([1, shape[axis] - 1]))], tuple(left), tuple(right), axis=axis
                )
            case "slice":
                changed = list(shape)
                if self.pick(True, False):
                    changed[axis] = 1
                    bounds = [self.stored(np.array([v])) for v in (0, 1, axis)]
                else:
                    changed[0] = 1
                    bounds = [self.stored(np.array([v])) for v in (0, 1)]
                self.emit("Slice", [name, *bounds], tuple(changed))
            case "pad" if max(shape) < 6:
                pads = self.rng.integers(0, 2, 2 * rank)
                self.emit(
                    "Pad",
                    [name, self.stored(pads)],
                    tuple(int(d + pads[i] + pads[rank + i]) for i, d in enumerate(shape)),
                )
            case "softmax":
                self.emit("Softmax", [name], shape, axis=axis)
            case "argmax":
                keep = self.pick(0, 1)
                changed = [1 if a == axis % rank else d for a, d in enumerate(shape) if keep or a != axis % rank]
                self.emit("ArgMax", [name], tuple(changed), axis=axis, keepdims=keep)
                out = next(reversed(self.shapes))
                self.emit("Cast", [out], self.shapes.pop(out), to=1)
            case "reduce":
                keep = self.pick(0, 1)
                axes = sorted({axis % rank, self.pick(*range(rank))})
                changed = [1 if a in axes else d for a, d in enumerate(shape) if keep or a not in axes]
                op = self.pick("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum")
                self.emit(op, [name, self.stored(np.array(axes))], tuple(changed), keepdims=keep)
            case "squeeze" if shape[axis] == 1:
                self.emit(
                    "Squeeze",
                    [name, self.stored(np.array([axis]))],
                    tuple(d for a, d in enumerate(shape) if a != axis % rank),
                )
            case "unsqueeze" if self.pick(True, False):
                at = self.pick(*range(rank + 1))
                wide = (*shape[:at], 1, *shape[at:])
                self.emit("Reshape", [name, self.stored(np.array(wide))], wide)
                if self.pick(True, False):
                    self.transpose(next(reversed(self.shapes)))
                    self.emit("Reshape", [next(reversed(self.shapes)), self.stored(np.array([-1, *shape[1:]]))], shape)
            case "unsqueeze":
                at = self.pick(*range(rank + 1))
                self.emit("Unsqueeze", [name, self.stored(np.array([at]))], (*shape[:at], 1, *shape[at:]))
            case "resize" if rank == 4 and shape[axis] <= 4:
                scales = np.float32([2 if a == axis % rank else 1 for a in range(rank)])
                changed = tuple(int(d * s) for d, s in zip(shape, scales, strict=True))
                self.emit("Resize", [name, "", self.stored(scales)], changed, mode="nearest")

    def make(self) -> ir.Model:
        start = tuple(self.shapes["x"])
        for _ in range(self.draw(st.integers(2, 16))):
            self.step()
        made = [n for n in self.shapes if n != "x"] or ["x"]
        if made == ["x"]:
            self.emit("Relu", ["x"], start)
            made = [next(reversed(self.shapes))]
        chosen = self.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
        read = {name for node in self.nodes for name in node.input}
        chosen += [n for n in made if n not in read and n not in chosen and self.draw(st.booleans())]
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "g",
            [info("x", 1, start if self.pick(True, False) else [f"d{i}_{d}" for i, d in enumerate(start)])],
            [info(n, 1, [None] * len(self.shapes[n])) for n in chosen],
            self.initializers,
        )
        return ir.from_proto(
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
        )


@st.composite
def models(draw: st.DrawFn) -> ir.Model:
    return _Maker(draw, draw(st.sampled_from([3, 4, 4]))).make()


@pytest.mark.parametrize("text", ["sink-transposes", "sink-transposes-through-sums", "merge-transposes"])
def test_numbers_stay_transposes_never_rise_and_a_second_run_finds_nothing(text: str) -> None:
    @RUNS
    @given(models())
    def law(model: ir.Model) -> None:
        declared = model.graph.inputs[0].shape
        shape = tuple(int(str(d).rpartition("_")[2]) for d in declared)
        model = run("eliminate-dead", model).model
        result = run(text, model)
        before, after = count(model), count(result.model)
        assert after < before if result.rewrites else after == before
        assert len(result.model.graph.nodes) <= len(model.graph.nodes)
        again = run(text, result.model)
        assert again.rewrites == 0, result.model.text()
        assert ir.saves(run(text, model).model) == ir.saves(result.model)
        feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        first, second = Evaluator(model), Evaluator(result.model)
        assert first.engine == second.engine == "onnxruntime"
        expected, found = first.run(feeds), second.run(feeds)
        for name, value in expected.items():
            if text == "sink-transposes-through-sums":
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
            else:
                assert found[name].tobytes() == value.tobytes()
                assert found[name].shape == value.shape

    law()


# ------------------------------------------------------------------------------------------------- as tf2onnx writes it

NHWC = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,H,W,2] image) => (float[N,4] scores, float[N,h,w,4] features)
    <float[4,2,3,3] w1, float[4,4,1,1] w2, float[4,4,3,3] w3, float[4] b1 = {1, 2, 3, 4}, float[4] b2 = {-1, 0, 1, 2}, float[4] slope = {0.5, 1, 2, 3},
     float[1] three = {3}, float[1] six = {6}, float zero = {0}, float top = {6}, int64[8] pads = {0, 1, 1, 0, 0, 1, 1, 0},
     int64[2] hw = {1, 2}, int64[1] from = {0}, int64[1] to = {2}, int64[1] last = {3}>
    {
        i1 = Transpose <perm = [0, 3, 1, 2]> (image)
        c1 = Conv (i1, w1)
        o1 = Transpose <perm = [0, 2, 3, 1]> (c1)
        s1 = Add (o1, b1)
        r1 = Clip (s1, zero, top)
        i2 = Transpose <perm = [0, 3, 1, 2]> (r1)
        c2 = Conv (i2, w2)
        o2 = Transpose <perm = [0, 2, 3, 1]> (c2)
        s2 = Add (o2, b2)
        p2 = PRelu (s2, slope)
        residual = Add (p2, r1)
        h = Add (residual, three)
        hc = Clip (h, zero, top)
        hd = Div (hc, six)
        swish = Mul (residual, hd)
        padded = Pad (swish, pads)
        i3 = Transpose <perm = [0, 3, 1, 2]> (padded)
        c3 = Conv (i3, w3)
        o3 = Transpose <perm = [0, 2, 3, 1]> (c3)
        half = Slice (o3, from, to, last)
        other = Slice (swish, from, to, last)
        features = Concat <axis = 3> (half, other)
        ip = Transpose <perm = [0, 3, 1, 2]> (features)
        pool = GlobalAveragePool (ip)
        op = Transpose <perm = [0, 2, 3, 1]> (pool)
        gate = Sigmoid (op)
        scaled = Mul (features, gate)
        mean = ReduceMax <axes = [1, 2], keepdims = 0> (scaled)
        scores = Softmax (mean)
    }
"""


def test_a_network_in_channels_last_keeps_transposes_at_its_border_only() -> None:
    proto = onnx.parser.parse_model(NHWC)
    rng = np.random.default_rng(0)
    for index, (name, shape) in enumerate((("w1", (4, 2, 3, 3)), ("w2", (4, 4, 1, 1)), ("w3", (4, 4, 3, 3)))):
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.insert(index, onnx.numpy_helper.from_array(values, name))
        del proto.graph.value_info[:]
    model = ir.from_proto(proto)
    result = run("fixpoint(fold-constants,eliminate-nop,eliminate-identity,merge-transposes,sink-transposes)", model)
    left = [node for node in result.model.graph.nodes if node.op == "Transpose"]
    border = {*map(id, result.model.graph.inputs), *map(id, result.model.graph.outputs)}
    assert count(model) == 8
    assert len(left) == 2
    assert all(id(node.inputs[0]) in border or id(node.outputs[0]) in border for node in left)
    feeds = [{"image": rng.standard_normal((n, 5, 6, 2)).astype(np.float32)} for n in (1, 3)]
    equivalence.compare(model, result.model, feeds=feeds).require("without transposes")
