"""Every YAML file of deploy/ through yamllint."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.deploy_files import tool, yaml_files

RULES = (
    "{extends: default, rules: {line-length: {max: 140}, document-start: disable, truthy: {check-keys: true},"
    " comments: {min-spaces-from-content: 1}, octal-values: disable}}"
)


def test_yamllint_finds_nothing() -> None:
    files = yaml_files()
    assert len(files) > 10
    done = tool("yamllint", "--strict", "-f", "parsable", "-d", RULES, *map(str, files))
    assert (done.returncode, done.stdout) == (0, "")


def test_yamllint_sees_a_key_twice(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("a: 1\na: yes\n")
    done = tool("yamllint", "--strict", "-f", "parsable", "-d", RULES, str(tmp_path))
    assert done.returncode == 1 and "key-duplicates" in done.stdout and "truthy" in done.stdout
