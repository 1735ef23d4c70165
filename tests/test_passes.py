"""Every pass: its contract, its docstring example, its text cases; and that one new file is all a new pass needs."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import CASES, Case, canonical, cases

from graphopt import equivalence, ir, verify
from graphopt.discovery import find_pass, pass_modules
from graphopt.edit import Editor
from graphopt.errors import InvalidModel, UnsupportedModel
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.instruments import FullCheck, Verify
from graphopt.ir import Constant, Model
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.pipeline import Pipeline, Result
from graphopt.target import Target

ROOT = Path(__file__).parents[1]
NAMES = list(pass_modules())


def run(text: str, model: Model, target: str | None = None) -> Result:
    ctx = Context(evaluate=evaluate_node, target=None if target is None else Target.parse(target))
    try:
        verify.full(model)
    except InvalidModel:  # the case is about a model that contradicts itself
        return Pipeline.parse(text).run(model, ctx)
    return Pipeline.parse(text).run(model, ctx, [Verify(), FullCheck()])


def same(left: Model, right: Model, types: bool) -> None:
    assert canonical(ir.loads(ir.saves(left)), types) == canonical(ir.loads(ir.saves(right)), types), left.text()


# --------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", NAMES)
def test_pass_is_a_frozen_dataclass_with_defaults_and_a_summary(name: str) -> None:
    kind = find_pass(name)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(kind(), Pass)
    assert kind.summary().endswith(".")
    assert kind.__module__.rpartition(".")[2].replace("_", "-") == name
    for item in dataclasses.fields(kind):
        assert item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


@pytest.mark.parametrize("name", NAMES)
def test_pass_with_other_options_survives_its_text_form(name: str) -> None:
    kind = find_pass(name)
    others = {}
    for item in dataclasses.fields(kind):
        value = getattr(kind(), item.name)
        halved = value / 2 if isinstance(value, float) else value  # a share stays a share
        others[item.name] = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else halved
    assert kind().options() == {}
    assert Pipeline.parse(str(Pipeline((kind(**others),)))).passes == (kind(**others),)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_example_is_what_the_pass_does(name: str) -> None:
    example = find_pass(name).example()
    assert example is not None, f"{name} needs a Before: and an After: block in its docstring"
    before, after = map(ir.parse, example)
    result = run(name, before, next(iter(find_pass(name).serves), None))
    same(result.model, after, name == "infer-shapes")
    feeds = equivalence.generate_inputs(before.inputs)
    expected, found = Evaluator(before).run(feeds), Evaluator(result.model).run(feeds)
    for left, right in zip(expected.values(), found.values(), strict=True):
        np.testing.assert_allclose(
            left, right, rtol=0.02 if find_pass(name).exactness is Exactness.APPROXIMATE else 1e-5
        )


def test_a_docstring_without_example_is_noticed() -> None:
    class Silent(Pass):
        """Say nothing."""

    assert Silent.example() is None


# ------------------------------------------------------------------------------------------------------- text cases

ALL = [case for path in sorted(CASES.glob("*.txt")) for case in cases(path)]


@pytest.mark.parametrize("name", sorted({p.pass_name() for p in Pipeline.parse("O1,O2").passes}))
def test_pass_of_level_2_has_as_many_cases_that_must_not_fire(name: str) -> None:
    found = [c.after is not None for c in cases(CASES / f"{name}.txt")]
    assert sum(found) <= len(found) - sum(found)


@pytest.mark.parametrize("name", sorted({p.pass_name() for p in Pipeline.parse("O1,O2").passes}))
def test_each_operator_that_a_rule_takes_away_has_as_many_cases_where_it_stays(name: str) -> None:
    """Rules have no names, operators have: those that the pass's source speaks of, and fewer of which are left where it fires."""
    source = (ROOT / "passes" / f"{name.replace('-', '_')}.py").read_text()
    known = set(re.findall(r'"([A-Z]\w+)"', source))
    taken, left = Counter[str](), Counter[str]()
    for case in cases(CASES / f"{name}.txt"):
        before = Counter(node.op for node in ir.parse(case.before).nodes())
        if case.after is None:
            left.update(set(before))
        else:
            taken.update(set(before - Counter(node.op for node in ir.parse(case.after).nodes())))
    assert {op: (n, left[op]) for op, n in taken.items() if op in known and left[op] < n} == {}


