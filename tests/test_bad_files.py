"""Bad input: one to three lines that say what, where and what to do; nothing but a `UserError` escapes load and save."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt import ir, verify
from graphopt.elements import Constant
from graphopt.errors import InvalidModel, OutputError, UnsupportedModel, UserError

ROOT = Path(__file__).parents[1]
REAL = ROOT / "models/concat.dynamo.onnx"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde"


def refused(path: Path, match: str | None = None, error: type[UserError] = InvalidModel) -> str:
    """Load `path`, which must be refused; returns the message."""
    with pytest.raises(error, match=match) as caught:
        ir.load(path)
    return readable(str(caught.value))


def readable(message: str) -> str:
    assert 1 <= len(message.splitlines()) <= 3
    assert len(message) < 1000
    assert message[-1] not in ".\n"
    return message


def proto_of(
    text: str = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { [n] y = Add (x, w) }",
) -> onnx.ModelProto:
    return ir.parse(text).to_proto()


def refused_proto(proto: onnx.ModelProto, match: str, error: type[UserError] = InvalidModel) -> None:
    with pytest.raises(error, match=match) as caught:
        ir.loads(proto.SerializeToString())
    readable(str(caught.value))


# ------------------------------------------------------------------------------------------------------ not a model


def zip_bytes(tmp_path: Path) -> bytes:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file:
        file.writestr("model.onnx", REAL.read_bytes())
    return (tmp_path / "z.zip").read_bytes()


@pytest.mark.parametrize("kind", ["text", "png", "zip", "zeros", "json", *range(20)])
def test_a_file_that_is_not_onnx_is_refused(kind, tmp_path):
    data = {
        "text": b"this is not a model\n" * 10,
        "png": PNG,
        "zip": zip_bytes(tmp_path),
        "zeros": bytes(100),
        "json": b'{"graph": {}}',
    }.get(kind) or random.Random(kind).randbytes(1000)
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    assert "bad.onnx' " in refused(path, r"not an ONNX model|not one, or truncated")
    with pytest.raises(InvalidModel, match=r"^<bytes> "):
        ir.loads(data)


def test_another_protobuf_message_is_refused(tmp_path):
    path = tmp_path / "tensor.pb"
    path.write_bytes(helper.make_tensor("t", TensorProto.FLOAT, [3], [1, 2, 3]).SerializeToString())
    refused(path)


def test_a_truncated_model_is_refused_wherever_it_ends(tmp_path):
    data, path, whole = REAL.read_bytes(), tmp_path / "cut.onnx", []
    messages: list[str] = []
    for cut in [*range(1, len(data), len(data) // 50), len(data) - 1]:
        path.write_bytes(data[:cut])
        try:
            whole.append(ir.load(path))
        except UserError as error:
            messages.append(readable(str(error)))
    assert whole == []
    assert len(messages) > 50
    assert [m for m in messages if "cut.onnx" not in m or not re.search("truncated|damaged", m)] == []


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "empty.onnx").touch()
    assert refused(tmp_path / "empty.onnx").endswith("is empty (0 bytes); export or copy the model again")
    assert refused(tmp_path).endswith("is a folder; name the .onnx file in it")
    assert refused(tmp_path / "missing.onnx").endswith("No such file or directory; check the path")
    assert refused(tmp_path / "empty.onnx/below").endswith("Not a directory; check the path")
    assert refused(Path("nul\0.onnx")).endswith("check the path")
    assert refused(tmp_path / ("n" * 300)).endswith("File name too long; check the path")
    (tmp_path / "loop.onnx").symlink_to(tmp_path / "loop.onnx")
    refused(tmp_path / "loop.onnx", "cannot read")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe")
    with pytest.raises(InvalidModel, match=r"<bytes> is empty \(0 bytes\)"):
        ir.loads(b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(REAL.read_bytes())
    path.chmod(0)
    assert refused(path).endswith("Permission denied; check the path")


def test_text_that_does_not_parse_is_told_with_line_and_column(tmp_path):
    path = tmp_path / "bad.onnxtxt"
    path.write_text("g (float[2] x) => (float[2] y) {\n  y = Relu x\n}")
    assert re.search(r"bad.onnxtxt' does not parse: .*line: 2 column: \d+", refused(path))
    path.write_bytes(b"g (\xff)")
    assert refused(path).endswith("is not text; a protobuf model is named .onnx")
    with pytest.raises(InvalidModel, match="the text does not parse: "):
        ir.parse("")


# ----------------------------------------------------------------------------------------------- rules of the format


def test_a_name_that_is_defined_twice_is_refused():
    proto = proto_of("g (float[2] x) => (float[2] y) { [one] t = Neg (x) [two] t2 = Abs (x) [three] y = Add (t, t2) }")
    proto.graph.node[1].output[0] = "t"
    refused_proto(proto, r"graph 'g': 't' is defined twice, the second time by node 'two' \(Abs\); rename one")
    proto = proto_of()
    proto.graph.initializer.append(proto.graph.initializer[0])
    refused_proto(proto, "initializer 'w' is defined twice; every value needs a name of its own")
    proto = proto_of()
    proto.graph.input.append(proto.graph.input[0])
    refused_proto(proto, "input 'x' is defined twice")
    proto = proto_of()
    proto.graph.node[0].output[0] = "x"
    refused_proto(proto, r"'x' is defined twice, the second time by node 'n' \(Add\)")
    proto = proto_of("g (float[2] x) => (float[2] y) { [n] y = LeakyRelu <alpha = 0.5> (x) }")
    proto.graph.node[0].attribute.append(proto.graph.node[0].attribute[0])
    refused_proto(proto, r"node 'n' \(LeakyRelu\): attribute 'alpha' is given twice; keep one")


def test_a_name_that_nothing_defines_is_told_with_the_nearest():
    proto = proto_of("g (float[2] hidden) => (float[2] y) { [n] y = Relu (hidden) }")
    proto.graph.node[0].input[0] = "hiden"
    refused_proto(proto, r"node 'n' \(Relu\) reads 'hiden', which nothing defines; did you mean 'hidden'\?$")
    proto.graph.node[0].input[0] = "qqq"
    refused_proto(proto, "reads 'qqq', which nothing defines$")
    proto = proto_of()
    proto.graph.output[0].name = "z"
    refused_proto(proto, "output 'z' is produced by no node; export the model again")


def test_a_body_that_reads_what_nothing_defines_is_refused():
    proto = proto_of(
        "g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = one () => (p) { p = Neg (x) }, else_branch = two () => (q) { q = Abs (x) }> }"
    )
    proto.graph.node[0].attribute[0].g.node[0].input[0] = "xx"
    refused_proto(proto, r"graph 'one': node '' \(Neg\) reads 'xx', which nothing defines")


def test_a_cycle_loads_and_is_told_by_the_verifier():
    proto = proto_of("g (float[2] x) => (float[2] y) { [a] t = Add (x, x) [b] y = Neg (t) }")
    proto.graph.node[0].input[1] = "y"
    with pytest.raises(
        InvalidModel, match=r"graph 'g' has a cycle through '.' \(.*\), '.' \(.*\); ONNX graphs are acyclic"
    ):
        verify.cycles(ir.from_proto(proto))


@pytest.mark.parametrize(
    ("opset", "ir_version", "message"),
    [
        (onnx.defs.onnx_opset_version() + 1, 10, r"uses opset \d+; onnx .* knows 1 to \d+: upgrade onnx, or convert"),
        (0, 10, "uses opset 0; onnx"),
        (-3, 10, "uses opset -3; onnx"),
        (21, onnx.IR_VERSION + 1, r"has IR version \d+; graphopt reads 3 to \d+: upgrade onnx"),
        (21, 2, "has IR version 2; graphopt reads 3 to .*: export the model again"),
        (21, 0, "has IR version 0; graphopt reads 3"),
        (21, -1, "has IR version -1; graphopt reads 3"),
    ],
)
def test_a_version_that_onnx_does_not_know_is_refused(opset, ir_version, message):
    proto = proto_of()
    proto.ir_version = ir_version
    proto.opset_import[0].version = opset
    refused_proto(proto, message, UnsupportedModel)


def test_the_model_is_named_in_quotes_once(tmp_path):
    proto = proto_of()
    proto.ir_version = 99
    with pytest.raises(UnsupportedModel, match=r"^the model has IR version 99"):
        ir.from_proto(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert refused(tmp_path / "m.onnx", error=UnsupportedModel).startswith(f"'{tmp_path}/m.onnx' has IR version 99")


def test_no_opset_import_no_graph_and_two_versions_of_a_domain_are_refused():
    proto = proto_of()
    proto.opset_import.add(domain="ai.onnx", version=7)
    refused_proto(proto, "imports domain 'ai.onnx' at two versions; keep one")
    del proto.opset_import[:]
    refused_proto(proto, "holds no graph or no opset import: not an ONNX model, or truncated")
    proto = proto_of()
    proto.ClearField("graph")
    refused_proto(proto, "holds no graph or no opset import")


def test_an_attribute_of_unknown_type_is_refused():
    proto = proto_of("g (float[2] x) => (float[2] y) { [n] y = LeakyRelu <alpha = 0.5> (x) }")
    proto.graph.node[0].attribute[0].ClearField("type")
    refused_proto(proto, r"node 'n' \(LeakyRelu\): attribute 'alpha' has no type that onnx .* knows; upgrade onnx")
    proto.graph.node[0].attribute[0].MergeFromString(b"\xa0\x01\x63")  # type = 99
    refused_proto(proto, "attribute 'alpha' has no type that onnx")


@pytest.mark.parametrize("kind", [0, 99])
def test_an_unknown_element_type_is_refused(kind):
    proto = proto_of()
    proto.graph.initializer[0].data_type = kind
    refused_proto(
        proto, rf"initializer 'w': element type {kind} is not known to onnx .*; upgrade onnx", UnsupportedModel
    )
    proto = proto_of()
    proto.graph.input[0].type.tensor_type.elem_type = 99
    refused_proto(proto, "value 'x': element type 99 is not known to onnx", UnsupportedModel)


@pytest.mark.parametrize(
    "field", ["node name", "operand", "initializer", "input", "dimension", "attribute", "domain", "graph", "output"]
)
def test_a_name_that_is_no_utf8_is_refused(field):
    proto = proto_of("g (float[N] x) => (float[N] y) <float[2] w = {1, 2}> { [n] y = LeakyRelu <alpha = 0.5> (x) }")
    mark = "MARK"
    match field:
        case "node name":
            proto.graph.node[0].name = mark
        case "operand":
            proto.graph.node[0].input[0] = mark
        case "initializer":
            proto.graph.initializer[0].name = mark
        case "input":
            proto.graph.input[0].name = mark
        case "dimension":
            proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = mark
        case "attribute":
            proto.graph.node[0].attribute[0].name = mark
        case "domain":
            proto.opset_import[0].domain = mark
        case "graph":
            proto.graph.name = mark
        case "output":
            proto.graph.output[0].name = mark
    with pytest.raises(InvalidModel, match=r"b'M\\xffRK' is not UTF-8; the file is damaged"):
        ir.loads(proto.SerializeToString().replace(b"MARK", b"M\xffRK"))


def test_an_operator_in_a_function_that_is_no_utf8_is_refused():
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]> g (float[1] x) => (float[1] y) { y = local.f (x) }
        <domain: "local", opset_import: ["" : 21]> f (a) => (b) { b = MARK (a) }"""
    with pytest.raises(InvalidModel, match=r"function 'f', a node: the name b'M\\xffRK' is not UTF-8"):
        ir.loads(ir.saves(ir.parse(text)).replace(b"MARK", b"M\xffRK"))


