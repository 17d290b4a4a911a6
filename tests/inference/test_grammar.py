"""Whatever a model wants to say, the answer keeps to its grammar; hostile grammars end quickly, and with a reason."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.errors import MachineError, UserError
from alpaca_lora.inference.grammar import Grammar, GrammarCompiler
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.inference.sampler import Sampler
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.text.detokenizer import Detokenizer
from alpaca_lora.text.tokenizer import Tokenizer
from tests.inference.schema_check import violations
from tests.text.tiny_tokenizers import byte_level, from_fields, gguf_fields_of_bytes, sentencepiece_file
from tests.tiny import ByteTokenizer, tiny_model

pytest.importorskip("llguidance")

CPU = torch.device("cpu")
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "item": {"enum": ["lamp", "灯", "chair \"x\"", 3, None]},
        "count": {"type": "integer", "minimum": 1, "maximum": 250},
        "price": {"type": "number", "exclusiveMinimum": 0, "maximum": 99.5},
        "note": {"type": "string", "maxLength": 6},
        "sizes": {"type": "array", "items": {"$ref": "#/$defs/size"}, "minItems": 1, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d{2}$"},
        "to": {"oneOf": [{"type": "null"}, {"type": "object", "properties": {"kind": {"const": "shop"}},
                                           "required": ["kind"], "additionalProperties": False}]},
    },
    "required": ["item", "count", "sizes", "code", "to"],
    "additionalProperties": False,
    "$defs": {"size": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "integer", "multipleOf": 7,
              "minimum": -70, "maximum": 70}], "items": False, "minItems": 2}},
}  # fmt: skip
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"leaf": {"type": "boolean"}, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    "required": ["leaf"],
    "additionalProperties": False,
}


def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    sentencepiece_file(folder)
    return {
        "bytes": ByteTokenizer(),
        "byte-level": byte_level(),
        "sentencepiece": Tokenizer.from_folder(folder),
        "gguf": from_fields(gguf_fields_of_bytes()),
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, GrammarCompiler]]:
    found = tokenizers(tmp_path_factory.mktemp("tokenizers"))
    return {name: (tokenizer, GrammarCompiler(tokenizer)) for name, tokenizer in found.items()}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer())


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()


def say(grammar: Grammar, tokenizer: Tokenizer, seed: int, *, flat: float = 1.0, most: int = 600) -> str:
    """An answer of a model that draws from noise, stop tokens (at least one) left out."""
    params = SamplingParams(temperature=1.0, seed=seed, grammar=grammar, stop_ids=tokenizer.stop_ids)
    sampler = Sampler(params, (), CPU)
    generator = torch.Generator().manual_seed(seed)
    said: list[int] = []
    while len(said) < most and not sampler.is_done:
        logits_V = torch.randn(tokenizer.vocab_size + 3, generator=generator) * flat
        said.append(sampler.choose(logits_V).token_id)
    assert sampler.is_done, text_of(tokenizer, said)
    return text_of(tokenizer, [token_id for token_id in said if token_id not in tokenizer.stop_ids])


def answer(model: CausalLM, sampler: Sampler, prompt_ids: list[int], most: int) -> list[int]:
    """As the engine does it, but the whole text again for each token."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + most and not sampler.is_done:
        with torch.inference_mode():
            hidden_TD = model(torch.tensor(ids), torch.arange(len(ids)), Packed([len(ids)]))
            ids.append(sampler.choose(model.logits(hidden_TD[-1:])[0]).token_id)
    return ids[len(prompt_ids) :]


