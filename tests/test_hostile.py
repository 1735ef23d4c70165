"""Models by strangers: whatever they declare, reading and optimizing them ends, in bounded memory, with a result or a message."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import Context, Pipeline, cli, ir, verify
from graphopt.analyses import symbolic
from graphopt.commands.terminal import HarmlessFormatter, _Terminal, harmless
from graphopt.equivalence import generate_inputs
from graphopt.errors import InvalidModel, PassError, UnsupportedModel, UserError, closest
from graphopt.evaluate import evaluate_node
from graphopt.instruments import Reproducer
from graphopt.pass_base import Pass
from graphopt.wire import map_beside

ROOT = Path(__file__).resolve().parents[1]


def value(name: str, shape: tuple[int | str, ...] = (2,), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, initializers=(), inputs=None, outputs=None, functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", inputs or [value("x")], outputs or [value("y")], list(initializers))
    imports = [helper.make_opsetid("", 21), *[helper.make_opsetid("local", 1)] * bool(functions)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports, functions=list(functions))


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def optimized(proto: onnx.ModelProto, pipeline: str = "O2"):
    return Pipeline.parse(pipeline).run(ir.loads(proto.SerializeToString()), Context(evaluate=evaluate_node))


def summed(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    """`nodes`, of which the last gives `c`, and its sum added to the input."""
    return [
        *nodes,
        helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
        helper.make_node("Cast", ["r"], ["f"], to=1),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]


# ----------------------------------------------------------------------------------------------------------- bombs

node = helper.make_node
one = numpy_helper.from_array(np.ones(1, np.float32), "a")
BOMBS = {
    "ConstantOfShape": model(summed(node("ConstantOfShape", ["s"], ["c"])), [ints("s", 1 << 40)]),
    "ConstantOfShape of 2^62": model(summed(node("ConstantOfShape", ["s"], ["c"])), [ints("s", 1 << 62)]),
    "Expand": model(summed(node("Expand", ["a", "s"], ["c"])), [one, ints("s", 1 << 31, 1 << 31)]),
    "Tile": model(summed(node("Tile", ["a", "s"], ["c"])), [one, ints("s", 1 << 62)]),
    "Range": model(
        summed(node("Range", ["b", "e", "d"], ["c"])),
        [numpy_helper.from_array(np.array(n, np.int64), k) for k, n in (("b", 0), ("e", 1 << 60), ("d", 1))],
    ),
    "Pad": model(summed(node("Pad", ["a", "p"], ["c"])), [one, ints("p", 1 << 60, 1 << 60)]),
    "Resize": model(
        summed(node("Unsqueeze", ["a", "n"], ["u"]), node("Resize", ["u", "", "s"], ["c"])),
        [one, ints("n", 1, 2, 3), numpy_helper.from_array(np.array([1, 1, 1e9, 1e9], np.float32), "s")],
    ),
    "OneHot": model(
        summed(node("OneHot", ["i", "d", "v"], ["c"])),
        [ints("i", *[1] * 1000), ints("d", 1 << 40), numpy_helper.from_array(np.array([0, 1], np.float32), "v")],
    ),
    "EyeLike": model(
        summed(node("ConstantOfShape", ["s"], ["e"]), node("EyeLike", ["e"], ["c"])), [ints("s", 1 << 20, 1 << 20)]
    ),
    "a vector of dimensions": model(
        summed(
            node("ConstantOfShape", ["s"], ["v"], value=ints("", 1)),
            node("Expand", ["a", "v"], ["c"]),
        ),
        [one, ints("s", 1 << 62)],
    ),
    "channels merged with an endless axis": model(
        summed(
            node("Expand", ["w", "s"], ["e"]),
            node("Reshape", ["e", "flat"], ["c"]),
        ),
        [
            numpy_helper.from_array(np.arange(4, dtype=np.float32).reshape(1, 4, 1), "w"),
            ints("s", 1 << 31, 4, 1 << 31),
            ints("flat", -1),
        ],
    ),
    "Tile by Tile": model(
        summed(
            *(node("Tile", [f"c{i}" if i else "a", "s"], [f"c{i + 1}"]) for i in range(40)),
            node("Identity", ["c40"], ["c"]),
        ),
        [one, ints("s", 2)],
    ),
    "Concat by Concat": model(
        summed(
            *(node("Concat", [f"c{i}" if i else "a"] * 2, [f"c{i + 1}"], axis=0) for i in range(40)),
            node("Identity", ["c40"], ["c"]),
        ),
        [one],
    ),
    "products of shapes": model(
        summed(
            node("Shape", ["x"], ["c0"]),
            *(node("Mul", [f"c{i}", f"c{i}"], [f"c{i + 1}"]) for i in range(60)),
            node("Identity", ["c60"], ["c"]),
        ),
        inputs=[value("x", ("N", "M"))],
        outputs=[value("y", ("N", "M"))],
    ),
    "powers of three": model(
        summed(*(node("Mul", [f"c{i}", f"c{i}"], [f"c{i + 1}"]) for i in range(60)), node("Identity", ["c60"], ["c"])),
        [ints("c0", 3)],
    ),
    "a Loop without end": model(
        [
            node(
                "Loop",
                ["m", "", "x"],
                ["y"],
                body=helper.make_graph(
                    [node("Identity", ["c"], ["d"]), node("Add", ["v", "v"], ["w"])],
                    "body",
                    [value("i", (), TensorProto.INT64), value("c", (), TensorProto.BOOL), value("v")],
                    [value("d", (), TensorProto.BOOL), value("w")],
                ),
            )
        ],
        [numpy_helper.from_array(np.array(1 << 62, np.int64), "m")],
    ),
    "a long vector": model(
        [node("Reshape", ["x", "s"], ["r"]), node("Mul", ["r", "r"], ["y"])],
        [ints("s", -1)],
        [value("x", (1 << 20, 1 << 20), TensorProto.INT64)],
        [value("y", (1 << 40,), TensorProto.INT64)],
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_blow_up_stays_in_the_graph(name):
    result = optimized(BOMBS[name])
    assert result.model.nbytes < 4 << 20
    assert len(ir.saves(result.model)) < 4 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 << 20  # KiB, of all tests that this process ran


def test_what_one_run_computes_is_bounded():
    """1,500 values of 1 MiB each, every one within the budget."""
    nodes = [node("Expand", ["a", "s"], [f"k{i}"]) for i in range(1500)]
    proto = model(summed(*nodes, node("Sum", [f"k{i}" for i in range(1500)], ["c"])), [one, ints("s", 1 << 18)])
    result = optimized(proto, "fold-constants")
    assert any("are computed already; left to run time" in str(r) for r in result.remarks)


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A function that makes `calls` one after the other."""
    values = ["a", *(f"v{i}" for i in range(len(calls) - 1)), "b"]
    nodes = [
        node(call, [values[i]], [values[i + 1]], domain="" if call == "Relu" else "local")
        for i, call in enumerate(calls)
    ]
    return helper.make_function(
        "local", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    )


