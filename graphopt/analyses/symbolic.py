"""Integer expressions over symbolic dimensions, in one canonical form: ``N``, ``N*S``, ``2*S + 1``, ``S//2``.

An expression is a polynomial with integer coefficients over atoms. An atom is a symbol or a function of expressions that is no polynomial
(floor division, remainder, minimum, maximum). Equal polynomials are equal objects in the sense of ``==``, so equality of dimensions is
decided exactly for polynomials and soundly (never wrongly "equal") for the rest. Constants are plain ``int``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Union

Atom = Union[str, "Function"]
Monomial = tuple[Atom, ...]  # sorted, with repetition; () is 1
Dim = Union[int, "Expr"]

_MAX_TERMS: Final = 32  # beyond these an expression becomes opaque, so that no shape arithmetic can blow up
_MAX_ATOMS: Final = 256  # in all terms, arguments of functions included
_MAX_DEPTH: Final = 16  # functions in functions
_RANGE: Final = 1 << 63  # what int64 holds


@dataclass(frozen=True)
class Function:
    """``name(arguments)``: one of ``//``, ``%``, ``min``, ``max``; or ``?`` for an opaque value, told apart by its number."""

    name: str
    arguments: tuple[Dim, ...]

    def __str__(self) -> str:
        if self.name in ("//", "%"):
            left, right = (f"({a})" if isinstance(a, Expr) and not a.is_atom else str(a) for a in self.arguments)
            return f"{left}{self.name}{right}"
        return f"{self.name}({','.join(map(str, self.arguments))})"


@dataclass(frozen=True)
class Expr:
    """A polynomial that is no constant: terms sorted, coefficients not zero."""

    terms: tuple[tuple[Monomial, int], ...]

    @property
    def is_atom(self) -> bool:
        """Whether it is a single symbol or function."""
        return len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1

    @property
    def is_opaque(self) -> bool:
        """Whether it is a value of which nothing is known but its identity."""
        atom = self.terms[0][0][0] if self.is_atom else None
        return isinstance(atom, Function) and atom.name == "?"

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in sorted(self.terms, key=lambda t: (-len(t[0]), str(t[0]))):
            factors = [str(a) for a in monomial]
            if coefficient != 1 or not factors:
                factors.insert(0, str(coefficient))
            parts.append("*".join(factors))
        return " + ".join(parts).replace("+ -", "- ")

    def __add__(self, other: Dim) -> Dim:
        return add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Dim) -> Dim:
        return add(self, multiply(other, -1))

    def __rsub__(self, other: Dim) -> Dim:
        return add(other, multiply(self, -1))

    def __mul__(self, other: Dim) -> Dim:
        return multiply(self, other)

    __rmul__ = __mul__


def symbol(name: str) -> Expr:
    """The dimension called `name`."""
    return Expr((((name,), 1),))


def opaque(number: int) -> Expr:
    """A value equal to itself alone; callers number them."""
    return _atom(Function("?", (number,)))


def _atom(atom: Atom) -> Expr:
    expression = Expr((((atom,), 1),))
    return expression if _fits(expression) else _beyond(expression)


def _fits(value: Expr) -> bool:
    atoms, depth = _extent(value)
    return atoms <= _MAX_ATOMS and depth <= _MAX_DEPTH


def _extent(value: Dim) -> tuple[int, int]:
    """How many atoms `value` is written with, and how deep they lie in one another."""
    atoms = depth = 0
    for atom in () if isinstance(value, int) else (a for m, _ in value.terms for a in m):
        inner = [(0, 0)] if isinstance(atom, str) else [_extent(a) for a in atom.arguments]
        atoms += 1 + sum(a for a, _ in inner)
        depth = max(depth, 1 + max(d for _, d in inner))
    return atoms, depth


