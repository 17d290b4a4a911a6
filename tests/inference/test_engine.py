"""Cached, batched, chunked generation says what a full forward per token says and what transformers says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alpaca_lora.errors import UserError
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.request import Request, SamplingParams
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.models.rope import RopeConfig
from tests.models.hf_models import MODELS, hf_model, ours_from
from tests.tiny import ByteTokenizer, tiny_model

TOKENIZER: Any = ByteTokenizer()


def prompts(lengths: tuple[int, ...], vocab_size: int = 97) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(vocab_size, (n,), generator=generator).tolist()) for n in lengths]


def requests(lengths: tuple[int, ...], **params: Any) -> list[Request]:
    return [Request(ids, SamplingParams(**{"max_new_tokens": 10, **params})) for ids in prompts(lengths)]


@torch.inference_mode()
def recomputed(model: CausalLM, prompt_ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """Greedy decoding without a cache: the whole sequence through the model for every token."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        hidden_TD = model(torch.tensor(ids), torch.arange(len(ids)), Packed([len(ids)]))
        ids.append(int(model.logits(hidden_TD[-1:]).argmax()))
    return tuple(ids[len(prompt_ids) :])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers_alone_and_in_a_batch(name: str) -> None:
    theirs = hf_model(name)
    engine = Engine(ours_from(theirs), TOKENIZER)
    asked = requests((9, 1, 14), max_new_tokens=16)
    together = engine.generate(asked)
    for request, completion in zip(asked, together, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        want = theirs.generate(  # pyright: ignore[reportCallIssue]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )[0, prompt.shape[1] :]  # fmt: skip
        assert engine.generate([request])[0].token_ids == tuple(want.tolist())
        assert completion.token_ids == tuple(want.tolist())
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    "overrides", [{}, {"windows": (4, None)}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}]
)
@pytest.mark.parametrize("step_tokens", [3, 2048])
def test_cache_chunks_and_batches_equal_recomputing(overrides: dict[str, Any], step_tokens: int) -> None:
    model = tiny_model(**overrides)
    asked = requests((7, 2, 20, 3, 11))
    completions = Engine(model, TOKENIZER, max_running=3, step_tokens=step_tokens).generate(asked)
    for request, completion in zip(asked, completions, strict=True):
        assert completion.token_ids == recomputed(model, request.prompt_ids, 10)


def test_the_answer_of_a_cache_that_is_wrong_would_differ() -> None:
    """The negative control: a model that sees other tokens does say something else."""
    model = tiny_model()
    (prompt,) = prompts((20,))
    assert recomputed(model, prompt, 10) != recomputed(model, prompt[10:], 10)


def test_sequences_join_as_others_end_and_answers_keep_their_order() -> None:
    model = tiny_model()
    asked = [
        Request(ids, SamplingParams(max_new_tokens=n))
        for ids, n in zip(prompts((5, 9, 3, 8, 4, 6)), (1, 12, 3, 7, 2, 5), strict=True)
    ]
    events = list(Engine(model, TOKENIZER, max_running=2).stream(asked))
    ended = [event.index for event in events if event.completion is not None]
    assert sorted(ended) == list(range(6)) and ended != sorted(ended)
    completions = Engine(model, TOKENIZER, max_running=2).generate(asked)
    for request, completion in zip(asked, completions, strict=True):
        assert completion.token_ids == recomputed(model, request.prompt_ids, request.params.max_new_tokens)


def test_streamed_text_is_the_final_text() -> None:
    asked = requests((5, 9, 3), max_new_tokens=60, temperature=1.0, seed=3)
    texts = ["", "", ""]
    for event in Engine(tiny_model(), TOKENIZER).stream(asked):
        texts[event.index] += event.text
        if event.completion is not None:
            assert event.completion.text == texts[event.index]
            assert event.completion.text == TOKENIZER.decode(event.completion.token_ids)
    assert all(texts)


def test_a_seeded_request_does_not_depend_on_its_company() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    params: dict[str, Any] = {
        "temperature": 1.2,
        "top_p": 0.95,
        "top_k": 50,
        "repetition_penalty": 1.1,
        "max_new_tokens": 25,
    }
    (alone,) = engine.generate(requests((6,), **params, seed=11))
    crowd = [*requests((9, 4), **params), *requests((6,), **params, seed=11), *requests((12,), **params, seed=11)]
    assert engine.generate(crowd)[2].token_ids == alone.token_ids
    assert engine.generate(requests((6,), **params, seed=12))[0].token_ids != alone.token_ids


def test_stop_ids_and_stop_texts_end_an_answer() -> None:
    model = tiny_model()
    (free,) = Engine(model, TOKENIZER).generate(requests((7,), max_new_tokens=30, temperature=1.0, seed=1))
    place = next(i for i in range(5, 30) if free.token_ids[i] not in free.token_ids[:i])
    (stopped,) = Engine(model, TOKENIZER).generate(
        requests((7,), max_new_tokens=30, temperature=1.0, seed=1, stop_ids=(free.token_ids[place],))
    )
    assert stopped.token_ids == free.token_ids[: place + 1] and stopped.finish_reason == "stop"
    assert stopped.text == TOKENIZER.decode(free.token_ids[:place])

    word = free.text[3:6]
    (cut,) = Engine(model, TOKENIZER).generate(requests((7,), max_new_tokens=30, temperature=1.0, seed=1, stop=(word,)))
    assert cut.finish_reason == "stop" and cut.text == free.text[: free.text.index(word)]


