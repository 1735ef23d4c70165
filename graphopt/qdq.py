"""Putting Q/DQ pairs into a graph: around tensors, on weights, on biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analyses.placement import Codes
from graphopt.analyses.ranges import Affine
from graphopt.analyses.weights import Quantized
from graphopt.edit import Editor
from graphopt.ir import Node, Variable

Array = np.ndarray[Any, Any]

_FLOAT = np.dtype(np.float32)


class Inserter:
    """Inserts pairs through one `Editor`; equal weights share one."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self._weights: dict[tuple[int, int | None, bytes], gs.Tensor] = {}
        self._kept: list[gs.Tensor] = []  # so that no id is used again

    def decoded(
        self, anchor: Node, wish: str, codes: Array, scale: Array, axis: int | None, zero: bool = True
    ) -> Variable:
        """A constant as codes and a DequantizeLinear before `anchor`; gives what it decodes to."""
        operands = [
            self.edit.constant(f"{wish}_codes", codes),
            self.edit.constant(f"{wish}_scale", np.asarray(scale, np.float32)),
        ]
        if zero:
            operands.append(self.edit.constant(f"{wish}_zero", np.zeros(np.shape(scale), codes.dtype)))
        result = Variable(self.edit.fresh_name(f"{wish}_decoded"), _FLOAT, tuple(codes.shape))
        attributes = {} if axis is None else {"axis": axis}
        node = Node("DequantizeLinear", f"{wish}_dequantize", attributes, operands, [result])
        self.edit.insert_before(anchor, node)
        return result

    def weight(self, node: Node, quantized: Quantized, zero: bool = True) -> None:
        """Let `node` read its weight as int8."""
        weight = node.inputs[1]
        key = (id(weight), quantized.axis, quantized.scale.tobytes())
        if key not in self._weights:
            codes, scale, axis = quantized.codes, quantized.scale, quantized.axis
            self._weights[key] = self.decoded(node, weight.name, codes, scale, axis, zero)
            self._kept.append(weight)
        node.inputs[1] = self._weights[key]

    def bias(self, node: Node, values: Array, scale: Array | None) -> None:
        """Give `node` a bias: int32 codes of `scale`, or float where that is None."""
        values = np.asarray(values, np.float64)
        old = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        wish = old.name if old is not None else f"{node.name}_bias"
        new: gs.Tensor
        if scale is None:
            new = self.edit.constant(wish, values.astype(np.float32))
        else:
            codes = np.rint(values / scale.astype(np.float64)).clip(-(2**31), 2**31 - 1).astype(np.int32)
            new = self.decoded(node, wish, codes, scale, 0 if np.ndim(scale) else None)
        if len(node.inputs) > 2:
            node.inputs[2] = new
        else:
            node.inputs.append(new)

    def pair(self, codes: Codes, affine: Affine) -> None:
        """Put a pair on a tensor, for those of its readers that the plan names."""
        tensor = codes.tensor
        producer = self.edit.producer(tensor)
        folds = codes.folds
        if folds is not None and producer is folds and _does(affine, folds, codes):
            source = folds.inputs[0]
            anchor = self.edit.producer(source)
        else:
            source, anchor, folds = tensor, producer, None
        everyone = len(codes.readers) == len({id(n) for n in tensor.outputs})
        whole = everyone and (producer is not None) and (self.edit.is_output(tensor) or folds is not None)
        scale = self.edit.constant(f"{tensor.name}_scale", np.asarray(affine.scale, np.float32))
        zero = self.edit.constant(f"{tensor.name}_zero", np.asarray(affine.zero_point, affine.scheme.dtype))
        shape = None if tensor.shape is None else tuple(tensor.shape)
        coded = Variable(self.edit.fresh_name(f"{tensor.name}_coded"), affine.scheme.dtype, shape)
        readers = list(codes.readers)
        if whole:  # the pair's end takes the tensor's place, name and all
            decoded: Any = tensor
            if folds is not None:
                self.edit.erase(folds)
            else:
                assert producer is not None
                source = Variable(self.edit.fresh_name(f"{tensor.name}_float"), _FLOAT, shape)
                for index, output in enumerate(producer.outputs):
                    if output is tensor:
                        producer.outputs[index] = source
        else:
            decoded = Variable(self.edit.fresh_name(f"{tensor.name}_decoded"), _FLOAT, shape)
        encode = Node("QuantizeLinear", f"{tensor.name}_quantize", None, [source, scale, zero], [coded])
        decode = Node("DequantizeLinear", f"{tensor.name}_dequantize", None, [coded, scale, zero], [decoded])
        if anchor is not None and not self.edit.is_erased(anchor):
            self.edit.insert_after(anchor, encode)
            self.edit.insert_after(anchor, decode)
        else:
            first = self.edit.model.graph.nodes[0]
            self.edit.insert_before(first, encode, readers[:1])
            self.edit.insert_before(first, decode, readers[:1])
        if not whole:
            for reader in readers:
                for index, operand in enumerate(reader.inputs):
                    if operand is tensor:
                        reader.inputs[index] = decoded


def _does(affine: Affine, folds: Node, codes: Codes) -> bool:
    """Whether clipping to the range of the codes is clipping to that of the Relu or Clip."""
    return affine.low >= 0 and (folds.op == "Relu" or codes.high is None or affine.high <= codes.high * (1 + 1e-6))
