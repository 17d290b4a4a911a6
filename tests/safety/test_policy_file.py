"""A policy file: including, changing, switching off; every way it can be wrong, with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from alpaca_lora.errors import ConfigError
from alpaca_lora.safety.policy import Policy
from tests.package_files import CHECKOUT
from tests.safety.policies import written

WORD = "  - {id: w, kind: words, action: redact, words: [blue]}\n"


def test_rules_are_included_changed_and_switched_off(tmp_path: Path) -> None:
    written(tmp_path, "rules:\n" + WORD + "  - {id: v, kind: words, action: flag, words: red}\n", "base.yml")
    path = written(tmp_path, """
rules:
  - include: base.yml
  - id: w
    action: block
    words: [green]
  - {id: v, enabled: false}
  - {id: new, kind: words, action: flag, words: 'blue, white', side: output, category: colour}
""")  # fmt: skip
    policy = Policy.from_file(path)
    assert [rule.id for rule in policy.rules] == ["w", "new"]
    assert policy.check("green", "input").action == "block"
    assert policy.check("blue red", "input").action == "allow"
    assert policy.check("blue, white", "output").categories == ("colour",)
    assert policy.categories() == ("words", "colour")
    assert set(policy.most_held("input")) == {"w"}


def test_the_policy_of_the_page(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs" / "safety.md").read_text(encoding="utf-8")
    policy = Policy.from_file(written(tmp_path, page.split("```yaml\n", 1)[1].split("```", 1)[0]))
    verdict = policy.check("Pr0ject Bluebird, TICKET-1234, 蓝鸟计划, +44 20 7946 0958", "output")
    assert verdict.text == "[project], TICKET-1234, [project], +44 20 7946 0958"
    assert [finding.rule for finding in verdict.findings] == ["project-names", "ticket-numbers", "project-names"]


def test_the_bundled_policy_can_be_included(tmp_path: Path) -> None:
    path = written(tmp_path, "rules:\n  - include: bundled\n  - {id: secrets, enabled: false}\n")
    ours, bundled = Policy.from_file(path), Policy.bundled()
    assert [rule.id for rule in bundled.rules if rule.id != "secrets"] == [rule.id for rule in ours.rules]


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, """
rules:
  - id: one
    kind: words
    action: erase
    words: [a]
  - id: two
    kind: patterns
    action: block
    patterns:
      - '(a+)+'
""")  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        Policy.from_file(path)
    first, second = str(raised.value).splitlines()
    assert first == f"{path}:5: action: 'erase' is not possible, expected flag or redact or rewrite or block"
    assert second.startswith(
        f"{path}:10: patterns: '(a+)+': at character 3: a repetition without an upper bound, write"
    )


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("{kind: words, action: flag, words: a}", "3: a rule without an id"),
        ("{id: x}", "3: id: no rule 'x' was included before"),
        ("{id: X y, kind: words, action: flag, words: a}", "3: id: 'X y' is no id"),
        (
            "{id: x, kind: wrods, action: flag}",
            "3: kind: 'wrods' is not possible, expected one of .*did you mean 'words'",
        ),
        ("{id: x, kind: words, action: flag, wrods: a}", "3: wrods: unknown key of a rule of kind words, did you mean"),
        ("{id: x, kind: words, action: flag}", "3: id: the rule 'x' has no words"),
        ("{id: x, kind: words, action: flag, words: []}", "3: words: .* is not possible"),
        ("{id: x, kind: words, action: flag, words: ['']}", "3: words: '' is no word"),
        ("{id: x, kind: words, action: flag, words: a, side: left}", "3: side: 'left' is not possible, expected input"),
        ("{id: x, kind: words, action: flag, words: a, enabled: 1}", "3: enabled: 1 is not possible"),
        ("{id: x, kind: words, action: rewrite, words: a}", "3: action: a rewrite needs a text"),
        (
            "{id: x, kind: words, action: block, words: a, replacement: b}",
            "3: replacement: nothing is replaced by block",
        ),
        ("{id: x, kind: patterns, action: flag, patterns: '('}", r"3: patterns: .* a \( without its \)"),
        (r"{id: x, kind: patterns, action: flag, patterns: '\p{No}\p{Q}'}", "3: patterns: RE2 does not take"),
        ("{id: x, kind: patterns, action: flag, patterns: a, tail: b*}", "3: tail: 'b*'"),
        ("{id: x, kind: personal_data, action: flag, entities: emial}", "3: entities: 'emial' is not known.*'email'"),
        ("{id: x, kind: secrets, action: flag, formats: [gihtub]}", "3: formats: 'gihtub' is not known.*'github'"),
        ("{id: x, kind: classifier, action: flag, classifier: c, label: l}", "3: classifier: 'c' is not known"),
        (
            "{id: x, kind: classifier, action: redact, classifier: c, label: l}",
            "3: action: a classifier names no place",
        ),
        ("{include: nowhere.yml}", "3: include: there is no file"),
        ("{include: policy.yml}", "3: include: more than 8 files include each other"),
        ("{include: bundled, id: x}", "3: include: an include stands alone"),
        ("[a]", "3: "),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, rule: str, said: str) -> None:
    path = written(tmp_path, f"# a policy\nrules:\n  - {rule}\n")
    with pytest.raises(ConfigError, match=said.replace("b*", r"b\*")) as raised:
        Policy.from_file(path)
    assert str(raised.value).startswith(f"{path}:3: ")


def test_an_id_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice, on line 2 and on line 3"):
        Policy.from_file(written(tmp_path, "rules:\n" + WORD + WORD))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Policy.from_file(tmp_path / "no.yml")


def test_an_unknown_id_names_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, "rules:\n  - include: bundled\n  - {id: secret, enabled: false}\n")
    with pytest.raises(ConfigError, match="did you mean 'secrets'"):
        Policy.from_file(path)
