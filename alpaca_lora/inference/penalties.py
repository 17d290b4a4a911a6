"""What was said before counts less: repetition, presence and frequency penalties. Knows which tokens came, no text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

_ROOM = 64  # places of the smallest table


class TokenCounts:
    """The different tokens of one request and how often each came. Memory grows with them, not with the vocabulary."""

    def __init__(self, token_ids: Iterable[int], device: torch.device) -> None:
        counts = Counter(token_ids)
        self._place = {token_id: place for place, token_id in enumerate(counts)}
        empty = [0] * max(_ROOM, len(counts))
        self._ids_N = torch.tensor([*counts, *empty], dtype=torch.int64, device=device)
        self._counts_N = torch.tensor([*counts.values(), *empty], dtype=torch.float32, device=device)

    @property
    def ids_N(self) -> torch.Tensor:
        """int64, each token once."""
        return self._ids_N[: len(self._place)]

    @property
    def counts_N(self) -> torch.Tensor:
        """float32, how often each of `ids_N` came."""
        return self._counts_N[: len(self._place)]

    def add(self, token_id: int) -> None:
        """One more `token_id`."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids_N):
            self._ids_N = torch.cat((self._ids_N, torch.zeros_like(self._ids_N)))
            self._counts_N = torch.cat((self._counts_N, torch.zeros_like(self._counts_N)))
        self._ids_N[place] = token_id
        self._counts_N[place] += 1


def penalize_repeated_(logits_V: torch.Tensor, seen_N: torch.Tensor, penalty: float) -> None:
    """Divide positive, multiply negative logits of the tokens `seen_N` by `penalty` (Keskar et al. 2019, CTRL)."""
    seen_logits_N = logits_V[seen_N]
    logits_V[seen_N] = torch.where(seen_logits_N < 0, seen_logits_N * penalty, seen_logits_N / penalty)


def penalize_said_(logits_V: torch.Tensor, said: TokenCounts, presence: float, frequency: float) -> None:
    """OpenAI's two penalties: logit -= presence + frequency * count, for each token that the answer holds."""
    logits_V[said.ids_N] -= presence + frequency * said.counts_N
