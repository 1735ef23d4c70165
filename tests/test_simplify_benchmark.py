"""The judging of benchmarks/simplify.py: what counts as a node, as valid, and as a loss. No peer is needed."""

import numpy as np
import onnx
import pytest
from onnx import parser

from benchmarks.graphs import Sample, matches, required_inputs
from benchmarks.harness import PeerRun
from benchmarks.simplify import OURS, Outcome, _keep, _recalled, fastest, gaps, verdict
from benchmarks.simplify_judge import Finding, count, histogram, interface, judge
from graphopt.measure import ProcessCost

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
ORIGINAL = f"{HEAD} f (float[N, 2] x) => (float[N, 2] y) {{ one = Constant <value_float = 1.0> () y = Mul (x, one) }}"
IDENTITY = f"{HEAD} f (float[N, 2] x) => (float[N, 2] y) {{ y = Identity (x) }}"


def outcome(nodes, *, state="valid", cpu=1.0):
    cost = ProcessCost((), 0, False, cpu, cpu, 10.0, "", "")
    told = {"broken": ["no"] if state == "wrong" else (), "flaws": ["no"] if state == "flawed" else ()}
    finding = None if state == "failed" else Finding({"Relu": nodes, "Constant": 99}, **told)
    return Outcome((PeerRun(cost, "exit code 1" if state == "failed" else None),), finding)


def judged(tmp_path, text, *, shape=(3, 2), moved=0.0):
    """The finding on `text` as a result for ORIGINAL, whose numbers are those of x."""
    (tmp_path / "out").mkdir()
    original, result, reference = tmp_path / "a.onnx", tmp_path / "out" / "b.onnx", tmp_path / "r.npz"
    onnx.save(parser.parse_model(ORIGINAL), original)
    onnx.save(parser.parse_model(text), result)
    x = np.linspace(-1, 1, num=int(np.prod(shape)), dtype=np.float32).reshape(shape)
    np.savez(reference, **{"0.in.x": x, "0.out.y": x, "0.moved.y": np.float64(moved)})
    return judge(original, result, reference, 1e-6)


