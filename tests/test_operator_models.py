"""Load and save of every model that the onnx package brings, and of ours, gives the same graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from graphopt import edit, ir, verify

ONNX_DATA = Path(onnx.__file__).parent / "backend/test/data"
OURS = Path(__file__).parents[1] / "models"
FILES = sorted(
    [*ONNX_DATA.glob("light/*.onnx"), *ONNX_DATA.glob("simple/*/*.onnx")]
    + [*ONNX_DATA.glob("pytorch-*/*/*.onnx"), *OURS.glob("*.onnx")]
)


@pytest.fixture(scope="module")
def operator_models() -> dict[str, onnx.ModelProto]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference implementations, which compute the expected outputs
        return {case.name: case.model for case in collect_testcases(None)}


def normal(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with its value_info in the order of names, the one thing that load and save may change."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    pending = [copy.graph]
    while pending:
        graph = pending.pop()
        infos = sorted(graph.value_info, key=lambda info: info.name)
        del graph.value_info[:]
        graph.value_info.extend(infos)
        for node in graph.node:
            for attribute in node.attribute:
                pending.extend([attribute.g] if attribute.HasField("g") else [])
                pending.extend(attribute.graphs)
    return copy


def changed(protos: dict[str, onnx.ModelProto], way: Callable[[onnx.ModelProto], onnx.ModelProto]) -> list[str]:
    return [name for name, proto in protos.items() if normal(way(proto)) != normal(proto)]


def test_there_are_as_many_as_the_onnx_package_brings(operator_models):
    assert len(operator_models) >= 1884
    assert len([f for f in FILES if "light" in f.parts]) == 9
    assert len([f for f in FILES if OURS in f.parents]) == 8
    assert len(FILES) > 150


def test_loading_and_saving_in_memory_changes_no_operator_model(operator_models):
    assert changed(operator_models, lambda proto: ir.loads(proto.SerializeToString()).to_proto()) == []


def test_cloning_changes_no_operator_model(operator_models):
    assert changed(operator_models, lambda proto: ir.from_proto(proto).clone().to_proto()) == []


def test_saving_to_a_file_changes_no_operator_model(operator_models, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # 1,884 waits for the disk prove nothing
    path = tmp_path / "model.onnx"

    def through_file(proto: onnx.ModelProto) -> onnx.ModelProto:
        ir.save(ir.from_proto(proto), path)
        return onnx.load(path)

    assert changed(operator_models, through_file) == []


def test_text_holds_as_much_of_an_operator_model_as_onnx_can_print_and_parse(operator_models):
    texts, differ = 0, []
    for name, proto in operator_models.items():
        try:
            through_onnx = onnx.parser.parse_model(onnx.printer.to_text(proto))
        except onnx.parser.ParseError:
            continue  # the parser does not read all that the printer writes
        texts += 1
        through_us = ir.parse(ir.from_proto(proto).text())
        differ += [name] if normal(through_us.to_proto()) != normal(through_onnx) else []
    assert differ == []
    assert texts > 1000


def test_every_operator_model_is_valid_to_our_verifiers(operator_models):
    faults = {}
    for name, proto in operator_models.items():
        model = ir.from_proto(proto)
        verify.operators(model)
        verify.cycles(model)
        if found := verify.structure(model) + verify.structure(model.clone()):
            faults[name] = found
    assert faults == {}


def test_cleaning_an_operator_model_leaves_it_valid(operator_models):
    faults = {}
    for name, proto in operator_models.items():
        model = ir.from_proto(proto)
        edit.cleanup(model)
        if found := verify.structure(model):
            faults[name] = found
    assert faults == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem if p.stem != "model" else p.parent.name)
def test_a_model_file_survives_load_clone_and_save(path, tmp_path, monkeypatch):
    proto, model = onnx.load(path), ir.load(path)
    assert verify.structure(model) == []
    assert normal(model.to_proto()) == normal(proto)
    ir.save(model.clone(), tmp_path / "copy.onnx")
    assert normal(onnx.load(tmp_path / "copy.onnx")) == normal(proto)
    assert ir.load(tmp_path / "copy.onnx").fingerprint() == model.fingerprint()
    monkeypatch.setattr(ir, "MAP_ABOVE", 0)
    ir.save(model, tmp_path / "external.onnx", external=True)
    assert ir.load(tmp_path / "external.onnx").fingerprint() == model.fingerprint()
