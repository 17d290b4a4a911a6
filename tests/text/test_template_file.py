"""Template files of users: what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from alpaca_lora.errors import ConfigError
from alpaca_lora.text.template_file import read_template_file

GOOD = '{\n  "prompt_input": "{instruction} {input}",\n  "prompt_no_input": "{instruction}"\n}'


def write(folder: Path, text: str, name: str = "own.json") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def test_reads_the_references_shape(tmp_path: Path) -> None:
    content = read_template_file(write(tmp_path, "\ufeff" + GOOD))
    assert content["prompt_no_input"] == "{instruction}" and content["response_split"] == "### Response:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD[:-1], ":4: "),
        ("[1]", "is not an object"),
        (GOOD.replace("prompt_no_input", "prompt_noinput"), r":3: prompt_noinput: unknown key.*'prompt_no_input'"),
        (GOOD.replace('"{instruction}"', "7"), ":3: prompt_no_input: is not text"),
        ('{"prompt_input": "x"}', "prompt_no_input: is missing"),
        ('{"prompt_input": "x", "prompt_input": "y"}', "given twice"),
    ],
)
def test_mistakes_name_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_template_file(write(tmp_path, text))


def test_yaml_objects_and_aliases_are_refused(tmp_path: Path) -> None:
    for text in ("a: &a [x]\nb: *a\n", "prompt_input: !!python/object/apply:os.getcwd []\n"):
        with pytest.raises(ConfigError):
            read_template_file(write(tmp_path, text, "own.yaml"))


def test_not_utf8_and_too_large(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(b'{"prompt_input": "\xe9"}')
    with pytest.raises(ConfigError, match="byte 18 is not UTF-8"):
        read_template_file(path)
    path.write_bytes(b" " * 1_000_001)
    with pytest.raises(ConfigError, match="larger"):
        read_template_file(path)
