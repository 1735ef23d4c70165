"""The reference pages, made from the code: passes from docstrings, the command line from typer, files from their JSON schemas."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """The text of each page by its name."""
    found = {
        "reference/passes.md": passes(),
        "reference/command-line.md": command_line(),
        "reference/python.md": python(),
    }
    for path in sorted((ROOT / "graphopt").glob("*.schema.json")):
        found[f"reference/{path.name.removesuffix('.schema.json')}.md"] = schema(json.loads(path.read_bytes()))
    return found


def passes() -> str:
    """Every pass: what it does, its example and its options, from its docstring and its fields."""
    from graphopt.discovery import find_pass, pass_modules
    from graphopt.pipeline import PRESETS, Pipeline, value_text

    lines = [
        "# Passes",
        "",
        "`graphopt passes NAME` prints the same. *Exact* rewrites are bitwise, *reassociating* ones move roundings, *approximate* ones "
        "are judged by a metric and are in no `-O` level.",
        "",
        "## Presets",
        "",
        *_table(("preset", "passes"), ((f"`{name}`", f"`{str(Pipeline.parse(name)) or 'none'}`") for name in PRESETS)),
    ]
    for name in pass_modules():
        kind = find_pass(name)
        lines += [f"## {name}", "", f"*{kind.exactness.name.capitalize()}.*", "", *_docstring(kind.__doc__ or "")]
        comments = _comments(kind)
        rows = [
            (
                f"`{f.name.replace('_', '-')}`",
                f"`{f.type}`".replace(" | ", " or "),
                f"`{value_text(f.default)}`",
                comments.get(f.name, ""),
            )
            for f in dataclasses.fields(kind)
        ]
        if rows:
            lines += _table(("option", "type", "default", ""), rows)
    return "\n".join(lines)


def command_line() -> str:
    """Every command with its arguments and options, as ``--help`` tells them."""
    import typer

    from graphopt.cli import app

    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        group.help,
        "",
        "Exit codes: 0 ok, 1 a failed build or unequal models, 2 usage, 3 a bug in graphopt.",
        "",
    ]
    for name, command in sorted(group.commands.items()):
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(["graphopt", name, *command.collect_usage_pieces(context)])
        lines += [f"## {name}", "", inspect.cleandoc(command.help or ""), "", f"    {usage}", ""]
        rows = []
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is None:  # an argument
                record = (parameter.make_metavar(context), getattr(parameter, "help", None) or "")
            rows.append((f"`{record[0]}`", record[1]))
        lines += _table(("argument or option", ""), rows)
    return "\n".join(lines)


def python() -> str:
    """The public names with their signatures and docstrings."""
    import graphopt

    lines = ["# Python", "", "What `graphopt` lists is public; everything else may move.", ""]
    for name in sorted(graphopt.__all__):
        found = getattr(graphopt, name)
        if not callable(found):
            continue
        lines += [f"## graphopt.{name}", ""]
        if not isinstance(found, type):
            lines += ["```text", f"{name}{inspect.signature(found)}", "```", ""]
        lines += _docstring(found.__doc__ or "")
        for method, function in vars(found).items() if isinstance(found, type) else ():
            function = getattr(function, "__func__", function)
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            lines += [f"### {name}.{method}", "", "```text", f"{method}{inspect.signature(function)}", "```", ""]
            lines += _docstring(function.__doc__ or "")
    return "\n".join(lines)


def schema(root: Schema) -> str:
    """A page for a JSON schema: one table an object."""
    title = str(root.get("title", "Schema"))
    lines = [f"# {title}", "", str(root.get("description", "")), "", *_object("", root, root)]
    for name, part in root.get("$defs", {}).items():
        lines += [f"## {name}", "", str(part.get("description", "")), ""]
        lines += _object("", part, root) if part.get("properties") else [_kind(part), ""]
    return "\n".join(lines)


def _object(prefix: str, part: Schema, root: Schema) -> list[str]:
    rows = list(_rows(prefix, part))
    return _table(("key", "type", "", "what it is"), rows) if rows else []


def _rows(prefix: str, part: Schema) -> Iterator[tuple[str, ...]]:
    """A row for each key, those of inner objects as ``outer.inner``."""
    for name, inner in part.get("properties", {}).items():
        needed = "required" if name in part.get("required", ()) else ""
        yield f"`{prefix}{name}`", _kind(inner), needed, str(inner.get("description", ""))
        yield from _rows(f"{prefix}{name}.", inner)
        if isinstance(inner.get("items"), dict):
            yield from _rows(f"{prefix}{name}[].", inner["items"])
        if isinstance(inner.get("additionalProperties"), dict):
            yield from _rows(f"{prefix}{name}.NAME.", inner["additionalProperties"])
    for name, inner in part.get("patternProperties", {}).items():
        yield f"`{prefix}/{name}/`", _kind(inner), "", str(inner.get("description", ""))
        yield from _rows(f"{prefix}NAME.", inner)


def _kind(part: Schema) -> str:
    """The type of a value in words."""
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in part:
        return f"`{json.dumps(part['const'])}`"
    if "enum" in part:
        return " or ".join(f"`{json.dumps(v)}`" for v in part["enum"])
    for key in ("anyOf", "oneOf"):
        if key in part:
            return " or ".join(_kind(p) for p in part[key])
    kind = part.get("type", "any")
    text = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if isinstance(part.get("items"), dict):
        text += f" of {_kind(part['items'])}"
    limits = [f"{sign} {part[key]}" for key, sign in _LIMITS.items() if key in part]
    if "pattern" in part:
        limits.append(f"`{part['pattern']}`")
    return ", ".join([text, *limits])


_LIMITS: Final = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    def line(cells: Any) -> str:
        texts = (" ".join(str(c).split()) for c in cells)
        return "| " + " | ".join(t if "`" in t else t.replace("|", "\\|") for t in texts) + " |"  # in `code` a | is one

    return [line(head), "|" + " --- |" * len(head), *map(line, rows), ""]


def _docstring(doc: str) -> list[str]:
    """A docstring as Markdown: indented blocks become fenced ones, ``x`` becomes `x`, sections become lists."""
    lines: list[str] = []
    block: list[str] | None = None
    section = False
    for line in [*inspect.cleandoc(doc).splitlines(), ""]:
        if block is not None and (line.startswith("    ") or not line.strip()):
            block.append(line[4:])
            continue
        if block is not None:
            lines += ["```text", *"\n".join(block).strip("\n").splitlines(), "```", ""]
            block = None
        if line in ("Args:", "Returns:", "Raises:", "Yields:"):
            section = True
            lines += ["", f"**{line[:-1]}**", ""]
        elif section and line.startswith("    "):
            item = line[4:]
            name, colon, rest = item.partition(": ")
            continued = item.startswith(" ") or not colon
            lines.append(f"  {_prose(item.strip())}" if continued else f"- `{name}`: {_prose(rest)}")
        elif line.startswith("    "):
            block = [line[4:]]
            lines.append("")
        else:
            section = section and not line.strip()
            lines.append(_prose(line))
    if block is not None:
        lines += ["```text", *"\n".join(block).strip("\n").splitlines(), "```"]
    return [*lines, ""]


def _prose(text: str) -> str:
    return (
        text.replace("``", "`").replace("<", "&lt;") if "`" not in text.replace("``", "") else text.replace("``", "`")
    )


def _comments(kind: type) -> dict[str, str]:
    """The comment beside each field of a dataclass."""
    source = inspect.getsource(kind)
    comments = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    [body] = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            found[statement.target.id] = " ".join(comments[n] for n in lines if n in comments)
    return found
