"""Flags over file over defaults, the origin of each value, and one message for all that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator
from rich.console import Console

from alpaca_lora.config import Options, Resolved, describe, dump, keys_of, located, resolve
from alpaca_lora.errors import ConfigError, DataError, Stopped, UserError


class PathOptions(Options):
    base: str = Field(description="a model")
    files: list[str] = Field([], json_schema_extra={"commas": False}, description="some files")
    note: str | None = Field(None, description="a text")


class NumberOptions(Options):
    rank: int = Field(8, ge=1, description="a rank")
    rate: float = Field(3e-4, gt=0, description="a rate")
    dropout: float = Field(0.05, ge=0, lt=1, description="a share")
    size: int | float = Field(2000, ge=0, description="a count or a share")
    steps: int | None = Field(None, ge=1, description="a number of steps")
    kind: Literal["linear", "cosine"] = Field("linear", description="a shape")
    targets: list[str] = Field(["q_proj"], min_length=1, description="some names")
    sinks: list[Literal["board", "cloud"]] = Field([], description="some sinks")
    group: bool = Field(False, description="a switch")
    inputs: bool = Field(True, description="another switch")
    prefix: bool = Field(False, description="a switch")

    @model_validator(mode="after")
    def _check(self) -> NumberOptions:
        if self.prefix and self.group:
            raise ConfigError("does not go with group", field="prefix", fix="turn one off")
        if self.rank == 666:
            raise ValueError("a bad number")
        return self


class TinyConfig(PathOptions, NumberOptions):
    """Two rooms."""


def run(*argv: str) -> Resolved[TinyConfig]:
    return resolve(TinyConfig, list(argv), "tiny")


def problem(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> str:
        path = tmp_path / "x.yml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write


def test_flags_win_over_the_file_and_the_file_over_defaults(write) -> None:
    path = write("base: m\nrank: 16\nrate: 1e-4\n")
    resolved = run("--config", path, "--rank", "32", "--group")
    value = resolved.value
    assert (value.base, value.rank, value.rate, value.dropout, value.group) == ("m", 32, 1e-4, 0.05, True)
    assert {key: resolved.origins[key] for key in ("base", "rank", "rate", "dropout", "group")} == {
        "base": f"{path}:1",
        "rank": "flag",
        "rate": f"{path}:3",
        "dropout": "default",
        "group": "flag",
    }
    assert set(resolved.origins) == set(TinyConfig.model_fields)


def test_keys_stand_in_the_order_of_the_rooms() -> None:
    assert keys_of(TinyConfig)[:4] == ["base", "files", "note", "rank"]
    assert sorted(keys_of(TinyConfig)) == sorted(TinyConfig.model_fields)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--rate", "1e-4"], "rate", 1e-4),
        (["--rate=3"], "rate", 3.0),
        (["--size", "0.1"], "size", 0.1),
        (["--size", "10"], "size", 10),
        (["--rank", "1_000"], "rank", 1000),
        (["--steps", "null"], "steps", None),
        (["--steps", "none"], "steps", None),
        (["--note", "none"], "note", "none"),
        (["--note", "null"], "note", None),
        (["--note", "42"], "note", "42"),
        (["--note=--x"], "note", "--x"),
        (["--note="], "note", ""),
        (["--inputs", "false"], "inputs", False),
        (["--inputs", "off"], "inputs", False),
        (["--inputs", "True"], "inputs", True),
        (["--no-inputs"], "inputs", False),
        (["--no_inputs"], "inputs", False),
        (["--group"], "group", True),
        (["--targets", "a,b"], "targets", ["a", "b"]),
        (["--targets", "[a,", "b]"], "targets", ["a", "b"]),
        (["--targets", "a", "--targets", "b"], "targets", ["a", "b"]),
        (["--files", "a,b", "c"], "files", ["a,b", "c"]),
    ],
)
def test_flag_values_have_the_type_of_their_field(argv: list[str], key: str, value: object) -> None:
    found = getattr(run("--base", "m", *argv).value, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),
        ("inputs: no", "inputs", False),
        ("note: no", "note", "no"),
        ("note: '5'", "note", "5"),
        ("note: null", "note", None),
        ("files: a.json", "files", ["a.json"]),
        ("files: a,b.json", "files", ["a,b.json"]),
        ("targets: a,b", "targets", ["a", "b"]),
        ("targets: [a, b]", "targets", ["a", "b"]),
        ("targets:\n  - a\n  - b", "targets", ["a", "b"]),
    ],
)
def test_file_values(write, line: str, key: str, value: object) -> None:
    assert getattr(run("--config", write(f"base: m\n{line}\n")).value, key) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnak: 8", "{}:2: rnak: unknown key of tiny, did you mean 'rank'?"),
        ("zzzzzzz: 8", "{}:2: zzzzzzz: unknown key of tiny, `alpaca-lora tiny --help` lists the keys"),
        ("rank: '8'", "{}:2: rank: '8' is not possible, expected an integer >= 1"),
        ("rank: 8.0", "{}:2: rank: 8.0 is not possible, expected an integer >= 1"),
        ("rank: true", "{}:2: rank: true is not possible, expected an integer >= 1"),
        ("rank: 0", "{}:2: rank: 0 is not possible, expected an integer >= 1"),
        ("rank: 010", "{}:2: rank: '010' is not possible, expected an integer >= 1"),
        ("rate: .nan", "{}:2: rate: nan is not possible, expected a number > 0"),
        ("rate: -1e-4", "{}:2: rate: -0.0001 is not possible, expected a number > 0"),
        ("dropout: 1", "{}:2: dropout: 1 is not possible, expected a number >= 0 and < 1"),
        ("steps: 0", "{}:2: steps: 0 is not possible, expected an integer >= 1 or null"),
        ("group: 2", "{}:2: group: 2 is not possible, expected true or false"),
        ("kind: cosin", "{}:2: kind: 'cosin' is not possible, expected linear or cosine, did you mean 'cosine'?"),
        (
            "sinks: bord",
            "{}:2: sinks: 'bord' is not possible, expected a list of board or cloud, did you mean 'board'?",
        ),
        ("note: 5", "{}:2: note: 5 is not possible, expected text or null, put it into quotes if it is text"),
        ("targets: []", "{}:2: targets: [] is not possible, expected a list of text"),
        (
            "targets: [a, 5]",
            "{}:2: targets: 5 is not possible, expected a list of text, put it into quotes if it is text",
        ),
        ("prefix: true\ngroup: true", "{}:2: prefix: does not go with group, turn one off"),
    ],
)
def test_a_wrong_file_names_file_line_key_and_what_is_expected(write, line: str, message: str) -> None:
    path = write(f"base: m\n{line}\n")
    assert problem("--config", path) == message.format(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rnak", "8"], "--rnak: unknown key of tiny, did you mean 'rank'?"),
        (["--confg", "x.yml"], "--confg: unknown key of tiny, did you mean 'config'?"),
        (["--rank", "abc"], "--rank: 'abc' is not possible, expected an integer >= 1"),
        (["--rank", "1.5"], "--rank: 1.5 is not possible, expected an integer >= 1"),
        (["--rank"], "--rank: no value, expected an integer >= 1"),
        (["--rank", "8", "--rank", "9"], "--rank: given 2 times, expected an integer >= 1"),
        (["--rate", "nan"], "--rate: 'nan' is not possible, expected a number > 0"),
        (["--rate", "-inf"], "--rate: '-inf' is not possible, expected a number > 0"),
        (["--group", "maybe"], "--group: 'maybe' is not possible, expected true or false"),
        (["--no-group", "true"], "--no-group: takes no value, 'true' given"),
        (["--group", "--no-group"], "--group: given together with --no_group, keep one"),
        (["--targets"], "--targets: no value, expected a list of text"),
        (
            ["--note", "two", "words"],
            "--note: 2 values, expected text or null, put a text of several words into quotes",
        ),
        (["--prefix", "--group"], "--prefix: does not go with group, turn one off"),
        (["--no-rank"], "--no_rank: unknown key of tiny, did you mean 'rank'?"),
        (["--rank", "666"], "a bad number"),
        (["--config"], "--config: 0 values, expected the path of one YAML file"),
        (["--config", "a", "b"], "--config: 2 values, expected the path of one YAML file"),
    ],
)
def test_a_wrong_flag_is_named_as_it_was_given(argv: list[str], message: str) -> None:
    assert problem("--base", "m", *argv) == message


def test_a_word_without_a_flag() -> None:
    assert problem("word", "--base", "m") == "word 'word' without a flag, expected --key value"


def test_a_missing_key_says_where_it_can_be_given() -> None:
    assert problem() == "base: missing, expected text, give --base or write it in the --config file"


def test_a_missing_config_file() -> None:
    assert problem("--config", "/none/such.yml") == "/none/such.yml: --config: no such file"


def test_all_problems_are_told_at_once_what_is_wrong_before_what_is_missing(write) -> None:
    path = write("rnak: 1\nrate: 0\n")
    assert problem("--config", path, "--rank", "abc", "--steps", "1", "--steps", "2").splitlines() == [
        f"{path}:1: rnak: unknown key of tiny, did you mean 'rank'?",
        "--steps: given 2 times, expected an integer >= 1 or null",
        "--rank: 'abc' is not possible, expected an integer >= 1",
        f"{path}:2: rate: 0 is not possible, expected a number > 0",
        "base: missing, expected text, give --base or write it in the --config file",
    ]


def test_very_many_problems_are_counted(write) -> None:
    lines = problem("--base", "m", "--config", write("".join(f"key{i}: 1\n" for i in range(50)))).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 30 more"


def test_the_first_problem_gives_the_error_its_place(write) -> None:
    path = write("base: m\nrnak: 1\nrate: 0\n")
    with pytest.raises(ConfigError) as caught:
        run("--config", path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (path, 2, "rnak")


def test_the_configuration_is_frozen() -> None:
    value = run("--base", "m").value
    with pytest.raises(ValueError, match="frozen"):
        value.rank = 9  # type: ignore[misc]


def test_dump_shows_each_key_its_value_and_its_origin(write) -> None:
    path = write("base: m[b]\nrank: 16\n")
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(dump(run("--config", path, "--targets", "a,b")))
    rows = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    assert f"{path}:2" in rows["rank"]
    assert "m[b]" in rows["base"]
    assert "[a, b]" in rows["targets"]
    assert "flag" in rows["targets"]
    assert "default" in rows["rate"]
    assert set(TinyConfig.model_fields) <= set(rows)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
values: dict[str, Any] = {
    "base": texts,
    "note": st.none() | texts,
    "files": st.lists(texts, max_size=3),
    "rate": st.floats(min_value=1e-300, max_value=1e300),
    "size": st.integers(0, 2**63 - 1) | st.floats(0, 1),
    "group": st.booleans(),
    "targets": st.lists(
        st.sampled_from(["no", "1e-4", "null", "a,b", "#x", "a: b", "- a", "[q", "é", "1"]), min_size=1
    ),
}


@given(st.fixed_dictionaries(values))
def test_the_saved_file_reads_back_to_the_same_values(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "roundtrip.yml"
    resolved = Resolved(TinyConfig(**data), dict.fromkeys(TinyConfig.model_fields, "default"), "tiny")
    path.write_text(resolved.to_yaml(), encoding="utf-8")
    assert run("--config", str(path)).value == resolved.value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--note=a\0b",), "--note: holds a NUL character, delete it"),
        (("--note=a\udcff",), "--note: is not valid Unicode, write it in UTF-8"),
        (("--files=a\0b",), "--files: holds a NUL character, delete it"),
        ((f"--rank={2**63}",), "--rank: the number is too large, expected at most 2^63 - 1"),
        ((f"--rank={'9' * 5000}",), "--rank: inf is not possible, expected an integer >= 1"),
    ],
)
def test_what_no_field_can_use_is_refused_for_all_rooms(words: tuple[str, ...], message: str) -> None:
    assert problem("--base=m", *words) == message


def test_an_error_of_a_room_gets_the_place_its_key_was_written_at(write) -> None:
    path = write("base: m\nrank: 16\n")
    origins = resolve(TinyConfig, ["--config", path, "--note=x"], "tiny").origins
    error = UserError("is odd", field="rank", expected="even", fix="add 1")
    assert str(located(error, origins)) == f"{path}:2: rank: is odd, expected even, add 1"
    assert type(located(error, origins)) is UserError
    assert str(located(ConfigError("is odd", field="note"), origins)) == "--note: is odd"
    for placed in (
        ConfigError("is odd", field="files"),
        DataError("is odd", file="f", field="rank"),
        Stopped(2, "end"),
    ):
        assert located(placed, origins) is placed


def test_describe_names_type_and_limits() -> None:
    fields = TinyConfig.model_fields
    assert describe(fields["size"]) == "an integer or a number >= 0"
    assert describe(fields["sinks"]) == "a list of board or cloud"


class ListOptions(Options):
    shares: list[float] = Field([], description="numbers")
    layers: list[int] = Field([], description="whole numbers")


def test_the_items_of_a_list_are_numbers_where_numbers_are_wanted() -> None:
    value = resolve(ListOptions, ["--shares", "0.7", "-3", "--layers", "1,2"], "finetune").value
    assert (value.shares, value.layers) == ([0.7, -3.0], [1, 2])
    assert ListOptions(shares="1,2e-1").shares == [1.0, 0.2]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="'x' is not possible, expected a list of"):
        resolve(ListOptions, ["--layers", "1,x"], "finetune")
