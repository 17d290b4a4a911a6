"""What holds for prefix and prompt tuning alike: they are tokens in front of every row, however rows are packed, cut,
checkpointed or cached; and every way in which they cannot be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alpaca_lora.adapters.options import AdapterOptions
from alpaca_lora.adapters.prefix import PrefixTuning
from alpaca_lora.adapters.prompt import PromptTuning
from alpaca_lora.adapters.virtual_tokens import KEY, VirtualTokenAdapter
from alpaca_lora.errors import AdapterError, AlpacaLoraError, ConfigError, UserError
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.request import Request, SamplingParams
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from tests.adapters.conftest import train_a_little
from tests.models.hf_models import MODELS, hf_model, ours_from
from tests.tiny import ByteTokenizer, tiny_model

METHODS: list[type[VirtualTokenAdapter]] = [PrefixTuning, PromptTuning]
TEXT = [5, 17, 80, 2, 33]
ROWS = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 1, 7, 4)]
both = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)


def attach(method: type[VirtualTokenAdapter], model: nn.Module, **changes: Any) -> Any:
    options = AdapterOptions(**{"method": method.method, "num_virtual_tokens": len(TEXT), **changes})
    return method.attach(model, options, seed=0, encode_text=lambda text: list(TEXT) if text else [])


def logits(model: CausalLM, rows: list[torch.Tensor]) -> torch.Tensor:
    positions_T = torch.cat([torch.arange(len(row)) for row in rows])
    return model.logits(model(torch.cat(rows), positions_T, Packed([len(row) for row in rows])))


def loss_sum(model: CausalLM, rows: list[torch.Tensor]) -> torch.Tensor:
    labels = torch.cat([F.pad(row[1:], (0, 1), value=-100) for row in rows])
    return F.cross_entropy(logits(model, rows), labels, reduction="sum", ignore_index=-100)


def gradients(adapter: Any, model: CausalLM, batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Of one optimizer batch that is cut into micro-batches."""
    parameters = [parameter for _, parameter in adapter.trained_parameters()]
    for parameter in parameters:
        parameter.grad = None
    for rows in batches:
        loss_sum(model, rows).backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith("prefix"))
    return [parameter.grad.clone() for parameter in parameters]  # pyright: ignore


@both
@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_is_its_text_before_every_row(method: type[VirtualTokenAdapter], name: str) -> None:
    model = ours_from(hf_model(name))
    with torch.no_grad():
        whole = logits(model, [torch.cat((torch.tensor(TEXT), row)) for row in ROWS])
        bare = logits(model, ROWS)
        adapter = attach(method, model)
        behind = logits(model, ROWS)
    rows = whole.split([len(TEXT) + len(row) for row in ROWS])
    torch.testing.assert_close(behind, torch.cat([row[len(TEXT) :] for row in rows]), atol=2e-5, rtol=1e-5)
    assert (behind - bare).abs().max() > 0.01
    adapter.remove()
    with torch.no_grad():  # as before: with gradients few rows go through other kernels
        assert torch.equal(logits(model, ROWS), bare) and model.prefix is None