# ------------------------------------------------------------------------------------------------------- weights


def with_tensor(**fields) -> onnx.ModelProto:
    proto = proto_of()
    tensor = proto.graph.initializer[0]
    tensor.Clear()
    tensor.MergeFrom(TensorProto(**{"name": "w", "data_type": TensorProto.FLOAT} | fields))
    return proto


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dims": [2], "raw_data": bytes(7)},
            r"initializer 'w' holds 7 bytes, but float32\[2\] takes 8; the file is damaged",
        ),
        ({"dims": [2], "raw_data": bytes(9)}, "holds 9 bytes"),
        ({"dims": [2], "raw_data": b""}, "holds 0 bytes"),
        ({"dims": [3], "raw_data": bytes(2), "data_type": TensorProto.INT4, "name": "w"}, None),
        ({"dims": [3], "raw_data": bytes(3), "data_type": TensorProto.INT4}, r"holds 3 bytes, but int4\[3\] takes 2"),
        ({"dims": [5], "raw_data": bytes(3), "data_type": TensorProto.FLOAT6E2M3}, r"but float6_e2m3fn\[5\] takes 4"),
        ({"dims": [2], "float_data": [1]}, r"holds 1 elements, but float32\[2\] takes 2"),
        ({"dims": [2], "float_data": [1, 2, 3]}, "holds 3 elements"),
        ({"dims": [2], "int64_data": [1, 2]}, "holds 0 elements"),
        ({"dims": [2]}, "holds 0 elements"),
        ({"dims": []}, r"holds 0 elements, but float32\[\] takes 1"),
        ({"dims": [0]}, None),
        (
            {"dims": [2], "float_data": [1, 2], "data_type": TensorProto.COMPLEX64},
            "holds 2 elements, but complex64.* takes 4",
        ),
        (
            {"dims": [2], "string_data": [b"a"], "data_type": TensorProto.STRING},
            r"holds 1 elements, but string\[2\] takes 2",
        ),
        (
            {"dims": [2], "raw_data": bytes(32), "data_type": TensorProto.STRING},
            "strings cannot lie in raw or external data",
        ),
        (
            {"dims": [-1], "float_data": []},
            r"declares float32\[-1\]; a dimension cannot be negative: the file is damaged",
        ),
        ({"dims": [-2, -1], "float_data": [1, 2]}, "cannot be negative"),
        ({"dims": [1 << 32, 1 << 32], "raw_data": b""}, "more than any machine can address: the file is damaged"),
        ({"dims": [1 << 62, 4], "float_data": []}, "more than any machine can address"),
        ({"dims": [0, 1 << 62, 1 << 62], "raw_data": b""}, "more than any machine can address"),
        ({"dims": [1 << 40], "raw_data": bytes(8)}, r"but float32\[1099511627776\] takes 4398046511104"),
        ({"dims": [1] * 65, "float_data": [1]}, "more than any machine can address"),
        ({"dims": [1] * 64, "float_data": [1]}, None),
    ],
)
def test_weights_that_are_not_what_they_declare_are_refused(fields, message):
    proto = with_tensor(**fields)
    if message is None:
        assert ir.loads(proto.SerializeToString()).constants()[0].values.shape == tuple(fields["dims"])
    else:
        refused_proto(proto, message)


