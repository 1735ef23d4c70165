"""The sanctioned mutations: by identity, names unique, outputs keep theirs, linear in the size of the model."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from graphopt import edit, ir, verify
from graphopt.elements import Constant, Node, Variable
from graphopt.errors import VerifyError

IF = """g (bool c, float[2] x) => (float[2] y) {{
    {before}
    y = If (c) <then_branch = one () => (p) {{ {one} }}, else_branch = two () => (q) {{ {two} }}>
}}"""


def with_if(before: str = "", one: str = "p = Neg (x)", two: str = "q = Abs (x)") -> ir.Model:
    return ir.parse(IF.format(before=before, one=one, two=two))


def texts(model: ir.Model) -> list[str]:
    """Each node as `outputs = Op (inputs)`, outer before inner."""
    return [
        f"{','.join(t.name for t in n.outputs)} = {n.op} ({', '.join(t.name for t in n.inputs)})" for n in model.nodes()
    ]


def node(model: ir.Model, op: str) -> Node:
    (found,) = [n for n in model.nodes() if n.op == op]
    return found


def chain(length: int) -> ir.Model:
    """x -> Relu -> Relu -> ... -> y."""
    model = ir.parse("g (float[1] x) => (float[1] y) { y = Relu (x) }")
    last = model.graph.nodes.pop()
    value = model.graph.inputs[0]
    for index in range(length - 1):
        output = Variable(f"t{index}")
        model.graph.nodes.append(Node("Relu", f"n{index}", None, [value], [output]))
        value = output
    last.inputs[0] = value
    model.graph.nodes.append(last)
    return model


def fan(width: int) -> ir.Model:
    """One tensor read by `width` nodes, all of which a Sum adds up."""
    model = ir.parse("g (float[1] x) => (float[1] y) { t = Abs (x) y = Sum (t) }")
    total = model.graph.nodes.pop()
    shared = total.inputs[0]
    total.inputs.clear()
    for index in range(width):
        output = Variable(f"r{index}")
        model.graph.nodes.append(Node("Relu", f"n{index}", None, [shared], [output]))
        total.inputs.append(output)
    model.graph.nodes.append(total)
    return model


# --------------------------------------------------------------------------------------------------- replace_uses


def test_every_reader_reads_the_replacement():
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Abs (x) b = Relu (a) y = Add (b, a) }")
    editor = edit.Editor(model)
    editor.replace_uses(node(model, "Relu").outputs[0], node(model, "Abs").outputs[0])
    editor.erase(node(model, "Relu"))
    editor.commit()
    assert texts(model) == ["a = Abs (x)", "y = Add (a, a)"]
    assert verify.structure(model) == []


def test_a_node_that_reads_one_tensor_twice_is_rewired_twice():
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Abs (x) y = Add (a, a) }")
    editor = edit.Editor(model)
    old = node(model, "Abs").outputs[0]
    assert editor.sole_consumer(old) is None
    editor.replace_uses(old, model.graph.inputs[0])
    assert len(model.graph.inputs[0].outputs) == 3
    assert list(old.outputs) == []
    editor.erase(node(model, "Abs"))
    editor.commit()
    assert texts(model) == ["y = Add (x, x)"]
    assert verify.structure(model) == []


def test_a_use_captured_by_a_body_is_replaced():
    model = with_if("t = Exp (x)", one="u = Neg (t) p = Mul (u, t)")
    edit.Editor(model).replace_uses(node(model, "Exp").outputs[0], model.graph.inputs[1])
    assert texts(model)[-3:] == ["u = Neg (x)", "p = Mul (u, x)", "q = Abs (x)"]


def test_the_output_of_a_graph_keeps_its_name():
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Abs (x) b = Neg (a) y = Identity (a) }")
    editor = edit.Editor(model)
    old, new = model.graph.outputs[0], node(model, "Abs").outputs[0]
    assert editor.can_replace(old, new)
    editor.replace_uses(old, new)
    editor.erase(node(model, "Identity"))
    editor.commit()
    assert texts(model) == ["y = Abs (x)", "b = Neg (y)"]
    assert verify.structure(model) == []


def test_the_output_of_a_body_keeps_its_name_too():
    model = with_if(one="u = Neg (x) p = Identity (u)")
    editor = edit.Editor(model)
    identity = node(model, "Identity")
    assert editor.can_replace(identity.outputs[0], identity.inputs[0])
    editor.replace_uses(identity.outputs[0], identity.inputs[0])
    editor.erase(identity)
    editor.commit()
    assert "p = Neg (x)" in texts(model)
    assert verify.structure(model) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("g (float[2] x) => (float[2] y) { y = Identity (x) }", "an input has a name to keep"),
        ("g (float[2] x) => (float[2] z, float[2] y) { z = Abs (x) y = Identity (z) }", "an output has a name to keep"),
        ("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Identity (w) }", "so has an initializer"),
    ],
)
def test_an_output_is_not_replaced_by_a_value_that_has_a_name_to_keep(text, why):
    model = ir.parse(text)
    identity = node(model, "Identity")
    assert not edit.Editor(model).can_replace(identity.outputs[0], identity.inputs[0]), why


def test_the_output_of_a_body_is_not_replaced_by_a_value_from_outside():
    model = with_if("t = Abs (x)", one="p = Identity (t)", two="q = Neg (x)")
    identity = node(model, "Identity")
    assert not edit.Editor(model).can_replace(identity.outputs[0], identity.inputs[0])


def test_what_was_known_of_the_type_passes_to_the_tensor_that_stays():
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Abs (x) b = Relu (a) y = Neg (b) }")
    a, b = node(model, "Abs").outputs[0], node(model, "Relu").outputs[0]
    b.dtype, b.shape = np.dtype("float32"), (2,)
    edit.Editor(model).replace_uses(b, a)
    assert (a.dtype, a.shape) == (np.dtype("float32"), (2,))


def test_a_tensor_replaced_by_itself_keeps_its_readers():
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Abs (x) y = Neg (a) }")
    tensor = node(model, "Abs").outputs[0]
    edit.Editor(model).replace_uses(tensor, tensor)
    assert verify.structure(model) == []
    assert list(tensor.outputs) == [node(model, "Neg")]


# ---------------------------------------------------------------------------------------------------------- erase


def test_of_two_equal_nodes_the_right_one_is_erased():
    model = ir.parse("g (float[2] x) => (float[2] y) { [n] a = Abs (x) [n] b = Abs (x) y = Add (a, a) }")
    first, second = model.graph.nodes[:2]
    editor = edit.Editor(model)
    editor.erase(second)
    assert (editor.is_erased(first), editor.is_erased(second)) == (False, True)
    editor.commit()
    assert model.graph.nodes[0] is first
    assert len(model.graph.nodes) == 2
    assert verify.structure(model) == []


def test_erasing_a_node_frees_what_its_bodies_capture():
    model = with_if("t = Abs (x)", one="p = Neg (t)", two="q = Relu (t)")
    editor = edit.Editor(model)
    t = model.graph.nodes[0].outputs[0]
    inside = node(model, "Neg")
    editor.replace_uses(model.graph.outputs[0], t)
    editor.erase(node(model, "If"))
    assert editor.is_erased(inside)
    editor.commit()
    assert texts(model) == ["y = Abs (x)"]
    assert list(t.outputs) == []
    assert verify.structure(model) == []


# --------------------------------------------------------------------------------------------------------- insert


def inserted(editor: edit.Editor, how: str, anchor: Node, name: str) -> Node:
    return getattr(editor, f"insert_{how}")(anchor, Node("Abs", name, None, [anchor.inputs[0]], [Variable(name)]))


def test_nodes_are_inserted_beside_their_anchor_in_the_order_of_the_calls():
    model = ir.parse("g (float[1] x) => (float[1] y) { [first] t = Relu (x) [last] y = Relu (t) }")
    editor = edit.Editor(model)
    last = model.graph.nodes[1]
    a = inserted(editor, "before", last, "a")
    inserted(editor, "before", last, "b")
    c = inserted(editor, "after", last, "c")
    inserted(editor, "after", last, "d")
    inserted(editor, "before", a, "before_a")
    inserted(editor, "after", a, "after_a")
    inserted(editor, "before", c, "before_c")
    inserted(editor, "after", c, "after_c")
    assert [n.name for n in model.graph.nodes] == ["first", "last"]
    editor.commit()
    names = ["first", "before_a", "a", "after_a", "b", "last", "before_c", "c", "after_c", "d"]
    assert sorted(n.name for n in model.graph.nodes) == sorted(names)
    order = {n.name: i for i, n in enumerate(model.graph.nodes)}
    assert order["first"] < order["before_a"] < order["a"] < order["after_a"] < order["b"] < order["last"]
    assert order["last"] < order["before_c"] < order["c"] < order["d"]
    assert order["c"] < order["after_c"]


def test_an_editor_works_on_after_a_commit():
    model = ir.parse("g (float[1] x) => (float[1] y) { [n] y = Relu (x) }")
    editor = edit.Editor(model)
    a = inserted(editor, "before", model.graph.nodes[0], "a")
    editor.commit()
    inserted(editor, "before", a, "b")
    inserted(editor, "after", a, "c")
    editor.erase(a)
    editor.commit()
    assert [n.name for n in model.graph.nodes] == ["b", "c", "n"]


def test_a_node_inserted_around_an_erased_one_takes_its_place():
    model = ir.parse("g (float[1] x) => (float[1] y) { [n] t = Relu (x) [m] y = Relu (t) }")
    editor = edit.Editor(model)
    n = model.graph.nodes[0]
    new = editor.insert_after(n, Node("Abs", "new", None, [n.inputs[0]], [editor.variable("v", n.outputs[0])]))
    dropped = inserted(editor, "after", n, "dropped")
    editor.erase(dropped)
    editor.replace_uses(n.outputs[0], new.outputs[0])
    editor.erase(n)
    editor.commit()
    assert texts(model) == ["v = Abs (x)", "y = Relu (v)"]
    assert verify.structure(model) == []


def test_a_node_lands_in_the_graph_of_its_anchor_and_knows_what_it_stands_for():
    model = with_if(one="[inner] p = Neg (x)")
    editor = edit.Editor(model)
    anchor = node(model, "Neg")
    other = node(model, "Abs")
    body = editor.graph_of(anchor)
    new = editor.insert_before(
        anchor, Node("Relu", "inner", None, [anchor.inputs[0]], [editor.variable("r")]), (anchor, other)
    )
    editor.commit()
    assert body.nodes == [new, anchor]
    assert new.name == "inner_1"
    assert new.origin == ("inner", "q")
    assert editor.graph_of(new) is body


# ------------------------------------------------------------------------------------------------------ questions


def test_the_one_node_that_reads_a_value_is_its_sole_consumer():
    model = ir.parse("g (float[2] x) => (float[2] y) { a = Abs (x) b = Neg (a) c = Exp (b) y = Add (b, c) }")
    editor = edit.Editor(model)
    assert editor.sole_consumer(node(model, "Abs").outputs[0]) is node(model, "Neg")
    assert editor.sole_consumer(node(model, "Neg").outputs[0]) is None


def test_a_use_inside_a_body_counts_as_a_consumer():
    model = with_if("t = Exp (x) u = Neg (t)", one="p = Mul (t, u)")
    editor = edit.Editor(model)
    assert editor.sole_consumer(node(model, "Exp").outputs[0]) is None  # Neg reads it, and Mul in the body
    assert editor.sole_consumer(node(model, "Neg").outputs[0]) is node(model, "Mul")


def test_a_graph_output_has_no_sole_consumer():
    model = ir.parse("g (float[2] x) => (float[2] a, float[2] y) { a = Abs (x) y = Neg (a) }")
    assert edit.Editor(model).sole_consumer(model.graph.outputs[0]) is None


def test_an_overridable_default_is_not_fixed_but_in_ir_3():
    for ir_version, fixed in ((3, True), (4, False)):
        proto = ir.parse("g (float[1] x, float[1] w) => (float[1] y) { y = Add (x, w) }").to_proto()
        proto.ir_version = ir_version
        proto.graph.initializer.add(name="w", data_type=1, dims=[1], float_data=[1])
        model = ir.from_proto(proto)
        assert edit.Editor(model).is_fixed(model.constants()[0]) is fixed
        assert model.is_fixed(model.constants()[0]) is fixed


def test_captures_are_what_a_body_reads_from_outside_however_deep():
    model = ir.parse("""g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
        t = Abs (x)
        y = If (c) <
            then_branch = one () => (p) <float[2] v = {3, 4}> {
                m = Mul (v, w)
                p = If (c) <then_branch = deep () => (d) { d = Add (m, t) }, else_branch = flat () => (e) { e = Identity (v) }>
            },
            else_branch = two () => (q) { q = Neg (x) }>
    }""")
    one, two = (model.graph.nodes[1].attrs[f"{name}_branch"] for name in ("then", "else"))
    assert {t.name for t in edit.captures(one).values()} == {"c", "w", "t"}
    assert {t.name for t in edit.captures(two).values()} == {"x"}
    assert {t.name for t in edit.reads(model.graph.nodes[1])} == {"c", "w", "t", "x"}


# ----------------------------------------------------------------------------------------------------------- sort


def shuffled(text: str, order: list[int]) -> ir.Model:
    model = ir.parse(text)
    model.graph.nodes = [model.graph.nodes[i] for i in order]
    return model


FIVE = "g (float[1] x) => (float[1] y) { a = Abs (x) b = Neg (x) c = Exp (a) d = Log (b) y = Add (c, d) }"


def test_a_sorted_graph_is_left_as_it_is():
    model = shuffled(FIVE, [1, 0, 3, 2, 4])
    before = list(model.graph.nodes)
    assert edit.sort(model.graph) == []
    assert model.graph.nodes == before


def test_sorting_keeps_the_order_that_the_data_does_not_decide():
    model = shuffled(FIVE, [4, 3, 2, 1, 0])
    assert edit.sort(model.graph) == []
    assert [n.op for n in model.graph.nodes] == ["Neg", "Log", "Abs", "Exp", "Add"]
    assert verify.structure(model) == []


def test_a_node_is_sorted_behind_what_its_bodies_capture():
    model = with_if("t = Exp (x)", one="p = Neg (t)")
    model.graph.nodes.reverse()
    assert edit.sort(model.graph) == []
    assert [n.op for n in model.graph.nodes] == ["Exp", "If"]


def cyclic() -> ir.Model:
    model = ir.parse("g (float[1] x) => (float[1] y) { a = Abs (x) b = Add (a, x) c = Neg (b) y = Exp (c) }")
    node(model, "Add").inputs[1] = node(model, "Neg").outputs[0]
    return model


def test_a_cycle_is_returned_without_the_nodes_behind_it():
    model = cyclic()
    before = list(model.graph.nodes)
    assert {n.op for n in edit.sort(model.graph)} == {"Add", "Neg"}
    assert model.graph.nodes == before


def test_a_node_whose_body_reads_its_own_result_is_a_cycle():
    model = with_if()
    node(model, "Neg").inputs[0] = model.graph.outputs[0]
    assert [n.op for n in edit.sort(model.graph)] == ["If"]


def test_cleaning_up_after_a_pass_that_made_a_cycle_says_so_and_deletes_nothing():
    model = cyclic()
    with pytest.raises(VerifyError, match=r"graph 'g' has a cycle through '' \(.*Add"):
        edit.cleanup(model)
    assert len(model.graph.nodes) == 4


# ---------------------------------------------------------------------------------------------------- remove_dead


def test_dead_nodes_and_initializers_go_and_inputs_stay():
    model = ir.parse("""g (float[1] x, float[1] unused) => (float[1] y) <float[1] w = {1}, float[1] v = {2}> {
        y = Relu (x) d = Add (x, w) e = Neg (d)
    }""")
    assert edit.remove_dead(model) == 4
    assert texts(model) == ["y = Relu (x)"]
    assert [t.name for t in model.graph.inputs] == ["x", "unused"]
    assert model.constants() == []
    assert len(model.graph.inputs[0].outputs) == 1
    assert verify.structure(model) == []
    assert edit.remove_dead(model) == 0


def test_what_a_live_body_captures_is_live():
    model = with_if("t = Exp (x)", one="p = Neg (t)")
    assert edit.remove_dead(model) == 0


def test_a_dead_node_takes_its_bodies_and_what_only_they_capture_with_it():
    model = ir.parse("""g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
        t = Exp (x)
        dead = If (c) <then_branch = one () => (p) { p = Mul (t, w) }, else_branch = two () => (q) { q = Neg (t) }>
        y = Relu (x)
    }""")
    assert edit.remove_dead(model) == 3
    assert texts(model) == ["y = Relu (x)"]
    assert [len(t.outputs) for t in model.graph.inputs] == [0, 1]
    assert verify.structure(model) == []


def test_a_dead_node_inside_a_live_body_goes():
    model = with_if(one="dead = Exp (x) p = Neg (x)")
    assert edit.remove_dead(model) == 1
    assert "Exp" not in {n.op for n in model.nodes()}
    assert verify.structure(model) == []


def test_a_node_with_one_live_result_of_two_stays():
    model = ir.parse("g (float[4] x) => (float[2] y) { y, rest = Split <num_outputs = 2> (x) }")
    assert edit.remove_dead(model) == 0


def test_a_default_of_an_input_stays_although_nothing_reads_it():
    proto = ir.parse("g (float[1] x, float[1] w) => (float[1] y) { y = Relu (x) }").to_proto()
    proto.graph.initializer.add(name="w", data_type=1, dims=[1], float_data=[1])
    model = ir.from_proto(proto)
    assert edit.remove_dead(model) == 0
    assert [c.name for c in model.graph.initializers] == ["w"]


# -------------------------------------------------------------------------------------------------------- growth


def test_a_chain_longer_than_the_stack_is_deep_meets_no_recursion_limit():
    model = chain(length := 10 * sys.getrecursionlimit())
    model.graph.nodes.reverse()
    edit.cleanup(model)
    assert verify.structure(model) == []
    copy = ir.loads(ir.saves(model.clone()))
    verify.cycles(copy)
    verify.operators(copy)
    assert len(copy.graph.nodes) == length
    model.graph.outputs[0] = model.graph.inputs[0]
    assert edit.remove_dead(model) == length


def test_one_tensor_with_many_readers_is_rewired_and_freed_in_one_sweep():
    model = fan(20_000)
    editor = edit.Editor(model)
    shared = node(model, "Abs").outputs[0]
    editor.replace_uses(shared, model.graph.inputs[0])
    for consumer in model.graph.nodes[1:100]:
        editor.insert_before(consumer, Node("Neg", "neg", None, [consumer.inputs[0]], [editor.variable("v")]))
    editor.commit()
    assert verify.structure(model) == []
    assert edit.remove_dead(model) == 100
    model.graph.outputs[0] = model.graph.inputs[0]
    assert edit.remove_dead(model) == 20_001
    assert list(model.graph.inputs[0].outputs) == []


def test_searching_the_readers_of_a_tensor_grows_with_their_number_and_not_its_square(monkeypatch):
    """Counts what is compared, so that no clock is needed."""
    looked: list[int] = []

    class Counting(list):
        def __iter__(self):
            looked.append(len(self))
            return super().__iter__()

    def reads_of_readers(width: int) -> int:
        model = fan(width)
        shared = node(model, "Abs").outputs[0]
        object.__setattr__(shared, "outputs", Counting(shared.outputs))
        looked.clear()
        assert verify.structure(model) == []
        edit.sort(model.graph)
        edit.remove_dead(model)
        return sum(looked)

    assert reads_of_readers(2000) <= 10 * 2000


def test_new_tensors_take_fresh_names():
    model = ir.parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    editor = edit.Editor(model)
    like = editor.variable("x", model.graph.inputs[0])
    assert (like.name, like.dtype, like.shape) == ("x_1", np.dtype("float32"), (2,))
    constant = editor.constant("y", np.zeros(2))
    assert isinstance(constant, Constant)
    assert constant.name == "y_1"
    assert editor.variable("free").shape is None