def test_functions_that_stand_for_too_many_nodes_are_refused():
    doubling = [function(f"f{i}", f"f{i + 1}", f"f{i + 1}") for i in range(40)] + [function("f40", "Relu")]
    loaded = ir.from_proto(model([node("f0", ["x"], ["y"], domain="local")], functions=doubling))
    with pytest.raises(UnsupportedModel, match=r"stand for [\d,]{15,} nodes, more than the 500,000"):
        verify.operators(loaded)


def test_functions_that_nest_too_deep_are_refused_and_a_hundred_levels_are_not():
    def chain(depth: int) -> ir.Model:
        functions = [function(f"f{i}", f"f{i + 1}") for i in range(depth - 1)] + [function(f"f{depth - 1}", "Relu")]
        return ir.from_proto(model([node("f0", ["x"], ["y"], domain="local")], functions=functions))

    verify.operators(chain(100))
    result = Pipeline.parse("inline-functions").run(chain(100))
    assert [n.op for n in result.model.nodes()] == ["Relu"]
    with pytest.raises(UnsupportedModel, match="function 'f0' calls functions 101 deep"):
        verify.operators(chain(101))


def test_two_functions_of_one_name_are_refused():
    twice = [function("f", "Relu"), function("f", "Relu", "Relu")]
    with pytest.raises(InvalidModel, match="function 'f' is defined twice; keep one"):
        ir.from_proto(model([node("f", ["x"], ["y"], domain="local")], functions=twice))


