"""The IR: a `Model` over one onnx-graphsurgeon graph, with everything that graphsurgeon itself would drop.

Three decisions carry this file:

* **We read and write the protobuf ourselves** and use graphsurgeon's `Graph`, `Node`, `Variable` and `Constant` as data
  structures only. Whatever field of a proto the IR does not model (doc strings, metadata, overloads, device
  configurations, fields of a newer onnx) stays in `carried`, a copy of that proto without the modelled fields, and is
  written back.
* **Weights stay in the file.** `load` scans the wire format and maps `raw_data` of large initializers, inline or external;
  `save` streams them from map to file. A model of many gigabytes opens in milliseconds and is never held in memory.
* **Nodes and tensors compare and hash by identity**, so that ``list.remove`` cannot hit a twin and dicts can be keyed by them.

Format reference: https://github.com/onnx/onnx/blob/main/docs/IR.md
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from graphopt.elements import (
    Buffer,
    Constant,
    Dim,
    Function,
    Graph,
    Node,
    Shape,
    TensorSpec,
    Variable,
    dtype_name,
    numpy_dtype,
    onnx_dtype,
    packed_bits,
    subgraphs,
    walk,
)
from graphopt.errors import InvalidModel, UnsupportedModel
from graphopt.garbage import patient_collector
from graphopt.reading import MOST_NESTED, Reader, domain_of, nodes_of
from graphopt.wire import MAP_ABOVE, WireError, map_file, nesting, pieces, replacing, scan
from graphopt.writing import Writer, is_sparse, raw_bytes, referenced, serialize, write_external, write_inline

EXTERNAL_ABOVE: Final = (
    1_500_000_000  # bytes of weights from which `save` writes them beside the model (protobuf ends at 2 GiB)
)
_TEXT_OPSET: Final = 23  # of a graph text without a header: every runtime we emit for reads it
_TEXT_IR_VERSION: Final = 11


class Model:
    """An ONNX model under optimization.

    Attributes:
        graph: the root graph.
        carried: the ModelProto without graph and functions (IR version, opset imports, producer, metadata, ...).
        source: the file it came from, if any.
        external: names of the external data files beside `source` that its weights were mapped from.
    """

    def __init__(
        self, graph: Graph, carried: onnx.ModelProto, source: Path | None = None, external: Sequence[str] = ()
    ) -> None:
        self.graph = graph
        self.carried = carried
        self.source = source
        self.external = tuple(external)

    @property
    def functions(self) -> list[Function]:
        """The model-local functions."""
        return list(self.graph.functions)

    @property
    def ir_version(self) -> int:
        """The version of the ONNX IR that the file declares."""
        return int(self.carried.ir_version)

    @property
    def opsets(self) -> dict[str, int]:
        """Domain -> version; the default domain is ``""``."""
        return {domain_of(o.domain): int(o.version) for o in self.carried.opset_import}

    @property
    def opset(self) -> int:
        """Version of the default domain; 0 when the model does not import it."""
        return self.opsets.get("", 0)

    def set_opset(self, domain: str, version: int) -> None:
        """Import `domain` at `version`."""
        for entry in self.carried.opset_import:
            if domain_of(entry.domain) == domain_of(domain):
                entry.version = version
                return
        self.carried.opset_import.append(onnx.helper.make_opsetid(domain, version))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What must be fed: the graph inputs that have no initializer."""
        return tuple(_spec(t) for t in self.graph.inputs if not isinstance(t, gs.Constant))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph outputs."""
        return tuple(_spec(t) for t in self.graph.outputs)

    def graphs(self) -> Iterator[Graph]:
        """The root graph and all bodies nested in it, outer before inner."""
        return walk(self.graph)

    def nodes(self) -> Iterator[Node]:
        """Every node of every graph; functions excluded."""
        for graph in self.graphs():
            yield from graph.nodes

    def constants(self) -> list[Constant]:
        """Every initializer that will be written, each once."""
        seen: dict[int, Constant] = {}
        for graph in self.graphs():
            for constant in graph.initializers:
                seen.setdefault(id(constant), constant)
            for tensor in referenced(graph):
                if isinstance(tensor, gs.Constant):
                    seen.setdefault(id(tensor), tensor)
        return list(seen.values())

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is a constant that no caller can override: an initializer that is no graph input.

        In IR 3 every initializer has to be one and is a constant none the less, see `modernize`.
        """
        if not isinstance(tensor, gs.Constant):
            return False
        return self.ir_version < 4 or not any(tensor is t for g in self.graphs() for t in g.inputs)

    def modernize(self) -> None:
        """Raise the IR version to 4 at least, since below it every initializer has to be a graph input.

        IR 3 gives no other way to state a weight, so its initializers are constants to us; from IR 4 on an initializer that
        is a graph input is a default that callers may override, and is left alone.
        """
        if self.ir_version < 4:
            for constant in self.graph.initializers:
                constant.carried = None
            self.graph.inputs = [t for t in self.graph.inputs if not isinstance(t, gs.Constant)]
            self.carried.ir_version = 4

    def clone(self) -> Model:
        """A copy that shares constant values and nothing else."""
        carried = onnx.ModelProto()
        carried.CopyFrom(self.carried)
        copies: dict[int, Any] = {}
        functions = list(self.graph.functions)  # never edited in place, so shared
        graph = clone_graph(self.graph, copies)
        graph._functions = functions
        return Model(graph, carried, self.source)

    def to_proto(self, embed: Callable[[Constant], bool] = lambda constant: True) -> onnx.ModelProto:
        """The ModelProto; constants for which `embed` is false are written as external data without a location.

        Raises:
            UnsupportedModel: an element type or attribute that ONNX cannot express.
        """
        return Writer(self, embed).write()

    def text(self) -> str:
        """ONNX's own text form. `parse` reads it back, without most doc strings, and unless a type is one that onnx prints as "...".

        Raises:
            UnsupportedModel: onnx cannot print the model.
        """
        try:
            return str(onnx.printer.to_text(self.to_proto()))
        except (UnicodeDecodeError, ValueError, RuntimeError) as error:
            raise UnsupportedModel(
                f"onnx cannot print this model ({str(error)[:200]}); save it as .onnx instead"
            ) from None

    def fingerprint(self) -> str:
        """sha256 of all that `save` keeps: the same across processes, and wherever the weights lie (in which field or file)."""
        writer = Writer(self, lambda constant: False)
        digest = hashlib.sha256(serialize(writer.write()))
        for constant, _ in writer.left_out:
            digest.update(constant.nbytes.to_bytes(8, "little"))
            for piece in pieces(raw_bytes(constant)):
                digest.update(piece)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all initializers as stored."""
        return sum(c.nbytes for c in self.constants())


def _spec(tensor: gs.Tensor) -> TensorSpec:
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None):
        return TensorSpec(tensor.name, None, None)
    dtype = None if tensor.dtype is None else dtype_name(tensor.dtype)
    return TensorSpec(tensor.name, dtype, None if tensor.shape is None else tuple(tensor.shape))


def clone_graph(graph: Graph, copies: dict[int, Any]) -> Graph:
    """Copy `graph`; `copies` maps id(tensor) -> its copy for everything in scope."""

    def tensor(old: gs.Tensor) -> gs.Tensor:
        new = copies.get(id(old))
        if new is None:
            if isinstance(old, gs.Constant):
                new = Constant(old.name, old._values)
            else:
                new = Variable(old.name, old.dtype, None if old.shape is None else tuple(old.shape))
                new.type = old.type
            new.carried = getattr(old, "carried", None)
            copies[id(old)] = new
        return new

    def attribute(value: Any) -> Any:
        if isinstance(value, gs.Graph):
            return clone_graph(value, copies)
        if isinstance(value, list):
            return [attribute(v) for v in value]
        return value

    new_graph = Graph(name=graph.name, opset=graph.opset, import_domains=graph.import_domains)
    new_graph.carried = graph.carried
    new_graph.inputs = [tensor(t) for t in graph.inputs]
    new_graph.initializers = [tensor(t) for t in graph.initializers]
    for node in graph.nodes:
        inputs = [tensor(t) for t in node.inputs]
        copy = Node(node.op, node.name, None, inputs, [tensor(t) for t in node.outputs], node.domain or "")
        copy.attrs = {name: attribute(value) for name, value in node.attrs.items()}
        copy.carried = getattr(node, "carried", None)
        copy.attr_types = dict(getattr(node, "attr_types", {}))
        copy.attr_docs = dict(getattr(node, "attr_docs", {}))
        copy.origin = getattr(node, "origin", ())
        new_graph.nodes.append(copy)
    new_graph.outputs = [tensor(t) for t in graph.outputs]
    return new_graph


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model from ``.onnx`` (protobuf) or ``.onnxtxt`` (ONNX text).

    Weights stay in the file, mapped, inline or external.

    Raises:
        InvalidModel: no such file, not ONNX, truncated, breaks a rule of the format, or external data is missing.
        UnsupportedModel: uses what graphopt cannot carry.
    """
    source = Path(path)
    try:
        if source.is_dir():
            raise InvalidModel(f"{str(source)!r} is a folder; name the .onnx file in it")
        if source.stat().st_size == 0:
            raise InvalidModel(f"{str(source)!r} is empty (0 bytes); export or copy the model again")
        if source.suffix == ".onnxtxt":
            return parse(source.read_text(encoding="utf-8"), source)
        data = map_file(source)
    except UnicodeDecodeError:
        raise InvalidModel(f"{str(source)!r} is not text; a protobuf model is named .onnx") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidModel(f"cannot read {str(source)!r}: {reason}; check the path") from None
    return _read(data, repr(str(source)), source)


