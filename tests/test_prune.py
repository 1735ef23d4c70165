"""Pruning: what goes, what is mended, what is refused; dead channels; the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_channel_groups import channel_groups, choose

from graphopt import cli, ir, models, verify
from graphopt.analyses import gradients
from graphopt.analyses.cut import Cut
from graphopt.analyses.gram import Moments, layers, ridge
from graphopt.analyses.importance import SELECTORS, Chooser
from graphopt.analyses.residual_blocks import chains, residual_blocks
from graphopt.analyses.shapes import Shapes
from graphopt.data import open_data
from graphopt.discovery import find_pass
from graphopt.edit import Editor, cleanup
from graphopt.errors import UsageError, UserError
from graphopt.evaluate import Evaluator, evaluate_node
from graphopt.pass_base import Context
from graphopt.pipeline import Pipeline

CHAIN = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,2,4,4] x) => (float[N,2,4,4] y)
    <float[4,2,1,1] a = {1, 0.5, -1, 2, 0.25, 1, 2, 1}, float[2,4,1,1] b = {1, 2, 3, 4, 5, 6, 7, 8}>
    { c = Conv (x, a)
      r = Relu (c)
      y = Conv (r, b) }
"""


def prune(model: ir.Model, options: str, samples: np.ndarray | None = None):
    data = None if samples is None else open_data({"x": samples}, model.inputs)
    return Pipeline.parse(f"prune-channels{options}").run(model, Context(evaluate=evaluate_node, data=data))


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


def top1(model: ir.Model) -> float:
    digits = models.digits()
    found = next(iter(Evaluator(model).run({"x": digits["x_test"]}).values()))
    return float((found.argmax(1) == digits["y_test"]).mean())


@pytest.fixture(scope="module")
def mobilenet() -> ir.Model:
    return Pipeline.parse("O2").run(ir.load(models.path("mobilenet.legacy"))).model


# ------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", ["mobilenet.dynamo", "vit.legacy"])
def test_half_of_the_parameters_go_and_nine_tenths_of_the_accuracy_stay(name: str) -> None:
    model = Pipeline.parse("O2").run(ir.load(models.path(name))).model
    samples = models.digits()["x_calib"]
    repaired = prune(model, "{ratio=0.5,target=params}", samples)
    assert (
        channel_groups(repaired.model).cost_model("params").total()
        <= 0.501 * channel_groups(model).cost_model("params").total()
    )
    assert top1(repaired.model) >= 0.9 * top1(model)
    plain = prune(model, "{ratio=0.5,target=params,repair=false}", samples)
    assert top1(repaired.model) > top1(plain.model) + 0.1


def test_channel_that_others_can_stand_in_for_costs_nothing() -> None:
    """Without an activation in between, two of four channels that see two inputs are redundant: least squares finds them exactly."""
    model = ir.parse(CHAIN.replace("Relu", "Identity"))
    samples = noise(32, 2, 4, 4)
    result = prune(model, "{ratio=0.5}", samples).model
    before, after = (Evaluator(m).run({"x": samples})["y"] for m in (model, result))
    # the ridge of 1e-4 of the mean diagonal leaves as much
    np.testing.assert_allclose(before, after, atol=1e-2 * np.abs(before).max())
    assert {c.shape[1] for c in result.constants() if c.shape[0] == 2 and len(c.shape) == 4} == {2}


