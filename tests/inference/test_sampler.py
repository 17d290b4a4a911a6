"""The filters are transformers' own, the draw follows the probabilities, a seed decides everything, rows are alone."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alpaca_lora.errors import AlpacaLoraError, ConfigError, NumericalError, UserError
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.inference.sampler import NUCLEUS, Choice, Sampler, check_vocabulary, choose_many, survivors

CPU = torch.device("cpu")


def logits(seed: int, vocab_size: int = 300) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_equal_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for seed in range(5):
        logits_V = logits(seed)
        probability_N, id_N = survivors(logits_V, params)
        ours_V = torch.zeros(300)
        ours_V[slice(None) if id_N is None else id_N] = probability_N / probability_N.sum()
        theirs_V = steps(torch.zeros(1, 1, dtype=torch.int64), logits_V[None]).softmax(-1)[0]
        torch.testing.assert_close(ours_V, theirs_V, atol=1e-6, rtol=1e-5)
        assert torch.equal(ours_V > 0, theirs_V > 0)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(top_p: float, scale: float) -> None:
    logits_V = logits(3, vocab_size=20_000) * scale  # 0.01: nearly flat, so the nucleus is most of the vocabulary
    probability_N, id_N = survivors(logits_V, SamplingParams(temperature=1.0, top_p=top_p))
    sorted_N, order_N = logits_V.double().softmax(0).sort(descending=True)
    expected = int((sorted_N.cumsum(0) - sorted_N < top_p).sum())
    assert id_N is not None
    # where so many tokens are alike, float32 may cut a few of them earlier or later
    assert abs(len(id_N) - expected) <= 1 + expected // 1000
    both = min(len(id_N), expected)
    torch.testing.assert_close(probability_N[:both].double(), sorted_N[:both], rtol=1e-4, atol=0)
    if scale == 1:
        torch.testing.assert_close(logits_V[id_N], logits_V[order_N[: len(id_N)]], rtol=1e-5, atol=0)
        assert (len(id_N) > NUCLEUS) == (top_p > 0.6)


def test_greedy_is_the_likeliest() -> None:
    assert Sampler(SamplingParams(), (), CPU).choose(logits(4)) == Choice(int(logits(4).argmax()), None)


def test_the_draw_follows_the_probabilities() -> None:
    share_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), (), CPU)
    drawn = torch.tensor([sampler.choose(share_V.log()).token_id for _ in range(4000)])
    counted_V = torch.bincount(drawn, minlength=4) / 4000
    assert (counted_V - share_V).abs().max() < 0.03  # four standard deviations of the largest share


def test_a_filtered_draw_stays_inside_the_filter() -> None:
    params = SamplingParams(temperature=1.0, top_k=3, seed=5)
    sampler, allowed = Sampler(params, (), CPU), set(logits(9).topk(3).indices.tolist())
    drawn = {sampler.choose(logits(9)).token_id for _ in range(200)}
    assert drawn <= allowed and len(drawn) > 1


def test_same_seed_same_draws_other_seed_other_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), (), CPU)
        return [sampler.choose(logits(i) / 3).token_id for i in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_answer(temperature: float, bad: float) -> None:
    logits_V = logits(0)
    logits_V[17] = bad
    with pytest.raises(NumericalError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), (), CPU).choose(logits_V)


def test_the_lowest_temperature_is_greedy() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    sampler = Sampler(SamplingParams(temperature=1e-300, seed=0), (), torch.device("cpu"))
    assert [sampler.choose(logits_V).token_id for _ in range(5)] == [1] * 5


# ---- what a request's own options change before the filters


def test_repetition_counts_prompt_and_answer() -> None:
    flat_V = torch.zeros(4)
    flat_V[2], flat_V[1] = 1.0, 0.9
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), (0,), CPU)
    assert [sampler.choose(flat_V).token_id for _ in range(2)] == [2, 1]  # 2 was said: it counts half the second time
    assert flat_V[2] == 1.0  # the caller's logits are not changed


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_presence_and_frequency_count_the_answer_and_not_the_prompt(name: str) -> None:
    logits_V = torch.tensor([0.0, 1.5, 1.0])
    sampler = Sampler(SamplingParams(**{name: 1.0}), (1, 1, 1), CPU)
    # 1 is said at 1.5; then it stands at 0.5 and 2 is said; then 1 at 0.5, 2 at 0 ...
    first = [sampler.choose(logits_V).token_id for _ in range(3)]
    assert first == [1, 2, 1]
    # ... and only the frequency counts on: 1 at -0.5, 2 at 0, 0 at 0
    fourth = sampler.choose(logits_V).token_id
    assert fourth == (1 if name == "presence_penalty" else 0)


def test_bias_is_added_to_the_logits() -> None:
    logits_V = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert Sampler(SamplingParams(logit_bias=((2, 2.5),)), (), CPU).choose(logits_V).token_id == 2
    assert Sampler(SamplingParams(logit_bias=((0, -1.5),)), (), CPU).choose(logits_V).token_id == 1
    everything = tuple((token_id, -100.0) for token_id in range(4))
    assert Sampler(SamplingParams(logit_bias=everything), (), CPU).choose(logits_V).token_id == 0
    banned = Sampler(SamplingParams(temperature=1.0, seed=1, logit_bias=((0, -100.0), (3, -100.0))), (), CPU)
    assert {banned.choose(logits_V).token_id for _ in range(300)} == {1, 2}


def test_bias_comes_before_the_repetition_penalty() -> None:
    params = SamplingParams(repetition_penalty=4.0, logit_bias=((0, 9.0),))
    # (-1 + 9) / 4 = 2 is less than 3; the other way round -1 * 4 + 9 = 5 is more
    assert Sampler(params, (0,), CPU).choose(torch.tensor([-1.0, 3.0])).token_id == 1


@pytest.mark.parametrize("token_id", [50, 10**9])
def test_a_bias_outside_of_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(ConfigError, match=f"logit_bias: names token {token_id}, expected ids from 0 to 49"):
        check_vocabulary(SamplingParams(logit_bias=((3, 1.0), (token_id, 1.0))), 50)
    check_vocabulary(SamplingParams(logit_bias=((49, 1.0),)), 50)


class Only:
    """A grammar of one token after another, then of nothing but an end."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = list(token_ids)
        self.stop_ids: list[int] = []

    def start(self, stop_ids: tuple[int, ...]) -> Only:
        self.stop_ids = list(stop_ids)
        return self

    @property
    def is_done(self) -> bool:
        return not self.token_ids

    def mask_(self, logits_V: torch.Tensor) -> None:
        left_V = torch.full_like(logits_V, -torch.inf)
        allowed = self.token_ids[:1] or self.stop_ids
        left_V[allowed] = logits_V[allowed]
        logits_V.copy_(left_V)

    def accept(self, token_id: int) -> None:
        if self.token_ids and self.token_ids.pop(0) != token_id:
            raise UserError("wrong token")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_decides_before_everything_else(temperature: float) -> None:
    grammar = Only(5, 7)
    params = SamplingParams(
        temperature=temperature, top_k=1, stop_ids=(9,), grammar=grammar, logit_bias=((3, 100.0), (5, -100.0)),
        repetition_penalty=1.5, presence_penalty=2.0,
    )  # fmt: skip
    sampler = Sampler(params, (5, 7), CPU)
    assert not sampler.is_done
    assert [sampler.choose(logits(1)).token_id for _ in range(2)] == [5, 7]
    assert sampler.is_done
    assert sampler.choose(logits(1)).token_id == 9
    assert not Sampler(SamplingParams(), (), CPU).is_done