def loads(data: bytes, name: str = "<bytes>") -> Model:
    """Read a model from the bytes of an ``.onnx`` file; raises as `load` does. External data is looked for nowhere."""
    if not data:
        raise InvalidModel(f"{name} is empty (0 bytes); export or copy the model again")
    return _read(memoryview(data), name, None)


def _read(view: memoryview, where: str, source: Path | None) -> Model:
    try:
        slim, raws = scan(view)
        proto = onnx.ModelProto.FromString(slim)
    except (DecodeError, WireError):
        deep = nesting(view) > MOST_NESTED
        reason = "it nests bodies deeper than protobuf admits" if deep else "not one, or truncated"
        raise InvalidModel(
            f"{where} cannot be read as an ONNX model ({reason}; {len(view)} bytes): copy or export it again"
        ) from None
    return _build(proto, source, raws, where)


def parse(text: str, source: Path | None = None) -> Model:
    """Read a model from ONNX text: a model, or a graph alone (which gets opset 23 and IR version 11).

    Raises:
        InvalidModel: the text does not parse; the message holds line and column.
    """
    where = repr(str(source)) if source else "the text"
    if _nesting(text) > _MOST_BRACKETS:
        raise InvalidModel(
            f"{where} does not parse: more than {_MOST_BRACKETS} brackets are open at once; protobuf admits no such model"
        )
    try:
        if _COMMENT.sub("", text).lstrip().startswith("<"):
            proto = onnx.parser.parse_model(text)
            _pack([proto.graph], (n for f in proto.functions for n in f.node))
            return _build(proto, source, {}, where)
        graph = onnx.parser.parse_graph(text)
    except DecodeError:
        raise InvalidModel(f"{where} cannot be read: it nests deeper than protobuf admits; flatten it") from None
    except (onnx.parser.ParseError, ValueError, IndexError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InvalidModel(f"{where} does not parse: {' | '.join(lines)[:500]}") from None
    _pack([graph])
    domains = {domain_of(n.domain) for n in nodes_of(graph.node)} | {""}
    imports = [onnx.helper.make_opsetid(d, 1 if d else _TEXT_OPSET) for d in sorted(domains)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=_TEXT_IR_VERSION)
    return _build(proto, source, {}, where)


def _nesting(text: str) -> int:
    """How many braces and parentheses are open at once: onnx's parser descends once for each, on the C stack."""
    depth = deepest = 0
    for match in _BRACKET.finditer(text):
        depth += {"{": 1, "(": 1, "}": -1, ")": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _pack(graphs: list[onnx.GraphProto], nodes: Iterable[onnx.NodeProto] = ()) -> None:
    """Pack sub-byte tensors, of which onnx's text parser writes each element into a word of its own, against onnx.proto."""
    attributes = [a for n in nodes_of([*nodes, *(n for g in graphs for n in g.node)]) for a in n.attribute]
    bodies = [body for a in attributes for body in (a.g, *a.graphs)]
    for tensor in [*(t for g in graphs + bodies for t in g.initializer), *(a.t for a in attributes)]:
        bits, codes = packed_bits(tensor.data_type) if tensor.data_type else 0, tensor.int32_data
        if bits in (2, 4) and len(codes) == math.prod(tensor.dims):
            packed = bytearray(-(-len(codes) * bits // 8))
            for index, code in enumerate(codes):
                packed[index * bits // 8] |= (code & ((1 << bits) - 1)) << index * bits % 8
            tensor.ClearField("int32_data")
            tensor.raw_data = bytes(packed)


def from_proto(proto: onnx.ModelProto, source: Path | None = None) -> Model:
    """Build a `Model` from a ModelProto, which must not be changed any more; `source` is the file whose external data it uses.

    Raises:
        InvalidModel: a rule of the format is broken.
        UnsupportedModel: an opset or an IR version newer than onnx knows, or an IR version before 3.
    """
    return _build(proto, source, {}, repr(str(source)) if source else "the model")


@patient_collector()
def _build(proto: onnx.ModelProto, source: Path | None, raws: dict[int, Buffer], where: str) -> Model:
    """`raws` holds, by index, the raw_data of root initializers that were left out of `proto`."""
    if not proto.HasField("graph") or not proto.opset_import:
        raise InvalidModel(
            f"{where} holds no graph or no opset import: not an ONNX model, or truncated; export it again"
        )
    newest = onnx.defs.onnx_opset_version()
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = domain_of(entry.domain)
        if versions.setdefault(domain, entry.version) != entry.version:
            raise InvalidModel(f"{where} imports domain {domain or 'ai.onnx'!r} at two versions; keep one")
        if domain == "" and not 1 <= entry.version <= newest:
            raise UnsupportedModel(
                f"{where} uses opset {entry.version}; onnx {onnx.__version__} knows 1 to {newest}: upgrade onnx, "
                "or convert the model with onnx.version_converter"
            )
    if not 3 <= proto.ir_version <= onnx.IR_VERSION:
        advice = "upgrade onnx" if proto.ir_version > onnx.IR_VERSION else "export the model again"
        raise UnsupportedModel(
            f"{where} has IR version {proto.ir_version}; graphopt reads 3 to {onnx.IR_VERSION}: {advice}"
        )
    try:
        reader = Reader(proto, source, raws)
        graph, carried = reader.read()
    except (InvalidModel, UnsupportedModel) as error:
        raise type(error)(f"{where}: {error}") from None
    return Model(graph, carried, source, sorted(reader.maps))


def save(model: Model, path: str | os.PathLike[str], external: bool | None = None) -> list[Path]:
    """Write ``.onnx`` or, by that suffix, ``.onnxtxt``; returns the files written.

    Args:
        model: what to write.
        path: where; written beside and renamed, so that a failure leaves no partial file.
        external: weights above 1 KiB into ``NAME.onnx.data`` beside the model; None: when they exceed 1.5 GB.

    Raises:
        OutputError: the place cannot be written or the disk is full.
        UnsupportedModel: the model does not fit protobuf's 2 GiB without its weights.
    """
    target = Path(path)
    if target.suffix == ".onnxtxt":
        text = model.text()
        try:
            parse(text)
        except InvalidModel as error:
            raise UnsupportedModel(f"onnx's text form cannot hold this model: save it as .onnx ({error})") from None
        with replacing(target) as file:
            file.write(text.encode())
        return [target]
    large = [c for c in model.constants() if c.nbytes > MAP_ABOVE and not is_sparse(c) and c.dtype != object]
    if external is None:
        external = sum(c.nbytes for c in large) > EXTERNAL_ABOVE
    if not external or not large:
        with replacing(target) as file:
            write_inline(model, large, file)
        return [target]
    return [target, write_external(model, large, target)]


def saves(model: Model) -> bytes:
    """The bytes of a one-file ``.onnx``.

    Raises:
        UnsupportedModel: it would exceed protobuf's 2 GiB.
    """
    return serialize(model.to_proto())


_SAFE = re.compile(r"[^\w./:-]+")
_BRACKET = re.compile(r'[{}()]|"(?:[^"\\]|\\.)*"|#.*')
_MOST_BRACKETS: Final = 100
_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)


def fresh_names(model: Model) -> Callable[[str], str]:
    """A function that turns a wish into a tensor or node name that the model does not use yet."""
    taken = {t.name for g in model.graphs() for t in [*g.inputs, *g.initializers]}
    for node in model.nodes():
        taken.add(node.name)
        taken.update(t.name for t in node.inputs)
        taken.update(t.name for t in node.outputs)

    last: dict[str, int] = {}

    def fresh(wish: str) -> str:
        base = _SAFE.sub("_", wish) or "value"
        name, number = base, last.get(base, 0)
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        last[base] = number
        taken.add(name)
        return name

    return fresh


__all__ = [
    "EXTERNAL_ABOVE",
    "Constant",
    "Dim",
    "Function",
    "Graph",
    "Model",
    "Node",
    "Shape",
    "TensorSpec",
    "Variable",
    "dtype_name",
    "from_proto",
    "load",
    "loads",
    "numpy_dtype",
    "onnx_dtype",
    "packed_bits",
    "parse",
    "replacing",
    "save",
    "saves",
    "subgraphs",
    "walk",
]