def test_ridge_is_pulled_toward_the_weights_at_hand_and_not_toward_zero() -> None:
    x, w = noise(400, 5), np.arange(10.0).reshape(1, 2, 5)
    moments = Moments(1, 5, 2)
    moments.add(x[None], (x @ w[0].T + 3).astype(np.float32)[None])
    for strength in (1e-4, 1e4):
        solved, bias = ridge(moments, w, strength, True)
        np.testing.assert_allclose(solved, w, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(bias, [[3, 3]], rtol=1e-3)
    other, _ = ridge(moments, np.zeros_like(w), 1e-6, True)
    np.testing.assert_allclose(other, w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("op", "weight", "attributes"),
    [
        ("Conv", "float[4,2,3,2]", "<group = 2, strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]>"),
        ("Conv", "float[8,1,3,3]", '<group = 4, auto_pad = "SAME_UPPER", strides = [2, 2]>'),
        ("Conv", "float[3,4,1,1]", ""),
        ("ConvTranspose", "float[4,3,3,2]", "<strides = [2, 1], dilations = [1, 2], pads = [1, 0, 0, 1]>"),
        ("ConvTranspose", "float[4,2,2,3]", "<group = 2, strides = [3, 2], output_padding = [1, 1]>"),
    ],
)
def test_layer_is_its_matrix_times_its_columns(op: str, weight: str, attributes: str) -> None:
    size = int(np.prod([int(n) for n in weight[6:-1].split(",")]))
    values = ",".join(map(str, np.random.default_rng(1).standard_normal(size).round(3)))
    model = ir.parse(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[2,4,7,6] x) => (float[2,?,?,?] y) <{weight} w = {{{values}}}> {{ y = {op} {attributes} (x, w) }}
    """)
    x = noise(2, 4, 7, 6)
    y = Evaluator(model).run({"x": x})["y"]
    model.graph.nodes[0].name = "n"
    layer = layers(model, turned=True)["n"]
    assert layer.result_like(x).shape == y.shape
    take = np.arange(layer.positions(y))[::3]
    found = layer.columns(x, y, take) @ layer.matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(found, layer.outputs(y, take), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.unmatrix(layer.matrix()), layer.weight.values)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_every_selector_prunes(name: str, mobilenet: ir.Model) -> None:
    result = prune(mobilenet, f"{{importance={name},ratio=0.3}}", models.digits()["x_calib"][:64])
    assert (
        channel_groups(result.model).cost_model("macs").total()
        <= 0.701 * channel_groups(mobilenet).cost_model("macs").total()
    )
    assert top1(result.model) > 0.5 if name != "random" else result.rewrites


def by_name(chooser: Chooser) -> dict[int, float]:
    """A selector of one's own: the last channel first."""
    return {root: -float(root) for root in chooser.left}


def too_few(chooser: Chooser) -> np.ndarray:
    return np.zeros(1)


def not_numbers(chooser: Chooser) -> dict[int, float]:
    return dict.fromkeys(chooser.left, float("nan"))


def raising(chooser: Chooser) -> dict[int, float]:
    raise RuntimeError("lost")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("too_few", "without a number for each class"),
        ("not_numbers", "is NaN"),
        ("raising", "it raised RuntimeError: lost"),
        ("CHAIN", "CHAIN is no function; name one"),
    ],
)
def test_selector_of_ones_own_that_goes_wrong_is_its_authors_to_mend(name: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"importance=.*{name}: .*{told}"):
        prune(ir.parse(CHAIN), f"{{importance={__name__}:{name}}}", noise(16, 2, 4, 4))


def test_selector_of_ones_own_is_one_function() -> None:
    model = ir.parse(CHAIN)
    result = prune(model, f"{{ratio=0.25,align=1,importance={__name__}:by_name,repair=false}}", noise(16, 2, 4, 4))
    (kept,) = (c for c in result.model.constants() if c.shape[1] == 2)
    np.testing.assert_array_equal(kept.values.reshape(-1), [1, 0.5, -1, 2, 0.25, 1])
    with pytest.raises(UserError, match="write module:function"):
        prune(model, "{importance=no.such:thing}")
    with pytest.raises(UserError, match="importance=a:b: No module"):
        prune(model, "{importance=a:b}")
    with pytest.raises(UsageError, match="there are obs, activation"):
        Pipeline.parse("prune-channels{importance=obz}")


GRADED = """
    <ir_version: 8, opset_import: ["": 20]>
    g (float[N,2,6,6] x, float[4,2,3,3] a, float[4] ab, float[4,1,3,3] b, float[6,4,1,1] c, float[6] s, float[6] sb, float[24,3] d,
       float[1,6,1,1] k) => (float[N,3] y)
    <int64[2] flat = {0, -1}, int64[1] zero = {0}, int64[1] six = {6}, int64[1] one = {1}>
    { p = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, a, ab)
      q = Gelu (p)
      r = Conv <group = 4, pads = [1, 1, 1, 1]> (q, b)
      r1 = MaxPool <kernel_shape = [2, 2]> (r)
      r2 = AveragePool <kernel_shape = [2, 2], strides = [1, 1]> (r)
      u1 = Conv (r1, c)
      u2 = Conv (r2, c)
      u = Add (u1, u2)
      v = Sigmoid (u)
      w = Mul (v, k)
      t = Transpose <perm = [0, 2, 3, 1]> (w)
      n = LayerNormalization (t, s, sb)
      m = Softmax (n)
      v3 = Exp (n)
      e = Div (m, v3)
      h = Slice (e, zero, six, one)
      f = Reshape (h, flat)
      y = MatMul (f, d) }
"""


