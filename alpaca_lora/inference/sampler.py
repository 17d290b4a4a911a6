"""From logits to a token: grammar, bias, penalties, temperature, top-k, top-p, min-p, then one draw.

Knows no model and no text. The rows of a step share one look at their logits (the likeliest token of each, and whether
the row is finite); what a row's own options ask for is done on that row alone, with its request's own generator, so the
draws of a seeded request never depend on who else is in the batch. The order of the filters is the one of transformers,
which the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from alpaca_lora.errors import AlpacaLoraError, ConfigError, NumericalError
from alpaca_lora.inference.penalties import TokenCounts, penalize_repeated_, penalize_said_
from alpaca_lora.inference.request import SamplingParams, TokenLogprob

LOWEST_TEMPERATURE = 1e-30  # what float32 still divides by
# likeliest tokens that top-p looks at first, then sixteen times as many: nearly always enough, and to sort 50,000 takes
# thirty times as long
NUCLEUS = 256


class Choice(NamedTuple):
    """The next token of one row. logprob: None where the request asked for none."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Chooses the tokens of one request. One uniform number is drawn per sampled token, none for greedy ones."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], device: torch.device) -> None:
        self.params = params
        self._generator: torch.Generator | None = None
        if not params.greedy:
            # on the CPU whatever the device: the same seed gives the same numbers everywhere
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)
        self._grammar = None if params.grammar is None else params.grammar.start(params.stop_ids)
        self._bias = None
        if params.logit_bias:
            token_ids, values = zip(*params.logit_bias, strict=True)
            self._bias = (torch.tensor(token_ids, device=device), torch.tensor(values, device=device).float())
        self._seen = TokenCounts(prompt_ids, device) if params.repetition_penalty != 1 else None
        # penalties of what the answer says: the prompt does not count
        penalized = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._said = TokenCounts((), device) if penalized else None

    @property
    def is_done(self) -> bool:
        """The request's grammar is complete and nothing can follow: the answer ends here."""
        return self._grammar is not None and self._grammar.is_done

    def choose(self, logits_V: torch.Tensor) -> Choice:
        """The next token. logits_V: float32, not changed. NumericalError when they are not finite, UserError when the
        grammar allows no token or became too complex."""
        outcome = choose_many([self], logits_V[None])[0]
        if isinstance(outcome, AlpacaLoraError):
            raise outcome
        return outcome

    def choose_with(self, logits_V: torch.Tensor, peak: float, likeliest: int) -> Choice:
        """As `choose`, when the largest logit and its token are known (see `choose_many`)."""
        _check_finite(peak)  # a NaN is its row's largest logit
        adjusted_V = self._adjust(logits_V)
        if self._generator is not None:
            token_id = self._draw(adjusted_V, self._generator)
        else:
            token_id = likeliest if adjusted_V is logits_V else int(adjusted_V.argmax())
        for counts in (self._seen, self._said):
            if counts is not None:
                counts.add(token_id)
        if self._grammar is not None:
            self._grammar.accept(token_id)
        num_top = self.params.logprobs
        return Choice(token_id, None if num_top is None else logprob_of(logits_V, token_id, num_top))

    def _adjust(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits that are chosen from; the same tensor when nothing changes them."""
        if self._grammar is None and self._bias is None and self._seen is None and self._said is None:
            return logits_V
        adjusted_V = logits_V.clone()
        if self._grammar is not None:
            self._grammar.mask_(adjusted_V)
        if self._bias is not None:
            adjusted_V.index_add_(0, *self._bias)
        if self._seen is not None:
            penalize_repeated_(adjusted_V, self._seen.ids_N, self.params.repetition_penalty)
        if self._said is not None:
            penalize_said_(adjusted_V, self._said, self.params.presence_penalty, self.params.frequency_penalty)
        return adjusted_V

    def _draw(self, logits_V: torch.Tensor, generator: torch.Generator) -> int:
        """Inverse of the cumulative distribution over the tokens that are left."""
        probability_N, id_N = survivors(logits_V, self.params)
        point = float(torch.rand((), generator=generator, dtype=torch.float64))
        cumulative_N = probability_N.double().cumsum(0)
        total = float(cumulative_N[-1])
        _check_finite(total)  # a grammar may have left nothing but logits of minus infinity
        place = int(torch.searchsorted(cumulative_N, point * total, right=True))
        place = min(place, len(cumulative_N) - 1)  # point * total may round up to the total
        return place if id_N is None else int(id_N[place])


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise NumericalError(
            "the model's logits are not finite", fix="check the weights and the adapter, or try dtype float32"
        )


@torch.inference_mode()
def choose_many(samplers: Sequence[Sampler], logits_BV: torch.Tensor) -> list[Choice | AlpacaLoraError]:
    """The next token of each row of a step; in place of one that cannot be chosen the error, so that the others go on.

    logits_BV: float32, row b for samplers[b], not changed. Errors as in `Sampler.choose`.
    """
    peak_B, likeliest_B = logits_BV.max(-1)
    outcomes: list[Choice | AlpacaLoraError] = []
    for sampler, logits_V, peak, likeliest in zip(
        samplers, logits_BV, peak_B.tolist(), likeliest_B.tolist(), strict=True
    ):
        try:
            outcomes.append(sampler.choose_with(logits_V, peak, likeliest))
        except AlpacaLoraError as error:
            outcomes.append(error)
    return outcomes


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """ConfigError when `logit_bias` names a token that a model of `vocab_size` tokens does not have."""
    for token_id, _ in params.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"names token {token_id}",
                field="logit_bias",
                expected=f"ids from 0 to {vocab_size - 1}, the vocabulary",
            )


def logprob_of(logits_V: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """ln of the probability of `token_id` and of the `num_top` likeliest tokens, likeliest first.

    Of the model's own distribution: before grammar, bias, penalties, temperature and filters, as OpenAI reports it. So
    a token that only the grammar made possible shows how unlikely it was.
    """
    total = logits_V.logsumexp(0)
    value_N, id_N = logits_V.topk(min(num_top, len(logits_V)))
    top = zip(id_N.tolist(), (value_N - total).tolist(), strict=True)
    return TokenLogprob(token_id, float(logits_V[token_id] - total), tuple(top))


def survivors(logits_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens that temperature, top-k, top-p and min-p leave, and their ids (None: all, in order).

    Top-p keeps the smallest set of likeliest tokens whose share reaches top_p (Holtzman et al. 2020), min-p those with
    at least min_p of the likeliest one's share (Nguyen et al. 2024); each filter works on what the one before it left,
    made to sum to 1.
    """
    # from the likeliest one downwards, so that no temperature, however low, makes infinite numbers
    scaled_V = (logits_V - logits_V.max()) / max(params.temperature, LOWEST_TEMPERATURE)
    if params.top_k == 0 and params.top_p == 1:
        probability_V = scaled_V.softmax(0)
        if params.min_p == 0:
            return probability_V, None
        id_N = (probability_V >= params.min_p * probability_V.max()).nonzero()[:, 0]
        return probability_V[id_N], id_N
    if 0 < params.top_k < len(scaled_V):
        kept_N, id_N = scaled_V.topk(params.top_k)
        probability_N = kept_N.softmax(0)
    else:
        probability_N, id_N = _nucleus(scaled_V, params.top_p)
    if params.top_p < 1:
        # a token stays while the tokens before it hold less than top_p; so at least one stays
        num_kept = int((probability_N.cumsum(0) - probability_N < params.top_p).sum())
        probability_N, id_N = probability_N[:num_kept], id_N[:num_kept]
    if params.min_p > 0:
        num_kept = int((probability_N >= params.min_p * probability_N[0]).sum())
        probability_N, id_N = probability_N[:num_kept], id_N[:num_kept]
    return probability_N, id_N


def _nucleus(scaled_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids of so many of the likeliest tokens, in order, that they hold `top_p`; all for top_p 1."""
    total = scaled_V.logsumexp(0)
    size = NUCLEUS if top_p < 1 else len(scaled_V)
    while size < len(scaled_V):
        kept_N, id_N = scaled_V.topk(size)
        probability_N = (kept_N - total).exp()
        # some room, so that rounding never makes a difference between this sum and the one that cuts
        if float(probability_N.sum()) > top_p + 1e-4:
            return probability_N, id_N
        size *= 16
    kept_N, id_N = scaled_V.sort(descending=True)
    return (kept_N - total).exp(), id_N
