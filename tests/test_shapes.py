"""The shape analysis: what it says holds in every run, and it says what shape arithmetic needs."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from graphopt import equivalence, ir, models
from graphopt.analyses import inference, symbolic
from graphopt.analyses.shapes import Info, Shapes
from graphopt.analyses.symbolic import Expr
from graphopt.evaluate import Evaluator
from graphopt.ir import Model


def substitute(value: Any, symbols: dict[str, int], opaque: dict[int, int]) -> int | None:
    """The number that an expression stands for in a run; None where an opaque value was not met yet."""
    if not isinstance(value, Expr):
        return int(value)
    total = 0
    for monomial, coefficient in value.terms:
        factor: int | None = coefficient
        for atom in monomial:
            if isinstance(atom, str):
                number: int | None = symbols.get(atom)
            elif atom.name == "?":
                key = atom.arguments[0]
                assert isinstance(key, int)
                number = opaque.get(key)
            else:
                arguments = [substitute(a, symbols, opaque) for a in atom.arguments]
                if any(a is None for a in arguments):
                    return None
                known = [a for a in arguments if a is not None]
                functions = {"//": lambda a, b: a // b, "%": lambda a, b: a % b, "min": min, "max": max}
                number = sum(known) if atom.name == "sum" else functions[atom.name](*known)
            if number is None:
                return None
            assert factor is not None
            factor *= number
        assert factor is not None
        total += factor
    return total


def contradiction(
    info: Info, array: np.ndarray[Any, Any], symbols: dict[str, int], opaque: dict[int, int]
) -> str | None:
    """What `info` says that does not hold of `array`; opaque dimensions are bound where they are met first."""
    if (
        info.dtype is not None
        and info.dtype != array.dtype
        and not (array.dtype.kind in "OUS" and info.dtype.kind == "O")
    ):
        return f"dtype {info.dtype} but {array.dtype}"
    if info.shape is None:
        return None
    if len(info.shape) != array.ndim:
        return f"rank {len(info.shape)} but {array.ndim}"
    for said, real in zip(
        [*info.shape, *(info.value.flat if info.value is not None else ())],
        [*array.shape, *(array.flat if info.value is not None else ())],
        strict=True,
    ):
        if isinstance(said, Expr) and said.is_opaque:
            (((atom,), _),) = said.terms
            key = atom.arguments[0]  # type: ignore[union-attr]
            assert isinstance(key, int)
            if opaque.setdefault(key, int(real)) != int(real):
                return f"opaque {said} is {opaque[key]} and {real}"
            continue
        if isinstance(said, Expr) and said.is_atom and isinstance(said.terms[0][0][0], str):
            symbols.setdefault(said.terms[0][0][0], int(real))
        number = substitute(said, symbols, opaque)
        if number is not None and number != int(real):
            return f"{said} = {number} but {real} (shape {[str(d) for d in info.shape]}, real {array.shape})"
    return None


def check_run(model: Model, feeds: dict[str, Any]) -> list[str]:
    """Run with every value of the root graph as an output and collect what the analysis said wrongly."""
    shapes = Shapes(model)
    tapped = model.clone()
    names = {t.name for t in tapped.graph.outputs}
    tensors = {t.name: t for node in model.graph.nodes for t in node.outputs if t.name}
    for node in tapped.graph.nodes:
        for tensor in node.outputs:
            if tensor.name and tensor.name not in names and shapes.dtype(tensors[tensor.name]) is not None:
                tensor.dtype, tensor.shape = shapes.dtype(tensors[tensor.name]), None
                tapped.graph.outputs.append(tensor)
    symbols: dict[str, int] = {}
    for spec in model.inputs:
        for dim, size in zip(spec.shape or (), np.shape(feeds[spec.name]), strict=bool(spec.shape)):
            if isinstance(dim, str):
                symbols[dim] = size
    opaque: dict[int, int] = {}
    for tensor in model.graph.inputs:
        info = shapes.info(tensor)
        if info.shape is not None and tensor.name in feeds:
            contradiction(info, np.asarray(feeds[tensor.name]), symbols, opaque)
    faults = []
    for name, value in Evaluator(tapped).run(feeds).items():
        if name in tensors and isinstance(value, np.ndarray | np.generic):
            fault = contradiction(shapes.info(tensors[name]), np.asarray(value), symbols, opaque)
            if fault:
                faults.append(f"{name}: {fault}")
    return faults


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "concat", "vit"])
@pytest.mark.parametrize("dialect", ["legacy", "dynamo"])
def test_every_fact_holds_in_runs_of_the_digits_nets(name: str, dialect: str) -> None:
    model = ir.load(models.path(f"{name}.{dialect}"))
    for batch in (1, 2, 5):
        feeds = equivalence.generate_inputs(model.inputs, seed=batch, dims={"batch": batch})
        assert check_run(model, feeds) == []


@functools.cache
def operator_cases() -> tuple[Any, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases' own arithmetic overflows on purpose
        return tuple(collect_testcases(None))


def test_every_fact_holds_for_the_expected_outputs_of_the_operator_models() -> None:
    faults, known, total = [], 0, 0
    for case in operator_cases():
        model = ir.from_proto(case.model)
        shapes = Shapes(model)
        for inputs, outputs in case.data_sets:
            opaque: dict[int, int] = {}
            symbols: dict[str, int] = {}
            fits = True
            for tensor, array in zip(model.graph.inputs, inputs, strict=False):
                if isinstance(array, np.ndarray) and shapes.shape(tensor) is not None:
                    fits = fits and contradiction(shapes.info(tensor), array, symbols, opaque) is None
            if not fits:
                continue  # a few cases feed what their own model does not declare
            for tensor, array in zip(model.graph.outputs, outputs, strict=False):
                if not isinstance(array, np.ndarray | np.generic):
                    continue
                total += 1
                known += shapes.shape(tensor) is not None
                fault = contradiction(shapes.info(tensor), np.asarray(array), symbols, opaque)
                if fault:
                    faults.append(f"{case.name}: {tensor.name}: {fault}")
    assert faults == []
    assert known > 0.9 * total, f"{known} of {total} outputs have a known rank"


def facts(text: str, tensor: str) -> tuple[list[str] | None, list[str] | None]:
    model = ir.parse(text)
    shapes = Shapes(model)
    found = {t.name: shapes.info(t) for g in model.graphs() for n in g.nodes for t in n.outputs}[tensor]
    dims = None if found.shape is None else [str(d) for d in found.shape]
    return dims, None if found.value is None else [str(v) for v in found.value.flat]


@pytest.mark.parametrize(
    ("body", "shape", "value"),
    [
        ("y = Shape (x)", ["3"], ["N", "S", "6"]),
        ("y = Shape <start = 1, end = -1> (x)", ["1"], ["S"]),
        ("y = Size (x)", [], ["6*N*S"]),
        ("y = Flatten <axis = 2> (x)", ["N*S", "6"], None),
        ("s = Shape (x) p = ReduceProd (s) y = Reshape (x, p)", ["6*N*S"], None),
        ("y = Concat <axis = 1> (x, x)", ["N", "2*S", "6"], None),
        ("y = Conv (x, w)", ["N", "2", "4"], None),
        ("y = Pad (x, pads)", ["N", "S + 2", "6"], None),
        ("y = Tile (x, reps)", ["N", "2*S", "18"], None),
        ("y = Slice (x, one, big, one)", ["N", "max(0,S - 1)", "6"], None),
        ("y = Slice (x, zero, one, one)", ["N", "min(1,S)", "6"], None),
        ("l = Shape (x) d, y, e = Split <num_outputs = 3> (l)", ["1"], ["S"]),
        ("a, y = Split <axis = 2, num_outputs = 2> (x)", ["N", "S", "3"], None),
        ("y = MaxPool <kernel_shape = [2], strides = [2]> (x)", ["N", "S", "3"], None),
        ("y = NonZero (x)", ["3", "?(0)"], None),
    ],
)  # fmt: skip
def test_symbolic_dimensions(body: str, shape: list[str], value: list[str] | None) -> None:
    text = f"""g (float[N,S,6] x) => (float y)
    <float[2,S,3] w, int64[6] pads = {{0,1,0,0,1,0}}, int64[3] reps = {{1,2,3}}, int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[1] big = {{9223372036854775807}}>
    {{ {body} }}""".replace("float[2,S,3] w, ", "").replace("(x, w)", "(x2, w)")
    if "x2" in body.replace("(x, w)", "(x2, w)"):
        text = """g (float[N,4,6] x) => (float y) <float[2,4,3] w = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> { y = Conv (x, w) }"""
    assert facts(text, "y") == (shape, value)


def test_group_normalization_keeps_the_shape() -> None:
    text = "g (float[N,4,H,6] x) => (float y) <float[4] k = {1,2,3,4}> { y = GroupNormalization <num_groups = 2> (x, k, k) }"
    assert facts(text, "y") == (["N", "4", "H", "6"], None)


def test_where_equal_on_shapes_is_decided_for_what_cannot_be_minus_one() -> None:
    text = """g (float[N,3] x) => (int64 y)
    <int64[2] minus = {-1, -1}>
    { s = Shape (x) e = Equal (s, minus) y = Where (e, minus, s) }"""
    assert facts(text, "y") == (["2"], ["N", "3"])


def test_a_symbol_may_be_one_or_zero_so_equality_with_one_stays_open() -> None:
    text = "g (float[N] x) => (bool y) <int64[1] one = {1}> { s = Shape (x) y = Equal (s, one) }"
    assert facts(text, "y") == (["1"], None)


def test_two_symbols_do_not_broadcast_to_either() -> None:
    dims, _ = facts("g (float[N] a, float[M] b) => (float y) { y = Add (a, b) }", "y")
    assert dims is not None
    assert dims[0] not in ("N", "M")


def test_a_table_cut_to_the_length_of_what_it_is_added_to_keeps_that_length() -> None:
    text = """g (float[N,S,4] x, float[1,512,4] table) => (float y) <int64[1] zero = {0}, int64[1] one = {1}>
    { length = Shape <start = 1, end = 2> (x)
      part = Slice (table, zero, length, one)
      y = Add (x, part) }"""
    assert facts(text, "part")[0] == ["1", "min(512,S)", "4"]
    assert facts(text, "y")[0] == ["N", "S", "4"]
    beside_another = text.replace("y = Add (x, part)", "y = Add (z, part)").replace("] x,", "] x, float[N,T,4] z,", 1)
    dims = facts(beside_another, "y")[0]
    assert dims is not None
    assert dims[1] not in ("S", "T", "min(512,S)")


def test_declared_shapes_of_intermediate_values_are_not_believed() -> None:
    text = "g (float[N,2] x) => (float y) <float[7,2] a> { a = Relu (x) y = Neg (a) }"
    assert facts(text, "y") == (["N", "2"], None)


def test_a_contradiction_makes_a_tensor_unknown_and_nothing_else() -> None:
    text = "g (float[3] a, float[4] b) => (float y) { c = Add (a, b) d = Relu (a) y = Sub (d, d) }"
    assert facts(text, "c")[0] is None
    assert facts(text, "y") == (["3"], None)


def test_an_unknown_operator_degrades_to_unknown() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[N] x) => (float y) { a = my.Magic (x) b = Relu (a) y = Neg (b) }"""
    assert facts(text, "b") == (None, None)


