"""Recipes: every complaint names file, line and key; the schema for editors says the same as the reader."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from graphopt import cli as command_line
from graphopt import models, recipe
from graphopt.recipe import RecipeError, Settings

NETS = Path(models.__file__).resolve().parent
SCHEMA = json.loads(recipe.SCHEMA_FILE.read_text())
GOOD = """#:schema x
# a comment with [brackets] and "quotes"
[defaults]
targets = ["ort:cpu",
  'tensorrt-rtx:sm86+sm89', # another
]
seed = 3

[build.small]
model = "models/small.onnx"
shapes = { x = "1x3", "in put" = "1x3x8x8:8x3x8x8:32x3x8x8" }

[build.large]
model = '''large.onnx'''
output = "../large"
level = 1
targets = []
int8 = true
data = "calib.npz"
max-drop = 1
depends = ["extra/*.png"]

[build.large.budget]
max-size = "1.5 MiB"
max-error = 1e-3
"""


def read(text: str, folder: Path) -> recipe.Recipe:
    file = folder / "graphopt.toml"
    file.write_text(text)
    return recipe.load(file)


def test_a_recipe_holds_several_builds_with_paths_of_its_folder(tmp_path: Path) -> None:
    found = read(GOOD, tmp_path)
    assert list(found.builds) == ["small", "large"]
    small, large = found.builds.values()
    assert small.model == tmp_path / "models/small.onnx"
    assert small.output == tmp_path / "out/small"
    assert small.targets == ("ort:cpu", "tensorrt-rtx:sm86+sm89")
    assert large.targets == ()
    assert large.data == str(tmp_path / "calib.npz")
    assert (large.seed, large.level, large.max_drop) == (3, 1, 1.0)
    assert large.budget.max_bytes == 1572864
    assert list(found.chosen(["large"])) == ["large"]
    jsonschema.Draft7Validator(SCHEMA).validate(tomllib.loads(GOOD))


def test_settings_come_back_from_their_table(tmp_path: Path) -> None:
    for settings in read(GOOD, tmp_path).builds.values():
        assert Settings.of_table(json.loads(json.dumps(settings.as_table()))) == settings


def test_the_request_names_no_place_of_this_machine(tmp_path: Path) -> None:
    for settings in read(GOOD, tmp_path).builds.values():
        assert str(tmp_path) not in json.dumps(settings.request())


BAD: dict[str, tuple[str, int, str]] = {  # what is wrong: the recipe, the line, and what is told
    "an unknown key": ('[build.a]\nmodel = "m"\ntarget = []', 3, "build.a.target: unknown key (did you mean 'targets'?)"),
    "a key with underscores": ('[build.a]\nmodel = "m"\n\nallow_domains = []', 4, "did you mean 'allow-domains'?"),
    "an unknown table": ('[build.a]\nmodel = "m"\n[bild.b]', 3, "bild: unknown key (did you mean 'build'?)"),
    "an unknown key in a dotted table": ('[build.a]\nmodel = "m"\nbudget.maxsize = "1 MB"', 3, "build.a.budget.maxsize: unknown key (did you mean 'max-size'?)"),
    "an unknown key in an inline table": ('[build.a]\nmodel = "m"\nbudget = {max-size = "1 MB", max-eror = 1}', 3, "max-eror: unknown key"),
    "no builds": ("[defaults]\nseed = 1", 1, "a recipe needs a table [build.NAME]"),
    "no model": ("# x\n[build.a]\nseed = 1", 2, 'build.a: lacks the key model; add model = "FILE.onnx"'),
    "a text where a list belongs": ('[build.a]\nmodel = "m"\ntargets = "ort"', 3, "is a text, and must be a list of texts"),
    "a number where a text belongs": ("[build.a]\nmodel = 3", 2, "is an integer, and must be a text"),
    "true where a number belongs": ('[build.a]\nmodel = "m"\nseed = true', 3, "is true or false, and must be an integer"),
    "a date": ('[build.a]\nmodel = "m"\nseed = 2026-01-01', 3, "is a date or time"),
    "an unknown target": ('[build.a]\nmodel = "m"\ntargets = [\n "ort",\n "tensorrtx"]', 3, "did you mean 'tensorrt"),
    "a shape that is none": ('[build.a]\nmodel = "m"\nshapes = { x = "1,3" }', 3, "expected a shape or MIN:OPT:MAX"),
    "a level that is none": ('[build.a]\nmodel = "m"\nlevel = 4', 3, "4 is none of 0, 1, 2, 3"),
    "level and passes": ('[build.a]\nmodel = "m"\npasses = "O1"\nlevel = 2', 4, "build.a.level: excludes passes"),
    "a share of more than all": ('[build.a]\nmodel = "m"\ndata = "d"\nprune = 1.5', 4, "1.5 is not between 0 and 1"),
    "a word of a set": ('[build.a]\nmodel = "m"\ngraph-level = "al"', 3, "(did you mean 'all'?)"),
    "a size that is none": ('[build.a]\nmodel = "m"\n[build.a.budget]\nmax-size = "25 Mb"', 4, "build.a.budget.max-size: '25 Mb' is no size"),
    "a negative bound": ('[build.a]\nmodel = "m"\n[build.a.budget]\nmax-error = -1', 4, "is no bound"),
    "int8 without samples": ('[build.a]\nmodel = "m"\nint8 = true', 3, "build.a.int8: needs samples"),
    "labels without int8": ('[build.a]\nmodel = "m"\nlabels = "y.npy"', 3, "belongs to int8; add int8 = true"),
    "two builds in one folder": ('[build.a]\nmodel = "m"\noutput = "o"\n[build.b]\nmodel = "m"\noutput = "./x/../o"', 6, "build 'a' writes"),
    "a build in the folder of another": ('[build.a]\nmodel = "m"\noutput = "o"\n[build.b]\nmodel = "m"\noutput = "o/b"', 6, "lie in one another"),
    "one folder for all": ('[defaults]\noutput = "o"\n[build.a]\nmodel = "m"\n[build.b]\nmodel = "m"', 2, "several builds cannot share"),
    "a name with a slash": ('[build."a/b"]\nmodel = "m"', 1, "a build's name is made of"),
    "a build that is no table": ("build.a = 3", 1, "build.a: is an integer, and must be a table"),
    "an empty path": ('[build.a]\nmodel = ""', 2, "is no path"),
    "a key behind a long text": ('[build.a]\npasses = """\nO1\n[build.x]\n"""\nmodel = "m"\nsede = 1', 7, "did you mean 'seed'?"),
    "no TOML": ("[build.a]\nmodel = ", 2, "the file is no TOML"),
    "a key twice": ('[build.a]\nmodel = "m"\nmodel = "n"', 3, "the file is no TOML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_complaints_name_file_line_and_key(case: str, tmp_path: Path) -> None:
    text, line, told = BAD[case]
    with pytest.raises(RecipeError) as error:
        read(text, tmp_path)
    message = str(error.value)
    assert told in message
    assert message.startswith(str(tmp_path / "graphopt.toml"))
    assert f":{line}:" in message or f"line {line}," in message


def test_the_schema_in_the_package_is_the_one_of_the_reader() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert recipe.schema() == SCHEMA  # python -m graphopt.recipe writes it


KNOWN_BY_THE_READER_ALONE = {
    "no model", "int8 without samples", "labels without int8", "level and passes", "two builds in one folder",
    "a build in the folder of another", "one folder for all", "no TOML", "a key twice",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD.keys() - KNOWN_BY_THE_READER_ALONE))
def test_the_schema_refuses_what_the_reader_refuses(case: str) -> None:
    def plain(value: Any) -> Any:
        return value if isinstance(value, dict | list | str | int | float) else str(value)

    table = json.loads(json.dumps(tomllib.loads(BAD[case][0]), default=plain))
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid(table)


def test_every_key_is_found_on_its_line() -> None:
    lines = GOOD.splitlines()
    found = recipe._lines(GOOD)
    for path, line in found.items():
        assert path[-1] in lines[line - 1], path

    def keys(table: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        return {(*path, k) for k in table} | {
            p for k, v in table.items() if isinstance(v, dict) for p in keys(v, (*path, k))
        }

    assert set(found) == keys(tomllib.loads(GOOD))


@pytest.mark.parametrize("text", ["25 MB", "25MB", "1.5 GiB", "0 B", "7"])
def test_sizes(text: str) -> None:
    assert recipe.parse_size(text) >= 0


# ---------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("net", ["resnet.dynamo.onnx", "vit.legacy.onnx"])
def test_init_writes_a_recipe_that_is_valid_with_its_comments_removed_too(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models").mkdir()
    (tmp_path / "my models" / "a b.onnx").write_bytes((NETS / net).read_bytes())
    assert command_line.run(["init", "my models/a b.onnx"]) == 0
    text = Path("graphopt.toml").read_text()
    assert text.startswith("#:schema file://")
    assert "float32[" in text
    assert "# Dynamic: batch" in text
    found = recipe.load("graphopt.toml")
    assert found.builds["a-b"].model == Path("my models/a b.onnx")
    keys = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and " = " in line]
    assert len(keys) == 10
    tables = {
        "build": {
            "a-b": {"model": "m", **tomllib.loads("\n".join(k for k in keys if not k.startswith("max-")))},
        }
    }
    tables["build"]["a-b"]["budget"] = tomllib.loads("\n".join(k for k in keys if k.startswith("max-")))
    jsonschema.Draft7Validator(SCHEMA).validate(tables)


def test_init_overwrites_nothing_and_takes_no_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.run(["init", str(NETS / "vit.legacy.onnx")]) == 0
    before = Path("graphopt.toml").read_bytes()
    assert command_line.run(["init", str(NETS / "resnet.legacy.onnx")]) == 1
    assert "is there already" in capfd.readouterr().err
    assert Path("graphopt.toml").read_bytes() == before
    assert command_line.run(["init", "none.onnx", "-f", "other.toml"]) == 1
    assert not Path("other.toml").exists()