def test_a_tensor_in_an_attribute_is_checked_too():
    proto = proto_of("g (float[2] x) => (float[2] y) { [k] w = Constant <value = float[2] {1, 2}> () y = Add (x, w) }")
    proto.graph.node[0].attribute[0].t.dims[0] = 3
    refused_proto(proto, r"node 'k' \(Constant\): attribute 'value' holds .*, but float32\[3\] takes")


@pytest.mark.parametrize(
    ("values", "indices", "shape", "good"),
    [
        ([5, 7], [1, 5], [2, 3], True),
        ([5, 7], [[0, 1], [1, 2]], [2, 3], True),
        ([], [], [2, 3], True),
        ([5, 7], [1, 6], [2, 3], False),
        ([5, 7], [-1, 5], [2, 3], False),
        ([5, 7], [[0, 1], [2, 2]], [2, 3], False),
        ([5, 7], [1], [2, 3], False),
        ([5, 7], [[0, 1, 0], [1, 2, 0]], [2, 3], False),
        ([5, 7], [1, 5], [2, -3], False),
    ],
)
def test_a_sparse_initializer_whose_indices_leave_its_shape_is_refused(values, indices, shape, good):
    proto = proto_of("g (float[2,3] x) => (float[2,3] y) { y = Add (x, x) }")
    proto.graph.node[0].input[1] = "s"
    tensor = onnx.numpy_helper.from_array(np.array(values, np.float32), "s")
    proto.graph.sparse_initializer.add(
        values=tensor, indices=onnx.numpy_helper.from_array(np.array(indices, np.int64)), dims=shape
    )
    if good:
        assert ir.from_proto(proto).constants()[0].values.shape == (2, 3)
    else:
        refused_proto(proto, "sparse initializer 's': its indices do not lie in shape")


