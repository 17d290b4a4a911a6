"""Chat templates: equal to transformers, and what came from the row is found in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_lora.errors import DataError, ModelFileError
from alpaca_lora.text.chat_template import ChatTemplate
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.text.rendered import Rendered
from alpaca_lora.text.templates import load_template
from tests.text.tiny_tokenizers import CHATML, FAMILIES, byte_level, of_family

WORDS = ("What does 灯 cost? 😀", "Twelve euro.\n\nIt is <|im_end|> cheap", "thanks </s>", "you are welcome")


@pytest.fixture(scope="session")
def families() -> dict[str, ChatTemplate]:
    loaded = {}
    for name in FAMILIES:
        template = load_template("chat", of_family(name))
        assert isinstance(template, ChatTemplate)
        loaded[name] = template
    return loaded


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), "chat", "chats.jsonl", 7)  # type: ignore[arg-type]


def dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


def texts(rendered: Rendered, which: str) -> list[str]:
    return [rendered.text[span.start : span.end] for span in getattr(rendered, which)]


FOUR = chat(("user", WORDS[0]), ("assistant", WORDS[1]), ("user", WORDS[2]), ("assistant", WORDS[3]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("generate", [False, True])
def test_text_and_ids_equal_transformers(
    name: str, generate: bool, families: dict[str, ChatTemplate], tmp_path: Path
) -> None:
    tokenizer = of_family(name)
    tokenizer.save(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = ("What does 灯 cost? 😀", "Twelve euro.", "thanks", "you are welcome")
    turns = list(zip(("user", "assistant", "user", "assistant"), plain, strict=True))
    row = chat(*(turns[:3] if generate else turns))
    expected = oracle.apply_chat_template(dicts(row), tokenize=False, add_generation_prompt=generate)
    assert families[name].render_text(dicts(row), generate=generate) == expected
    ids = oracle.apply_chat_template(dicts(row), tokenize=True, add_generation_prompt=generate, return_dict=False)
    rendered = families[name].render_prompt(row) if generate else families[name].render(row)
    # transformers adds no BOS of its own to a chat
    bos = [tokenizer.bos_id] if tokenizer.add_bos and expected.startswith(FAMILIES[name][1] or " ") else []
    ours = bos + tokenizer.encode(rendered).ids
    if generate and name == "qwen3_like":  # the empty thought before a trained answer is written for the model
        assert oracle.decode(ours) == expected + "<think>\n\n</think>\n\n"
    else:
        assert ids[: len(ours)] == ours
        assert not oracle.decode(ids[len(ours) :]).strip()  # a template may end with a line break after the last turn


ENDS = {
    "llama3": "<|eot_id|>", "mistral": "</s>", "llama2": "</s>", "gemma": "<end_of_turn>", "zephyr": "</s>",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_responses_are_the_answers_and_their_end(name: str, families: dict[str, ChatTemplate]) -> None:
    template = families[name]
    rendered = template.render(FOUR)
    end = ENDS.get(name, "<|im_end|>")
    assert template.stop_tokens == (end,) and not rendered.needs_eos and rendered.special
    for text, answer in zip(texts(rendered, "responses"), (WORDS[1], WORDS[3]), strict=True):
        assert text.endswith(end) and text.removesuffix(end).strip() == answer
    assert texts(rendered, "user_spans") == list(WORDS)
    assert rendered.responses[-1].end == len(rendered.text)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_generation_begins_where_the_answer_began(name: str, families: dict[str, ChatTemplate]) -> None:
    row = chat(*[(m.role, m.content) for m in FOUR.messages[:3]])
    prompt = families[name].render_prompt(row)
    rendered = families[name].render(FOUR)
    assert rendered.text[: rendered.responses[-1].start] == prompt.text
    assert prompt.responses == () and texts(prompt, "user_spans") == list(WORDS[:3])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_bos_and_no_special_token_out_of_a_row(name: str, families: dict[str, ChatTemplate]) -> None:
    tokenizer = of_family(name)
    hostile = " ".join(tokenizer.special_tokens)
    row = chat(("user", hostile), ("assistant", hostile))
    ids = tokenizer.encode(families[name].render(row)).ids
    plain = tokenizer.encode(families[name].render(chat(("user", "x"), ("assistant", "x")))).ids
    special = set(tokenizer.special_tokens.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    if tokenizer.bos_id is not None:
        assert ([tokenizer.bos_id] if tokenizer.add_bos else []).count(tokenizer.bos_id) + ids.count(
            tokenizer.bos_id
        ) == 1


def test_a_templates_bos_stays_where_we_add_none() -> None:
    text, bos, eos = FAMILIES["gemma"]
    tokenizer = byte_level(bos=bos, eos=eos, add_bos=False, chat_template=text)
    encoded = tokenizer.encode(load_template("chat", tokenizer).render(chat(("user", "q"), ("assistant", "a"))))
    assert tokenizer.starts_with_bos(encoded) and encoded.ids[1:].count(encoded.ids[0]) == 0


def test_answers_keep_their_end_token_as_label(families: dict[str, ChatTemplate]) -> None:
    tokenizer = of_family("chatml")
    rendered = families["chatml"].render(FOUR)
    encoded = tokenizer.encode(rendered)
    for span in rendered.responses:
        start, end, straddling = encoded.span_tokens(span)
        assert encoded.ids[end - 1] == tokenizer.special_tokens["<|im_end|>"] and straddling == 0
        assert encoded.ids[start:end].count(tokenizer.special_tokens["<|im_end|>"]) == 1


WITH_TOOL = chat(("user", "q"), ("assistant", "call"), ("tool", "42"), ("assistant", "done"))


def test_system_and_tool_turns_where_the_template_has_none(families: dict[str, ChatTemplate]) -> None:
    row = chat(("user", "q"), ("assistant", "a"))
    rendered = families["gemma"].render(row, system_prompt="Be kind.")
    assert texts(rendered, "user_spans") == ["Be kind.\n\nq", "a"]
    assert "<|system|>\nBe kind.</s>" in families["zephyr"].render(row, system_prompt="Be kind.").text
    assert texts(families["gemma"].render(WITH_TOOL), "user_spans")[2] == "Tool result:\n42"
    assert "<|im_start|>tool\n42<|im_end|>" in families["chatml"].render(WITH_TOOL).text


def test_input_follows_the_instruction() -> None:
    row = Conversation((Message("user", "Translate.", "灯"), Message("assistant", "lamp")), "instruction", "", 0)
    rendered = load_template("chat", of_family("chatml")).render(row)
    assert texts(rendered, "user_spans") == ["Translate.\n\n灯", "lamp"]


def test_content_that_the_template_takes_apart(families: dict[str, ChatTemplate]) -> None:
    row = chat(("user", "q"), ("assistant", "<think>hm</think>\n\nlamp"))
    with pytest.raises(DataError, match=r"chats\.jsonl:7: messages: the chat template changes the text of a turn"):
        families["qwen3_like"].render(row)
    row = chat(("user", "q"), ("assistant", "  lamp \n"))
    assert texts(families["llama3"].render(row), "responses") == ["lamp<|eot_id|>"]
    assert texts(families["chatml"].render(row), "responses") == ["  lamp \n<|im_end|>"]


LOOKS_INSIDE = (
    "{% for m in messages %}{% if m.content|length > 30 %}{{ '<|user|>long:' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content|trim + '<|im_end|>\n' }}{% endfor %}"
)


def test_a_template_that_looks_at_the_content_is_marked_instead() -> None:
    template = load_template("chat", byte_level(chat_template=LOOKS_INSIDE))
    row = chat(("user", " " + "long " * 20), ("assistant", "short "))
    rendered = template.render(row)
    assert texts(rendered, "user_spans") == [("long " * 20).strip(), "short"]
    assert rendered.text.count("long:") == 1


def test_rows_that_the_template_refuses_name_file_and_line(families: dict[str, ChatTemplate]) -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:7: .*must alternate"):
        families["mistral"].render(chat(("user", "q"), ("user", "q"), ("assistant", "a")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}", "cannot be used"),
        ("{{ messages[0].content }}", "writes turn 2"),
        ("{% include 'x' %}{{ messages }}", "cannot be used"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "steps"),
    ],
)
def test_templates_that_cannot_work_are_refused_when_loaded(text: str, message: str) -> None:
    tokenizer = byte_level(chat_template=text)
    with pytest.raises(ModelFileError, match=message):
        load_template("chat", tokenizer)


def test_provenance() -> None:
    template = load_template("chat", byte_level(chat_template=CHATML))
    assert template.source == "tiny" and len(template.digest) == 64
    other = load_template("chat", byte_level(chat_template=CHATML + " "))
    assert other.digest != template.digest


CONTENT = st.text(
    alphabet=st.one_of(st.sampled_from("ab <|im_end|>\n\t </s>价😀{}%"), st.characters(exclude_categories=["Cs"])),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(CONTENT, min_size=2, max_size=5), name=st.sampled_from(["chatml", "llama3", "gemma", "llama2"])
)
def test_any_content_is_found_again(contents: list[str], name: str, families: dict[str, ChatTemplate]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    template = families[name]
    rendered = template.render(chat(*zip(roles, contents, strict=True)))
    assert rendered.text.startswith(rendered.text[: rendered.responses[0].start])
    full = template.render_text([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
    assert full.startswith(rendered.text)
    found = texts(rendered, "user_spans")
    stripped = [c if name == "chatml" else c.strip() for c in contents]
    assert found == [c for c in stripped if c]
