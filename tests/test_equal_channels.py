"""Channels that weights of one number make equal: merged networks compute what they did."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_channel_groups import networks

from graphopt import equivalence, ir, verify
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

MERGE = Pipeline.parse("merge-equal-channels")


@st.composite
def architectures(draw: st.DrawFn) -> ir.Model:
    """Networks whose weights are, most of them, one number: as ConstantOfShape, or as an initializer."""
    model = draw(networks()).to_proto()
    graph = model.graph
    nodes, kept = [], []
    layers = ("Conv", "Gemm", "MatMul", "BatchNormalization", "Add", "Mul", "PRelu")
    weights = {name for node in graph.node if node.op_type in layers for name in node.input}
    for weight in graph.initializer:
        value = np.float32(draw(st.sampled_from([0.25, -0.5, 0.75])))
        form = draw(st.sampled_from(["fill", "fill", "fill", "stored", "own"]))
        if weight.name not in weights or not weight.dims or form == "own":
            kept.append(weight)
        elif form == "stored":
            kept.append(onnx.numpy_helper.from_array(np.full(tuple(weight.dims), value), weight.name))
        else:
            kept.append(onnx.numpy_helper.from_array(np.array(weight.dims, np.int64), f"{weight.name}_shape"))
            one = onnx.numpy_helper.from_array(value.reshape(1))
            nodes.append(onnx.helper.make_node("ConstantOfShape", [f"{weight.name}_shape"], [weight.name], value=one))
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return ir.from_proto(model)


def test_merged_networks_compute_what_they_did() -> None:
    merged = []

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=40,
        suppress_health_check=list(HealthCheck),
    )
    @given(architectures(), st.sampled_from([None, 1, 3]))
    def law(model: ir.Model, limit: int | None) -> None:
        result = MERGE.run(model, Context(evaluate=evaluate_node, limit=limit))
        merged.append(result.rewrites)
        assert verify.structure(result.model) == []
        assert verify.interface(model, result.model) == []
        first, second = Evaluator(model), Evaluator(result.model)
        feeds = {"x": np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)}
        expected, found = first.run(feeds), second.run(feeds)
        for name, value in expected.items():
            assert equivalence.difference(name, value, found[name]).relative <= 1e-5
        if limit is None:
            assert MERGE.run(result.model).rewrites == 0

    law()
    assert np.mean([count > 0 for count in merged]) > 0.5


def test_a_fill_of_half_a_gigabyte_costs_neither_file_nor_memory() -> None:
    model = ir.parse("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[N,25088] x) => (float[N,10] y)
        <int64[2] s = {25088, 4096}, int64[2] t = {4096, 10}>
        { w = ConstantOfShape <value = float[1] {0.001}> (s)
          v = ConstantOfShape <value = float[1] {0.002}> (t)
          h = Gemm (x, w)
          r = Relu (h)
          y = Gemm (r, v) }""")
    result = Pipeline.parse("O2").run(model).model
    assert [node.op for node in result.graph.nodes] == ["Gemm", "Relu", "Gemm"]
    assert sum(c.nbytes for c in result.constants()) < 1 << 18
    x = np.random.default_rng(0).standard_normal((2, 25088)).astype(np.float32)
    sums = np.maximum(x.sum(axis=1, dtype=np.float64) * 0.001, 0) * 4096 * 0.002
    found = Evaluator(result).run({"x": x})["y"]
    assert np.allclose(found, sums[:, None], rtol=1e-4, atol=1e-4)