def test_too_many_nodes_are_refused_and_the_limit_is_not(monkeypatch):
    monkeypatch.setattr("graphopt.reading.MOST_NODES", 10)
    chain = [node("Relu", [f"t{i}" if i else "x"], [f"t{i + 1}"]) for i in range(11)]
    ir.from_proto(model(chain[:10], outputs=[value("t10")]))
    with pytest.raises(UnsupportedModel, match="more than 10 nodes, which is what graphopt admits"):
        ir.from_proto(model(chain, outputs=[value("t11")]))


def test_a_sparse_initializer_that_is_huge_when_dense_is_refused_when_asked_for():
    proto = model(
        [node("Gather", ["w", "i"], ["v"]), node("Add", ["x", "v"], ["y"])],
        [numpy_helper.from_array(np.array([0, 1]), "i")],
    )
    sparse = proto.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(ints("", 0))
    sparse.dims.append(1 << 32)
    loaded = ir.from_proto(proto)
    with pytest.raises(UnsupportedModel, match="does not fit into memory when dense"):
        next(c for c in loaded.constants() if c.name == "w").values  # noqa: B018


@pytest.mark.parametrize("shape", [(1 << 62,), (1 << 20, 1 << 20), (1 << 62, 1 << 62)])
def test_inputs_that_no_machine_holds_are_not_generated(shape):
    loaded = ir.from_proto(model([node("Relu", ["x"], ["y"])], inputs=[value("x", shape)], outputs=[value("y", shape)]))
    with pytest.raises(UnsupportedModel, match="is too large to generate; give a sample with --data"):
        generate_inputs(loaded.inputs)


@dataclass(frozen=True)
class Trips(Pass):
    """A pass that takes an axis for granted."""

    def run(self, model, ctx):
        return [0][1]


@pytest.mark.parametrize(
    ("declared", "error"), [((3,), InvalidModel), ((2,), PassError)], ids=["a contradiction", "a sound model"]
)
def test_a_pass_that_trips_over_a_model_blames_it_only_where_the_checker_does(declared, error):
    proto = model([node("Add", ["x", "x"], ["y"])], outputs=[value("y", declared)])
    with pytest.raises(error, match="the model contradicts itself" if error is InvalidModel else "failed .IndexError"):
        Pipeline((Trips(),)).run(ir.from_proto(proto))


def test_what_is_no_group_and_no_axis_is_left_to_the_checker():
    """Found by fuzzing: a Slice of a scalar, a fill of three numbers, more groups than channels."""
    scalar = model([node("Slice", ["x", "b", "e"], ["y"])], [ints("b", 0), ints("e", 1)], [value("x", ())])
    assert optimized(scalar, "split-slices").rewrites == 0
    three = numpy_helper.from_array(np.ones(3, np.float32))
    fill = model([node("ConstantOfShape", ["s"], ["c"], value=three), node("Add", ["x", "c"], ["y"])], [ints("s", 2)])
    assert optimized(fill, "merge-equal-channels").rewrites == 0
    weight = numpy_helper.from_array(np.ones((4, 1, 1, 1), np.float32), "w")
    grouped = model(
        [node("Conv", ["x", "w"], ["c"], group=1 << 31), node("Relu", ["c"], ["y"])],
        [weight],
        [value("x", (1, 4, 2, 2))],
        [value("y", (1, 4, 2, 2))],
    )
    assert optimized(grouped, "merge-equal-channels").rewrites == 0


# ----------------------------------------------------------------------------------------------------- expressions


def test_an_expression_stays_small_and_equal_ones_stay_equal():
    a = b = symbolic.add(symbolic.symbol("N"), symbolic.multiply(3, symbolic.symbol("M")))
    for _ in range(60):
        a, b = symbolic.multiply(a, a), symbolic.multiply(b, b)
    assert a == b
    assert len(str(a)) < 10_000
    assert isinstance(a, symbolic.Expr)
    assert not symbolic.is_nonnegative(a)
    halves = symbolic.symbol("N")
    for _ in range(1000):
        halves = symbolic.floor_divide(symbolic.add(halves, 1), 2)
    assert len(str(halves)) < 10_000


