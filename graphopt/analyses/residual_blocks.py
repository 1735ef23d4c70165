"""Residual blocks: what is added to a stream that also goes round it, and can be left out as a whole.

``y = x + f(x)`` becomes ``y = x``. A block is the set of nodes that compute ``f(x)`` and nothing else: everything behind ``x`` that only the
addition reads, in the end. Blocks on one stream (each adds to what the one before left) form a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphopt.analyses.shapes import Shapes
from graphopt.edit import Editor, captures
from graphopt.ir import Model, Node, subgraphs

_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


@dataclass(frozen=True)
class Block:
    """One residual block, by names."""

    join: str  # the Add
    skip: str  # the tensor that goes round
    result: str  # what the Add computes
    nodes: frozenset[str]  # what computes the other operand


def residual_blocks(model: Model, shapes: Shapes) -> list[Block]:
    """All blocks that can be left out without a change of shape, in the order of the graph."""
    nodes = list(model.graph.nodes)
    producers = {id(t): n for n in nodes for t in n.outputs if t.name}
    number = {id(n): i for i, n in enumerate(nodes)}
    kept = {id(t) for t in model.graph.outputs}
    kept |= {id(t) for n in nodes for body in subgraphs(n) for t in captures(body).values()}
    found = []
    for node in nodes:
        if node.op != "Add" or not node.is_onnx or id(node.outputs[0]) in kept:
            continue
        for skip, other in (node.inputs, node.inputs[::-1]):
            if isinstance(skip, gs.Constant) or isinstance(other, gs.Constant) or skip is other:
                continue
            shape = shapes.shape(node.outputs[0])
            if shape is None or shape != shapes.shape(skip) or shapes.dtype(skip) != shapes.dtype(node.outputs[0]):
                continue
            inside = _behind(other, node, producers, number, kept)
            reads = any(t is skip for n in inside for t in n.inputs)
            if reads and any(n.op in _LAYERS for n in inside):
                names = frozenset(n.name for n in inside)
                found.append(Block(node.name, skip.name, node.outputs[0].name, names))
                break
    return found


def _behind(
    tensor: gs.Tensor, join: Node, producers: dict[int, Node], number: dict[int, int], kept: set[int]
) -> list[Node]:
    """The nodes that only `join` reads, through `tensor`."""
    inside: dict[int, Node] = {}
    pending = {number[id(producers[id(tensor)])]: producers[id(tensor)]} if id(tensor) in producers else {}
    while pending:  # the last node first: all who read it have been judged then
        node = pending.pop(max(pending))
        readers = [r for t in node.outputs for r in t.outputs]
        ours = all(r is join or id(r) in inside for r in readers)
        if any(r is join for r in readers) and not any(t is tensor for t in node.outputs):
            ours = False
        if not ours or any(id(t) in kept for t in node.outputs):
            continue
        inside[id(node)] = node
        for operand in node.inputs:
            producer = producers.get(id(operand))
            if producer is not None:
                pending[number[id(producer)]] = producer
    return list(inside.values())


def chains(model: Model, blocks: list[Block]) -> list[list[int]]:
    """Numbers of blocks, in order, that are on one stream: each goes round what the one before it computed, rectified or normalized or not."""
    producers = {t.name: n for n in model.graph.nodes for t in n.outputs if t.name}
    results = {block.result: k for k, block in enumerate(blocks)}
    found: list[list[int]] = []
    place: dict[int, list[int]] = {}
    for k, block in enumerate(blocks):
        at = block.skip
        while at not in results and at in producers and producers[at].op in ("Relu", "LayerNormalization", "Identity"):
            at = producers[at].inputs[0].name
        before = results.get(at)
        if before is not None and before in place:
            place[k] = place[before]
            place[k].append(k)
        else:
            place[k] = [k]
            found.append(place[k])
    return found


def leave_out(model: Model, edit: Editor, block: Block, stands: dict[str, str]) -> None:
    """Let the stream go past a block; `stands` then tells in whose place tensors before it are: those behind it.

    A Relu of what was a Relu already is left out, too.
    """
    join = next(node for node in model.graph.nodes if node.name == block.join)
    skip = next(t for t in join.inputs if t.name == _current(join, block))
    result = join.outputs[0]
    gated = bool(result.outputs) and all(reader.op == "Relu" for reader in result.outputs)
    source = edit.producer(skip)
    if gated and source is not None and source.op == "Relu":
        before = source.inputs[0]
        stands[before.name] = stands.get(result.name, result.name)
        for reader in list(result.outputs):
            if edit.can_replace(reader.outputs[0], skip):
                stands[skip.name] = stands.get(reader.outputs[0].name, reader.outputs[0].name)
                edit.replace_uses(reader.outputs[0], skip)
    else:
        stands[skip.name] = stands.get(result.name, result.name)
    edit.replace_uses(result, skip)


def _current(join: Node, block: Block) -> str:
    """The operand that goes round: by its name, or, where a block before it is gone, the one that the block does not compute."""
    if any(t.name == block.skip for t in join.inputs):
        return block.skip
    names: list[str] = [t.name for t in join.inputs if not (t.inputs and t.inputs[0].name in block.nodes)]
    return names[0]
