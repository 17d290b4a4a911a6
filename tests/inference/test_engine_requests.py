"""Requests that come and go one by one: numbers, cancelling, adapters, classes, errors, and nothing left behind."""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from typing import Any

import pytest
import torch

from alpaca_lora.errors import NumericalError, UserError
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.request import Completion, Event, Request, SamplingParams
from alpaca_lora.inference.runner import Runner
from alpaca_lora.inference.sequence import Sequence
from alpaca_lora.models.attention import Packed
from alpaca_lora.models.classifier import attach_score, class_logits
from tests.inference.fake_bank import FakeBank
from tests.tiny import ByteTokenizer, tiny_model

TOKENIZER: Any = ByteTokenizer()
BLOCK_BYTES = 2 * 2 * 16 * 2 * 8 * 4  # keys and values, layers, places, heads, width, float32
PROMPT = tuple(range(40))


def request(num_tokens: int = 20, *, new: int = 10, **more: Any) -> Request:
    return Request(PROMPT[:num_tokens], SamplingParams(max_new_tokens=new), **more)


def banked(**options: Any) -> tuple[Engine, FakeBank]:
    model = tiny_model()
    bank = FakeBank(model)
    return Engine(model, TOKENIZER, bank=bank, **options), bank  # pyright: ignore


def run(engine: Engine) -> dict[int, Completion]:
    """All that is left to do; the completions by their requests' numbers."""
    done: dict[int, Completion] = {}
    while engine.has_work:
        for event in engine.step():
            if event.completion is not None:
                assert event.index not in done
                done[event.index] = event.completion
    return done


def is_clean(engine: Engine) -> bool:
    stats = engine.stats()
    engine._pool.check([])
    return not engine.has_work and (stats.num_running, stats.num_waiting, stats.cache_usage) == (0, 0, 0.0)


def test_requests_join_at_any_step() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    want = engine.generate([request(20), request(7, new=4), request(33)])
    first = engine.add(request(20))
    assert engine.has_work and [event.index for event in engine.step()] == [first]
    engine.step()
    others = [engine.add(request(7, new=4)), engine.add(request(33))]
    done = run(engine)
    assert [done[index].token_ids for index in (first, *others)] == [answer.token_ids for answer in want]
    assert engine.step() == [] and is_clean(engine)


def test_an_event_for_every_token() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    engine.add(Request(PROMPT, SamplingParams(max_new_tokens=6, logprobs=2, stop=("never said",))))
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    done = events[-1].completion
    assert done is not None and len(events) == 6
    assert tuple(token for event in events for token in event.token_ids) == done.token_ids
    assert tuple(one for event in events for one in event.logprobs) == done.logprobs
    assert done.logprobs is not None and all(len(one.top) == 2 for one in done.logprobs)
    assert "".join(event.text for event in events) == done.text


def test_stats_count_what_was_done() -> None:
    engine = Engine(tiny_model(), TOKENIZER, max_running=1)
    for _ in range(3):
        engine.add(request(40, new=5))
    assert engine.stats().num_waiting == 3 and engine.stats().prompt_tokens == 0
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 2, 1)
    assert stats.cache_usage == 3 / stats.num_blocks
    run(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generation_tokens) == (120, 64, 15)
    assert stats.num_preemptions == 0 and is_clean(engine)


# --- cancelling


def test_a_cancelled_request_tells_what_it_said_and_holds_nothing() -> None:
    engine, bank = banked(max_running=1)
    bank.load("a", 1.1)
    running, waiting = engine.add(request(new=50, adapter="a")), engine.add(request(adapter="a"))
    said = [token for _ in range(5) for event in engine.step() for token in event.token_ids]
    for index in (running, waiting):
        engine.cancel(index)
    assert bank.num_users == 0 and engine.stats().cache_usage == 0 and engine.has_work
    done = run(engine)
    assert [done[index].finish_reason for index in (running, waiting)] == ["cancelled", "cancelled"]
    assert done[running].token_ids == tuple(said) and done[waiting].token_ids == ()
    engine.cancel(running)  # too late is no error
    engine.cancel(999)
    assert is_clean(engine)