def test_a_number_beyond_int64_is_opaque():
    large = (1 << 62) + 1
    assert symbolic.add(large, -1) == 1 << 62
    assert isinstance(symbolic.add(large, large), symbolic.Expr)
    assert isinstance(symbolic.multiply(large, 2), symbolic.Expr)
    assert symbolic.multiply(large, 2) == symbolic.add(large, large)
    assert isinstance(symbolic.multiply(symbolic.symbol("N"), 1 << 64), symbolic.Expr)


# ------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("depth", [60, 1000, 50_000])
@pytest.mark.parametrize("kind", ["seq(", "optional(", "body"])
def test_text_that_nests_deep_is_refused_before_it_is_parsed(kind, depth):
    if kind == "body":
        inner = " ".join(f"y = If (c) <then_branch = g{i} () => (y) {{" for i in range(depth))
        text = f"g (bool c, float[2] x) => (float[2] y) {{ {inner} y = Neg (x) {'}>' * depth} }}"
    else:
        text = f"g ({kind * depth}float[2]{')' * depth} x) => (float[2] y) {{ y = Identity (x) }}"
    with pytest.raises(InvalidModel, match=r"brackets are open at once|nests deeper|does not parse"):
        ir.parse(text)


def test_brackets_in_strings_and_comments_are_no_nesting():
    text = f'g (float[2] x) => (float[2] y) {{ # {"(" * 200}\n y = LeakyRelu <note = "{"{" * 200}"> (x) }}'
    assert ir.parse(text).graph.nodes[0].attrs["note"] == "{" * 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\xff\xff\xff\xff\x7f",  # a graph of 2^34 bytes, of which none is there
        b"\x3a" + b"\xff" * 20,
        b"\x0b" * 10_000,  # groups in groups
        b"\x3a\x02\x0b\x0c" * 1000,
        b"\x08\x0a" + b"\x3a\x80\x80\x80\x80\x08",
        b"\xf2\xff\xff\xff\x0f\x00",
    ],
)
def test_a_protobuf_that_lies_about_lengths_is_refused(data):
    with pytest.raises(UserError):
        ir.loads(data)


def test_a_name_of_a_megabyte_costs_no_time_and_no_megabyte_of_message(tmp_path, capfd):
    name = "a" * (1 << 20)
    assert closest(name, [name + "b"]) is None
    assert closest("conv", itertools.chain(["cony"], (name for _ in range(3)))) == "cony"
    proto = model([node("Relu", [name], ["y"])])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert cli.run(["inspect", str(tmp_path / "m.onnx")]) == 1
    assert len(capfd.readouterr().err) < 5000


# -------------------------------------------------------------------------------------------------- external files


def outside(tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder, and a file beside that folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    return folder / "m.onnx", tmp_path / "secret"


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "a/../../secret", "link", "linked/secret", "file:///etc/passwd", "", ".", "a\0b"],
)
def test_external_data_outside_of_the_folder_is_refused(location, tmp_path):
    path, secret = outside(tmp_path)
    (path.parent / "link").symlink_to(secret)
    (path.parent / "linked").symlink_to(tmp_path)
    (path.parent / "a").mkdir()
    with pytest.raises(InvalidModel, match=r"refused|no regular file|cannot be read"):
        map_beside(path, location, "initializer 'w'")


def test_a_file_that_becomes_a_link_between_check_and_opening_is_not_followed(tmp_path, monkeypatch):
    path, secret = outside(tmp_path)
    data = path.parent / "m.data"
    data.write_bytes(bytes(8))
    opening = os.open

    def swap(name, *arguments, **keywords):
        if name == "m.data":
            data.unlink()
            data.symlink_to(secret)
        return opening(name, *arguments, **keywords)

    monkeypatch.setattr("graphopt.wire.os.open", swap)
    monkeypatch.setattr("graphopt.wire.os.supports_dir_fd", {swap})
    with pytest.raises(InvalidModel, match=r"external data 'm.data' cannot be read"):
        map_beside(path, "m.data", "initializer 'w'")


