"""An answer does not depend on who else is in the batch, on how prompts are cut, on giving up, on what was known.

Tokens are equal. Logits are equal but for the order in which products are summed: the same row in a matrix product of
another height. Of a float32 logit of size s that is at most TOLERANCE * s here, some units in the last place for each
of the two layers; the tests hold all logits of all steps to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.request import Completion, Request, SamplingParams
from alpaca_lora.inference.runner import Runner, StepLogits
from alpaca_lora.inference.step_batch import StepBatch
from tests.inference.fake_bank import FakeBank
from tests.tiny import ByteTokenizer, tiny_model

TOKENIZER: Any = ByteTokenizer()
TOLERANCE = 64 * torch.finfo(torch.float32).eps
BLOCK_BYTES = 2 * 2 * 16 * 2 * 8 * 4  # keys and values, layers, places, heads, width, float32
# one and a half contexts of prompts; the greedy one, the sampled ones with all that a sampler remembers
PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 1.1, "seed": 5, "top_k": 20, "logit_bias": ((65, 2.0),)},
]


class Recorder:
    """Every request's logits, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, list[torch.Tensor]] = defaultdict(list)
        run = Runner.run

        def recording(runner: Runner, batch: StepBatch) -> StepLogits:
            found = run(runner, batch)
            for sequence, logits_V in zip(batch.token_sequences, found.tokens_NV, strict=True):
                self.logits[sequence.index].append(logits_V.clone())
            return found

        monkeypatch.setattr(Runner, "run", recording)

    def take(self) -> list[torch.Tensor]:
        """(steps, V) of each request since the last call, in the order in which they came."""
        found = [torch.stack(self.logits[index]) for index in sorted(self.logits)]
        self.logits.clear()
        return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def prompts(lengths: Sequence[int], common: int = 0) -> list[tuple[int, ...]]:
    """Random prompts that begin with the same ``common`` tokens."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randint(97, (common,), generator=generator).tolist()
    return [(*start, *torch.randint(97, (n,), generator=generator).tolist()) for n in lengths]


def requests(lengths: Sequence[int], *, common: int = 0, new: int = 20, **more: Any) -> list[Request]:
    return [
        Request(ids, SamplingParams(**{"max_new_tokens": new, **PARAMS[i % len(PARAMS)]}), **more)
        for i, ids in enumerate(prompts(lengths, common))
    ]


def check(recorder: Recorder, engine: Engine, asked: list[Request], bank: FakeBank | None = None) -> list[Completion]:
    """The answers of all together are those of each alone in an engine of its own."""
    together = engine.generate(asked)
    logits = recorder.take()
    for request, answer, found in zip(asked, together, logits, strict=True):
        (alone,) = Engine(engine.model, TOKENIZER, bank=bank).generate([request])  # pyright: ignore
        (want,) = recorder.take()
        assert answer.token_ids == alone.token_ids
        assert answer.text == alone.text and answer.finish_reason == alone.finish_reason
        assert (found - want).abs().max() <= TOLERANCE * want.abs().max()
    return together


@pytest.mark.parametrize("overrides", [{}, {"windows": (9, None)}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("step_tokens", [4, 7, 64, 2048])
def test_company_and_chunks(recorder: Recorder, overrides: dict[str, Any], step_tokens: int) -> None:
    engine = Engine(tiny_model(**overrides), TOKENIZER, max_running=4, step_tokens=step_tokens)
    check(recorder, engine, requests((40, 1, 33, 16, 90, 5, 17)))


@pytest.mark.parametrize("num_blocks", [7, 8, 10])
def test_giving_up_and_coming_back(recorder: Recorder, num_blocks: int) -> None:
    engine = Engine(tiny_model(), TOKENIZER, max_running=4, step_tokens=24, cache_bytes=num_blocks * BLOCK_BYTES)
    check(recorder, engine, requests((30, 14, 33, 16, 20), new=60))
    assert engine.stats().num_preemptions > 0
    assert engine.stats().cache_usage == 0


@pytest.mark.parametrize("keep_prefixes", [False, True])
def test_known_beginnings(recorder: Recorder, keep_prefixes: bool) -> None:
    engine = Engine(tiny_model(), TOKENIZER, max_running=2, keep_prefixes=keep_prefixes)
    asked = requests((10, 1, 16, 5), common=48)
    first = check(recorder, engine, asked)
    assert [answer.cached_tokens for answer in first] == [0, 48, 48, 48]
    again = check(recorder, engine, asked)
    assert [answer.cached_tokens for answer in again] == ([48, 48, 48, 48] if keep_prefixes else [0, 48, 48, 48])


def test_an_answer_is_a_known_beginning_of_the_next_turn(recorder: Recorder) -> None:
    engine = Engine(tiny_model(), TOKENIZER, keep_prefixes=True)
    (request,) = requests((20,), new=30)
    (answer,) = check(recorder, engine, [request])
    turn = Request((*request.prompt_ids, *answer.token_ids, 65, 66, 67), request.params)
    # 49 places have keys and values: the last token was never read
    assert check(recorder, engine, [turn])[0].cached_tokens == 48


def test_adapters_and_tenants_in_one_batch(recorder: Recorder) -> None:
    model = tiny_model()
    bank = FakeBank(model)
    bank.load("mild", 1.5)
    bank.load("wild", -1.0)
    bank.load("prefix", 1.0, num_virtual=21, seed=1)
    bank.load("other prefix", 1.0, num_virtual=21, seed=2)
    names = (None, "mild", "wild", "prefix", "other prefix", "mild", None, "prefix")
    (ids,) = prompts((40,))
    asked = [Request(ids, SamplingParams(max_new_tokens=12), adapter=name) for name in names]
    asked += [Request(ids, SamplingParams(max_new_tokens=12), adapter=name, salt="tenant") for name in names[:5]]
    engine = Engine(model, TOKENIZER, bank=bank, max_running=16, step_tokens=64)  # pyright: ignore
    answers = check(recorder, engine, asked, bank)
    # only the second of the same adapter and tenant finds something
    found = [answer.cached_tokens for answer in answers]
    assert [count > 0 for count in found] == [i in (5, 6, 7) for i in range(len(asked))]
    assert len({answer.token_ids for answer in answers[:5]}) == 5
    assert bank.num_users == 0


def test_adapters_that_give_up(recorder: Recorder) -> None:
    model = tiny_model()
    bank = FakeBank(model)
    bank.load("wild", -1.0)
    bank.load("prefix", 1.3, num_virtual=10, seed=1)
    names = (None, "wild", "prefix")
    asked = [
        Request(ids, SamplingParams(max_new_tokens=40), adapter=names[i % 3])
        for i, ids in enumerate(prompts((20, 30, 9, 14, 3, 25)))
    ]
    engine = Engine(
        model,
        TOKENIZER,
        bank=bank,
        max_running=4,
        step_tokens=24,
        cache_bytes=7 * BLOCK_BYTES,  # pyright: ignore
    )
    check(recorder, engine, asked, bank)
    assert engine.stats().num_preemptions > 0 and bank.num_users == 0


def test_the_tolerance_can_be_missed(recorder: Recorder) -> None:
    """The negative control: one token of the prompt more or less is far outside of it."""
    engine = Engine(tiny_model(), TOKENIZER)
    (ids,) = prompts((60,))
    engine.generate(
        [Request(ids, SamplingParams(max_new_tokens=1)), Request(ids[1:], SamplingParams(max_new_tokens=1))]
    )
    whole, short = recorder.take()
    assert (whole - short).abs().max() > 100 * TOLERANCE * whole.abs().max()
