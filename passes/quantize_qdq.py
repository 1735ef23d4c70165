"""``x' = scale * (clip(round(x / scale) + zero_point) - zero_point)`` around convolutions and matrix products.

Where the pairs stand and how codes look follows from the target (`graphopt.analyses.placement`): ONNX Runtime gets uint8 activations
with a zero point and int8 values from one convolution to the next, TensorRT gets symmetric int8 on the inputs of weighted operators alone. Weights
are symmetric int8 with one scale for each output channel; a bias becomes int32 for ONNX Runtime and stays float for TensorRT.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
import onnx

from graphopt.analyses import calibration, gram, weights
from graphopt.analyses.gram import Layer
from graphopt.analyses.placement import (
    WEIGHTED,
    Codes,
    Placer,
    Plan,
    check_patterns,
    depth,
    operators,
    refusal,
    selects,
    sizes,
    tell_unreached,
)
from graphopt.analyses.quantized import forms
from graphopt.analyses.ranges import SIGNED, UNSIGNED, Affine, Scheme, affine, find_range
from graphopt.analyses.rounding import rounded
from graphopt.analyses.shapes import Shapes
from graphopt.analyses.twins import RangeJudge, Twin, judge
from graphopt.edit import Editor
from graphopt.errors import UnsupportedModel, UsageError
from graphopt.ir import Model, Node, from_proto
from graphopt.pass_base import Context, Exactness, Pass
from graphopt.qdq import Inserter

_OPSET: Final = 13  # from which DequantizeLinear has an axis
_TRIED: Final = ("minmax", "percentile", "mse", "entropy")  # by calibration=auto
_SHARES: Final = (0.9, 0.9, 0.85, 0.8, 0.75)  # by which auto draws in an end of a range, one after the other
_JUDGED_ON: Final = 64  # samples that auto and bias correction look at, at most
_RANGE_WORK: Final = 1 << 35  # multiply-accumulates of the samples that auto looks at, about
_BIAS_WORK: Final = 1 << 37  # and of those for bias correction
_SINGLE: Final = 0.05  # share of the multiply-accumulates below which a convolution on its own stays float
_TOGETHER: Final = 0.2  # share of all such together from which on those become int8
_DEEP: Final = 128  # that have so many products for each value: coding two values costs about as much
_HEAVY: Final = 1 << 33  # multiply-accumulates of a sample from which on auto does not draw in ends


@dataclass(frozen=True)
class QuantizeQdq(Pass):
    """Compute convolutions and matrix products with constant weights in int8, with Q/DQ pairs where the target wants them.

    Ranges come from calibration data (``--data``); without it only tensors whose range is known, as behind Softmax, get codes.

    Before:
        g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1.0, 0.5, 0.0, -0.5}>
        { s = Softmax (x)
          y = MatMul (s, w) }
    After:
        g (float[1,2] x) => (float[1,2] y)
        <float s_scale = {0.003921569}, uint8 s_zero = {0}, int8[2,2] w_codes = {127, 127, 0, -127},
         float[2] w_scale = {0.007874016, 0.003937008}, int8[2] w_zero = {0, 0}>
        { s = Softmax (x)
          q = QuantizeLinear (s, s_scale, s_zero)
          d = DequantizeLinear (q, s_scale, s_zero)
          w = DequantizeLinear <axis = 1> (w_codes, w_scale, w_zero)
          y = MatMul (d, w) }
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    calibration: Literal["auto", "minmax", "average", "percentile", "mse", "entropy"] = "auto"
    share: float = 0.9999  # of the values inside the range, for percentile
    exclude: tuple[str, ...] = ()  # names (with * and ?) or operators of nodes to leave in float
    only: tuple[str, ...] = ()  # of nodes to quantize; none: all that can be
    pair_safe: bool | None = None  # weights that cannot saturate on x86 without VNNI; none: as the target needs
    rounding: Literal["gptq", "nearest"] = "gptq"  # of weights; gptq lets their errors cancel on the samples
    correct_bias: bool = True  # take the mean error of each channel off the bias
    min_channels: int | None = (
        None  # weighted operators with fewer channels in or out stay float; none: 16 for TensorRT
    )
    samples: int | None = None  # calibration samples to use; none: all

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; give the share of the values inside the range, as 0.9999")
        for name in ("samples", "min_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} is {value}; give 1 at least")

    def run(self, model: Model, ctx: Context) -> int:
        """Plan, calibrate, insert; returns the number of weighted operators that became int8."""
        if ctx.target is not None:
            unable = [
                c for c in ctx.target.compute_capabilities if int(c[2:]) < 80 and ctx.target.runtime == "tensorrt-rtx"
            ]
            if unable:
                raise UnsupportedModel(
                    f"quantize-qdq: {ctx.target} cannot run int8 ({', '.join(unable)}); build float16 for it, or name sm80 and newer"
                )
        raised = self.raised(model)
        done = _Run(self, raised, ctx).run()
        if done and raised is not model:
            ctx.remark(
                None, f"opset raised from {model.opset} to {_OPSET}, the first whose DequantizeLinear has an axis"
            )
            model.graph, model.carried = raised.graph, raised.carried
        return done

    @staticmethod
    def raised(model: Model) -> Model:
        """`model`, or what it is in the first opset that has what is needed.

        Raises:
            UnsupportedModel: onnx cannot convert it.
        """
        if model.opset >= _OPSET or not any(True for _ in operators(model)):
            return model
        try:
            return from_proto(onnx.version_converter.convert_version(model.to_proto(), _OPSET), model.source)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModel(
                f"quantize-qdq needs opset {_OPSET}, the model has {model.opset} and onnx cannot convert it "
                f"({' '.join(str(error).split())[:200]}); export it again"
            ) from None

    def twins(self, model: Model, ctx: Context) -> dict[str, Twin]:
        """How each weighted operator would be rounded, by name; `model` stays as it is."""
        return _Run(self, model, ctx).twins()


