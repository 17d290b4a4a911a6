"""The sandbox: templates that would take the machine are stopped quickly, honest ones run as Jinja runs them."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from jinja2 import TemplateError

from alpaca_lora.text.sandbox import MAX_STEPS, BudgetError, Sandbox


def run(source: str, **variables: Any) -> str:
    sandbox = Sandbox()
    return sandbox.render(sandbox.compile_source(source), **variables)


BOMBS = {
    "one loop": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop over a text": "{% for a in t %}{% for b in t %}{% for c in t %}{% endfor %}{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ [0] * 10**10 }}",
    "large power": "{{ 10 ** (10 ** 10) }}",
    "doubled by ~": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by +": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=[1,2,3,4]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "replace": "{{ ('a' * 5000)|replace('a', 'b' * 9000) }}",
    "method replace": "{{ ('a' * 5000).replace('a', 'b' * 9000) }}",
    "join": "{{ ('b' * 9000).join('a' * 9000) }}",
    "filter join": "{{ ('a' * 9000)|join('b' * 9000) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "percent": "{{ '%09999999999d' % 1 }}",
    "filter format": "{{ '%09999999999d'|format(1) }}",
    "indent": "{{ 'a\nb'|indent(10**10) }}",
    "tojson": "{{ messages|tojson(indent=10**10) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in [1,2] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "many copies": "{% set t = 'a' * 15000000 %}{% for i in range(999) %}{% set x = t|upper %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_quickly(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError):
        run(BOMBS[name], t="x" * 300, messages=[{"role": "user"}])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include 'secret' %}",
        "{% import 'secret' as s %}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''.encode('utf-16') }}",
    ],
)
def test_nothing_outside_is_reached(source: str) -> None:
    messages = [{"role": "user"}]
    with contextlib.suppress(TemplateError):
        assert run(source, messages=messages) == ""  # undefined is empty
    assert messages == [{"role": "user"}]


def test_steps_are_counted_anew_for_each_rendering() -> None:
    sandbox = Sandbox()
    template = sandbox.compile_source("{% for i in range(90000) %}{% endfor %}ok")
    assert [sandbox.render(template) for _ in range(MAX_STEPS // 90_000 + 2)] == ["ok"] * (MAX_STEPS // 90_000 + 2)


def test_a_source_without_end_is_refused() -> None:
    with pytest.raises(BudgetError):
        run(" " * 1_000_001)
    with pytest.raises(TemplateError):
        run("{{ " + "(" * 50_000 + ")" * 50_000 + " }}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% generation %}{{ 'a' ~ 1 ~ none }}{% endgeneration %}", "a1None"),
        ("{{ {'价': '<b>'}|tojson }}", '{"价": "<b>"}'),
        ("{{ [3,1]|sort|join(', ') }}{{ 'abc'|replace('b', 'dd') }}", "1, 3addc"),
        ("{% set ns = namespace(n=1) %}{% for i in 'ab' %}{% set ns.n = ns.n * 3 %}{% endfor %}{{ ns.n }}", "9"),
        ("{{ ' x '.strip() + 'Y'.lower() + 'a-b'.split('-')[-1] }}", "xyb"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}", "12"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
        ("{{ messages|map(attribute='role')|first }}", "user"),
        ("{{ 'a\nb'|indent(2) }}", "a\n  b"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}", "1"),
    ],
)
def test_honest_templates_run(source: str, text: str) -> None:
    assert run(source, messages=[{"role": "user"}, {"role": "assistant"}]) == text