# ---- log probabilities


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_those_of_the_model_before_everything(num_top: int) -> None:
    params = SamplingParams(
        temperature=0.3, top_k=2, seed=3, logprobs=num_top, logit_bias=((17, 50.0),), presence_penalty=1.0
    )
    choice = Sampler(params, (1, 2), CPU).choose(logits(6))
    expected_V = logits(6).double().log_softmax(0)
    assert choice.token_id == 17  # that is, against the model's will
    assert choice.logprob is not None and choice.logprob.token_id == 17
    assert choice.logprob.logprob == pytest.approx(float(expected_V[17]), abs=1e-5)
    value_N, id_N = expected_V.topk(num_top)
    assert [token_id for token_id, _ in choice.logprob.top] == id_N.tolist()
    assert [value for _, value in choice.logprob.top] == pytest.approx(value_N.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    choice = Sampler(SamplingParams(logprobs=20), (), CPU).choose(torch.tensor([0.0, 1.0]))
    assert choice.logprob is not None and len(choice.logprob.top) == 2
    assert sum(torch.tensor([value for _, value in choice.logprob.top]).exp().tolist()) == pytest.approx(1.0)


# ---- the rows of a step

ROWS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2),
    SamplingParams(temperature=0.8, top_p=0.5, min_p=0.01, seed=3, frequency_penalty=0.5),
    SamplingParams(presence_penalty=1.0, logprobs=3),
    SamplingParams(temperature=1.3, top_k=40, seed=4, repetition_penalty=1.2, logprobs=0),
    SamplingParams(temperature=0.7, min_p=0.1, seed=5, logit_bias=((3, 2.0),)),
    SamplingParams(logprobs=1),
)


