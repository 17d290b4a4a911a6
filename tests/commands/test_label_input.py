"""What a classifier is asked through `generate`: a prompt, lines of a pipe, the terminal; one answer for each line."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alpaca_lora.commands import label
from alpaca_lora.commands.label import shown_label
from alpaca_lora.inference import classify
from alpaca_lora.weights.huggingface import write_folder
from tests.commands.conftest import Outcome, Program, edit_json
from tests.commands.test_label import CALM, LOUD, TASK
from tests.tiny import ByteTokenizer, tiny_model

Ask = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tuned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier, which leaves control characters in and reads 24 tokens. Read only."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [f"{letter * (3 + i % 5)}\t{name}\n" for i in range(12) for letter, name in (("a", "calm"), ("b", "loud"))]
    (folder / "train.tsv").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPACA_LORA_HOME", str(folder / "home"))
        done = Program(tiny_base, folder / "train.tsv", folder)(
            "finetune", **{**TASK, "max_steps": 40}, cutoff_len=24, skip_cleaning="control_characters"
        )
    assert done.code == 0, done.err
    return folder / "out"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def ask(program: Program, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """ask(bytes of standard input, options of generate)."""

    def _ask(data: bytes = b"", *, stdin: Any = None, **options: Any) -> Outcome:
        monkeypatch.setattr(sys, "stdin", stdin or io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        return program("generate", **{"prompt": None, "max_new_tokens": None, "lora_weights": tuned, **options})

    return _ask


def test_one_text_has_the_fields_of_one_text(ask: Ask) -> None:
    done = ask(prompt=LOUD)
    assert set(done.result) == {"label", "probabilities", "prompt_tokens", "seconds"}
    assert done.out.splitlines()[0] == done.result["label"] == "loud"
    assert "labels: 'calm', 'loud'" in done.err and "loud 100.0%" in done.err
    assert "do nothing" not in done.err


def test_every_line_has_its_line(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []
    shares = classify._shares
    monkeypatch.setattr(classify, "_shares", lambda *given: streams.append(len(given[1])) or shares(*given))
    done = ask(f"{CALM}\n\n{LOUD}\r\n \t \n{CALM * 9}\n{LOUD}".encode())
    assert done.code == 0, done.err
    *labels, json_line = done.out.split("\n")[:-1]
    assert labels == ["calm", "", "loud", "", "calm", "loud"] and json_line.startswith("{")
    results = done.result["results"]
    assert [one["line"] for one in results] == [1, 2, 3, 4, 5, 6]
    assert [one["label"] or "" for one in results] == labels and set(results[1]) == {"line", "label"}
    assert [one["truncated"] for one in results if one["label"]] == [False, False, True, False]
    assert {key: done.result[key] for key in ("label", "prompt_tokens")} == {"label": "loud", "prompt_tokens": 10}
    for number in (2, 4):
        assert f"standard input:{number}: there is no text to classify" in done.err
    assert "standard input:5: the text is longer than 24 tokens: only its beginning was read" in done.err
    assert streams == [3, 1]  # the lines that are there at once; the last one ends where the input ends
    # alone a line has the same answer
    for text, number in ((CALM, 0), (LOUD, 2)):
        alone = ask(prompt=text).result["probabilities"]
        assert alone == pytest.approx(results[number]["probabilities"], abs=1e-5)


def test_a_text_is_cleaned_as_the_training_was(ask: Ask) -> None:
    """Spaces at the edges go, as a rule that was not skipped wants it; control characters stay, as in training."""
    counts = [one["prompt_tokens"] for one in ask(b"aaa\n  aaa \naa\x01a\x01\n").result["results"]]
    assert counts == [4, 4, 6]


def test_a_line_that_is_not_utf8_ends_it_with_its_number(ask: Ask) -> None:
    done = ask(b"aaaa\nbb\xe9\naaaa\n")
    assert done.code == 3 and done.out.splitlines()[0] == "calm"
    assert done.result["error"]["message"].startswith("standard input:2: byte 7 (0xe9) is not UTF-8")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_no_text_at_all(ask: Ask, data: bytes) -> None:
    done = ask(data)
    assert done.code == 2 and "no text came from standard input" in done.result["error"]["message"]
    assert done.out.split("\n")[:-2] == [""] * data.count(b"\n")


def test_a_prompt_without_text(ask: Ask) -> None:
    done = ask(prompt=" ")
    assert done.code == 2 and done.result["error"]["message"] == "--prompt: the text to classify is empty"


def test_what_a_classifier_cannot_read_is_refused_or_told(ask: Ask) -> None:
    done = ask(prompt="aaa", input="more")
    assert done.code == 2 and "--input: the model classifies one text" in done.result["error"]["message"]
    done = ask(prompt="aaa", temperature=0.5, stream="true", system_prompt="Be brief.", max_new_tokens=5)
    assert done.code == 0
    told = "these keys do nothing: max_new_tokens, temperature, stream, system_prompt"
    assert done.err.count("do nothing") == 1 and told in done.err


def test_the_terminal_survives_what_is_wrong(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: Iterator[Any] = iter(["aaaa", "", "  ", KeyboardInterrupt, "\ud800", "bbbb", EOFError])

    def typed(*_: object, **__: object) -> str:
        key = next(keys)
        if isinstance(key, type):
            raise key
        return key

    monkeypatch.setattr(Console, "input", typed)
    answers = []
    answer = label.classify

    def stumbling(model: Any, tokenizer: Any, texts: list[str], *given: Any, **named: Any) -> Any:
        answers.append(texts)
        return answer(model, tokenizer, texts, *given, **{**named, "skip_cleaning": ["all"]})

    monkeypatch.setattr(label, "classify", stumbling)
    done = ask(stdin=Terminal(io.BytesIO()))
    assert done.code == 0, done.err
    assert answers == [["aaaa"], ["\ud800"], ["bbbb"]]
    assert done.out.splitlines()[:-1] == ["calm", "loud"] and len(done.result["results"]) == 2
    assert "Ctrl-D leaves" in done.err and "error: half of a surrogate pair is no text" in done.err


def test_a_label_cannot_steer_the_terminal_or_break_its_line(
    ask: Ask, program: Program, tmp_path: Path, tuned: Path
) -> None:
    assert shown_label("a\x1b[31m\nb\u2028c\x85\t") == "a [31m b c" and shown_label("so so") == "so so"
    folder = Path(shutil.copytree(tuned, tmp_path / "evil"))
    edit_json(folder / "alpaca_lora.json", labels=["calm", "lo\nud\x1b[2J"])
    done = ask(f"{LOUD}\n{CALM}\n".encode(), lora_weights=folder)
    assert done.out.split("\n")[:2] == ["lo ud [2J", "calm"] and "\x1b" not in done.out + done.err
    assert done.result["results"][0]["label"] == "lo\nud\x1b[2J"


def test_a_classifier_without_a_record_says_what_is_not_known(ask: Ask, tmp_path: Path, tuned: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "bare"))
    (folder / "alpaca_lora.json").unlink()
    done = ask(prompt=CALM, lora_weights=folder)
    assert done.code == 0 and done.result["label"] == "LABEL_0"
    assert "there is no alpaca_lora.json: cutoff_len, the EOS and the names of the labels of its training" in done.err
    assert "template" not in done.err


@pytest.mark.parametrize(
    ("key", "value"), [("cutoff_len", "many"), ("cutoff_len", 0), ("skip_cleaning", "all"), ("skip_cleaning", ["x"])]
)
def test_a_record_that_cannot_be(ask: Ask, tmp_path: Path, tuned: Path, key: str, value: Any) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "broken"))
    edit_json(folder / "alpaca_lora.json", config={key: value})
    done = ask(prompt=CALM, lora_weights=folder)
    assert done.code == 3 and f"alpaca_lora.json: config.{key}: is " in done.result["error"]["message"]


def test_a_classifier_of_hugging_face_is_read_whole_and_without_eos(ask: Ask, tmp_path: Path) -> None:
    from alpaca_lora.models.classifier import attach_score, classifier_config

    model = tiny_model()
    attach_score(model, ("no", "yes"), seed=0)
    tensors = {name: weight for name, weight in model.state_dict().items() if not name.startswith("lm_head")}
    config = classifier_config(model.config.to_hf(), ("no", "yes"), 258)
    write_folder(tmp_path / "theirs", tensors.items(), config, tokenizer_saver=ByteTokenizer().save)
    done = ask(prompt="aaaa", base_model=tmp_path / "theirs", lora_weights=None)
    assert done.code == 0 and done.result["prompt_tokens"] == 5  # BOS and the text
    assert "cutoff_len, the EOS of its training are not known; texts are read up to 512 tokens, without EOS" in done.err