def test_a_sparse_initializer_larger_than_memory_loads_and_says_so_when_read():
    proto = proto_of("g (float[2] x) => (float[2] y) { y = Add (x, x) }")
    tensor, index = helper.make_tensor("s", 1, [1], [5]), helper.make_tensor("", 7, [1], [3])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, index, [1 << 30, 1 << 30]))
    model = ir.loads(ir.saves(ir.from_proto(proto)))
    assert model.nbytes == 12
    assert model.fingerprint()
    with pytest.raises(
        UnsupportedModel, match=r"sparse initializer 's' of shape .* does not fit into memory when dense"
    ):
        _ = model.constants()[0].values


# ------------------------------------------------------------------------------------------------------- nesting


def deep(levels: int) -> onnx.ModelProto:
    """Ifs in Ifs, built in place, since copying stops at protobuf's limit."""
    proto = helper.make_model(
        helper.make_graph([], "g", [], []), ir_version=10, opset_imports=[helper.make_opsetid("", 21)]
    )
    graph = proto.graph
    for level in range(levels):
        attribute = graph.node.add(op_type="If", output=[f"y{level}"]).attribute.add(
            name="then_branch", type=onnx.AttributeProto.GRAPH
        )
        graph = attribute.g
        graph.name = f"body{level}"
    return proto