@pytest.mark.parametrize("case", ALL, ids=str)
def test_case(case: Case) -> None:
    before = ir.parse(case.before)
    result = run(case.pipeline, before)
    expected = before if case.after is None else ir.parse(case.after)
    same(result.model, expected, "infer-shapes" in case.pipeline)
    assert (result.rewrites == 0) == (case.after is None)
    if case.remark:
        assert any(case.remark in str(r) for r in result.remarks), list(map(str, result.remarks))
    if case.after is not None:
        allowed = equivalence.tolerance(
            Pipeline.parse(case.pipeline).exactness, result.rewrites, equivalence.float_types(before)
        )
        equivalence.compare(before, result.model, allowed=allowed).require(case.name)


def test_every_pass_has_cases_that_fire_and_cases_that_must_not() -> None:
    def of(name: str, fires: bool) -> bool:
        return any(case.pipeline.startswith(name) and (case.after is not None) == fires for case in ALL)

    assert [name for name in NAMES if not of(name, fires=False)] == []
    assert [name for name in NAMES if not of(name, fires=True)] == []


@pytest.mark.parametrize("name", [name for name in NAMES if find_pass(name).places])
def test_places_that_explain_tells_of_are_where_the_pass_fires(name: str) -> None:
    for case in cases(CASES / f"{name}.txt"):
        model = ir.parse(case.before)
        edit, nodes = Editor(model), list(model.nodes())
        held = [
            n
            for place in find_pass(name).places
            for n in nodes
            if n.op in place.ops and (place.otherwise or not place.missing(n, edit))
        ]
        assert case.after is None or held, case.name


# ------------------------------------------------------------------------------ what the text form of ONNX cannot say


def with_constant(text: str, name: str, values: np.ndarray) -> Model:
    """The model of `text` with the value of initializer `name` replaced."""
    proto = onnx.parser.parse_model(text)
    for index, initializer in enumerate(proto.graph.initializer):
        if initializer.name == name:
            proto.graph.initializer[index].CopyFrom(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(proto)


HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


@pytest.mark.parametrize("values", [[np.nan, 1], [np.inf, -np.inf], [-0.0, 0.0], [5e-324, 1e-45]])
def test_unusual_floats_are_folded_bit_by_bit(values: list[float]) -> None:
    array = np.array(values, np.float32)
    model = with_constant(
        f"{HEADER} g (float[2] x) => (float[4] y) <float[2] w = {{1,2}}> {{ a = Concat <axis=0> (w, w)  b = Concat <axis=0> (x, x)  y = Add (a, b) }}",
        "w",
        array,
    )
    folded = {c.name: c.values for c in run("fold-constants", model).model.constants()}
    assert folded["a"].tobytes() == np.concatenate([array, array]).tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float8_e4m3fn])
def test_types_that_runtimes_cannot_take_are_folded_by_the_reference(dtype: type) -> None:
    kind = onnx.TensorProto.DataType.Name(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))).lower()
    model = with_constant(
        f"{HEADER} g (float[2,1] x) => (float[2,3] y) <{kind}[3] w = {{1,2,3}}, int64[1] a = {{0}}> {{ u = Unsqueeze (w, a)  f = Cast <to = 1> (u)  y = Add (x, f) }}",
        "w",
        np.array([1, 2, 3]).astype(dtype),
    )
    result = run("fold-constants", model).model
    assert [n.op for n in result.nodes()] == ["Add"]
    (constant,) = result.constants()
    assert constant.values.tolist() == [[1, 2, 3]]


def test_a_cast_to_bfloat16_is_folded() -> None:
    model = ir.parse(
        "g (bfloat16[2] x) => (bfloat16[2] y) <float[2] w = {1.0, 3.0}> { b = Cast <to = 16> (w)  y = Add (x, b) }"
    )
    result = run("fold-constants", model).model
    assert [c.values.dtype.name for c in result.constants()] == ["bfloat16"]


def test_one_budget_holds_for_a_whole_pipeline() -> None:
    lines = " ".join(f"a{i} = Expand (w{i}, n) y{i} = Add (x, a{i})" for i in range(4))
    weights = ", ".join(f"float[1] w{i} = {{{i}}}" for i in range(4))
    outputs = ", ".join(f"float[100] y{i}" for i in range(4))
    model = ir.parse(f"g (float[100] x) => ({outputs}) <int64[1] n = {{100}}, {weights}> {{ {lines} }}")
    for text in ("fold-constants{budget=1000}", "fixpoint(fold-constants{budget=1000},eliminate-identity)"):
        result = run(text, model)
        assert 0 < result.model.nbytes - model.nbytes <= 1000
        assert sum(n.op == "Expand" for n in result.model.nodes()) == 2
    twice = "fold-constants{budget=1000},fold-constants{budget=1000}"
    assert sum(n.op == "Expand" for n in run(twice, model).model.nodes()) == 2
    assert not any(n.op == "Expand" for n in run("fold-constants{budget=none}", model).model.nodes())


