"""The engine on a real bank: every kind of adapter in one batch says what it says alone, attached to its own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.adapters.peft_format import load_adapter
from alpaca_lora.errors import AdapterError
from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.request import Completion, Request, SamplingParams
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import class_logits
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.quantization.linear import QuantizedLinear
from alpaca_lora.quantization.load import replace_module
from alpaca_lora.quantization.plan import Plan
from tests.inference.adapter_folders import BASE, KINDS, LABELS, SPECIAL, ids, make_bank, make_folder
from tests.tiny import ByteTokenizer, tiny_model

TOKENIZER: Any = ByteTokenizer()
PARAMS = SamplingParams(max_new_tokens=12)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)


def prompt(length: int) -> tuple[int, ...]:
    return tuple(ids(length, seed=1).tolist())


def run(engine: Engine) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while engine.has_work:
        done |= {event.index: event.completion for event in engine.step() if event.completion is not None}
    return done


def said_alone(folder: Path | None, request: Request, make_model: Callable[[], CausalLM] = tiny_model) -> Completion:
    """The answer of a model that has the adapter attached and no bank."""
    model = make_model()
    if folder is not None:
        load_adapter(folder, model, BASE)
    return Engine(model, TOKENIZER).generate([Request(request.prompt_ids, request.params)])[0]


@pytest.mark.parametrize("step_tokens", [24, 2048])
def test_all_kinds_in_one_batch(tmp_path: Path, step_tokens: int) -> None:
    model, bank = make_bank()
    folders: dict[str | None, Path | None] = {None: None}
    for seed, kind in enumerate((*KINDS, *SPECIAL)):
        folders[kind] = make_folder(tmp_path / kind, kind, seed=seed)
        bank.load(kind, tmp_path / kind)
    engine = Engine(model, TOKENIZER, bank=bank, max_running=24, step_tokens=step_tokens)
    names = [*folders, *reversed(folders)]
    asked = [
        Request(prompt(20 + place % 5), SAMPLED if place % 2 else PARAMS, adapter=name)
        for place, name in enumerate(names)
    ]
    answers = engine.generate(asked)
    for request, answer in zip(asked, answers, strict=True):
        assert answer.token_ids == said_alone(folders[request.adapter], request).token_ids, request.adapter
    # the negative control: adapters do say other things than the base
    base = said_alone(None, asked[0]).token_ids
    assert sum(answer.token_ids == base for answer in answers) < len(answers) / 2


def test_an_adapter_changed_on_disk_and_loaded_again(tmp_path: Path) -> None:
    model, bank = make_bank()
    engine = Engine(model, TOKENIZER, bank=bank, keep_prefixes=True)
    request = Request(prompt(40), PARAMS, adapter="a")
    folders = [make_folder(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    answers = []
    for folder in (folders[0], folders[1], folders[0]):
        bank.load("a", folder)
        answers += engine.generate([request])
        assert answers[-1].token_ids == said_alone(folder, request).token_ids
    assert [answer.cached_tokens for answer in answers] == [0, 0, 32]
    assert answers[0].token_ids != answers[1].token_ids


def test_an_adapter_that_leaves_while_it_answers(tmp_path: Path) -> None:
    model, bank = make_bank()
    folder = make_folder(tmp_path / "a")
    bank.load("a", folder)
    engine = Engine(model, TOKENIZER, bank=bank, max_running=1)
    request = Request(prompt(20), PARAMS, adapter="a")
    numbers = [engine.add(request), engine.add(request)]
    engine.step()
    bank.unload("a")
    with pytest.raises(AdapterError, match="no adapter 'a'"):
        engine.add(request)
    assert bank.num_bytes > 0
    done = run(engine)
    assert {done[index].token_ids for index in numbers} == {said_alone(folder, request).token_ids}
    assert bank.num_bytes == 0


def test_more_adapters_than_there_is_memory_for_come_and_go(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / str(seed), seed=seed) for seed in range(3)]
    one = make_bank()[1].load("a", folders[0]).num_bytes
    model, bank = make_bank(max_bytes=2 * one)
    for place, folder in enumerate(folders):
        bank.load(str(place), folder)
    engine = Engine(model, TOKENIZER, bank=bank)
    for place in (0, 1, 2, 0, 2):
        request = Request(prompt(20), PARAMS, adapter=str(place))
        (answer,) = engine.generate([request])
        assert answer.token_ids == said_alone(folders[place], request).token_ids
        assert bank.num_bytes <= 2 * one


def test_classifiers_beside_talkers(tmp_path: Path) -> None:
    model, bank = make_bank()
    for name, kind, labels in (("judge", "lora", LABELS), ("prefix judge", "prefix", LABELS), ("talker", "lora", ())):
        bank.load(name.replace(" ", "-"), make_folder(tmp_path / name, kind, labels=labels))
    engine = Engine(model, TOKENIZER, bank=bank)
    talk = Request(prompt(20), PARAMS, adapter="talker")
    numbers = [
        engine.add(Request(prompt(30), adapter="judge", kind="classify")),
        engine.add(talk),
        engine.add(Request(prompt(30), adapter="prefix-judge", kind="classify")),
    ]
    done = run(engine)
    assert done[numbers[1]].token_ids == said_alone(tmp_path / "talker", talk).token_ids
    for index, name in ((numbers[0], "judge"), (numbers[2], "prefix judge")):
        alone = tiny_model()
        load_adapter(tmp_path / name, alone, BASE)
        with torch.inference_mode():
            hidden_TD = alone(torch.tensor(prompt(30)), torch.arange(30), Packed([30]))
            want = class_logits(alone, hidden_TD[-1])
        torch.testing.assert_close(torch.tensor(done[index].class_logits), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_base(tmp_path: Path, scheme: str) -> None:
    def make_model() -> CausalLM:
        model = tiny_model(hidden_size=64, intermediate_size=64, head_dim=16)
        for name, one in Plan.uniform(model, scheme, None).schemes.items():
            replace_module(model, name, QuantizedLinear.from_dense(model.get_submodule(name), one, name=name))
        return model

    model = make_model()
    bank = AdapterBank(model, BASE)
    folders: dict[str | None, Path | None] = {None: None}
    for kind in ("lora", "dora", "prefix"):
        folders[kind] = make_folder(tmp_path / kind, kind, model=make_model())
        bank.load(kind, tmp_path / kind)
    asked = [Request(prompt(20 + n), PARAMS, adapter=name) for n, name in enumerate((*folders, *folders))]
    answers = Engine(model, TOKENIZER, bank=bank, step_tokens=40, max_running=8).generate(asked)
    for request, answer in zip(asked, answers, strict=True):
        assert answer.token_ids == said_alone(folders[request.adapter], request, make_model).token_ids