def test_channels_that_hardly_vary_around_a_large_mean_are_weighed_without_overflow() -> None:
    """Second moments in single precision say nothing of them: what roundings left must not be inverted."""
    model = ir.parse(
        CHAIN.replace("r = Relu (c)", "t = Add (c, k)\n r = Relu (t)").replace(
            "<float[4", "<float[1] k = {1000}, float[4", 1
        )
    )
    with np.errstate(all="raise", under="ignore"):
        result = prune(model, "{ratio=0.5,align=1}", 1e-3 * noise(6, 2, 4, 4))
    assert result.facts["prune-channels"]["error"]["repaired"] < 1


def test_heads_go_whole() -> None:
    """In both exports' forms; one folds the heads into the batch to transpose the keys."""
    for name, excluded in (("vit.legacy", "'*mlp*'"), ("vit.dynamo", "'val_74','val_138','val_202'")):
        model = Pipeline.parse("O2").run(ir.load(models.path(name))).model
        options = f"{{heads=true,ratio=0.1,align=1,exclude=[{excluded}]}}"
        result = prune(model, options, models.digits()["x_calib"][:32])
        before, after = ([g.width for g in channel_groups(m, heads=True).groups] for m in (model, result.model))
        assert sorted(before) == [4, 4, 4, 128, 128, 128]
        assert sum(before) - sum(after) == result.rewrites > 0
        assert top1(result.model) > 0.9


def test_layers_that_are_only_sliced_are_named() -> None:
    text = CHAIN.replace("y = Conv (r, b) }", "p = Conv (r, b) q = Conv (r, b) y = Add (p, q) }")
    told = [str(r) for r in prune(ir.parse(text), "{ratio=0.3,align=1}", noise(8, 2, 4, 4)).remarks]
    assert any("only sliced, not fitted" in text and "shared by 2 nodes" in text for text in told)