def num_sequences() -> int:
    gc.collect()
    return sum(type(one) is Sequence for one in gc.get_objects())


def test_a_thousand_cycles_leave_nothing_behind() -> None:
    engine, bank = banked(max_running=4, step_tokens=16, cache_bytes=9 * BLOCK_BYTES)
    bank.load("a", 1.1)
    bank.load("p", 1.0, num_virtual=5)
    rng, open_, before = random.Random(0), [], num_sequences()
    for _ in range(1000):
        open_.append(
            engine.add(request(rng.randint(1, 40), new=rng.randint(1, 30), adapter=rng.choice((None, "a", "p"))))
        )
        for _ in range(rng.randint(0, 6)):
            ended = {event.index for event in engine.step() if event.completion is not None}
            open_ = [index for index in open_ if index not in ended]
        if len(open_) > 6:
            engine.cancel(open_.pop(rng.randrange(len(open_))))
    for index in open_:
        engine.cancel(index)
    run(engine)
    assert is_clean(engine) and bank.num_users == 0
    assert engine.stats().num_preemptions > 0
    assert num_sequences() == before


# --- what can never be answered


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(tiny_model(), TOKENIZER, max_running=2, cache_bytes=3 * BLOCK_BYTES)
    for asked in (request(40, new=10), request(2, new=48)):
        with pytest.raises(UserError, match=r"needs 49 places .*at most 48.*cache_bytes"):
            engine.add(asked)
    # the last token of an answer takes no place
    fits = [engine.add(request(39, new=10)), engine.add(request(1, new=48))]
    done = run(engine)
    assert [done[index].completion_tokens for index in fits] == [10, 48] and is_clean(engine)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Request(()), "no tokens"),
        (Request((1, -1)), "token -1"),
        (Request((264,)), "token 264"),
        (Request((1,) * 512), "512 tokens.*context of 512"),
        (Request((1,), SamplingParams(logit_bias=((264, 1.0),))), "logit_bias.*264"),
        (Request((1,), adapter="a"), "no adapters"),
        (Request((1,), kind="classify"), "class head"),
    ],
)
def test_requests_that_can_never_be_answered(asked: Request, words: str) -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    with pytest.raises(UserError, match=words):
        engine.add(asked)
    assert is_clean(engine)


def test_an_adapter_that_is_not_there_and_a_prefix_that_leaves_no_room() -> None:
    engine, bank = banked()
    bank.load("long", 1.0, num_virtual=500)
    with pytest.raises(UserError, match="there is no 'b'"):
        engine.add(request(adapter="b"))
    with pytest.raises(UserError, match="context of 12 tokens behind 500 virtual tokens"):
        engine.add(request(12, adapter="long"))
    assert bank.num_users == 0
    index = engine.add(request(11, adapter="long"))
    assert run(engine)[index].completion_tokens == 1


def test_engines_that_cannot_be() -> None:
    with pytest.raises(UserError, match="step_tokens: is 7, expected at least max_running, which is 8"):
        Engine(tiny_model(), TOKENIZER, max_running=8, step_tokens=7)
    with pytest.raises(UserError, match="cache_bytes"):
        Engine(tiny_model(), TOKENIZER, cache_bytes=100)


# --- errors of one and errors of all


