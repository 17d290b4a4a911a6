"""From logits to a token: penalty, temperature, top-k, top-p, min-p, then one draw. Knows no model and no text.

Each row is chosen on its own with its request's own generator, so a seeded request's draws never depend on who else is
in the batch. The order of the filters is the one of transformers, which the tests compare with.
"""

from __future__ import annotations

import math

import torch

from alpaca_lora.errors import NumericalError
from alpaca_lora.inference.request import SamplingParams

LOWEST_TEMPERATURE = 1e-30  # what float32 still divides by


class Sampler:
    """Chooses the tokens of one request. One uniform number is drawn per sampled token, none for greedy ones."""

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...], device: torch.device) -> None:
        self.params = params
        self._generator: torch.Generator | None = None
        if not params.greedy:
            # on the CPU whatever the device: the same seed gives the same numbers everywhere
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)
        self._seen: set[int] = set(prompt_ids) if params.repetition_penalty != 1 else set()
        self._seen_N = torch.tensor(sorted(self._seen), dtype=torch.int64, device=device)

    def choose(self, logits_V: torch.Tensor) -> int:
        """The next token id. logits_V: float32, not changed. NumericalError when they are not finite."""
        params = self.params
        if params.repetition_penalty != 1:
            logits_V = penalize(logits_V, self._seen_N, params.repetition_penalty)
        if self._generator is None:
            chosen = int(logits_V.argmax())
            _check_finite(float(logits_V[chosen]))  # argmax finds a NaN where there is one
        else:
            chosen = self._draw(logits_V, self._generator)
        if params.repetition_penalty != 1 and chosen not in self._seen:
            self._seen.add(chosen)
            self._seen_N = torch.cat((self._seen_N, self._seen_N.new_tensor([chosen])))
        return chosen

    def _draw(self, logits_V: torch.Tensor, generator: torch.Generator) -> int:
        """Inverse of the cumulative distribution over the tokens that are left."""
        probability_N, id_N = survivors(logits_V, self.params)
        point = float(torch.rand((), generator=generator, dtype=torch.float64))
        cumulative_N = probability_N.double().cumsum(0)
        total = float(cumulative_N[-1])
        _check_finite(total)
        place = int(torch.searchsorted(cumulative_N, point * total, right=True))
        place = min(place, len(cumulative_N) - 1)  # point * total may round up to the total
        return place if id_N is None else int(id_N[place])


def _check_finite(value: float) -> None:
    if not math.isfinite(value):
        raise NumericalError(
            "the model's logits are not finite", fix="check the weights and the adapter, or try dtype float32"
        )


def penalize(logits_V: torch.Tensor, seen_N: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive, multiply negative logits of tokens seen before by `penalty` (Keskar et al. 2019, CTRL)."""
    seen_logits_N = logits_V[seen_N]
    penalized_N = torch.where(seen_logits_N < 0, seen_logits_N * penalty, seen_logits_N / penalty)
    return logits_V.index_put((seen_N,), penalized_N)


def survivors(logits_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens that temperature, top-k, top-p and min-p leave, and their ids (None: all, in order).

    Top-p keeps the smallest set of likeliest tokens whose share reaches top_p (Holtzman et al. 2020), min-p those with
    at least min_p of the likeliest one's share (Nguyen et al. 2024); each filter works on what the one before it left,
    made to sum to 1.
    """
    # from the likeliest one downwards, so that no temperature, however low, makes infinite numbers
    scaled_V = (logits_V - logits_V.max()) / max(params.temperature, LOWEST_TEMPERATURE)
    vocab_size = len(scaled_V)
    if params.top_k == 0 and params.top_p == 1:
        probability_V = scaled_V.softmax(0)
        if params.min_p == 0:
            return probability_V, None
        id_N = (probability_V >= params.min_p * probability_V.max()).nonzero()[:, 0]
        return probability_V[id_N], id_N
    if 0 < params.top_k < vocab_size:
        kept_N, id_N = scaled_V.topk(params.top_k)
    else:
        kept_N, id_N = scaled_V.sort(descending=True)
    probability_N = kept_N.softmax(0)
    if params.top_p < 1:
        # a token stays while the tokens before it hold less than top_p; so at least one stays
        num_kept = int((probability_N.cumsum(0) - probability_N < params.top_p).sum())
        probability_N, id_N = probability_N[:num_kept], id_N[:num_kept]
    if params.min_p > 0:
        num_kept = int((probability_N >= params.min_p * probability_N[0]).sum())
        probability_N, id_N = probability_N[:num_kept], id_N[:num_kept]
    return probability_N, id_N