def allowed(grammar: Grammar, text: bytes, stop_ids: tuple[int, ...] = (257,)) -> set[int]:
    """Which bytes and stop ids may follow `text`, for the byte tokenizer."""
    state = grammar.start(stop_ids)
    for byte in text:
        state.accept(byte)
    logits_V = torch.zeros(264)
    state.mask_(logits_V)
    return set((logits_V == 0).nonzero()[:, 0].tolist())


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether the whole of `text` is an answer, for the byte tokenizer."""
    try:
        return 257 in allowed(grammar, text.encode())
    except UserError:
        return False


# ---- answers


@pytest.mark.parametrize("name", ["bytes", "byte-level", "sentencepiece", "gguf"])
@pytest.mark.parametrize("schema", [ORDER, TREE], ids=["order", "tree"])
def test_noise_becomes_what_the_schema_asks_for(
    known: dict[str, tuple[Tokenizer, GrammarCompiler]], name: str, schema: dict[str, Any]
) -> None:
    tokenizer, compiler = known[name]
    grammar = compiler.json_schema(schema)
    texts = {say(grammar, tokenizer, seed, most=2000) for seed in range(12)}
    for text in texts:
        assert violations(json.loads(text), schema) == [], text
    assert len(texts) > 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tiny_model_answers_in_json(temperature: float) -> None:
    tokenizer = ByteTokenizer()
    part = {"type": "object", "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": -9,
            "maximum": 99}}, "required": ["on"], "additionalProperties": False}  # fmt: skip
    grammar = GrammarCompiler(tokenizer).json_schema(part)
    for seed in range(4):
        model = tiny_model(seed, max_position_embeddings=1024)
        params = SamplingParams(temperature=temperature, seed=seed, grammar=grammar, stop_ids=tokenizer.stop_ids)
        sampler = Sampler(params, (), CPU)
        text = text_of(tokenizer, answer(model, sampler, tokenizer.encode_text("Light:"), 400))
        assert sampler.is_done, text
        assert violations(json.loads(text), part) == [], text


def test_json_mode_is_an_object(known: dict[str, tuple[Tokenizer, GrammarCompiler]]) -> None:
    compiler = known["bytes"][1]
    grammar = compiler.json_object()
    for text in (
        "{}",
        '{"a": [1, -2.5e3, "x\\n\\"é", {"b": null}], "c": true}',
        '{\n    "a": {\n        "b": 1\n    }\n}',
    ):
        assert accepts(grammar, text), text
    for text in ("[]", "1", " {}", "{} ", '{"a": 1,}', "{'a': 1}", '{"a": 01}', '{"a"', '{"a": NaN}'):
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("name", ["bytes", "byte-level", "sentencepiece", "gguf"])
def test_a_regular_expression_holds_as_a_whole(known: dict[str, tuple[Tokenizer, GrammarCompiler]], name: str) -> None:
    tokenizer, compiler = known[name]
    pattern = r"(yes|no|灯+)/[a-f]{2,4}\n?"
    grammar = compiler.regex(pattern)
    texts = {say(grammar, tokenizer, seed) for seed in range(20)}
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(texts) > 10


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a/ <s> /b", "a/ <s> /b"),
        ("a/\nstart: /x", "a/\nstart: /x"),
        ("a/ | %json <x>", "a/ "),
        ("a//i", "a//i"),
        (r"[/]\/", "//"),
    ],
)
def test_a_pattern_cannot_step_out_of_its_place(compiler: GrammarCompiler, pattern: str, text: str) -> None:
    grammar = compiler.regex(pattern)
    assert accepts(grammar, text)
    for other in ("x", "null", "a", "A//", text + "x"):
        assert not accepts(grammar, other), other


# ---- ends


def test_an_answer_ends_where_it_may_and_nowhere_else(compiler: GrammarCompiler) -> None:
    grammar = compiler.regex("ab*")
    assert allowed(grammar, b"") == {ord("a")}
    assert allowed(grammar, b"a") == {ord("b"), 257}
    assert allowed(grammar, b"ab", stop_ids=(257, 260)) == {ord("b"), 257, 260}
    assert allowed(grammar, b"ab", stop_ids=()) == {ord("b")}
    state = grammar.start((257,))
    state.accept(ord("a"))
    assert not state.is_done
    state.accept(257)
    assert state.is_done


def test_a_complete_answer_is_done_without_a_stop_token(compiler: GrammarCompiler) -> None:
    state = compiler.json_schema({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}).start(())
    shut = compiler.json_schema({"const": "x"}).start(())
    for byte in b'"x"':
        assert not shut.is_done
        shut.accept(byte)
    assert shut.is_done
    for byte in b'{"a":1}':
        assert not state.is_done
        state.accept(byte)
    assert state.is_done


def test_a_wrong_token_is_an_error(compiler: GrammarCompiler) -> None:
    with pytest.raises(UserError, match="grammar"):
        compiler.regex("ab").start(()).accept(ord("x"))
    with pytest.raises(UserError):
        compiler.regex("ab").start((257,)).accept(260)  # a special token that is no stop of this request


def test_states_of_one_grammar_do_not_meet(compiler: GrammarCompiler) -> None:
    grammar = compiler.regex("ab|cd")
    first, second = grammar.start(()), grammar.start(())
    first.accept(ord("a"))
    logits_V = torch.zeros(264)
    second.mask_(logits_V)
    assert set((logits_V == 0).nonzero()[:, 0].tolist()) == {ord("a"), ord("c")}


def test_special_tokens_and_rows_without_a_token_are_never_text(compiler: GrammarCompiler) -> None:
    grammar = compiler.regex("(?s:.)*")
    assert allowed(grammar, b"") == {*range(0x80), *range(0xC2, 0xF5), 257}
    # a character is finished before anything else can come
    assert allowed(grammar, "é".encode()[:1]) == set(range(0x80, 0xC0))


def test_white_space_is_bounded(compiler: GrammarCompiler) -> None:
    grammar = compiler.json_object()
    assert accepts(grammar, "{" + " " * 24 + "}") and not accepts(grammar, "{" + " " * 25 + "}")


def test_a_name_cannot_come_again_in_disguise(compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema({"properties": {"a": {"const": 1}}, "required": ["a"], "type": "object"})
    assert accepts(grammar, '{"a": 1, "b": 2}')
    for again in ('"a"', '"\\u0061"'):
        assert not accepts(grammar, f'{{"a": 1, {again}: 2}}')


# ---- grammars from outside


def tall(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


ANY_OF_NAMES = {"anyOf": [{"properties": {f"p{i}": {"type": "string"}}} for i in range(20)]}
HOSTILE: dict[str, tuple[dict[str, Any], str | None]] = {
    "recursive reference": (TREE, None),
    "reference to itself": ({"$ref": "#"}, "no token can come next"),
    "references in a ring": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},
                                                              "b": {"$ref": "#/$defs/a"}}}, "no token can come next"),
    "10^4 values": ({"enum": [f"value {i}" for i in range(10_000)]}, "has 10000 entries"),
    "depth 10^3": (tall(1000), "is nested more than"),
    "depth 30": (tall(30), None),
    "bad pattern": ({"type": "string", "pattern": "(("}, "unclosed group"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "back reference": ({"type": "string", "pattern": "(a)\\1"}, "backreferences are not supported"),
    "exponential pattern": ({"type": "string", "pattern": "^(a+)+$"}, None),
    "repeated repeats": ({"type": "string", "pattern": "((((a{1,30}){1,30}){1,30}){1,30}){1,30}"}, None),
    "contradicting bounds": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater"),
    "contradicting types": ({"type": "string", "const": 3}, "incompatible types"),
    "contradicting lengths": ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength (5) is greater"),
    "nothing": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "property 'a' is unsatisfiable"),
    "unsupported keyword": ({"type": "object", "patternProperties": {}}, "'patternProperties' is not supported"),
    "oneOf of the same": ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    "oneOf times oneOf": ({"allOf": [{"oneOf": ANY_OF_NAMES["anyOf"]}] * 8}, "schema too large"),
    "anyOf times anyOf": ({"allOf": [ANY_OF_NAMES] * 8}, "schema too large"),
    "1000 branches": ({"oneOf": [{"type": "object", "properties": {"k": {"const": f"k{i}"}}, "required": ["k"]}
                                 for i in range(900)]}, None),
    "long strings": ({"type": "string", "minLength": 9_000, "maxLength": 10_000}, None),
    "long lists": ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 9_000, "maxItems": 10_000}, None),
    "nested long lists": ({"type": "array", "maxItems": 9_999, "items": {"type": "array", "maxItems": 9_999, "items": {
        "type": "array", "maxItems": 9_999, "items": {"type": "array", "maxItems": 9_999}}}}, None),
    "large divisor": ({"type": "integer", "multipleOf": 999_983}, "have 999983 steps"),
    "fine divisor": ({"type": "number", "multipleOf": 1e-12}, "too many digits"),
    "divisors": ({"type": "object", "properties": {f"p{i}": {"type": "integer", "multipleOf": 97, "minimum": i}
                                                   for i in range(200)}}, None),
    "patterns that meet": ({"allOf": [{"type": "string", "pattern": f"x{i}"} for i in range(20)]}, "20 patterns"),
    "four patterns that meet": ({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"}
                                           for i in range(4)]}, "Unable to determine if regex is empty"),
    "patterns side by side": ({"anyOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}$"}
                                         for i in range(900)]}, None),
    "large bounds": ({"type": "number", "minimum": -(2**53), "maximum": 2**53}, None),
    "tiny bounds": ({"type": "number", "minimum": 1e-300, "maximum": 2e-300}, None),
    "500 properties": ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)},
                        "additionalProperties": {"type": "string", "pattern": "^a*$"}}, None),
    "half a character": ({"const": "\ud800"}, "unexpected end of hex escape"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_end_quickly_with_an_error_or_work(compiler: GrammarCompiler, name: str) -> None:
    """None: compiles, and a hundred tokens of it are drawn; a text: an error that holds it."""
    schema, message = HOSTILE[name]
    started = time.perf_counter()
    if message is None:
        draw(compiler.json_schema(schema), 100)
    else:
        with pytest.raises(UserError) as caught:
            draw(compiler.json_schema(schema), 100)
        assert message in str(caught.value) and len(str(caught.value)) < 500
    assert time.perf_counter() - started < 10


def draw(grammar: Grammar, most: int) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0, grammar=grammar), (), CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(most):
        if sampler.is_done:
            return
        sampler.choose(torch.randn(261, generator=generator))


@pytest.mark.parametrize("pattern", ["", "((", "(?=a)", "a" * 600, "(a)\\1"])
def test_bad_regular_expressions_are_refused(compiler: GrammarCompiler, pattern: str) -> None:
    with pytest.raises(UserError, match="regex: "):
        compiler.regex(pattern)


def test_compiling_beside_a_running_answer(compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema(ORDER)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(5):
                say(compiler.json_schema(TREE) if seed % 2 else grammar, ByteTokenizer(), 10 * seed + turn, most=2000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError, match=r"llguidance.*alpaca-lora\[serve\]"):
        GrammarCompiler(ByteTokenizer()).json_object()