def test_gradients_are_differences() -> None:
    """What fisher squares, against finite differences of a factor on one class, for a drawn direction of the outputs."""
    rng = np.random.default_rng(3)
    model = ir.parse(GRADED)
    shapes = {"a": (4, 2, 3, 3), "ab": (4,), "b": (4, 1, 3, 3), "c": (6, 4, 1, 1), "s": (6,), "sb": (6,), "d": (24, 3)}
    shapes["k"] = (1, 6, 1, 1)
    weights = {n: ir.Constant(n, 0.5 * rng.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
    for node in model.graph.nodes:
        node.name = f"n_{node.outputs[0].name}"
        for index, tensor in enumerate(node.inputs):
            node.inputs[index] = weights.get(tensor.name, tensor)
    model.graph.inputs = model.graph.inputs[:1]
    groups = channel_groups(model)
    feed = {"x": noise(1, 2, 6, 6)}
    found = gradients.squares(groups, [feed], evaluate_node, seed=1)
    assert found
    y = Evaluator(model).run(feed)["y"]
    drawn = np.random.default_rng(1).standard_normal(y.shape) / y.std()

    def loss(root: int, factor: float) -> float:
        copy = model.clone()
        edit = Editor(copy)
        nodes = {node.name: node for node in copy.graph.nodes}
        for contraction in groups.contractions:
            node = nodes[contraction.node.name]
            shape = [1] * len(groups.labels(contraction.node.inputs[contraction.operand]) or ())
            shape[contraction.axis] = -1
            mask = np.where(groups.roots[contraction.atoms] == root, factor, 1).astype(np.float32).reshape(shape)
            scaled = edit.variable("scaled")
            edit.insert_before(
                node, ir.Node("Mul", "m", {}, [node.inputs[contraction.operand], edit.constant("m", mask)], [scaled])
            )
            node.inputs[contraction.operand] = scaled
        edit.commit()
        return float((Evaluator(copy).run(feed)["y"] * drawn).sum())

    for root, square in found.items():
        slope = (loss(root, 1.01) - loss(root, 0.99)) / 0.02

        assert square == pytest.approx(slope**2, rel=0.02, abs=1e-4)


def test_twin_is_folded_into_the_one_that_stays() -> None:
    """The last filter is twice the first: without any samples and any fit, its readers lose nothing."""
    model = ir.parse(CHAIN)
    result = prune(model, "{ratio=0.25,align=1,importance=fold,repair=false}").model
    x = noise(4, 2, 4, 4)
    before, after = (Evaluator(m).run({"x": x})["y"] for m in (model, result))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- behaviour


def test_second_run_finds_the_ratio_reached(mobilenet: ir.Model) -> None:
    first = prune(mobilenet, "{ratio=0.2}").model
    assert prune(first, "{ratio=0.2}").rewrites == 0
    assert prune(first, "{ratio=0.4}").rewrites > 0


def test_same_samples_same_bytes(mobilenet: ir.Model) -> None:
    samples = models.digits()["x_calib"][:32]
    first, second = (prune(mobilenet, "{ratio=0.3}", samples).model for _ in range(2))
    assert ir.saves(first) == ir.saves(second)


def test_widths_keep_to_multiples_and_excluded_layers_keep_theirs(mobilenet: ir.Model) -> None:
    result = prune(mobilenet, "{ratio=0.3,align=8,exclude=['head.*'],rounds=2}", models.digits()["x_calib"][:64])
    found = {g.name: g.width for g in channel_groups(result.model).groups}
    assert all(width % 8 == 0 for width in found.values())
    assert next(w for name, w in found.items() if name.startswith("head")) == 64


def test_report_says_widths_costs_and_errors(mobilenet: ir.Model) -> None:
    told = [str(r) for r in prune(mobilenet, "{ratio=0.3}", models.digits()["x_calib"][:64]).remarks]
    assert any("multiply-accumulates (-30" in text for text in told)
    assert any("before repair" in text for text in told)
    assert any("channels: " in text and "macs, " in text and " bytes, error of its readers " in text for text in told)


@pytest.mark.parametrize(
    "options", ["ratio=0.5,align=1", "ratio=0.5,align=1,rounds=2", "ratio=0.5,align=1,repair=false"]
)
def test_report_follows_groups_whose_weights_got_other_names(options: str) -> None:
    result = prune(ir.parse(CHAIN), f"{{{options}}}", noise(16, 2, 4, 4))
    (group,) = result.facts["prune-channels"]["groups"]
    assert result.facts["prune-channels"]["macs"] == [256, 128]  # the second round has nothing left to do
    assert group["channels"] == [4, 2]
    assert group["params"] == [16, 8]
    assert group["macs"] == [256, 128]


def test_report_knows_a_group_that_has_one_channel_left() -> None:
    result = prune(ir.parse(CHAIN), "{ratio=0.74,align=1,rounds=2}", noise(16, 2, 4, 4))
    (group,) = result.facts["prune-channels"]["groups"]
    assert group["channels"] == [4, 1]
    assert group["params"] == [16, 6]  # with the bias that the repair gave the reader
    assert group["macs"] == [256, 64]


def test_without_samples_norms_decide_and_a_remark_says_so() -> None:
    result = prune(ir.parse(CHAIN), "{ratio=0.5}")
    assert any("no calibration data" in str(r) for r in result.remarks)


# -------------------------------------------------------------------------------------------------- blocks, latency

STREAM = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,4,4,4] x) => (float[N,2,4,4] y)
    <float[4,4,1,1] a, float[4,4,1,1] b, float[4,4,1,1] c, float[4,4,1,1] d, float[2,4,1,1] e>
    { s = Conv (x, a)
      r = Relu (s)
      p = Conv (r, b)
      q = Relu (p)
      f = Conv (q, c)
      t = Add (r, f)
      u = Relu (t)
      g1 = Conv (u, d)
      h = Add (g1, u)
      v = Relu (h)
      y = Conv (v, e) }