def test_nodes_of_subgraphs_and_functions_count_and_constants_do_not():
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        f (bool c, float[2] x) => (float[2] y) {
            one = Constant <value_float = 1.0> ()
            z = local.twice (x)
            y = If (c) <
                then_branch = a () => (float[2] p) { p = Add (z, one) },
                else_branch = b () => (float[2] q) { two = Constant <value_float = 2.0> () q = Mul (z, two) }
            >
        }
        <domain: "local", opset_import: ["" : 17]>
        twice (v) => (w) { w = Add (v, v) }"""
    )
    found = histogram(model)
    assert found == {"Constant": 2, "local.twice": 1, "If": 1, "Add": 2, "Mul": 1}
    assert count(found) == 5


def test_an_input_with_a_default_is_not_required():
    model = parser.parse_model(f"{HEAD} f (float[2] x, float[2] w = {{1, 2}}) => (float[2] y) {{ y = Add (x, w) }}")
    assert [value.name for value in required_inputs(model)] == ["x"]


def test_an_equal_result_is_valid(tmp_path):
    found = judged(tmp_path, IDENTITY)
    assert (found.state, found.nodes, found.max_abs, found.samples) == ("valid", 1, 0.0, 1)


def test_a_result_with_other_numbers_is_wrong(tmp_path):
    found = judged(tmp_path, IDENTITY.replace("Identity", "Neg"))
    assert found.state == "wrong"
    assert found.max_abs == 2.0


def test_what_the_original_itself_does_to_a_rounding_is_no_difference(tmp_path):
    near = IDENTITY.replace("y = Identity (x)", "tiny = Constant <value_float = 1e-5> () y = Add (x, tiny)")
    assert judged(tmp_path, near, moved=1e-5).state == "valid"
    (tmp_path / "again").mkdir()
    assert judged(tmp_path / "again", near).state == "wrong"


def test_a_fill_counts_and_is_told(tmp_path):
    fill = "s = Constant <value_ints = [2]> () z = ConstantOfShape (s) y = Add (x, z)"
    found = judged(tmp_path, IDENTITY.replace("y = Identity (x)", fill))
    assert (found.state, found.nodes, found.fills) == ("valid", 2, 1)


def test_outcomes_come_back_as_they_were_when_the_same_is_asked(tmp_path):
    outcomes = {OURS: outcome(4), "a": outcome(3, state="flawed"), "b": outcome(5, state="failed")}
    asked = {"rounds": 1, "peers": ["a", "b"]}
    _keep(tmp_path / "kept", "graph", asked, {"allowed": 1e-6}, outcomes)
    facts, found = _recalled(tmp_path / "kept", "graph", asked)
    assert facts == {"allowed": 1e-6}
    assert [(o.state, o.nodes, o.cpu_seconds) for o in found.values()] == [
        (o.state, o.nodes, o.cpu_seconds) for o in outcomes.values()
    ]
    assert _recalled(tmp_path / "kept", "graph", {**asked, "rounds": 3}) is None
    assert _recalled(tmp_path / "kept", "other", asked) is None


def test_a_result_that_refuses_another_batch_is_wrong(tmp_path):
    found = judged(tmp_path, IDENTITY.replace("[N, 2] x", "[64, 2] x"))
    assert found.state == "wrong"
    assert "does not run" in found.broken[0]


def test_a_result_whose_input_has_another_name_is_wrong(tmp_path):
    found = judged(tmp_path, IDENTITY.replace("x)", "z)"))
    assert found.broken == ["input 'x' is gone", "1 more required inputs, as 'z'"]


def test_a_result_that_renames_a_symbol_is_flawed(tmp_path):
    found = judged(tmp_path, IDENTITY.replace("float[N, 2] y", "float[M, 2] y"))
    assert found.state == "flawed"
    assert found.flaws == ["output 'y' was [N,2], is [M,2]"]


def test_a_result_that_the_checker_rejects_is_flawed(tmp_path):
    found = judged(tmp_path, IDENTITY.replace("y = Identity (x)", "y = Identity (x) unused = Nonsense (x)"))
    assert any("checker" in flaw for flaw in found.flaws)


def test_a_lost_shape_is_not_the_same_interface():
    original, result = parser.parse_model(IDENTITY), parser.parse_model(IDENTITY)
    result.graph.output[0].type.tensor_type.ClearField("shape")
    assert interface(original, result) == ([], ["output 'y' was [N,2], is of unknown rank"])


@pytest.mark.parametrize(("nodes", "expected"), [(4, "win (5 b, d)"), (5, "tie (5 b, d)"), (7, "LOSS by 2 (5 b, d)")])
def test_the_verdict_is_against_the_fewest_nodes_of_the_valid(nodes, expected):
    rivals = {"a": outcome(6), "b": outcome(5), "c": outcome(1, state="wrong"), "d": outcome(5)}
    found = verdict({OURS: outcome(nodes), **rivals, "e": outcome(1, state="failed")}, ("valid",))
    assert str(found) == expected


def test_a_flawed_result_counts_only_against_the_right():
    outcomes = {OURS: outcome(4), "a": outcome(3, state="flawed"), "b": outcome(5)}
    assert verdict(outcomes, ("valid",)).word == "win"
    assert str(verdict(outcomes, ("valid", "flawed"))) == "LOSS by 1 (3 a)"


def test_ours_must_be_valid_to_win():
    outcomes = {OURS: outcome(1, state="flawed"), "a": outcome(9)}
    assert verdict(outcomes, ("valid",)).word == "LOSS: ours is flawed"


def test_the_fastest_rival_is_right_and_in_python():
    rivals = {
        "ort_basic": outcome(1, cpu=0.1),  # compiled
        "onnxslim": outcome(1, state="wrong", cpu=0.2),
        "polygraphy": outcome(1, cpu=2.0),
        "onnxscript": outcome(1, state="flawed", cpu=1.5),
    }
    assert fastest({OURS: outcome(1), **rivals}) == ("onnxscript", 1.5)


def test_gaps_name_the_largest_difference_first_and_no_constants():
    assert gaps({"Cast": 1, "Shape": 5, "Constant": 9}, {"Cast": 2, "Shape": 2}) == "Shape +3, Cast -1"


def test_patterns_are_separated_by_commas():
    assert matches("vit_legacy", "light_*,vit_*")
    assert not matches("vit_legacy", "light_*,vit")


def test_samples_take_dimensions_shapes_and_fills():
    model = parser.parse_model(
        f"{HEAD} f (float[N, 2] x, int64[K] ids, int64[K] mask) => (float[N, 2] y) {{ y = Identity (x) }}"
    )
    feeds = Sample(dims={"N": 3, "K": 5}, shapes={"ids": (7,)}, fill={"mask": 1}).feeds(model, seed=0)
    assert feeds["x"].shape == (3, 2)
    assert feeds["ids"].shape == (7,)
    assert feeds["mask"].tolist() == [1] * 5