def field(number: int, payload: bytes) -> bytes:
    size, out = len(payload), bytearray([number << 3 | 2])
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(out) + bytes([size]) + payload


def test_bodies_nested_deeper_than_protobuf_admits_are_refused_as_file_and_as_message():
    body = field(2, b"leaf")
    for level in range(2000):
        body = field(2, b"body") + field(
            1,
            field(4, b"If")
            + field(2, f"y{level}".encode())
            + field(5, field(1, b"then_branch") + field(6, body) + b"\xa0\x01\x05"),
        )
    data = b"\x08\x0a" + field(7, body) + field(8, b"\x10\x15")
    with pytest.raises(InvalidModel, match="deeper than protobuf admits") as caught:
        ir.loads(data)
    readable(str(caught.value))
    with pytest.raises(UserError, match="bodies deep; protobuf admits 33: flatten") as told:
        ir.from_proto(deep(300))
    readable(str(told.value))


# ---------------------------------------------------------------------------------------------------------- fuzz


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with some bytes flipped, cut out, repeated or inserted."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0 | 1 | 2:
                out[at] ^= 1 << rng.randrange(8)
            case 3:
                del out[at : at + rng.randrange(1, 20)]
            case 4:
                out[at:at] = out[at : at + rng.randrange(1, 20)]
            case 5:
                out[at] = rng.randrange(256)
    return bytes(out)


def everything(model: ir.Model) -> None:
    """What is done with a model that loads."""
    model.to_proto()
    model.clone()
    verify.structure(model)
    model.fingerprint()
    for constant in model.constants():
        _ = constant.values
    verify.cycles(model)
    verify.operators(model)


