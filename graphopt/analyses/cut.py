"""A cut: classes of channels and residual blocks removed from a model, and what of the original is where afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.analyses.channel_groups import ChannelGroups, Group, Kept
from graphopt.analyses.residual_blocks import Block, leave_out
from graphopt.edit import Editor, cleanup
from graphopt.ir import Model

Array = np.ndarray[Any, Any]


Place = tuple[str, int, int]  # node, operand, axis


def places_of(groups: ChannelGroups, group: Group) -> list[Place]:
    """Where the weight that gives a group its name is read: slicing renames weights, but not the nodes that read them."""
    if not group.sites:
        return [(group.name, -1, -1)]
    name, axis, _ = group.sites[0]
    nodes = groups.model.graph.nodes
    return [(node.name, i, axis) for node in nodes for i, tensor in enumerate(node.inputs) if tensor.name == name]


@dataclass
class Cut:
    """One cut after another of the same model, as seen from the original."""

    places: dict[str, list[Array | None]] = field(default_factory=dict)  # tensor -> for each axis, the indices left
    stands: dict[str, str] = field(default_factory=dict)  # tensor -> the later one of the original in whose place it is
    blocks: list[str] = field(default_factory=list)  # the additions that are gone
    removed: dict[Place, int] = field(default_factory=dict)  # place of a group -> classes

    def apply(self, model: Model, groups: ChannelGroups, gone: set[int], blocks: Sequence[Block]) -> None:
        """Remove classes and blocks from `model`, of which `groups` are."""
        kept = Kept(groups, gone)
        for group in groups.groups:
            lost = len(gone.intersection(group.classes))
            for place in places_of(groups, group):
                self.removed[place] = self.removed.get(place, 0) + lost
        for node in groups.model.graph.nodes:
            for tensor in node.outputs:
                labels = groups.labels(tensor) or ()
                if not any(atoms is not None for atoms in labels):
                    continue
                old = self.places.get(tensor.name, [None] * len(labels))
                new = [None if atoms is None else kept.indices(atoms) for atoms in labels]
                self.places[tensor.name] = [
                    n if o is None or n is None else o[n] for o, n in zip(old, new, strict=True)
                ]
        edit = Editor(model)
        groups.apply(gone, edit)
        for block in blocks:
            leave_out(model, edit, block, self.stands)
            self.blocks.append(block.join)
        edit.commit()
        cleanup(model)