@both
@pytest.mark.parametrize("projection", [False, True])
def test_the_gradient_does_not_depend_on_how_rows_are_cut(method: type[VirtualTokenAdapter], projection: bool) -> None:
    model = tiny_model(windows=(4, None))
    adapter = attach(method, model, prefix_projection=projection, prefix_hidden_size=6)
    train_a_little(adapter)
    want = gradients(adapter, model, [[row] for row in ROWS])
    assert all(one.abs().max() > 1e-3 and one.dtype == torch.float32 for one in want)
    for batches in ([ROWS], [ROWS[:2], ROWS[2:]], [ROWS[::-1]]):
        for checkpointing in (False, True):
            model.gradient_checkpointing = checkpointing
            for got, wanted in zip(gradients(adapter, model, batches), want, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
            assert model.gradient_checkpointing is checkpointing
    other = gradients(adapter, model, [ROWS[:3]])  # the negative control: a row left out is noticed
    assert all((one - wanted).abs().max() > 1e-3 for one, wanted in zip(other, want, strict=True))


@both
def test_long_rows_and_short_ones_in_one_stream(method: type[VirtualTokenAdapter], monkeypatch: Any) -> None:
    from alpaca_lora.kernels import attention

    model = tiny_model()
    adapter = attach(method, model)
    want, whole = gradients(adapter, model, [ROWS]), logits(model, ROWS)
    monkeypatch.setattr(attention, "LONGEST_PLAIN", 4)  # the long ones by flash
    torch.testing.assert_close(logits(model, ROWS), whole, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(gradients(adapter, model, [ROWS]), want, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@both
def test_training_moves_the_virtual_tokens_only(method: type[VirtualTokenAdapter]) -> None:
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter = attach(method, model)
    optimizer = torch.optim.Adam([parameter for _, parameter in adapter.trained_parameters()], lr=0.03)
    assert not any(adapter.moved().values())
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_sum(model, ROWS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(norm > 0.01 for norm in adapter.moved().values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)


@both
def test_bfloat16_models_get_keys_in_their_dtype_and_float32_gradients(method: type[VirtualTokenAdapter]) -> None:
    before_row = [torch.cat((torch.tensor(TEXT), ROWS[0]))]
    wanted = logits(tiny_model(), before_row)[len(TEXT) :]
    model = tiny_model().bfloat16()
    own_error = (logits(model, before_row)[len(TEXT) :] - wanted).abs().mean()
    adapter = attach(method, model)
    assert {x.dtype for pair in adapter.tokens.keys_values() for x in pair} == {torch.bfloat16}
    assert (logits(model, ROWS[:1]) - wanted).abs().mean() < 1.5 * own_error
    assert all(one.dtype == torch.float32 for one in gradients(adapter, model, [ROWS]))


# --- in generation


@torch.no_grad()
def recomputed(model: CausalLM, prompt_ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        ids.append(int(logits(model, [torch.tensor(ids)])[-1].argmax()))
    return tuple(ids[len(prompt_ids) :])


@both
@pytest.mark.parametrize("name", ["llama2-grouped-query", "gemma3", "gpt-neo", "qwen2-window"])
@pytest.mark.parametrize("step_tokens", [3, 2048])
def test_generation_with_a_cache_equals_recomputing(
    method: type[VirtualTokenAdapter], name: str, step_tokens: int
) -> None:
    model = ours_from(hf_model(name))
    adapter = attach(method, model)
    train_a_little(adapter)
    asked = [Request(tuple(row.tolist()), SamplingParams(max_new_tokens=8)) for row in ROWS]
    tokenizer: Any = ByteTokenizer()
    completions = Engine(model, tokenizer, max_running=3, step_tokens=step_tokens).generate(asked)
    want = [recomputed(model, request.prompt_ids, 8) for request in asked]
    assert [completion.token_ids for completion in completions] == want
    adapter.remove()
    assert want != [recomputed(model, request.prompt_ids, 8) for request in asked]


@both
def test_a_cache_evaluates_the_virtual_tokens_once(method: type[VirtualTokenAdapter], monkeypatch: Any) -> None:
    model = tiny_model()
    adapter = attach(method, model)
    calls = []
    evaluate = adapter.tokens.keys_values
    monkeypatch.setattr(adapter.tokens, "keys_values", lambda: calls.append(1) or evaluate())
    tokenizer: Any = ByteTokenizer()
    asked = [Request(tuple(row.tolist()), SamplingParams(max_new_tokens=5)) for row in ROWS]
    Engine(model, tokenizer, max_running=2).generate(asked)
    assert len(calls) == 1


@both
def test_the_context_holds_prompt_and_virtual_tokens(method: type[VirtualTokenAdapter]) -> None:
    model = ours_from(hf_model("gpt-neo"))  # learned positions: 64 of them
    tokenizer: Any = ByteTokenizer()
    engine = Engine(model, tokenizer)
    assert engine.context_length == 64
    attach(method, model)
    assert engine.context_length == 59
    prompt = tuple(range(58))
    (completion,) = engine.generate([Request(prompt, SamplingParams(max_new_tokens=9))])
    assert len(completion.token_ids) == 1
    with pytest.raises(UserError, match="context of 59 tokens behind 5 virtual tokens"):
        engine.generate([Request((*prompt, 1), SamplingParams(max_new_tokens=1))])
    with pytest.raises(UserError, match=r"65 tokens \(5 of them virtual\) is longer than this model's 64"):
        logits(model, [torch.arange(60)])


# --- kept and taken up again


@pytest.mark.parametrize(("method", "projection"), [(PrefixTuning, False), (PrefixTuning, True), (PromptTuning, False)])
def test_resuming_restores_what_was_trained_bit_for_bit(method: type[VirtualTokenAdapter], projection: bool) -> None:
    def new(seed: int) -> Any:
        options = AdapterOptions(
            method=method.method, num_virtual_tokens=6, prefix_projection=projection, virtual_tokens_text=""
        )
        return method.attach(tiny_model(), options, seed=seed)

    old = new(0)
    train_a_little(old)
    trained = {name: parameter.detach().clone() for name, parameter in old.trained_parameters()}
    resumed, careless = new(1), new(1)
    for adapter in (resumed, careless):
        for name, parameter in adapter.trained_parameters():
            parameter.data.copy_(trained[name])
    resumed.load_extra_state(old.extra_state())
    assert torch.equal(resumed.state_tensors()[KEY], old.state_tensors()[KEY]) and resumed.moved() == old.moved()
    # the negative control: what a network adds to, and what moved is measured from, is the start
    wrong_part = careless.state_tensors()[KEY] if projection else torch.tensor(list(careless.moved().values()))
    right_part = old.state_tensors()[KEY] if projection else torch.tensor(list(old.moved().values()))
    assert (wrong_part - right_part).abs().max() > 0.01
    for wrong in ({}, {"start": torch.zeros(2, 2)}, {**old.extra_state(), "more": torch.zeros(1)}):
        with pytest.raises(AdapterError, match="holds not the start"):
            resumed.load_extra_state(wrong)


@both
def test_state_tensors_go_back(method: type[VirtualTokenAdapter]) -> None:
    for projection in (False, True):
        adapter = attach(method, tiny_model(), prefix_projection=projection)
        train_a_little(adapter)
        state = adapter.state_tensors()
        train_a_little(adapter, seed=4)
        assert not torch.allclose(adapter.state_tensors()[KEY], state[KEY])
        adapter.load_state_tensors(state)
        torch.testing.assert_close(adapter.state_tensors()[KEY], state[KEY])
        with pytest.raises(AdapterError, match="shape"):
            adapter.load_state_tensors({KEY: state[KEY][:2]})
        with pytest.raises(AdapterError, match="other tensors"):
            adapter.load_state_tensors({**state, "extra": torch.zeros(1)})


@both
def test_the_start_is_a_text_cut_or_repeated_or_tokens_of_the_vocabulary(method: type[VirtualTokenAdapter]) -> None:
    def start(**changes: Any) -> Any:
        return attach(method, tiny_model(), **changes).tokens.table().detach()

    torch.testing.assert_close(start(num_virtual_tokens=3), start()[:3], atol=1e-5, rtol=1e-5)
    twelve = attach(method, tiny_model(), num_virtual_tokens=12)
    with torch.no_grad():
        repeated = logits(tiny_model(), [torch.cat((torch.tensor((TEXT * 3)[:12]), ROWS[0]))])[12:]
        torch.testing.assert_close(logits(twelve.model, ROWS[:1]), repeated, atol=1e-5, rtol=1e-5)
    options = AdapterOptions(method=method.method, num_virtual_tokens=5)
    blind = method.attach(tiny_model(), options, seed=0)
    assert any("no tokenizer" in message for message in blind.messages)
    silent = attach(method, tiny_model(), virtual_tokens_text="")
    assert silent.messages == [] and torch.equal(silent.tokens.table(), blind.tokens.table())
    other = method.attach(tiny_model(), options, seed=1)
    assert not torch.equal(other.tokens.table(), blind.tokens.table())


@both
def test_what_the_encoder_puts_before_every_text_stands_there_once(method: type[VirtualTokenAdapter]) -> None:
    """BOS is the first of the virtual tokens, as it is of a text; it is not repeated with the text."""

    def start(before: list[int], num_virtual_tokens: int) -> torch.Tensor:
        options = AdapterOptions(method=method.method, num_virtual_tokens=num_virtual_tokens)
        encode_text = lambda text: [*before, *([7, 8, 9] if text else [])]  # noqa: E731
        return method.attach(tiny_model(), options, seed=0, encode_text=encode_text).tokens.table().detach()  # pyright: ignore

    def exactly(ids: list[int]) -> torch.Tensor:
        options = AdapterOptions(method=method.method, num_virtual_tokens=len(ids))
        encode_text = lambda text: ids if text else []  # noqa: E731
        return method.attach(tiny_model(), options, seed=0, encode_text=encode_text).tokens.table().detach()  # pyright: ignore

    assert torch.equal(start([256], 8), exactly([256, 7, 8, 9, 7, 8, 9, 7]))
    assert torch.equal(start([], 4), exactly([7, 8, 9, 7]))
    assert torch.equal(start([256], 3), exactly([256, 7, 8]))
    with pytest.raises(ConfigError, match="virtual_tokens_text: has no tokens"):
        options = AdapterOptions(method=method.method, virtual_tokens_text=" ")
        method.attach(tiny_model(), options, seed=0, encode_text=lambda text: [256])


# --- what cannot be


@both
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_virtual_tokens": 512}, ConfigError, "num_virtual_tokens: .*no room .*fewer than 512"),
        ({"modules_to_save": ["embed_tokens"]}, ConfigError, "modules_to_save: .*trains no other modules"),
        ({"modules_to_save": ["nothing_like_it"]}, ConfigError, "names no module"),
    ],
)
def test_options_that_cannot_be(
    method: type[VirtualTokenAdapter], changes: dict[str, Any], error: type[AlpacaLoraError], words: str
) -> None:
    model = tiny_model()
    with pytest.raises(error, match=words):
        attach(method, model, **changes)
    assert model.prefix is None


@both
def test_other_things_that_cannot_be(method: type[VirtualTokenAdapter]) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="virtual_tokens_text: has no tokens"):
        method.attach(model, AdapterOptions(method=method.method), seed=0, encode_text=lambda text: [])
    with pytest.raises(ConfigError, match="decoders only, not on Sequential"):
        attach(method, nn.Sequential(nn.Linear(3, 3)))
    adapter = attach(method, model)
    for other in METHODS:
        with pytest.raises(AdapterError, match="has virtual tokens already"):
            attach(other, model)
    for merge in (adapter.merge, adapter.merged_tensors):
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge()
    adapter.remove()
    assert adapter.state_tensors() == {} and adapter.moved() == {} and list(adapter.trained_parameters()) == []
    with pytest.raises(AdapterError, match="not on the model any more"):
        adapter.remove()
    attach(method, model)  # and the model is free again
