"""One call that executes a whole step: the seam for whoever runs it otherwise. Knows no requests and no text."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.kv_cache import KVCache
from alpaca_lora.inference.paged_plan import PagedPlan
from alpaca_lora.inference.step_batch import StepBatch
from alpaca_lora.kernels.few_rows import FEW_ROWS
from alpaca_lora.models.classifier import class_logits
from alpaca_lora.models.decoder import CausalLM

# numbers of rows are multiples of one up to so many rows, above of the other: 36 numbers up to 2,048 rows
SMALL_STEP, SMALL_ROWS, LARGE_STEP = 16, 128, 64


class StepLogits(NamedTuple):
    """tokens_NV: float32, of the batch's `token_rows`. classes: float32 (C,) of each of its `class_rows`."""

    tokens_NV: torch.Tensor
    classes: list[torch.Tensor]


class Runner:
    """Runs steps of ``model`` on ``cache``; the bank's adapters each act on their own rows."""

    def __init__(self, model: CausalLM, cache: KVCache, bank: AdapterBank | None = None) -> None:
        self.model, self.cache, self.bank = model, cache, bank

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepLogits:
        """Stores keys and values of all rows in the cache and returns the logits of those that are asked."""
        idle = [0] * self._num_idle(len(batch.ids))
        if self.bank is not None:
            self.bank.set_rows([*batch.adapters, (None, len(idle))] if idle else batch.adapters)
        plan = PagedPlan(self.cache, batch.segments, len(idle))
        hidden_TD = self.model(self._tensor(batch.ids + idle), self._tensor(batch.positions + idle), plan)
        return StepLogits(self._token_logits(hidden_TD, batch.token_rows), self._classes(hidden_TD, batch))

    def _num_idle(self, num_rows: int) -> int:
        """Rows that are computed for nobody, so that steps have few different numbers of rows: for each one processors
        compile their products in bfloat16 anew, and keep them. Half a minute of prompts of all lengths took 300 MB so.
        """
        if num_rows <= FEW_ROWS or self.cache.device.type != "cpu" or self.cache.keys[0].dtype != torch.bfloat16:
            return 0
        if any(rope.kind == "dynamic" for rope in self.model.config.ropes):
            return 0  # reads a sequence's length off the positions of a step
        return -num_rows % (SMALL_STEP if num_rows <= SMALL_ROWS else LARGE_STEP)

    def _token_logits(self, hidden_TD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if not rows:
            return hidden_TD.new_empty((0, self.model.config.vocab_size), dtype=torch.float32)
        if len(rows) == len(hidden_TD):
            return self.model.logits(hidden_TD)
        if self.bank is not None:
            self.bank.select_rows(rows)
        return self.model.logits(hidden_TD[rows])

    def _classes(self, hidden_TD: torch.Tensor, batch: StepBatch) -> list[torch.Tensor]:
        """A classifying adapter's own head, else the model's."""
        found = []
        for row, sequence in zip(batch.class_rows, batch.class_sequences, strict=True):
            score = None if sequence.adapter is None else sequence.adapter.score
            if score is None:
                found.append(class_logits(self.model, hidden_TD[row]))
            else:
                found.append(F.linear(hidden_TD[row].float(), score.weight.float()))
        return found

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.cache.device)
