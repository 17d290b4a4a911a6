"""Python's `re` says the same of every expression that is understood; what is not understood is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.errors import AdapterError, ConfigError
from alpaca_lora.models.name_pattern import Effort, NamePattern

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.11.mlp.up_proj", "lm_head",
    "transformer.h.3.attn.attention.out_proj", "a", "aa", "ab.ba", "",
]  # fmt: skip


def matches(text: str, name: str, *, is_end: bool = False) -> bool:
    return NamePattern(text, Effort("f"), field="target_modules", is_end=is_end).matches(name)


@pytest.mark.parametrize(
    "text",
    [
        r".*", r".*\.(q|k)_proj", r"model\.layers\.\d+\..*", r"model\.layers\.[01]\.self_attn\.[a-z]_proj", "a|aa|",
        r".*layers\.(?!0\.).*", r"(?=.*mlp).*_proj", r"^model\..+$", r"\Alm_head\Z", r".*\bmlp\b.*", r"[^m].*", r"\w+",
        r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
        r"(?P<part>a|b)+\.[]b-]{1,2}[a]", r"a{2}", r"a{,2}", r"a{1,}", r"a{0}", r".{3,4}", r"(a?){5}", r"(a*)*",
        r"(|a)+",
        r"\S+", r"\D*", r"a{b", r"x{}", r"[.]*[\w.]*", r"(?:(?:a|b)\.?)*", r"a\B.*", r"[a\-z]b.[\d\w]a", r"a$|^b", "é*",
        r"^model\.layers\.1\.self_attn\.k_proj", r"lm\_head$", "model.layers.0.self_attn.q_proj",
    ],
)  # fmt: skip
def test_as_re(text: str) -> None:
    for name in NAMES:
        assert matches(text, name) == (re.fullmatch(text, name) is not None), name
        expected = re.match(rf"(.*\.)?({text})$", name) is not None
        assert matches(text, name, is_end=True) == expected, name


PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "", "^", "$", r"\b"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{,2}"])).map("(?:{0[0]}){0[1]}".format),
        inner.map(lambda text: f"(?!{text})"),
        inner.map(lambda text: f"(?={text})"),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=PIECES, name=st.text("ab.", max_size=5))
def test_as_re_whatever_it_is(text: str, name: str) -> None:
    assert matches(text, name) == (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (r"(.)\1", r"\\1 is not understood here"), (r"(?<=a)b", r"begins with \(\?<"), (r"(?i)a", r"begins with \(\?i"),
        (r"(?P=x)", "begins with"), (r"(?>a)", "begins with"), (r"a*+", "repetition of a repetition"),
        ("a**", "repetition"), ("*a", "repetition of nothing"), ("(a", r"a \( without its \)"),
        ("a)", r"a \) without its \("), ("[a", "too early"), ("a\\", "too early"), (r"\x41", r"\\x"),
        ("a{2000}", "a repetition of 2000"), ("a{3,2}", "a repetition of 3 to 2"), ("[b-a]", "the range b-a"),
        ("(" * 60 + ")" * 60, "groups inside"), (".*" * 1001, "2002 characters"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(text: str, match: str) -> None:
    with pytest.raises(AdapterError, match=match) as caught:
        NamePattern(text, Effort("folder/adapter_config.json"), field="rank_pattern")
    assert str(caught.value).startswith("folder/adapter_config.json: rank_pattern: ")
    with pytest.raises(ConfigError, match=match) as said:
        NamePattern(text, Effort(), field="lora_target_modules")
    assert str(said.value).startswith("lora_target_modules: ")


@pytest.mark.parametrize(
    "text",
    [r"(a+)+!", r"(a|a)*!", r"(a|aa)+!", r"(.*.*.*.*.*.*)*!", "(a|a)" * 60 + "!", r"((a*)*)*!", r"(a?){60}a{60}!"],
)
def test_what_backtracks_for_years_takes_no_time(text: str) -> None:
    started = time.monotonic()
    for _ in range(100):
        assert not matches(text, "a" * 60)
    assert time.monotonic() - started < 10


def test_effort_ends() -> None:
    text = r"(.*(?=.*b).*)*"
    assert matches(text, "ab" * 60)
    with pytest.raises(AdapterError, match="f: target_modules: expressions of module names take too long"):
        NamePattern(text, Effort("f", steps=100), field="target_modules").matches("ab" * 60)
    with pytest.raises(AdapterError, match="take too long"):  # to be read
        NamePattern("[a-z]" * 50, Effort("f", steps=100), field="target_modules")
