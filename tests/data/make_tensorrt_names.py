"""Reduce the API of each TensorRT version to its names: ``python make_tensorrt_names.py FOLDER`` writes tensorrt_names.json.

FOLDER holds one JSON file a version, named PACKAGE-VERSION.json, as stub_import.py beside them dumps it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def names(described: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """``Builder``, ``Builder.create_network``, ``ILogger.Severity``, ...: all names under `described`."""
    for name, entry in described.items():
        yield prefix + name
        members = entry.get("members", {})
        if isinstance(members, list):  # an enum
            yield from (f"{prefix}{name}.{member}" for member in members)
        else:
            yield from names(members, f"{prefix}{name}.")


def compact(folder: Path) -> dict[str, Any]:
    """Which versions have which names: ``{"versions": [...], "names": {class: {bits: "name name ..."}}}``.

    `bits` has one character a version: ``101`` means the first and the third.
    """
    files = sorted(folder.glob("*.json"))
    known = [set(names(json.loads(file.read_text())["names"])) for file in files]
    table: dict[str, dict[str, list[str]]] = {}
    for name in sorted(set.union(*known)):
        owner, _, member = name.rpartition(".")
        if member != "__init__":
            bits = "".join("01"[name in version] for version in known)
            table.setdefault(owner, {}).setdefault(bits, []).append(member)
    joined = {owner: {bits: " ".join(members) for bits, members in rows.items()} for owner, rows in table.items()}
    return {"versions": [file.stem for file in files], "names": joined}


def expand(text: str) -> dict[str, set[str]]:
    """Version -> its names, from what `compact` wrote."""
    table = json.loads(text)
    result: dict[str, set[str]] = {version: set() for version in table["versions"]}
    for owner, rows in table["names"].items():
        for bits, members in rows.items():
            for version, bit in zip(table["versions"], bits, strict=True):
                if bit == "1":
                    result[version].update(f"{owner}.{m}" if owner else m for m in members.split())
    return result


if __name__ == "__main__":
    target = Path(__file__).with_name("tensorrt_names.json")
    table = compact(Path(sys.argv[1]))
    rows = ",\n".join(f" {json.dumps(owner)}: {json.dumps(rows)}" for owner, rows in table["names"].items())
    target.write_text(f'{{"versions": {json.dumps(table["versions"])}, "names": {{\n{rows}\n}}}}\n')