def test_a_free_transpose_is_folded_beside_an_expand_that_breaks_the_budget() -> None:
    """The largest value is not the one that grows the file."""
    model = with_constant(
        f"{HEADER} g (float[300,300] x) => (float[300,300] y) <float[1] w = {{1}}, float[1,1] s = {{1}}, int64[2] n = {{200, 300}}>"
        "{ t = Transpose (w)  e = Expand (s, n)  a = MatMul (x, t)  b = Concat <axis=0> (e, x)  i = ReduceSum (b)  y = Add (a, i) }",
        "w",
        np.arange(90000, dtype=np.float32).reshape(300, 300),
    )
    result = Pipeline.parse("fold-constants{budget=1000}").run(model)
    assert sorted(n.op for n in result.model.nodes()) == ["Add", "Concat", "Expand", "MatMul", "ReduceSum"]
    assert result.model.nbytes - model.nbytes <= 1000


def test_an_evaluator_that_refuses_leaves_the_node_and_a_remark() -> None:
    model = ir.parse("g (float[2] x) => (float[2] y) <float[2] w = {1,2}> { a = Neg (w) y = Add (x, a) }")

    def refuse(*_: object) -> list[np.ndarray]:
        raise UnsupportedModel("out of order")

    result = Pipeline.parse("fold-constants").run(model, Context(evaluate=refuse))
    assert result.rewrites == 0
    assert "out of order" in str(result.remarks[0])


def test_sparse_constants_stay() -> None:
    sparse = onnx.helper.make_sparse_tensor(
        onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [2.0]),
        onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [1]),
        [3],
    )
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], sparse_value=sparse),
        onnx.helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, [3])], [info("y", 1, [3])])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))
    result = Pipeline.parse("fold-constants").run(model)
    assert result.rewrites == 0
    assert "sparse" in str(result.remarks[0])


def test_operands_of_a_constant_are_evaluated_as_the_pass_asks_and_equal_nodes_share_a_session() -> None:
    from graphopt import evaluate

    evaluate._prepared.cache_clear()
    model = ir.parse(
        "g (float[2] x) => (float[2] y) <float[2] w = {1,2}> { a = Neg (w) b = Neg (a) c = Neg (b) y = Add (x, c) }"
    )
    assert run("fold-constants", model).rewrites == 3
    assert evaluate._prepared.cache_info().misses == 1


# ------------------------------------------------------------------------------------------------------- one new file

SEVENTH = '''
"""``relu(relu(x)) = relu(x)``."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.edit import Editor
from graphopt.rewrite import Match, RewritePass, op


@dataclass(frozen=True)
class MergeRelus(RewritePass):
    """Apply Relu once.

    Before:
        g (float[2] x) => (float[2] y)
        { a = Relu (x)
          y = Relu (a) }
    After:
        g (float[2] x) => (float[2] y)
        { y = Relu (x) }
    """

    times: int = 1  # for show

    pattern = op("Relu", op("Relu", "x", name="inner"), name="outer")

    def rewrite(self, match: Match, edit: Editor):
        return match.nodes["inner"].outputs[0]
'''


def test_the_seventh_pass_needs_one_new_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "graphopt").mkdir()
    for source in (ROOT / "graphopt").iterdir():
        if source.name != "passes":
            (tmp_path / "graphopt" / source.name).symlink_to(source.resolve())
    (tmp_path / "graphopt/passes").mkdir()
    for source in (ROOT / "passes").glob("*.py"):
        (tmp_path / "graphopt/passes" / source.name).symlink_to(source)
    (tmp_path / "graphopt/passes/merge_relus.py").write_text(SEVENTH)
    script = textwrap.dedent("""
        from graphopt import Pipeline, parse
        from graphopt.discovery import find_pass, pass_modules
        assert "merge-relus" in pass_modules()
        assert find_pass("merge-relus").summary() == "Apply Relu once."
        before, after = find_pass("merge-relus").example()
        pipeline = Pipeline.parse("fixpoint(merge-relus{times=2}),eliminate-dead")
        assert Pipeline.parse(str(pipeline)) == pipeline
        result = pipeline.run(parse(before))
        print([n.op for n in result.model.nodes()], [(s.pass_name, s.rewrites) for s in result.steps])
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "['Relu'] [('merge-relus', 1), ('merge-relus', 0), ('eliminate-dead', 0)]" in done.stdout


def test_constants_that_passes_share_stay_read_only() -> None:
    constant = Constant("c", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        constant.values[0] = 1
    assert verify.structure(ir.parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")) == []
    assert evaluate_node.__doc__
