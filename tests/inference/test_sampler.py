"""The filters are transformers' own, the draw follows the probabilities, and a seed decides everything."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alpaca_lora.errors import NumericalError
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.inference.sampler import Sampler, penalize, survivors

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


def test_repetition_penalty_equals_transformers_and_counts_prompt_and_answer() -> None:
    logits_V, seen = logits(1), [3, 5, 5, 200]
    theirs_V = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits_V[None])[0]
    ours_V = penalize(logits_V, torch.tensor(sorted(set(seen))), 1.3)
    torch.testing.assert_close(ours_V, theirs_V)

    flat_V = torch.zeros(4)
    flat_V[2], flat_V[1] = 1.0, 0.9
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), (0,), CPU)
    assert [sampler.choose(flat_V) for _ in range(2)] == [2, 1]  # 2 was said, so it counts half the second time
    assert flat_V[2] == 1.0  # the caller's logits are not changed


def test_greedy_is_the_likeliest() -> None:
    assert Sampler(SamplingParams(), (), CPU).choose(logits(4)) == int(logits(4).argmax())


def test_the_draw_follows_the_probabilities() -> None:
    share_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), (), CPU)
    drawn = torch.tensor([sampler.choose(share_V.log()) for _ in range(4000)])
    counted_V = torch.bincount(drawn, minlength=4) / 4000
    assert (counted_V - share_V).abs().max() < 0.03  # four standard deviations of the largest share


def test_a_filtered_draw_stays_inside_the_filter() -> None:
    params = SamplingParams(temperature=1.0, top_k=3, seed=5)
    sampler, allowed = Sampler(params, (), CPU), set(logits(9).topk(3).indices.tolist())
    drawn = {sampler.choose(logits(9)) for _ in range(200)}
    assert drawn <= allowed and len(drawn) > 1


def test_same_seed_same_draws_other_seed_other_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), (), CPU)
        return [sampler.choose(logits(i) / 3) for i in range(20)]

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
    assert [sampler.choose(logits_V) for _ in range(5)] == [1] * 5
