"""What each operator does with the channels of its operands: one function an operator, in one table.

A relation takes a `Call`, joins or pins the atoms of operands, and returns the labels of the results (None: it cannot tell, so everything
it reads is pinned). Where an attribute or a shape constant speaks of a size that may change, it leaves a fix for the slicing. An
operand that a relation does not ask for (`Call.axes`) is pinned.

| operator | relation |
|---|---|
| Conv | rows of the weight are the result's channels and the bias; columns are the operand's, summed over |
| depthwise Conv | channel c of the operand is rows c*m .. of the weight |
| grouped Conv | as Conv within each group; all groups must keep equally many |
| ConvTranspose, Gemm, MatMul, Einsum | the same with their layouts; two activations sum over both |
| LSTM, GRU, RNN | a hidden unit is a row of each gate, a column of the recurrence, an index of results and states |
| Attention, MultiHeadAttention | whole heads of queries, keys and values; with heads on an axis of their own, sizes of heads, too |
| BatchNormalization, PRelu, elementwise | index by index, with broadcasting |
| QuantizeLinear, DequantizeLinear | index by index, with scales and zero points of channels |
| GroupNormalization | whole groups |
| Concat, Split, Slice, Gather, Pad, Tile | an index map; sizes and bounds are rewritten |
| Reshape, Flatten | row-major index arithmetic: in a merge a channel becomes a run, in a split one axis carries the channels |
| Expand, ConstantOfShape | copies, of which any may go |
| DepthToSpace, SpaceToDepth | a channel is tied to its r*r |
| Shape | a size may be moved about and stated where it is stated anew; any other use pins |
| LayerNormalization, Softmax, ArgMax, TopK, ... | the axis they work along stays |
"""

from __future__ import annotations

from graphopt.analyses import channels_attention, channels_elementwise, channels_layout, channels_products
from graphopt.analyses.channel_call import TABLE, Call, Relation
from graphopt.analyses.channels_layout import held_sizes
from graphopt.analyses.channels_products import BlockSlice
from graphopt.ir import Node

assert all((channels_attention, channels_elementwise, channels_layout, channels_products))  # they fill the table


def relation_of(node: Node) -> Relation | None:
    """What the table says of the node's operator; None where it is not there."""
    return TABLE.get(node.op if node.is_onnx else f"{node.domain}.{node.op}")


__all__ = ["BlockSlice", "Call", "Relation", "held_sizes", "relation_of"]