class _Run:
    def __init__(self, options: QuantizeQdq, model: Model, ctx: Context) -> None:
        self.options, self.model, self.ctx = options, model, ctx
        self.chains = ctx.target is None or not ctx.target.traits.symmetric_int8
        self.scheme: Scheme = UNSIGNED if self.chains else SIGNED
        self.safe = options.pair_safe if options.pair_safe is not None else self.chains
        self.edit = Editor(model)
        self.statistics: dict[str, calibration.Statistics] = {}

    def run(self) -> int:
        check_patterns("quantize-qdq", (*self.options.exclude, *self.options.only), self.model)
        known = forms(self.model)
        if known:
            told = ", ".join(f"{count} {form}" for form, count in known.items())
            self.ctx.remark(None, f"quantized already in part ({told}): kept as it is, what is float is added")
        chosen = self._choose()
        if not chosen:
            return 0
        chosen = self._without_single(chosen)
        plan = self._placer(chosen).plan()
        missing = self._calibrate(plan)
        while missing:  # without data: keep what has known ranges
            rest = [n for n in chosen if not self._touches(n, missing)]
            if not rest or len(rest) == len(chosen):
                return 0
            chosen = rest
            plan = self._placer(chosen).plan()
            missing = self._unknown(plan)
        admitted = []
        for node in chosen:
            if not self.ctx.admit():
                break
            admitted.append(node)
        if not admitted:
            return 0
        if len(admitted) < len(chosen):
            plan = self._placer(admitted).plan()
        self._write(plan, self._affines(plan))
        return len(plan.nodes)

    def twins(self) -> dict[str, Twin]:
        """Codes and weights as `run` would choose them, by name of the operator; nothing is changed."""
        plan = self._placer(self._without_single(self._choose())).plan()
        if self._calibrate(plan):
            raise UsageError("quantize-qdq: sensitivity needs calibration data; give --data")
        found = self._affines(plan)
        scales = {id(c.tensor): found[id(c)] for c in plan.codes}
        quantized = self._weights(plan, scales)
        return {n.name: Twin(scales[id(n.inputs[0])], quantized[n.name].values()) for n in plan.nodes}

    # -------------------------------------------------------------------------------------------------- what to do

    def _placer(self, chosen: list[Node]) -> Placer:
        rtx = self.ctx.target is not None and self.ctx.target.runtime == "tensorrt-rtx"
        return Placer(self.model, self.edit, chosen, self.chains, projections=not rtx)

    def _choose(self) -> list[Node]:
        shapes = self.ctx.analysis(Shapes, self.model)
        least = self.options.min_channels
        least = least if least is not None else 1 if self.chains else 16
        chosen = []
        for node in operators(self.model):
            reason = None
            if selects(self.options.exclude, node):
                reason = "excluded"
            elif self.options.only and not selects(self.options.only, node):
                reason = "not among those asked for"
            else:
                reason = refusal(node, self.edit, shapes, self.model.opset)
            if reason is None and min(sizes(node)) < least and not self._wide_enough(node, least):
                reason = f"{min(sizes(node))} channels: too few for int8 to pay on this target (min-channels={least})"
            if reason is None:
                chosen.append(node)
            else:
                self.ctx.remark(node, f"stays float: {reason}")
        for node in self.model.nodes():
            if node.op == "ConvTranspose":
                self.ctx.remark(node, "stays float: neither runtime has an int8 kernel for it")
        tell_unreached(self.model, WEIGHTED, self.ctx)
        return chosen

    def _without_single(self, chosen: list[Node]) -> list[Node]:
        """`chosen` but for small convolutions among float operators: to code their input and result costs more than they have to gain."""
        if not self.chains or self.ctx.data is None or not any(n.op == "Conv" for n in chosen):
            return chosen
        placer = self._placer(chosen)
        placer.plan()
        work = calibration.effort(self.model, self.ctx.data)
        share = {n.name: work.nodes.get(n.name, work.macs) / max(1, work.macs) for n in chosen}
        alone = [
            n for n in chosen if n.op == "Conv" and len(chosen) > 1 and share[n.name] < _SINGLE and placer.alone(n)
        ]
        many = sum(share[n.name] for n in alone) >= _TOGETHER
        kept = []
        for node in chosen:
            if any(node is n for n in alone) and not (many and depth(node) >= _DEEP):
                told = f"{100 * share[node.name]:.1f} % of the multiply-accumulates"
                if many:
                    told = f"{depth(node)} products a value"
                self.ctx.remark(node, f"stays float: {told}, among float operators: its codes would cost more")
            else:
                kept.append(node)
        return kept

    def _wide_enough(self, node: Node, least: int) -> bool:
        """TensorRT pads one narrow side of a plain convolution at little cost; grouped ones need multiples of 8."""
        if node.op != "Conv":
            return False
        inputs, outputs = sizes(node)
        if int(node.attrs.get("group", 1)) > 1:
            return outputs % 8 == 0
        return max(inputs, outputs) >= least and (inputs % 8 == 0 or outputs % 8 == 0)

    def _calibrate(self, plan: Plan) -> list[Codes]:
        data = self.ctx.data
        if data is None:
            missing = self._unknown(plan)
            if missing:
                self.ctx.remark(None, "no calibration data: only tensors with a known range get codes; give --data")
            return missing
        limit = self.options.samples
        if limit is not None and data.count is not None and data.count < limit:
            raise UsageError(f"quantize-qdq: {limit} samples asked for, {data.name} holds {data.count}")
        self.statistics = data.memo.setdefault((self.model.fingerprint(), limit), {})
        names = [c.tensor.name for c in plan.codes if c.tensor.name not in self.statistics]
        self.statistics.update(calibration.calibrate(self.model, names, data, limit=limit))
        for codes in plan.codes:
            seen = self.statistics[codes.tensor.name]
            if seen.seen and seen.low == seen.high:
                self.ctx.remark(
                    codes.readers[0] if codes.readers else None,
                    f"{codes.tensor.name!r} is {seen.low:g} throughout all samples, and its codes reach no further; "
                    "give samples in which it varies",
                )
        return []

    def _unknown(self, plan: Plan) -> list[Codes]:
        return [c for c in plan.codes if c.low is None or c.high is None]

    def _touches(self, node: Node, missing: list[Codes]) -> bool:
        placer = self._placer([node])
        near = {id(node.inputs[0])}
        if self.chains and node.op == "Conv":
            near.add(id(placer.result(node)))
        return any(id(c.tensor) in near for c in missing)

    # ------------------------------------------------------------------------------------------------------- ranges

    def _range(self, codes: Codes, method: str) -> tuple[float, float]:
        seen = self.statistics.get(codes.tensor.name)
        if seen is None or not seen.seen:
            return codes.low or 0.0, codes.high or 0.0
        low, high = find_range(seen, method, self.scheme, self.options.share)
        if codes.low is not None:
            low = max(low, codes.low)
        if codes.high is not None:
            high = min(high, codes.high)
        return low, high

    def _affines(self, plan: Plan) -> dict[int, Affine]:
        """Scale and zero point of each tensor; those of a group are its leader's, whose range holds all of theirs."""
        method = self.options.calibration
        members: dict[int, list[Codes]] = {}
        for codes in plan.codes:
            members.setdefault(id(codes.root), []).append(codes)
        if method == "auto" and self.ctx.data is not None:
            ranges = self._best(members)
        else:
            ranges = {k: self._joint(group, "minmax" if method == "auto" else method) for k, group in members.items()}
        return {id(c): affine(*ranges[id(c.root)], self.scheme) for c in plan.codes}

    def _joint(self, group: list[Codes], method: str) -> tuple[float, float]:
        ranges = [self._range(c, method) for c in group]
        return min(r[0] for r in ranges), max(r[1] for r in ranges)

    def _best(self, members: dict[int, list[Codes]]) -> dict[int, tuple[float, float]]:
        """Of the methods' ranges the one with the least error at the readers, either end then drawn in as far as that helps."""
        data = self.ctx.data
        assert data is not None
        groups = {
            k: [(c.tensor.name, tuple(dict.fromkeys(n.name for n in c.readers))) for c in group]
            for k, group in members.items()
        }
        known: dict[Any, tuple[float, float]] = data.memo.setdefault(
            ("ranges", self.model.fingerprint(), self.scheme, self.options.share), {}
        )
        missing = {k: group for k, group in groups.items() if tuple(group) not in known}
        if missing:
            work = calibration.effort(self.model, data)
            judge = RangeJudge(self.model, missing, data, work.samples(_RANGE_WORK, 4, _JUDGED_ON))
            best: dict[int, tuple[float, tuple[float, float]]] = {}

            def attempt(ranges: dict[int, tuple[float, float]]) -> None:
                losses = judge.losses({k: affine(*r, self.scheme) for k, r in ranges.items()})
                for k, r in ranges.items():
                    if k not in best or losses.get(k, 0.0) < best[k][0]:
                        best[k] = losses.get(k, 0.0), r

            for method in _TRIED:
                attempt({k: self._joint(members[k], method) for k in missing})
            for share in _SHARES if work.macs < _HEAVY else ():
                attempt({k: (r[0] * share, r[1]) for k, (_, r) in best.items()})
            for share in _SHARES if work.macs < _HEAVY else ():
                attempt({k: (r[0], r[1] * share) for k, (_, r) in best.items()})
            known.update((tuple(groups[k]), r) for k, (_, r) in best.items())
        return {k: known[tuple(group)] for k, group in groups.items()}

    # ------------------------------------------------------------------------------------------------------ weights

    def _weights(self, plan: Plan, scales: dict[int, Affine]) -> dict[str, weights.Quantized]:
        """The weight of each operator as codes, by name."""
        found = {n.name: self._nearest(n, scales[id(n.inputs[0])].scale) for n in plan.nodes}
        data = self.ctx.data
        if self.options.rounding == "nearest" or data is None:
            return found
        known: dict[Any, weights.Quantized] = data.memo.setdefault(("gptq", self.model.fingerprint()), {})
        layers = {n: layer for n, layer in gram.layers(self.model).items() if n in found}
        keys = {n: (n, self.safe, self._mends(layer), found[n].scale.tobytes()) for n, layer in layers.items()}
        missing = {n: layer for n, layer in layers.items() if keys[n] not in known}
        mended = frozenset(n for n, layer in missing.items() if self._mends(layer))
        new = rounded(self.model, missing, found, data, pair_safe=self.safe, centred=mended, seed=self.ctx.seed)
        known.update((keys[n], new[n]) for n in missing)
        return {**found, **{n: known[keys[n]] for n in layers}}

    def _mends(self, layer: Layer) -> bool:
        """Whether the mean error of a layer goes into a bias."""
        return self.options.correct_bias and not layer.fixed_bias

    def _nearest(self, node: Node, scale: float) -> weights.Quantized:
        """The weight of `node`, its scales large enough for the bias to fit int32."""
        weight = np.asarray(node.inputs[1].values)
        least = None
        if self.chains and _has_bias(node):
            bias = np.abs(np.asarray(node.inputs[2].values, np.float64)).reshape(-1)
            least = np.broadcast_to(bias / (scale * 2.0**30), (sizes(node)[1],))
        return weights.quantize(node, weight, pair_safe=self.safe, least=least)

    # ------------------------------------------------------------------------------------------------------ changes

    def _write(self, plan: Plan, found: dict[int, Affine]) -> None:
        scales = {id(c.tensor): found[id(c)] for c in plan.codes}
        quantized = self._weights(plan, scales)
        layers = {n: layer for n, layer in gram.layers(self.model).items() if n in quantized}
        shifts: dict[str, np.ndarray[Any, Any]] = {}
        if self.options.correct_bias and self.ctx.data is not None:
            twins = {
                n.name: Twin(scales[id(n.inputs[0])], quantized[n.name].values())
                for n in plan.nodes
                if n.op != "MatMul" or (n.name in layers and layers[n.name].adder is not None)
            }
            shifts = self._shifts(twins)
        inserter = Inserter(self.edit)
        for node in plan.nodes:
            scale = scales[id(node.inputs[0])].scale
            shift = shifts.get(node.name)
            adder = layers[node.name].adder if node.name in layers else None
            if node.op == "MatMul" and shift is not None and adder is not None:
                index = layers[node.name].bias
                assert index is not None
                old = adder.inputs[index]
                values = old.values.astype(np.float64) - shift.reshape(old.shape)
                adder.inputs[index] = self.edit.constant(old.name, values.astype(old.dtype))
            elif node.op != "MatMul" and (_has_bias(node) or shift is not None):
                channels = sizes(node)[1]
                bias = np.zeros(channels)
                if _has_bias(node):
                    bias = bias + np.asarray(node.inputs[2].values, np.float64).reshape(-1)
                if shift is not None:
                    bias = bias - shift
                inserter.bias(node, bias, quantized[node.name].scale * np.float32(scale) if self.chains else None)
            inserter.weight(node, quantized[node.name])
        for codes in plan.codes:
            inserter.pair(codes, found[id(codes)])
        self.edit.commit()

    def _shifts(self, twins: dict[str, Twin]) -> dict[str, Any]:
        """The mean error of each channel, by name of the operator."""
        data = self.ctx.data
        assert data is not None
        known: dict[Any, Any] = data.memo.setdefault(("shifts", self.model.fingerprint()), {})
        keys = {
            n: (n, t.codes, hashlib.sha256(b"" if t.weight is None else t.weight.tobytes()).digest())
            for n, t in twins.items()
        }
        missing = {n: t for n, t in twins.items() if keys[n] not in known}
        if missing:
            work = calibration.effort(self.model, data)
            samples = data.head(work.samples(_BIAS_WORK, 8, _JUDGED_ON), work.at_once)
            known.update((keys[n], shift) for n, shift in judge(self.model, missing, samples)[0].items())
        return {n: known[keys[n]] for n in twins}


def _has_bias(node: Node) -> bool:
    return len(node.inputs) > 2 and bool(node.inputs[2].name)