def poison(model: Any, token: int) -> None:
    """The model's logits are not finite for sequences that hold this token."""
    model.embeddings.weight.data[token] = float("nan")


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    model = tiny_model()
    crowd = [request(20), request(33), request(5)]
    want = [answer.token_ids for answer in Engine(model, TOKENIZER).generate(crowd)]
    poison(model, 200)
    engine = Engine(model, TOKENIZER)
    bad = Request((*PROMPT[:18], 200, 7), SamplingParams(max_new_tokens=5))
    numbers = [engine.add(one) for one in (crowd[0], bad, crowd[1], bad, crowd[2])]
    done = run(engine)
    for place, tokens in zip((0, 2, 4), want, strict=True):
        assert done[numbers[place]].token_ids == tokens
    for place in (1, 3):
        assert done[numbers[place]].finish_reason == "error"
        assert "not finite" in str(done[numbers[place]].error)
    assert is_clean(engine)
    with pytest.raises(NumericalError, match="not finite"):
        engine.generate([crowd[0], bad])
    assert is_clean(engine)
    assert [answer.token_ids for answer in engine.generate(crowd)] == want


class DeadEnd:
    """A grammar in which no second token can come."""

    is_done = False

    def start(self, stop_ids: Any) -> DeadEnd:
        return DeadEnd()

    def mask_(self, logits_V: torch.Tensor) -> None:
        if vars(self).get("said"):
            raise UserError("no token can come next", field="grammar", fix="look for parts that contradict each other")

    def accept(self, token_id: int) -> None:
        self.said = True


def test_a_grammar_that_cannot_go_on_is_the_users_error() -> None:
    engine = Engine(tiny_model(), TOKENIZER)
    bad = Request(PROMPT, SamplingParams(max_new_tokens=5, grammar=DeadEnd()))
    with pytest.raises(UserError) as caught:
        engine.generate([request(20), bad])
    told = caught.value
    assert (told.what, told.field) == ("no token can come next", "grammar") and told.fix is not None
    assert str(told).count("no token can come next") == 1
    numbers = [engine.add(request(20)), engine.add(bad)]
    done = run(engine)
    assert [done[index].finish_reason for index in numbers] == ["length", "error"]
    assert isinstance(done[numbers[1]].error, UserError) and is_clean(engine)