def test_branches_of_an_if_agree_where_they_agree() -> None:
    text = """g (bool c, float[N,2] x) => (float y)
    { a = If (c) <then_branch = t () => (float[N,2] p) { p = Relu (x) }, else_branch = e () => (float[M,2] q) { q = Neg (x) }>
      y = Exp (a) }"""
    assert facts(text, "y") == (["N", "2"], None)


def test_an_initializer_that_callers_may_override_has_no_value() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x, int64[2] s) => (float y) <int64[2] s = {2, -1}> { y = Reshape (x, s) }"""
    )
    shapes = Shapes(ir.from_proto(model))
    found = shapes.shape(ir.from_proto(model).graph.outputs[0])
    assert found is None or all(isinstance(d, Expr) and d.is_opaque for d in found)


N, S = symbolic.symbol("N"), symbolic.symbol("S")


def test_expressions_have_one_form() -> None:
    assert N * S + N == N + S * N
    assert (N + 1) * (N + 1) == N * N + 2 * N + 1
    assert N - N == 0
    assert str(symbolic.floor_divide(S, 2)) == "S//2"
    assert symbolic.floor_divide(N * 6, 3) == N * 2
    assert symbolic.divide_exactly(N * S * 4, N * 2) == S * 2
    assert symbolic.divide_exactly(N, 2) is None
    assert symbolic.maximum(N + 1, N) == N + 1
    assert symbolic.minimum(N, S) == symbolic.minimum(S, N)


def test_a_dimension_may_be_zero() -> None:
    assert symbolic.is_nonnegative(N * S)
    assert not symbolic.is_positive(N)
    assert symbolic.is_positive(N + 1)
    assert not symbolic.is_nonnegative(N - 1)


def test_sums_of_many_terms_become_opaque_and_stay_equal() -> None:
    many = [symbolic.symbol(f"d{i}") for i in range(50)]
    total = functools.reduce(symbolic.add, many)
    again = functools.reduce(symbolic.add, many)
    assert total == again


def test_onnx_is_asked_once_about_layers_that_differ_in_names_alone() -> None:
    layers = "{0} = Add (x, {0}i)  {0}o = ReduceSum <keepdims = {1}> ({0})"
    model = ir.parse(f"""
        g (float[N,M] x, float[N,M] ai, float[N,M] bi, float[N,M] ci) => (float[1,1] ao, float[1,1] bo, float co)
        {{ {layers.format("a", 1)} {layers.format("b", 1)} {layers.format("c", 0)} }}""")
    inference.infer.cache_clear()
    shapes = Shapes(model)
    assert inference.infer.cache_info().misses == 3  # Add, and ReduceSum of each kind
    assert [shapes.shape(t) for t in model.graph.outputs] == [(1, 1), (1, 1), ()]
    Shapes(model)
    assert inference.infer.cache_info().misses == 3


def test_values_of_floats_matter_to_few_operators() -> None:
    model = ir.parse("""
        g (float[1,1,4,4] x) => (float[A,B,C,D] y, float[P] r)
        <float[4] s = {1, 1, 2, 2}, float a = {0}, float b = {3}, float c = {0.5}>
        { y = Resize (x, , s)  r = Range (a, b, c) }""")
    shapes = Shapes(model)
    assert [shapes.shape(t) for t in model.graph.outputs] == [(1, 1, 8, 8), (6,)]