def test_data_in_a_folder_and_behind_a_link_within_is_read(tmp_path):
    path, _ = outside(tmp_path)
    (path.parent / "sub").mkdir()
    (path.parent / "sub/w").write_bytes(b"12345678")
    (path.parent / "w").symlink_to("sub/w")
    assert bytes(map_beside(path, "sub/w", "w")) == bytes(map_beside(path, "w", "w")) == b"12345678"


def external(path: Path, count: int, elements: int) -> None:
    """A model of `count` initializers that all claim the same bytes of one file."""
    proto = model([node("Sum", ["x", *(f"w{i}" for i in range(count))], ["y"])], inputs=[value("x", (elements,))])
    for index in range(count):
        tensor = proto.graph.initializer.add(name=f"w{index}", data_type=1, dims=[elements], data_location=1)
        tensor.external_data.add(key="location", value="w.data")
    path.write_bytes(proto.SerializeToString())
    (path.parent / "w.data").write_bytes(bytes(4 * elements))


def test_bytes_of_a_file_may_be_shared_but_not_without_end(tmp_path, monkeypatch):
    external(tmp_path / "m.onnx", 16, 100)
    assert ir.load(tmp_path / "m.onnx").nbytes == 16 * 400
    external(tmp_path / "m.onnx", 17, 100)
    assert ir.load(tmp_path / "m.onnx").nbytes == 17 * 400  # small: nobody counts
    monkeypatch.setattr("graphopt.reading._FREE_CLAIMS", 0)
    with pytest.raises(InvalidModel, match=r"claim more than 16 times the 400 bytes of 'w.data'"):
        ir.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("command", ["run", "inspect", "opt", "build", "compare", "bench"])
def test_no_command_hands_a_model_to_a_runtime_that_reads_elsewhere(command, tmp_path, capfd, monkeypatch):
    path, _ = outside(tmp_path)
    external(path, 1, 2)
    path.write_bytes(path.read_bytes().replace(b"w.data", b"../xyz"))
    (tmp_path / "xyz").write_bytes(bytes(8))
    monkeypatch.chdir(tmp_path)
    more = {"opt": ["-o", "o.onnx"], "build": ["-o", "out", "-t", "ort:cpu"], "compare": [str(path)]}.get(command, [])
    assert cli.run([command, str(path), *more]) == 1
    assert "'../xyz', outside the model's folder; refused" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------- terminal

EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202etxt.exe\x7f\0"


def test_control_characters_are_shown_not_obeyed():
    told = harmless(f"a\tb\n{EVIL}")
    assert told == "a\tb\n\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202etxt.exe\\x7f\\x00"
    assert harmless("größe 尺寸 ✓") == "größe 尺寸 ✓"
    stream = io.StringIO()
    terminal = _Terminal(file=stream, force_terminal=True, width=200)
    from rich.table import Table

    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    terminal.print(table)
    terminal.print(EVIL, markup=False)
    assert "\x1b[31mred" not in stream.getvalue()
    assert "\x1b]" not in stream.getvalue()
    assert not {"\x07", "\x9b", "\u202e", "\0"} & set(stream.getvalue())
    import logging

    record = logging.LogRecord("n", logging.WARNING, "f", 1, "node %s", (EVIL,), None)
    assert "\x1b" not in HarmlessFormatter().format(record)


@pytest.mark.parametrize("command", ["inspect", "explain", "opt", "build", "run", "groups"])
def test_names_in_a_model_cannot_drive_the_terminal(command, tmp_path, capfd, monkeypatch):
    loaded = ir.from_proto(
        model(
            [node("Relu", [EVIL], [f"t{EVIL}"], name=f"n{EVIL}"), node("Abs", [f"t{EVIL}"], [f"y{EVIL}"], name=EVIL)],
            inputs=[value(EVIL)],
            outputs=[value(f"y{EVIL}")],
        )
    )
    monkeypatch.chdir(tmp_path)
    ir.save(loaded, "m.onnx")
    more = {
        "explain": [f"n{EVIL}"],
        "opt": ["-o", "o.onnx", "--remarks", "--time"],
        "build": ["-o", "o", "-t", "ort:cpu"],
    }
    cli.run([command, "m.onnx", *more.get(command, [])])
    told = "".join(capfd.readouterr())
    assert told
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\0"} & set(told)