RICH = """<ir_version: 10, opset_import: ["" : 21, "local" : 1], producer_name: "p">
    g (bool c, float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}, int4[3] q = {1, 2, 3}> {
        [a] t = Add (x, w)
        [b] u = local.f (t)
        [c] k = Constant <value = float[2] {3, 4}> ()
        [d] v = Mul (u, k)
        [e] y = If (c) <
            then_branch = one () => (p) <float[2] z = {5, 6}> { p = Mul (v, z) },
            else_branch = two () => (r) { r = Transpose <perm = [0, 1]> (v) }>
    }
    <domain: "local", opset_import: ["" : 21]> f (a) => (b) { b = Relu (a) }"""


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_file_gives_a_model_or_a_user_error_and_nothing_else(part):
    rich = ir.saves(ir.parse(RICH))
    sources = [rich, rich, REAL.read_bytes()]
    loaded = 0
    for seed in range(part * 150, part * 150 + 150):
        rng = random.Random(seed)
        data = damaged(sources[seed % 3], rng)
        try:
            model = ir.loads(data)
            loaded += 1
            everything(model)
            ir.loads(ir.saves(model))
        except UserError as error:
            readable(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert loaded > 15


def test_a_damaged_text_gives_a_model_or_a_user_error_and_nothing_else():
    for seed in range(300):
        text = damaged(RICH.encode(), random.Random(seed)).decode(errors="ignore")
        try:
            everything(ir.parse(text))
        except UserError as error:
            readable(str(error))


# ---------------------------------------------------------------------------------------------------------- saving


def unwritable(model: ir.Model, path: Path, match: str, **options) -> None:
    with pytest.raises(OutputError, match=match) as caught:
        ir.save(model, path, **options)
    readable(str(caught.value))


def large() -> ir.Model:
    model = ir.from_proto(proto_of())
    model.graph.initializers.append(Constant("large", np.ones(100_000, np.float32)))
    return model


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    model = large()
    (tmp_path / "file").touch()
    unwritable(model, tmp_path, "it is a folder; name a file in it")
    unwritable(model, tmp_path / "missing/m.onnx", "No such file or directory; check the folder and its permissions")
    unwritable(model, tmp_path / "file/m.onnx", "Not a directory; check the folder")
    unwritable(model, tmp_path / ("n" * 300), "File name too long")
    unwritable(model, Path("nul\0"), "a path holds no NUL")
    (tmp_path / "m.onnx.data").mkdir()
    unwritable(model, tmp_path / "m.onnx", "it is a folder", external=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "m.onnx.data"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    unwritable(large(), tmp_path / "m.onnx", "Permission denied; check the folder and its permissions")


def test_a_long_name_that_the_system_takes_is_taken(tmp_path):
    assert ir.save(large(), tmp_path / ("n" * 240 + ".onnx"))[0].stat().st_size > 400_000


def test_a_device_is_written_and_not_replaced():
    ir.save(large(), "/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("when", [1, 2])
def test_a_full_disk_leaves_the_old_files_and_no_others(external, when, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    old = ir.from_proto(proto_of())
    old.graph.initializers.append(Constant("large", np.zeros(100_000, np.float32)))
    ir.save(old, path, external=external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = 0

    def no_space(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == when or not external:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    unwritable(large(), path, "No space left on device; free some space", external=external)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert ir.load(path).fingerprint() == old.fingerprint()


@pytest.mark.parametrize("external", [True, False])
def test_a_file_size_limit_leaves_no_partial_file(external, tmp_path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from graphopt import ir
from graphopt.errors import OutputError
model = ir.load({str(tmp_path / "in.onnx")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ir.save(model, {str(tmp_path / "out.onnx")!r}, external={external})
except OutputError as error:
    print(error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    ir.save(large(), tmp_path / "in.onnx")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("File too large; free some space")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_an_error_in_the_middle_of_writing_leaves_no_partial_file(tmp_path, monkeypatch):
    model = large()
    monkeypatch.setattr("graphopt.writing.pieces", lambda buffer: iter([b"some", 1 / 0 if not buffer else None]))
    with pytest.raises(TypeError):
        ir.save(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    ir.save(large(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_more_than_protobuf_holds_is_refused_for_one_file_and_leaves_nothing(tmp_path):
    """1,100 names of one 2 MB array, of which nothing is written once the sum is known."""
    model = ir.from_proto(proto_of())
    array = np.zeros(500_000, np.float32)
    model.graph.initializers += [Constant(f"w{i}", array) for i in range(1100)]
    with pytest.raises(UnsupportedModel, match="exceeds protobuf's 2 GiB in one file; save it with external data"):
        ir.save(model, tmp_path / "m.onnx", external=False)
    assert list(tmp_path.iterdir()) == []
