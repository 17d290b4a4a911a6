"""`generate` through its command line: what is printed where, the JSON line, adapters with and without a record."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.peft_format import save_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.cli import main
from alpaca_lora.device import Compute
from alpaca_lora.models.load import load_base
from alpaca_lora.text.templates import load_template
from alpaca_lora.weights.huggingface import write_folder
from tests.tiny import CHATML, ByteTokenizer, tiny_model

FLOAT32 = Compute(torch.device("cpu"), torch.float32, 1, "test")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama with a chat template, as a Hugging Face folder."""
    model = tiny_model(max_position_embeddings=1024)
    tokenizer = ByteTokenizer(chat_template=CHATML)
    return write_folder(
        tmp_path / "base", model.state_dict().items(), model.config.to_hf(), tokenizer_saver=tokenizer.save
    )


def adapter_folder(
    base: Path, folder: Path, *, template: str | None, fingerprint: str | None = None, **record: Any
) -> Path:
    """A trained adapter; with `template` None a plain PEFT folder without a record."""
    loaded = load_base(str(base), FLOAT32)
    adapter = Lora.attach(loaded.model, AdapterOptions(lora_r=4), seed=0)
    for name, parameter in adapter.trained_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    content = None
    if template is not None:
        made = load_template(template, loaded.tokenizer).to_record()
        content = AdapterRecord("tiny", fingerprint or loaded.fingerprint, made, add_bos=True, **record)
    save_adapter(folder, adapter, content)
    return folder


def generate(base: Path, *flags: str, json_line: bool = True) -> int:
    words = ["generate", "--base_model", str(base), "--dtype", "float32", "--max_new_tokens", "8", *flags]
    return main([*words, "--json"] if json_line else words)


def result(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str, str]:
    """The JSON of the last line, the standard output before it, and the standard error."""
    captured = capsys.readouterr()
    *before, last = captured.out.rstrip("\n").split("\n")
    return json.loads(last), "\n".join(before), captured.err


def test_one_answer(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(base, "--prompt", "Hi") == 0
    facts, out, err = result(capsys)
    assert set(facts) == {"text", "prompt_tokens", "completion_tokens", "tokens_per_second", "finish_reason"}
    assert out == facts["text"] and facts["completion_tokens"] == 8 and facts["finish_reason"] == "length"
    assert facts["prompt_tokens"] == 1 + len("user\nHi\nassistant\n") + 3  # BOS, text, three marks of turns
    assert "template: chat" in err and "sha256" in err
    assert facts["text"] not in err or not facts["text"].strip()


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_streaming_prints_the_same(base: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert (
        generate(base, "--prompt", "Hi", "--temperature", "1", "--generation_seed", "3", *flags, json_line=False) == 0
    )
    streamed = capsys.readouterr().out
    assert generate(base, "--prompt", "Hi", "--temperature", "1", "--generation_seed", "3") == 0
    assert streamed == result(capsys)[0]["text"] + "\n"


def test_the_template_of_the_record_is_used_and_the_adapter_acts(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(base, "--prompt", "Hi", "--prompt_template_name", "alpaca")
    plain, _, _ = result(capsys)
    folder = adapter_folder(base, tmp_path / "lora", template="alpaca", system_prompt="Short.")
    assert generate(base, "--prompt", "Hi", "--lora_weights", str(folder)) == 0
    tuned, _, err = result(capsys)
    assert "template: alpaca" in err and "system prompt: Short." in err and "not merged" in err
    assert "warning" not in err
    assert tuned["prompt_tokens"] == plain["prompt_tokens"] + len("Short.\n\n")
    assert tuned["text"] != plain["text"]


def test_a_merged_folder_is_asked_with_the_template_of_its_record(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter_folder(base, tmp_path / "adapter", template="alpaca_zh")
    assert generate(base, "--prompt", "Hi", "--lora_weights", str(folder)) == 0
    facts, _, _ = result(capsys)
    (base / "alpaca_lora.json").write_bytes((folder / "alpaca_lora.json").read_bytes())
    assert generate(base, "--prompt", "Hi") == 0
    merged, _, said = result(capsys)
    assert "template: alpaca_zh" in said and merged["prompt_tokens"] == facts["prompt_tokens"]


def test_another_template_than_the_trained_one_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter_folder(base, tmp_path / "lora", template="alpaca", system_prompt="Short.")
    flags = ("--lora_weights", str(folder), "--prompt_template_name", "alpaca_zh", "--system_prompt", "Long.")
    assert generate(base, "--prompt", "Hi", *flags) == 0
    _, _, err = result(capsys)
    assert "trained with template 'alpaca', not with 'alpaca_zh'" in err
    assert "trained with another system prompt: 'Short.'" in err and "system prompt: Long." in err


def test_stops_of_the_record_end_the_answer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter_folder(base, tmp_path / "one", template="alpaca")
    generate(base, "--prompt", "Hi", "--lora_weights", str(folder))
    free, _, _ = result(capsys)
    word = free["text"][2:4]
    stopping = adapter_folder(base, tmp_path / "two", template="alpaca", stop_strings=[word])
    generate(base, "--prompt", "Hi", "--lora_weights", str(stopping))
    cut, _, _ = result(capsys)
    assert cut["finish_reason"] == "stop" and cut["text"] == free["text"][: free["text"].index(word)]


def test_a_folder_of_peft_without_a_record(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter_folder(base, tmp_path / "lora", template=None)
    assert generate(base, "--prompt", "Hi", "--lora_weights", str(folder)) == 0
    _, _, err = result(capsys)
    assert "no alpaca_lora.json" in err and "template: chat" in err


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter_folder(base, tmp_path / "lora", template="alpaca", fingerprint="0123abc")
    assert generate(base, "--prompt", "Hi", "--lora_weights", str(folder)) == 2
    facts, _, err = result(capsys)
    assert "0123abc" in facts["error"]["message"] and "0123abc" in err


def test_lines_of_a_pipe_are_a_conversation(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd?\n/reset\nHi\n"))
    assert generate(base) == 0
    last, out, _ = result(capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd?\n"))
    assert generate(base) == 0
    second, _, _ = result(capsys)
    assert second["prompt_tokens"] > last["prompt_tokens"] + len("And?")
    assert out.startswith(last["text"]) and out.endswith(last["text"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x" * 2000], "context of 1024"),
        (["--prompt", "Hi", "--prompt_template_name", "alpace"], "did you mean 'alpaca'"),
        (["--prompt", "Hi", "--top_p", "1.5"], "top_p"),
        (["--prompt", "Hi", "--lora_weights", "/no/such/folder"], "no such folder"),
    ],
)
def test_errors_are_one_message(base: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert generate(base, *flags) == 2
    facts, _, err = result(capsys)
    assert message in facts["error"]["message"] and "Traceback" not in err


def test_nothing_asked_is_an_error(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert generate(base) == 2
    assert "--prompt" in capsys.readouterr().err
