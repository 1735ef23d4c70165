"""The table of docs/fusion.md, made from the passes.

python -m docs.fusion        # write it anew
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).with_name("fusion.md")
BEGIN, END = "<!-- fusions: python -m docs.fusion -->", "<!-- end of fusions -->"


def fusions() -> str:
    """Every pass that puts several nodes into fewer, with the presets that run it and the targets it is made for."""
    from graphopt.discovery import find_pass, pass_modules
    from graphopt.pipeline import Pipeline

    levels = {level: {p.pass_name() for p in Pipeline.parse(level).passes} for level in ("O2", "O3")}
    lines = ["| pass | what it does | level | targets |", "| --- | --- | --- | --- |"]
    for name in pass_modules():
        kind = find_pass(name)
        if not (name.startswith(("fuse-", "lower-")) or kind.serves):
            continue
        level = next((f"-{found}" for found, names in levels.items() if name in names), "by name")
        targets = ", ".join(f"`{target}`" for target in kind.serves) or "every one"
        lines.append(f"| `{name}` | {kind.summary()} | {level} | {targets} |")
    return "\n".join(lines)


def page() -> str:
    """The page with its table made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{fusions()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
