"""Strict YAML: values of the core schema, and every way a file can be wrong, with its line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from alpaca_lora.errors import ConfigError
from alpaca_lora.yaml_reader import MAX_BYTES, parse_yaml, read_yaml, read_yaml_list, resolve_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("3", 3),
        ("-7", -7),
        ("1_000", 1000),
        (".5", 0.5),
        ("2.", 2.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("0x10", "0x10"),
        ("e5", "e5"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert resolve_scalar(text) == value
    assert type(resolve_scalar(text)) is type(value)


def test_infinities_are_read_as_such_so_that_the_schema_can_refuse_them() -> None:
    assert resolve_scalar("-.inf") == float("-inf")
    assert resolve_scalar(".nan") != resolve_scalar(".nan")


def test_keys_have_values_and_lines() -> None:
    entries = parse_yaml("# head\na: 1\n\nb:\n  - x\n  - 'no'\nc: [1e-4, y]\n\"d\": '5'\n", "f.yml")
    assert {key: (entry.value, entry.line) for key, entry in entries.items()} == {
        "a": (1, 2),
        "b": (["x", "no"], 4),
        "c": ([1e-4, "y"], 7),
        "d": ("5", 8),
    }


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "null"])
def test_an_empty_file_has_no_keys(text: str) -> None:
    assert parse_yaml(text, "f.yml") == {}


@pytest.mark.parametrize(
    ("text", "line", "field", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a", "line 1 and on line 3"),
        ("a: !!python/object/apply:os.system ['true']", 1, "a", "tags are not read"),
        ("a: !!int '3'", 1, "a", "tags are not read"),
        ("!!map {a: 1}", 1, None, "tags are not read"),
        ("!x a: 1", 1, "a", "tags are not read"),
        ("a: &x [1]\nb: *x\n", 2, "b", "aliases are not read"),
        ("a: &x 1\nb: [*x]\n", 2, "b", "aliases are not read"),
        ("<<: {a: 1}", 1, None, "merge keys"),
        ("- a\n- b\n", 1, None, "not a mapping"),
        ("just words", 1, None, "not a mapping"),
        ("a: 1\nb: {c: 2}\n", 2, "b", "a mapping where a value"),
        ("a:\n  - [1]\n", 2, "a", "list inside of a list"),
        ("? [a]\n: 1\n", 1, None, "key that is not text"),
        ("a: 1\n---\nb: 2\n", 2, None, "second document"),
        ("a: [1, 2\nb: 3\n", 2, None, "not YAML"),
        ("a: 1\n\tb: 2\n", 2, None, "not YAML"),
        ("a: 1\nb: \x07\n", 2, None, "control character"),
    ],
)
def test_what_is_not_a_flat_mapping_is_refused_with_its_line(
    text: str, line: int, field: str | None, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yml")
    assert (caught.value.file, caught.value.line, caught.value.field) == ("f.yml", line, field)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"f.yml:{line}: ")


def test_a_tag_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError, match="tags are not read"):
        parse_yaml(f"a: !!python/object/apply:pathlib.Path.touch [{canary}]", "f.yml")
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "[" * 200_000,
        "a: " + "[" * 200_000,
        "".join(f"k{i}: 1\n" for i in range(20_000)),
        "a: [" + "1," * 100_000 + "1]",
    ],
    ids=["aliases", "depth", "depth of a value", "keys", "list"],
)
def test_bombs_are_refused_at_once(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        parse_yaml(text, "f.yml")
    assert time.perf_counter() - start < 5  # under one second alone; the bound leaves room for a busy machine


def test_files_that_cannot_be_text(tmp_path: Path) -> None:
    path = tmp_path / "f.yml"
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"f\.yml:2: byte 11 is not UTF-8"):
        read_yaml(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        read_yaml(path)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "f.yml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: two\r\n")
    assert {key: entry.value for key, entry in read_yaml(path).items()} == {"a": 1, "b": "two"}


def test_a_list_of_mappings_under_one_key(tmp_path: Path) -> None:
    path = tmp_path / "f.yml"
    path.write_text("# a list\nplan:\n  - {a: 1, b: [x, 2.5]}\n\n  - c: yes\n    d:\n  - {}\n")
    items = read_yaml_list(path, "plan", field="plan_file")
    assert [{key: entry.value for key, entry in item.items()} for item in items] == [
        {"a": 1, "b": ["x", 2.5]}, {"c": "yes", "d": None}, {}
    ]  # fmt: skip
    assert [[entry.line for entry in item.values()] for item in items] == [[3, 3], [5, 6], []]
    path.write_text('{"plan": [{"a": 1}]}')  # JSON is YAML
    assert [item["a"].value for item in read_yaml_list(path, "plan", field="plan_file")] == [1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f.yml: is something else"), ("[]", "f.yml:1: is something else"), ("other: []", "f.yml:1: is something"),
        ("plan: text", "f.yml:1: is something else"), ("plan:\n- [a]", "f.yml:2: is something else"),
        ("plan:\n- {a: {b: 1}}", "f.yml:2: a: a mapping where a value is expected"),
        ("plan:\n- {a: 1}\nb: 2", "f.yml:3: a second key"), ("plan: []\n---\nplan: []", "f.yml:2: a second document"),
        ("plan:\n- {a: 1, a: 2}", "f.yml:2: a: given twice"), ("plan:\n- !!python {a: 1}", "f.yml:2: plan: tag"),
        ("plan: &x\n- {a: 1}\n- *x", "f.yml:3: plan: alias"), ("plan:\n- {a: 1", "f.yml:2: not YAML"),
        ("plan:\n" + "- {}\n" * 1001, "f.yml:1002: plan: more than 1000 entries"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_mappings(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "f.yml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml_list(tmp_path / "f.yml", "plan", field="plan_file")
    assert str(caught.value).startswith(f"{tmp_path}/{says}")
    with pytest.raises(ConfigError, match=r"nowhere\.yml: plan_file: no such file"):
        read_yaml_list(tmp_path / "nowhere.yml", "plan", field="plan_file")
