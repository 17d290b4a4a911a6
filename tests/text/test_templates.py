"""The instruction templates: bytes, turns, spans, files, records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from alpaca_lora.errors import AdapterError, ConfigError, DataError, UserError
from alpaca_lora.text.messages import Conversation, Message, instruction
from alpaca_lora.text.rendered import Rendered
from alpaca_lora.text.templates import INSTRUCTION_TEMPLATES, InstructionTemplate, load_template, template_from_record
from tests.text.tiny_tokenizers import CHATML, byte_level, of_family

# characters, bytes, start of the sha256 of the raw strings that published adapters were trained with
PUBLISHED = {
    ("alpaca", "prompt_input"): (225, 225, "f1b8970aa9b05de4"),
    ("alpaca", "prompt_no_input"): (153, 153, "7768da83ee0feb38"),
    ("alpaca_legacy", "prompt_input"): (224, 224, "28811e9850d9511b"),
    ("alpaca_legacy", "prompt_no_input"): (152, 152, "35101bc36d10997c"),
    ("alpaca_short", "prompt_input"): (66, 66, "e213cba2d1089f79"),
    ("alpaca_short", "prompt_no_input"): (46, 46, "c42ad62d113edc9a"),
    ("vigogne", "prompt_input"): (246, 257, "631ae5fdf000555d"),
    ("vigogne", "prompt_no_input"): (163, 169, "82e0a57e9c7c2e56"),
}
ALPACA = INSTRUCTION_TEMPLATES["alpaca"]


def texts(rendered: Rendered, which: str) -> list[str]:
    return [rendered.text[span.start : span.end] for span in getattr(rendered, which)]


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), "chat", "chats.jsonl", 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "form"), PUBLISHED)
def test_format_constants_are_byte_for_byte_the_published_ones(name: str, form: str) -> None:
    raw = getattr(INSTRUCTION_TEMPLATES[name], form)
    digest = hashlib.sha256(raw.encode()).hexdigest()[:16]
    assert (len(raw), len(raw.encode()), digest) == PUBLISHED[name, form]


@pytest.mark.parametrize("name", INSTRUCTION_TEMPLATES)
def test_the_split_marker_is_the_last_heading(name: str) -> None:
    template = INSTRUCTION_TEMPLATES[name]
    for prompt in (template.prompt_input, template.prompt_no_input):
        assert prompt.rstrip("\n").endswith(template.response_split)


def test_chinese_template_has_its_headings() -> None:
    prompt = INSTRUCTION_TEMPLATES["alpaca_zh"].prompt_input
    for part in ("### 指令:\n{instruction}\n\n", "### 输入:\n{input}\n\n", "### 回答:\n"):
        assert part in prompt


@pytest.mark.parametrize("context", ["", "a lamp"])
def test_a_row_is_the_formatted_prompt_and_the_answer(context: str) -> None:
    rendered = ALPACA.render(instruction("Name {it} <s>", context, "A lamp."))
    prompt = ALPACA.prompt_input if context else ALPACA.prompt_no_input
    assert rendered.text == prompt.format(instruction="Name {it} <s>", input=context) + "A lamp."
    assert texts(rendered, "responses") == ["A lamp."]
    assert texts(rendered, "user_spans") == ["Name {it} <s>", *([context] if context else []), "A lamp."]
    assert rendered.needs_eos and not rendered.special


@pytest.mark.parametrize("name", INSTRUCTION_TEMPLATES)
def test_a_prompt_is_the_row_up_to_its_answer(name: str) -> None:
    template = INSTRUCTION_TEMPLATES[name]
    row = instruction("Say it", "twice", "It, it.")
    prompt = template.render_prompt(Conversation(row.messages[:1], "instruction", "", 0))
    rendered = template.render(row)
    assert rendered.text[: rendered.responses[0].start] == prompt.text
    assert prompt.responses == () and not prompt.needs_eos


def test_turns_follow_each_other_with_one_preamble() -> None:
    rendered = ALPACA.render(
        chat(("system", "Be brief."), ("user", "one?"), ("assistant", "1"), ("tool", "42"), ("assistant", "2"))
    )
    preamble = ALPACA.prompt_no_input.partition("\n\n")[0]
    assert rendered.text == (
        f"Be brief.\n\n{preamble}\n\n### Instruction:\none?\n\n### Response:\n1\n\n"
        "### Instruction:\nTool result:\n42\n\n### Response:\n2"
    )
    assert texts(rendered, "responses") == ["1", "2"]
    assert texts(rendered, "user_spans") == ["Be brief.", "one?", "1", "42", "2"]


@pytest.mark.parametrize(
    ("lead", "later"),
    [
        ("You help.\n\nUSER:\n\n", "USER:\n\n"),
        ("You help.\n\n\nUSER:\n", "USER:\n"),
        ("USER:\n\n", "USER:\n\n"),  # a heading without a preamble
        ("USER: ", "USER: "),
        ("You {{help}}.\n\nUSER: ", "USER: "),
    ],
)
def test_the_heading_of_an_own_template_stays_in_later_turns(lead: str, later: str) -> None:
    own = InstructionTemplate("own", lead + "{instruction} {input}\nA: ", lead + "{instruction}\nA: ", "A:")
    rendered = own.render(chat(("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")))
    assert rendered.text == f"{lead.format()}one?\nA: 1\n\n{later}two?\nA: 2"


def test_the_rows_system_message_goes_before_the_options() -> None:
    row = chat(("user", "q"), ("assistant", "a"))
    assert ALPACA.render(row, system_prompt="Own.").text.startswith("Own.\n\nBelow is")
    row = chat(("system", "Row's."), ("user", "q"), ("assistant", "a"))
    rendered = ALPACA.render(row, system_prompt="Own.")
    assert rendered.text.startswith("Row's.\n\nBelow is") and "Own." not in rendered.text


def test_plain_text_stands_as_it_is() -> None:
    row = Conversation((Message("assistant", "Once upon </s>"),), "text", "", 0)
    for template in (ALPACA, load_template("chat", of_family("chatml"))):
        rendered = template.render(row)
        assert rendered.text == "Once upon </s>" and texts(rendered, "responses") == ["Once upon </s>"]
        assert rendered.needs_eos and not rendered.special


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ((("user", "q"),), "turn 1"),
        ((("assistant", "a"),), "turn 1"),
        ((("user", "q"), ("assistant", "a"), ("assistant", "b")), "turn 3"),
    ],
)
def test_turns_that_teach_nothing_name_file_line_and_turn(turns: tuple[tuple[str, str], ...], what: str) -> None:
    with pytest.raises(DataError, match=rf"chats\.jsonl:7: messages: {what}"):
        ALPACA.render(chat(*turns))


def test_a_prompt_must_wait_for_an_answer() -> None:
    with pytest.raises(UserError, match="assistant's already"):
        ALPACA.render_prompt(chat(("user", "q"), ("assistant", "a")))


def test_the_default_is_what_the_model_brings() -> None:
    assert load_template(None, byte_level()).name == "alpaca"
    assert load_template(None, byte_level(chat_template=CHATML)).name == "chat"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'alpaca_short'"):
        load_template("alpaca_shrt", byte_level())
    with pytest.raises(ConfigError, match="brings no chat template"):
        load_template("chat", byte_level())
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template("missing.json", byte_level())


OWN = {
    "description": "mine",
    "prompt_input": "Q: {instruction} ({input})\nA:",
    "prompt_no_input": "Q: {instruction}\nA:",
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_own_template_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_text(json.dumps({**OWN, "response_split": "A:"}), encoding="utf-8")  # JSON is YAML
    if suffix == ".yaml":
        path.write_text(
            'prompt_input: "Q: {instruction} ({input})\\nA:"\nprompt_no_input: "Q: {instruction}\\nA:"\n',
            encoding="utf-8",
        )
    template = load_template(str(path), byte_level())
    assert template.source == str(path) and template.name == "own"
    assert template.render(instruction("why", "short", " so")).text == "Q: why (short)\nA: so"


def test_a_jinja_file_is_a_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8", newline="")
    rendered = load_template(str(path), byte_level()).render(instruction("q", "", "a"))
    assert texts(rendered, "responses") == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Q: {question}", r"has the slots \{question\}, expected \{instruction\}"),
        ("no slot", "has the slots none"),
        ("{instruction} {", "prompt_no_input"),
    ],
)
def test_wrong_slots_are_named(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InstructionTemplate("bad", "{instruction} {input}", prompt, "A:")


@pytest.mark.parametrize("name", INSTRUCTION_TEMPLATES)
def test_records_rebuild_the_template(name: str) -> None:
    record = json.loads(json.dumps(INSTRUCTION_TEMPLATES[name].to_record()))
    assert template_from_record(record, byte_level()) == INSTRUCTION_TEMPLATES[name]


def test_chat_records_rebuild_the_template() -> None:
    tokenizer = of_family("llama3")
    template = load_template("chat", tokenizer)
    again = template_from_record(json.loads(json.dumps(template.to_record())), tokenizer)
    row = instruction("q", "", "a")
    assert again.render(row) == template.render(row) and again.digest == template.digest


def test_changed_records_are_refused() -> None:
    record = ALPACA.to_record()
    with pytest.raises(AdapterError, match="sha256"):
        template_from_record({**record, "prompt_no_input": "Say yes: {instruction}"}, byte_level())
    with pytest.raises(AdapterError, match="unknown kind"):
        template_from_record({**record, "kind": "magic"}, byte_level())
    with pytest.raises(AdapterError, match="lacks"):
        template_from_record({"kind": "instruction"}, byte_level())
    with pytest.raises(AdapterError, match=r"^f\.json: template\.name: is 5, expected text"):
        template_from_record({**record, "name": 5}, byte_level(), file="f.json")


def test_a_changed_chat_template_is_not_run() -> None:
    record = load_template("chat", byte_level(chat_template=CHATML)).to_record()
    with pytest.raises(AdapterError, match="sha256"):
        template_from_record({**record, "chat_template": "{{ raise_exception('it ran') }}"}, byte_level())
