"""Minimum cut: which yes-or-no choices together cost least, where costs fall on single choices and on pairs that differ.

Dinic's algorithm, without recursion; capacities are small integers, and all orders are fixed, so equal problems get equal answers.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FORBIDDEN: Final = 1 << 40
_NO: Final = 0  # terminal: choices on its side are "no"
_YES: Final = 1


class MinCut:
    """Choices, numbered from 2; of all cheapest answers `solve` gives the one with fewest "yes"."""

    def __init__(self) -> None:
        self._to: list[int] = []  # arcs in pairs: 2k forth, 2k + 1 back
        self._capacity: list[int] = []
        self._arcs: list[list[int]] = [[], []]

    def choice(self) -> int:
        """A new choice."""
        self._arcs.append([])
        return len(self._arcs) - 1

    def cost_if_yes(self, choice: int, cost: int = 1) -> None:
        """Charge `cost` for a yes."""
        self.cost_if_differ(_NO, choice, cost)

    def cost_if_no(self, choice: int, cost: int = 1) -> None:
        """Charge `cost` for a no."""
        self.cost_if_differ(choice, _YES, cost)

    def cost_if_differ(self, no: int, yes: int, cost: int = 1) -> None:
        """Charge `cost` when `no` is answered no and `yes` is answered yes."""
        for target, source, capacity in ((yes, no, cost), (no, yes, 0)):
            self._arcs[source].append(len(self._to))
            self._to.append(target)
            self._capacity.append(capacity)

    def solve(self) -> list[bool]:
        """The answer to each choice, by its number; the first two entries are the terminals."""
        while (levels := self._levels())[_YES] >= 0:
            self._block(levels)
        answers = [False] * len(self._arcs)
        answers[_YES] = True
        pending = [_YES]
        while pending:
            node = pending.pop()
            for arc in self._arcs[node]:
                source = self._to[arc]
                if self._capacity[arc ^ 1] and not answers[source]:
                    answers[source] = True
                    pending.append(source)
        return answers

    def _levels(self) -> list[int]:
        levels = [-1] * len(self._arcs)
        levels[_NO] = 0
        pending = deque([_NO])
        while pending:
            node = pending.popleft()
            for arc in self._arcs[node]:
                target = self._to[arc]
                if self._capacity[arc] and levels[target] < 0:
                    levels[target] = levels[node] + 1
                    pending.append(target)
        return levels

    def _block(self, levels: list[int]) -> None:
        """Fill every shortest path."""
        following = [0] * len(self._arcs)
        path: list[int] = []
        node = _NO
        while True:
            if node == _YES:
                amount = min(self._capacity[arc] for arc in path)
                for arc in path:
                    self._capacity[arc] -= amount
                    self._capacity[arc ^ 1] += amount
                path.clear()
                node = _NO
            arcs = self._arcs[node]
            while following[node] < len(arcs):
                arc = arcs[following[node]]
                if self._capacity[arc] and levels[self._to[arc]] == levels[node] + 1:
                    break
                following[node] += 1
            if following[node] < len(arcs):
                path.append(arcs[following[node]])
                node = self._to[path[-1]]
            elif node == _NO:
                return
            else:
                arc = path.pop()
                node = self._to[arc ^ 1]
                following[node] += 1
