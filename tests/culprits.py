"""A plug-in pass that does wrong in one rewrite of many, and how to make it known to pipelines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from graphopt import discovery, ir, pipeline
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.pass_base import Context, Pass


@dataclass(frozen=True)
class NegToMul(Pass):
    """Turn every Neg into a product with -1; at the node `at` something goes wrong."""

    at: str = ""
    how: str = "numbers"  # numbers, nan, raise, dangling, interface, operator; second: the next one is wrong too
    asks: bool = True  # whether it asks before each rewrite

    def run(self, model: Model, ctx: Context) -> int:
        edit = Editor(model)
        done = 0
        for node in list(model.nodes()):
            if node.op != "Neg":
                continue
            if self.asks and not ctx.admit():
                break
            wrong = node.name == self.at or (self.how == "second" and node.name == f"neg{int(self.at[3:]) + 1}")
            if wrong and self.how == "raise":
                raise RuntimeError("on purpose")
            factor = -1.0 if not wrong else {"numbers": -1.5, "second": -1.5, "nan": np.nan}.get(self.how, -1.0)
            result = node.outputs[0]
            node.outputs.clear()
            by = edit.constant(f"{node.name}_by", np.array(factor, np.float32))
            op = "NoSuchOp" if wrong and self.how == "operator" else "Mul"
            new = Node(op, f"{node.name}_mul", {}, [node.inputs[0], by], [result])
            edit.insert_before(node, new, origin=[node])
            edit.erase(node)
            if wrong and self.how == "dangling":
                new.inputs[0] = ir.Variable("ghost", np.dtype(np.float32), (2,))
            if wrong and self.how == "interface":
                model.graph.outputs[0].shape = (7,)
            done += 1
        edit.commit()
        return done

    @classmethod
    def pass_name(cls) -> str:
        return "neg-to-mul"


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``neg-to-mul`` stand in pipeline texts, as a plug-in would."""
    known = {**discovery.pass_modules(), "neg-to-mul": __name__}
    real = discovery.find_pass
    monkeypatch.setattr(pipeline, "pass_modules", lambda: known)
    monkeypatch.setattr(pipeline, "find_pass", lambda name: NegToMul if name == "neg-to-mul" else real(name))


def chain(count: int) -> str:
    """Text of a model of `count` Negs and as many Relus and Identities, in turns."""
    lines, last = [], "x"
    for i in range(count):
        lines.append(f"[neg{i}] n{i} = Neg ({last}) [relu{i}] r{i} = Relu (n{i}) [add{i}] a{i} = Add (n{i}, r{i})")
        lines.append(f"[id{i}] i{i} = Identity (a{i})")
        last = f"i{i}"
    body = "\n".join(lines)
    return (
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        f"g (float[2] x) => (float[2] y) {{ {body}\n [last] y = Sub (x, {last}) }}"
    )