def _beyond(value: object) -> Expr:
    """An opaque value in place of one that is too large to write down: the same for the same."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    return Expr((((Function("?", (-1 - int.from_bytes(digest[:16]),)),), 1),))


def _terms(value: Dim) -> Mapping[Monomial, int]:
    return dict(value.terms) if isinstance(value, Expr) else {(): int(value)} if value else {}


def _make(terms: Mapping[Monomial, int]) -> Dim:
    kept = {m: c for m, c in terms.items() if c}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return _integer(kept[()])
    expression = Expr(tuple(sorted(kept.items(), key=_order)))
    small = len(kept) <= _MAX_TERMS and all(abs(c) < _RANGE for c in kept.values())
    return expression if small and _fits(expression) else _beyond(expression)


def _integer(value: int) -> Dim:
    return value if abs(value) < _RANGE else _beyond(value)


def _order(term: tuple[Monomial, int]) -> tuple[int, str]:
    return len(term[0]), str([str(a) for a in term[0]])


def add(a: Dim, b: Dim) -> Dim:
    """``a + b``."""
    if isinstance(a, int) and isinstance(b, int):
        return _integer(a + b)
    total = dict(_terms(a))
    for monomial, coefficient in _terms(b).items():
        total[monomial] = total.get(monomial, 0) + coefficient
    return _make(total)


def multiply(a: Dim, b: Dim) -> Dim:
    """``a * b``."""
    if isinstance(a, int) and isinstance(b, int):
        return _integer(a * b)
    total: dict[Monomial, int] = {}
    for left, x in _terms(a).items():
        for right, y in _terms(b).items():
            monomial = tuple(sorted(left + right, key=str))
            total[monomial] = total.get(monomial, 0) + x * y
    return _make(total)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of all."""
    total: Dim = 1
    for dim in dims:
        total = multiply(total, dim)
    return total


def divide_exactly(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` where `b` is one term that divides every term of `a`, else None. Assumes that `b` is not zero."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    divisor = _terms(b)
    if len(divisor) != 1:
        return 1 if a == b else None
    ((monomial, coefficient),) = divisor.items()
    result: dict[Monomial, int] = {}
    for term, factor in _terms(a).items():
        rest = list(term)
        for atom in monomial:
            if atom not in rest:
                return None
            rest.remove(atom)
        if factor % coefficient:
            return None
        result[tuple(rest)] = factor // coefficient
    return _make(result)


def floor_divide(a: Dim, b: Dim) -> Dim:
    """``a // b``, rounded towards minus infinity; `b` must not be zero."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = divide_exactly(a, b)
    return exact if exact is not None else _atom(Function("//", (a, b)))


def remainder(a: Dim, b: Dim) -> Dim:
    """``a % b`` with the sign of `b`, as Python's."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    return 0 if divide_exactly(a, b) is not None else _atom(Function("%", (a, b)))


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller one."""
    return _extreme("min", a, b)


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger one."""
    return _extreme("max", a, b)


def _extreme(name: str, a: Dim, b: Dim) -> Dim:
    if a == b:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b) if name == "min" else max(a, b)
    gap = add(a, multiply(b, -1))
    if isinstance(gap, int):
        return (a if gap < 0 else b) if name == "min" else (a if gap > 0 else b)
    return _atom(Function(name, tuple(sorted((a, b), key=str))))


def is_positive(value: Dim) -> bool:
    """Whether it is surely > 0: symbols are dimensions, so at least 0, and one positive constant term suffices."""
    if isinstance(value, int):
        return value > 0
    return _no_negative_term(value) and _terms(value).get((), 0) > 0


def is_nonnegative(value: Dim) -> bool:
    """Whether it is surely >= 0: symbols are dimensions."""
    return value >= 0 if isinstance(value, int) else _no_negative_term(value)


def _no_negative_term(value: Expr) -> bool:
    return all(c >= 0 and all(_is_dimension(a) for a in m) for m, c in value.terms)


def _is_dimension(atom: Atom) -> bool:
    if isinstance(atom, str):
        return True
    if atom.name == "?":
        return len(atom.arguments) == 1 and isinstance(atom.arguments[0], int) and atom.arguments[0] >= 0
    if atom.name == "max":
        return any(is_nonnegative(a) for a in atom.arguments)
    return atom.name in ("//", "%", "min") and all(is_nonnegative(a) for a in atom.arguments)