def rows_of(step: int, vocab_size: int) -> torch.Tensor:
    return torch.stack([logits(100 * step + row, vocab_size) for row in range(len(ROWS))])


@pytest.mark.parametrize("vocab_size", [301, 40_007])
def test_a_row_is_bit_equal_whoever_is_beside_it(vocab_size: int) -> None:
    alone: list[list[Choice]] = []
    for row, params in enumerate(ROWS):
        sampler = Sampler(params, (1, 2), CPU)
        alone.append([sampler.choose(rows_of(step, vocab_size)[row].clone()) for step in range(6)])
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    together = {row: Sampler(ROWS[row], (1, 2), CPU) for row in order}
    for step in range(6):
        rows = order[: 8 - step]  # they leave one by one
        before = rows_of(step, vocab_size)[rows]
        logits_BV = before.clone()
        outcomes = choose_many([together[row] for row in rows], logits_BV)
        assert outcomes == [alone[row][step] for row in rows]
        assert torch.equal(logits_BV, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_fails_alone(bad: float) -> None:
    logits_BV = rows_of(0, 300)
    good = choose_many([Sampler(params, (), CPU) for params in ROWS], logits_BV)
    for broken in (0, 1, 4):
        broken_BV = logits_BV.clone()
        broken_BV[broken, 250] = bad
        outcomes = choose_many([Sampler(params, (), CPU) for params in ROWS], broken_BV)
        assert isinstance(outcomes[broken], NumericalError)
        assert [outcome for row, outcome in enumerate(outcomes) if row != broken] == [
            outcome for row, outcome in enumerate(good) if row != broken
        ]


def test_a_row_that_the_grammar_ends_badly_fails_alone() -> None:
    class Stuck(Only):
        def mask_(self, logits_V: torch.Tensor) -> None:
            raise UserError("allows no further token", field="grammar")

    samplers = [Sampler(params, (), CPU) for params in (SamplingParams(), SamplingParams(grammar=Stuck()))]
    first, second = choose_many(samplers, rows_of(0, 300)[:2])
    assert isinstance(first, Choice) and isinstance(second, AlpacaLoraError)
    with pytest.raises(UserError, match="grammar: allows no further token"):
        samplers[1].choose(logits(0))


def test_only_logits_of_minus_infinity_left_is_no_choice() -> None:
    logits_V = torch.tensor([1.0, -torch.inf])
    with pytest.raises(NumericalError):
        Sampler(SamplingParams(temperature=1.0, grammar=Only(1)), (), CPU).choose(logits_V)


def test_it_works_inside_and_outside_of_inference_mode() -> None:
    params = SamplingParams(frequency_penalty=0.1, repetition_penalty=1.1)
    sampler = Sampler(params, (1,), CPU)
    for step in range(200):  # long enough for the tables to grow
        with torch.inference_mode(step % 2 == 0):
            sampler.choose(logits(step))