def test_what_a_failed_request_computed_is_not_used_again() -> None:
    model = tiny_model()
    engine = Engine(model, TOKENIZER)
    healthy = model.embeddings.weight.data[200].clone()
    poison(model, 200)
    bad = Request((*PROMPT, 200, *PROMPT), SamplingParams(max_new_tokens=5))
    index = engine.add(bad)
    assert run(engine)[index].finish_reason == "error"
    model.embeddings.weight.data[200] = healthy
    index = engine.add(bad)
    done = run(engine)[index]
    assert done.finish_reason == "length" and done.cached_tokens == 0


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("broken_step", [0, 1, 4])
def test_a_step_that_breaks_off_loses_no_request(
    error: BaseException, broken_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, bank = banked(step_tokens=40)
    bank.load("p", 1.0, num_virtual=20)
    crowd = [request(40), request(33, adapter="p"), request(5)]
    want = [answer.token_ids for answer in engine.generate(crowd)]
    numbers = [engine.add(one) for one in crowd]
    tokens: dict[int, list[int]] = defaultdict(list)
    whole, calls = Runner.run, []

    def breaking(self: Runner, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == broken_step + 1:
            raise error
        return whole(self, batch)

    monkeypatch.setattr(Runner, "run", breaking)
    broken = 0
    while engine.has_work:
        try:
            for event in engine.step():
                tokens[event.index] += event.token_ids
        except (RuntimeError, KeyboardInterrupt):
            broken += 1
            engine._pool.check([])
    assert broken == 1 and [tuple(tokens[index]) for index in numbers] == want
    assert is_clean(engine) and bank.num_users == 0


# --- adapters


def test_an_adapter_loaded_again_under_its_name_is_another_one() -> None:
    engine, bank = banked()
    answers = []
    for gain in (1.0, -1.0, 1.0):
        bank.load("a", gain)
        index = engine.add(request(40, adapter="a"))
        answers.append(run(engine)[index])
    assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids
    # the first one's blocks are still there and still its own
    assert [answer.cached_tokens for answer in answers] == [0, 0, 32]


def test_a_request_keeps_the_adapter_that_it_came_for() -> None:
    engine, bank = banked(max_running=1)
    old = bank.load("a", 1.0)
    want = run_one(engine, request(adapter="a"))
    numbers = [engine.add(request(adapter="a")), engine.add(request(adapter="a"))]
    engine.step()
    bank.load("a", -1.0)
    numbers.append(engine.add(request(adapter="a")))
    assert bank.users[old] == 2
    done = run(engine)
    assert [done[index].token_ids == want for index in numbers] == [True, True, False]
    assert bank.num_users == 0


def test_an_adapter_is_held_before_anything_is_read_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at a name and the first use of it somebody may unload it, or load another one."""
    engine, bank = banked()
    adapter = bank.load("long", 1.0, num_virtual=500)
    monkeypatch.setattr(bank, "acquire", lambda name: bank.users.update([adapter]) or adapter)
    monkeypatch.setattr(bank, "get", lambda name: pytest.fail("looked before it was held"))
    with pytest.raises(UserError, match="context of 12 tokens"):
        engine.add(request(12, adapter="long"))
    assert bank.num_users == 0


def run_one(engine: Engine, asked: Request) -> tuple[int, ...]:
    index = engine.add(asked)
    return run(engine)[index].token_ids


# --- classes


def classes(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    hidden_TD = model(torch.tensor(ids), torch.arange(len(ids)), Packed([len(ids)]))
    return class_logits(model, hidden_TD[-1])


def test_classes_beside_generation() -> None:
    model = tiny_model()
    attach_score(model, ("no", "yes", "perhaps"), seed=0).weight.data.mul_(20)
    engine = Engine(model, TOKENIZER, max_running=4, step_tokens=16)
    texts = [PROMPT[:n] for n in (1, 16, 39, 20)]
    (said,) = engine.generate([request(20)])
    numbers = [engine.add(Request(ids, kind="classify")) for ids in texts]
    talking = engine.add(request(20))
    done = run(engine)
    for index, ids in zip(numbers, texts, strict=True):
        answer = done[index]
        assert (answer.finish_reason, answer.text, answer.token_ids) == ("stop", "", ())
        torch.testing.assert_close(torch.tensor(answer.class_logits), classes(model, ids), atol=1e-5, rtol=1e-5)
    assert done[talking].token_ids == said.token_ids and is_clean(engine)


def test_an_adapter_brings_its_own_head() -> None:
    engine, bank = banked()
    adapter = bank.load("judge", 1.0, num_classes=3)
    bank.load("talker", 1.0)
    index = engine.add(Request(PROMPT, adapter="judge", kind="classify"))
    answer = run(engine)[index]
    bank.set_rows([(None, len(PROMPT))])
    with torch.inference_mode():
        hidden_TD = engine.model(torch.tensor(PROMPT), torch.arange(len(PROMPT)), Packed([len(PROMPT)]))
    torch.testing.assert_close(
        torch.tensor(answer.class_logits), adapter.score.weight @ hidden_TD[-1], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(UserError, match="class head"):
        engine.add(Request(PROMPT, adapter="talker", kind="classify"))
    adapter.score.weight[0, 0] = float("nan")
    index = engine.add(Request(PROMPT, adapter="judge", kind="classify"))
    failed = run(engine)[index]
    assert failed.finish_reason == "error" and failed.class_logits is None and bank.num_users == 0


def test_a_text_to_classify_may_fill_the_context() -> None:
    model = tiny_model(max_position_embeddings=32)
    attach_score(model, 2, seed=0)
    engine = Engine(model, TOKENIZER)
    index = engine.add(Request(PROMPT[:32], kind="classify"))
    torch.testing.assert_close(torch.tensor(run(engine)[index].class_logits), classes(model, PROMPT[:32]))
    with pytest.raises(UserError, match="33 tokens"):
        engine.add(Request(PROMPT[:33], kind="classify"))