def test_the_context_is_a_limit_with_a_message() -> None:
    engine = Engine(tiny_model(max_position_embeddings=16), TOKENIZER)
    (full,) = engine.generate(requests((12,), max_new_tokens=50))
    assert full.completion_tokens == 4 and full.finish_reason == "length"
    for length in (16, 40):
        with pytest.raises(UserError, match=f"{length} tokens.*context of 16"):
            engine.generate(requests((length,)))


def test_prompts_that_cannot_be_answered_are_refused_before_anything_runs() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    with pytest.raises(UserError, match="no tokens"):
        next(engine.stream([*requests((3,)), Request(())]))
    with pytest.raises(UserError, match=r"token 5000.*vocabulary of 264"):
        next(engine.stream([Request((1, 5000))]))


def test_a_stream_can_be_closed_and_the_engine_used_again() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    stream = engine.stream(requests((5,), max_new_tokens=100, temperature=1.0, seed=0))
    next(stream)
    stream.close()
    assert engine.generate(requests((5,)))[0].token_ids == recomputed(engine.model, prompts((5,))[0], 10)


def test_two_streams_of_one_engine_do_not_disturb_each_other() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    asked = [requests((5, 9), max_new_tokens=20), requests((7, 3, 4), max_new_tokens=12)]
    want = [[answer.token_ids for answer in engine.generate(some)] for some in asked]
    streams = [engine.stream(some) for some in asked]
    said: list[dict[int, list[int]]] = [{}, {}]
    while any(events := [next(stream, None) for stream in streams]):
        for place, event in enumerate(events):
            if event is not None:
                said[place].setdefault(event.index, []).extend(event.token_ids)
    assert [[tuple(one[i]) for i in sorted(one)] for one in said] == want
    assert not engine.has_work


def test_a_model_that_changes_between_two_calls_answers_as_it_is() -> None:
    model, (request,) = tiny_model(), requests((40,))
    engine = Engine(model, TOKENIZER)
    assert engine.generate([request])[0].token_ids == recomputed(model, request.prompt_ids, 10)
    other = tiny_model(1)
    model.load_state_dict(other.state_dict())
    (after,) = engine.generate([request])
    assert after.token_ids == recomputed(other, request.prompt_ids, 10) and after.cached_tokens == 0
    # the negative control: an engine that was promised otherwise goes on with the old keys and values
    keeping = Engine(model, TOKENIZER, keep_prefixes=True)
    keeping.generate([request])
    model.load_state_dict(tiny_model().state_dict())
    (stale,) = keeping.generate([request])
    assert stale.cached_tokens == 32 and stale.token_ids != recomputed(model, request.prompt_ids, 10)
    keeping.forget_prefixes()
    assert keeping.generate([request])[0].token_ids == recomputed(model, request.prompt_ids, 10)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 511])
def test_prompts_of_every_length_against_the_blocks(length: int) -> None:
    model = tiny_model()
    engine = Engine(model, TOKENIZER, keep_prefixes=True)
    (request,) = requests((length,), max_new_tokens=4)
    want = recomputed(model, request.prompt_ids, min(4, 512 - length))
    for num_cached in (0, (length - 1) // 16 * 16):
        (answer,) = engine.generate([request])
        assert (answer.token_ids, answer.cached_tokens) == (want, num_cached)


def test_dynamic_ropes_are_never_cut_shared_or_batched() -> None:
    ropes = (RopeConfig(10_000.0, "dynamic", factor=4.0, trained_positions=16),)
    model = tiny_model(ropes=ropes, max_position_embeddings=16)
    engine = Engine(model, TOKENIZER, max_running=4, step_tokens=8, keep_prefixes=True)
    assert engine.context_length == 64
    asked = requests((40, 40, 7), max_new_tokens=6)
    alone = [Engine(model, TOKENIZER).generate([request])[0].token_ids for request in asked]
    for _ in range(2):
        answers = engine.generate(asked)
        assert [answer.token_ids for answer in answers] == alone
        assert not any(answer.cached_tokens for answer in answers)


def test_no_requests_no_answers() -> None:
    assert Engine(tiny_model(), TOKENIZER).generate([]) == []


@pytest.mark.gpu
def test_a_gpu_says_the_same() -> None:
    asked = [*requests((7, 2, 20)), *requests((9,), temperature=1.0, seed=3, repetition_penalty=1.2)]
    on_cpu = Engine(tiny_model(windows=(4, None)), TOKENIZER).generate(asked)
    on_gpu = Engine(tiny_model(windows=(4, None)).cuda(), TOKENIZER, max_running=3, step_tokens=8).generate(asked)
    assert [answer.token_ids for answer in on_gpu] == [answer.token_ids for answer in on_cpu]