"""


def stream() -> ir.Model:
    text, rng = STREAM, np.random.default_rng(0)
    for name, size in (("a", 16), ("b", 16), ("c", 16), ("d", 16), ("e", 8)):
        values = ",".join(map(str, (rng.standard_normal(size) * (0.02 if name == "d" else 0.7)).round(3)))
        head = f"float[{2 if name == 'e' else 4},4,1,1] {name}"
        text = text.replace(head, f"{head} = {{{values}}}")
    model = ir.parse(text)
    for node in model.graph.nodes:
        node.name = f"n_{node.outputs[0].name}"
    return model


def test_residual_blocks_are_found_in_chains() -> None:
    model = stream()
    blocks = residual_blocks(model, Shapes(model))
    assert [(b.result, b.skip, sorted(b.nodes)) for b in blocks] == [
        ("t", "r", ["n_f", "n_p", "n_q"]),
        ("h", "u", ["n_g1"]),
    ]
    assert chains(model, blocks) == [[0, 1]]
    cut = Cut()
    cut.apply(model, channel_groups(model), set(), blocks)
    assert [node.op for node in model.graph.nodes] == ["Conv", "Relu", "Conv"]
    assert cut.stands["s"] == "h"
    assert verify.structure(model) == []


def test_block_that_does_least_goes_and_the_layer_before_it_takes_its_place() -> None:
    """The second block adds next to nothing; the layers before it make up for what it did."""
    model, samples = stream(), noise(64, 4, 4, 4)
    result = prune(model, "{ratio=0.2,keep=0.9,drop_blocks=true}", samples)
    assert any("ends in 'n_h' is left out" in str(r) for r in result.remarks)
    assert result.facts["prune-channels"]["blocks"] == ["n_h"]
    errors = result.facts["prune-channels"]["error"]
    assert errors["repaired"] < errors["sliced"] < 0.1
    other = prune(model, "{ratio=0.2,keep=0.9,drop_blocks=true,exclude='n_g1'}", samples)
    assert other.facts["prune-channels"]["blocks"] == ["n_t"]


def width_clock(models_: Sequence[ir.Model], feeds: object) -> list[float]:
    """Seconds that only the multiply-accumulates of layers decide, in steps of two channels."""
    return [sum(math.prod(-(-n // 2) for n in c.shape) for c in m.constants() if len(c.shape) > 1) for m in models_]


def test_latency_is_what_the_clock_says() -> None:
    model, samples = stream(), noise(64, 4, 4, 4)
    data = open_data({"x": samples}, model.inputs)
    ctx = Context(evaluate=evaluate_node, data=data, clock=width_clock)
    result = Pipeline.parse("prune-channels{target=latency,ratio=0.7,align=2,drop_blocks=false}").run(model, ctx)
    before, after = width_clock([model, result.model], {})
    assert after <= 0.7 * before * 1.05
    told = result.facts["prune-channels"]
    assert told["latency_seconds"] == [before, after]
    assert all(len(group["latency_seconds"]) == 2 for group in told["groups"])
    again = Context(evaluate=evaluate_node, data=data, clock=width_clock)
    assert Pipeline.parse("prune-channels{target=latency,ratio=0.7,align=2}").run(result.model, again).rewrites == 0
    with pytest.raises(UserError, match="needs a target that runs here"):
        prune(model, "{target=latency}", samples)
    assert (
        cli.run(
            [
                "opt",
                str(models.path("vit.legacy")),
                "-o",
                "-",
                "-p",
                "prune-channels{target=latency}",
                "--target",
                "tensorrt-rtx",
            ]
        )
        == 1
    )


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("options", ["{ratio=0}", "{ratio=1}", "{ratio=-0.2}", "{keep=0}", "{align=0}", "{rounds=0}"])
def test_share_outside_0_to_1_is_refused(options: str) -> None:
    with pytest.raises(UsageError, match="prune-channels: "):
        Pipeline.parse(f"prune-channels{options}")


def test_nothing_prunable_is_an_error_that_says_what_pins() -> None:
    text = CHAIN.replace("=> (float[N,2,4,4] y)", "=> (float[N,2,4,4] y, float[N,4,4,4] r)")
    with pytest.raises(
        UserError, match="no channel of this model can be removed: 4 channels stay: it is graph output 'r'"
    ):
        prune(ir.parse(text), "")


def test_everything_excluded_is_an_error_too() -> None:
    with pytest.raises(UserError, match="covers all 1 groups"):
        prune(ir.parse(CHAIN), "{exclude='*'}")


def test_who_computes_the_channels_can_be_excluded_by_any_of_its_names() -> None:
    model = ir.parse(CHAIN)
    model.graph.nodes[0].name, model.graph.nodes[0].origin = "first_1", ("first",)
    for name in ("first", "first_1", "a"):
        with pytest.raises(UserError, match="covers all 1 groups"):
            prune(model, f"{{exclude={name}}}")
    with pytest.raises(UsageError, match=r"exclude=nothing\* matches no node and no weight"):
        prune(model, "{exclude='nothing*'}")


def test_products_of_vectors_are_named_as_what_keeps_their_channels() -> None:
    model = ir.parse(
        "g (float[2] x) => (float[2] y) <float[4,2] a = {1,2,3,4,5,6,7,8}, float[2,4] b = {1,2,3,4,5,6,7,8}> { h = MatMul (a, x) y = MatMul (b, h) }"
    )
    with pytest.raises(UserError, match=r"channels stay: node .* \(MatMul\) needs all of it"):
        prune(model, "")


def test_more_than_can_be_removed_is_an_error_and_leaves_the_model_alone() -> None:
    model = ir.parse(CHAIN)
    before = model.fingerprint()
    with pytest.raises(UserError, match=r"75\.0% of the macs at most can be removed, 90\.0% was asked for"):
        prune(model, "{ratio=0.9,align=1}")
    assert model.fingerprint() == before


@pytest.mark.parametrize(
    ("text", "factor", "told"),
    [("{1, 0.5", 1e30, "too large to square"), ("{nan, 0.5", 1, "output 'y' of the model is NaN")],
)
def test_numbers_that_nothing_can_be_learnt_from_are_an_error(text: str, factor: float, told: str) -> None:
    model = ir.parse(CHAIN.replace("a = {1, 0.5", f"a = {text}"))
    with pytest.raises(UserError, match=told):
        prune(model, "{ratio=0.5,align=1}", np.float32(factor) * noise(8, 2, 4, 4))


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="shape"):
        prune(ir.parse(CHAIN), "{ratio=0.5}", noise(8, 3, 4, 4))


# --------------------------------------------------------------------------------------------------- dead channels


def test_model_masked_by_another_tool_becomes_small(mobilenet: ir.Model) -> None:
    """Zero filters and biases of half of all channels: the same outputs without them."""
    groups = channel_groups(mobilenet)
    gone = choose(groups, np.random.default_rng(0), 0.5)
    masked = mobilenet.clone()
    twin = channel_groups(masked)
    changed = {}
    for tensor, labels in twin.weights():
        if labels[0] is not None and (len(labels) == 4 or len(labels) == 1):
            values = np.array(tensor.values)
            values[np.isin(twin.roots[labels[0]], list(gone))] = 0
            changed[id(tensor)] = ir.Constant(tensor.name, values)
    for node in masked.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if id(tensor) in changed:
                node.inputs[index] = changed[id(tensor)]
    cleanup(masked)
    result = Pipeline.parse("eliminate-dead-channels").run(masked)
    assert result.rewrites >= len(gone)
    small, cost = channel_groups(result.model), channel_groups(mobilenet).cost_model("params")
    cost.remove(gone)
    assert small.cost_model("params").total() <= cost.total()
    x = models.digits()["x_test"][:64]
    before, after = (next(iter(Evaluator(m).run({"x": x}).values())) for m in (masked, result.model))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("between", "dies"),
    [
        ("Relu (c)", True),
        ("Tanh (c)", True),
        ("Sigmoid (c)", False),
        ("Exp (c)", False),
        ("Add (c, k)", False),
        ("Mul (c, k)", True),
    ],
)
def test_zero_survives_only_what_keeps_it(between: str, dies: bool) -> None:
    model = ir.parse(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1,1,1,1] x) => (float[1,1,1,1] y)
        <float[2,1,1,1] a = {{1, 0}}, float[1,2,1,1] b = {{3, 4}}, float[1] k = {{5}}>
        {{ c = Conv (x, a)
          r = {between}
          y = Conv (r, b) }}
    """)
    assert Pipeline.parse("eliminate-dead-channels").run(model).rewrites == dies


# ---------------------------------------------------------------------------------------------------- command line


def test_build_prunes_with_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "calib.npz"
    np.savez(data, x=models.digits()["x_calib"])
    model = str(models.path("mobilenet.legacy"))
    out = ["-o", str(tmp_path / "out"), "-t", "ort:cpu"]
    assert cli.run(["build", model, *out, "--prune", "0.3", "--data", str(data)]) == 0
    assert "multiply-accumulates (-30." in capsys.readouterr().err
    assert cli.run(["build", model, *out, "--prune", "0.3"]) == 2
    assert "--prune needs samples" in capsys.readouterr().err
    assert cli.run(["build", model, *out, "--prune", "30", "--data", str(data)]) == 2
    assert "between 0 and 1" in capsys.readouterr().err


def test_groups_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["groups", str(models.path("vit.dynamo"))]) == 0
    told = capsys.readouterr().out
    assert "blocks.0.mlp" in told
    assert "normalizes over it" in told


def test_pass_is_documented() -> None:
    assert "samples without labels" in find_pass("prune-channels").summary()