@pytest.mark.parametrize("field", ["op_type", "domain"])
def test_operators_and_domains_hold_no_control_characters(field):
    proto = model([node("Relu", ["x"], ["y"])])
    setattr(proto.graph.node[0], field, "a\nerror: b")
    with pytest.raises(InvalidModel, match="cannot be the name of an operator or domain"):
        ir.from_proto(proto)


# ------------------------------------------------------------------------------------------------------------ code


def sources() -> list[Path]:
    return [p for room in ("graphopt", "passes", "backends", "models") for p in sorted((ROOT / room).rglob("*.py"))]


BANNED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "multiprocessing"}


def test_nothing_is_pickled_evaluated_or_unpickled() -> None:
    """Neither by name nor by a function that pickles for its caller."""
    for path in sources():
        for found in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(found, 'lineno', 0)}"
            if isinstance(found, ast.Import):
                assert not BANNED & {a.name.partition(".")[0] for a in found.names}, where
            if isinstance(found, ast.ImportFrom):
                assert str(found.module).partition(".")[0] not in BANNED, where
            if isinstance(found, ast.Call):
                name = ast.unparse(found.func)
                assert name not in ("eval", "exec", "compile", "__import__"), where
                assert not name.endswith(("ProcessPoolExecutor", "torch.load", "yaml.load")), where
                assert ast.unparse(found).count("allow_pickle=True") == 0, where


def test_a_model_cannot_name_code_to_run(tmp_path, monkeypatch, capfd):
    """Passes, plug-ins and module:callable come from the command line; what a model's metadata says is never looked at."""
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\ndef data(): return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    proto = model([node("Relu", ["x"], ["y"], name="evil:data", domain="")])
    for key in ("graphopt", "pipeline", "passes", "data", "plugin", "custom_op_library", "graphopt.passes"):
        proto.metadata_props.add(key=key, value="evil:data")
        proto.graph.metadata_props.add(key=key, value="evil:data")
        proto.graph.node[0].metadata_props.add(key=key, value="evil:data")
    proto.producer_name = "evil:data"
    ir.save(ir.from_proto(proto), "m.onnx")
    for arguments in (
        ["inspect", "m.onnx"],
        ["opt", "m.onnx", "-o", "o.onnx"],
        ["build", "m.onnx", "-o", "o", "-t", "ort:cpu"],
    ):
        assert cli.run(arguments) == 0, capfd.readouterr().err
    assert cli.run(["run", "m.onnx"]) == 0
    assert not (tmp_path / "ran").exists()


def test_a_reproducer_names_passes_but_no_code(tmp_path, monkeypatch, capfd):
    """Its pipeline comes from the file, and an option of a pass may name a function of the user's."""
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()\ndef rank(*_): return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    proto = model([node("Relu", ["x"], ["y"])])
    facts = {"pipeline": "prune-channels{importance='evil:rank'}", "error": "KeyError: 1"}
    proto.metadata_props.add(key=Reproducer.KEY, value=json.dumps(facts))
    ir.save(ir.from_proto(proto), "m.onnx")
    assert cli.run(["reproduce", "m.onnx"]) == 1
    assert "wants the code 'evil:rank' to run, which only a command line may name" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_absurd_model_ends_the_whole_command_line_with_a_message(tmp_path):
    """End to end, in the child that build makes: a Loop of 2^62 rounds, which the proof of the numbers runs."""
    (tmp_path / "m.onnx").write_bytes(BOMBS["a Loop without end"].SerializeToString())
    command = [
        sys.executable,
        "-m",
        "graphopt.cli",
        "build",
        "m.onnx",
        "-o",
        "out",
        "-t",
        "ort:cpu",
        "--step-limit",
        "10",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "error: onnxruntime: running the model: no progress for 10 s, stopped" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]
