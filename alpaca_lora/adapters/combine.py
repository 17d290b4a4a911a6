"""Several LoRA updates of the same linears -> one: the sum, exactly or in an approximation of the same rank.

Knows factors and scales by module name; knows neither files nor models. Everything is a pure function. The eleven
kinds, and what they give, are those of PEFT's `add_weighted_adapter` (version 0.21).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from alpaca_lora.adapters.linear_adapter import seeded
from alpaca_lora.adapters.pruning import Election, drop_at_random, elected_mean, keep_largest, weighted_sum
from alpaca_lora.errors import ConfigError


class Update(NamedTuple):
    """What one adapter adds to one linear's weight: scale * B A. lora_A (R, in), lora_B (out, R), float32."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> torch.Tensor:
        """scale * B A (out, in)."""
        return (self.lora_B @ self.lora_A) * self.scale


class Kind(NamedTuple):
    """How a kind works. on: what is added, A and B apart ("factors"), whole updates ("updates"), or neither because the
    factors are only put side by side ("stack"). thin: how each is made sparse first. elects: TIES' signs."""

    on: Literal["factors", "updates", "stack"]
    thin: Literal["largest", "random"] | None = None
    elects: bool = False


KINDS: Mapping[str, Kind] = {
    "linear": Kind("factors"),
    "cat": Kind("stack"),
    "svd": Kind("updates"),
    "ties": Kind("factors", "largest", True),
    "ties_svd": Kind("updates", "largest", True),
    "dare_linear": Kind("factors", "random"),
    "dare_ties": Kind("factors", "random", True),
    "dare_linear_svd": Kind("updates", "random"),
    "dare_ties_svd": Kind("updates", "random", True),
    "magnitude_prune": Kind("factors", "largest"),
    "magnitude_prune_svd": Kind("updates", "largest"),
}


@dataclass(frozen=True, slots=True)
class Combination:
    """What to do. density: share of entries kept; svd_rank: None is the largest rank of the inputs; seed: of DARE's
    masks, which belong to (seed, module), so that other modules do not change them.

    ConfigError: an unknown kind, a setting that this kind does not have, or one that it needs and does not get.
    """

    kind: str
    density: float | None = None
    majority_sign_method: Election | None = None  # None: "total" where the kind elects
    svd_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown {self.kind!r}", field="combination", expected=f"one of {', '.join(KINDS)}")
        kind = KINDS[self.kind]
        if kind.thin and self.density is None:
            raise ConfigError("missing", field="density", expected=f"share of entries that {self.kind} keeps, 0 to 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"is {self.density}", field="density", expected="above 0, at most 1")
        for key, value, has in (
            ("density", self.density, kind.thin is not None),
            ("majority_sign_method", self.majority_sign_method, kind.elects),
            ("svd_rank", self.svd_rank, kind.on == "updates"),
        ):
            if value is not None and not has:
                raise ConfigError(f"combination {self.kind} has none", field=key, fix="leave it out")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"is {self.svd_rank}", field="svd_rank", expected="at least 1")


def combine(inputs: Sequence[Mapping[str, Update]], weights: Sequence[float], how: Combination) -> dict[str, Update]:
    """Module name -> its combined update, with scale 1, for every module that any input changes.

    A module is combined from the inputs that have it. ConfigError: numbers of inputs and weights differ, a weight is
    not finite, or a kind that adds factors meets different ranks in one module.
    """
    if len(inputs) != len(weights):
        raise ConfigError(
            f"{len(weights)} weights for {len(inputs)} adapters", field="combination_weights", expected="one for each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"is {list(weights)}", field="combination_weights", expected="finite numbers")
    rank = how.svd_rank or max((one.rank for updates in inputs for one in updates.values()), default=0)
    names = dict.fromkeys(name for updates in inputs for name in updates)
    combined: dict[str, Update] = {}
    for name in names:
        present = [(updates[name], weight) for updates, weight in zip(inputs, weights, strict=True) if name in updates]
        own, own_weights = [one for one, _ in present], [weight for _, weight in present]
        combined[name] = combine_module(
            own, own_weights, how, rank=rank, generator=seeded(how.seed, how.kind, name), name=name
        )
    return combined


def combine_module(
    updates: Sequence[Update], weights: Sequence[float], how: Combination, *, rank: int, generator: torch.Generator,
    name: str = "",
) -> Update:  # fmt: skip
    """One module's updates (all (out, in)) -> one with scale 1. rank: what kinds that decompose cut to."""
    on = KINDS[how.kind].on
    if on == "stack":
        lora_A = torch.cat([one.lora_A * (weight * one.scale) for one, weight in zip(updates, weights, strict=True)])
        return Update(lora_A, torch.cat([one.lora_B for one in updates], dim=1), 1.0)
    if on == "factors":
        return _add_factors(updates, weights, how, generator, name)
    if how.kind == "svd":
        return _truncated_sum(updates, weights, rank)
    delta = _add([one.delta() for one in updates], weights, how, generator)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return _cut(left, values, right, rank)


def _add(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Combination, generator: torch.Generator
) -> torch.Tensor:
    kind = KINDS[how.kind]
    density = 1.0 if how.density is None else how.density
    if kind.thin == "largest":
        tensors = [keep_largest(one, density) for one in tensors]
    elif kind.thin == "random":
        tensors = [drop_at_random(one, density, generator) for one in tensors]
    if kind.elects:
        return elected_mean(tensors, weights, how.majority_sign_method or "total")
    return weighted_sum(tensors, weights)


def _add_factors(
    updates: Sequence[Update], weights: Sequence[float], how: Combination, generator: torch.Generator, name: str
) -> Update:
    """A and B added apart, each with the root of |w s|: right where the factors agree, since (sum B)(sum A) also holds
    the products of one adapter's B with another's A."""
    ranks = [one.rank for one in updates]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"combination {how.kind} adds factors, which have ranks {', '.join(map(str, ranks))}"
            + (f" in {name}" if name else ""),
            field="combination", expected="one rank", fix="choose cat, or a kind that ends in svd",
        )  # fmt: skip
    factors = [weight * one.scale for one, weight in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    # the sign goes to one side only: on both it would cancel
    signed = [-root if factor < 0 else root for root, factor in zip(roots, factors, strict=True)]
    lora_A = _add([one.lora_A for one in updates], signed, how, generator)
    lora_B = _add([one.lora_B for one in updates], roots, how, generator)
    return Update(lora_A, lora_B, 1.0)


def _truncated_sum(updates: Sequence[Update], weights: Sequence[float], rank: int) -> Update:
    """The best approximation of rank `rank` of sum_n w_n s_n B_n A_n, whose (out, in) matrix is never made: with
    B = Q R and A^T = P S of the stacked factors, B A = Q (R S^T) P^T, and only the small middle is decomposed."""
    stacked_A = torch.cat([one.lora_A * (weight * one.scale) for one, weight in zip(updates, weights, strict=True)])
    stacked_B = torch.cat([one.lora_B for one in updates], dim=1)
    q, r = torch.linalg.qr(stacked_B.double())
    p, s = torch.linalg.qr(stacked_A.double().t())
    left, values, right = torch.linalg.svd(r @ s.t(), full_matrices=False)
    return _cut(q @ left, values, right @ p.t(), rank)


def _cut(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int) -> Update:
    """U S V^T cut to its largest singular values, all of S in B."""
    lora_A, lora_B = right[:rank], left[:, :rank] * values[:rank]
    return Update(lora_A.float().contiguous(), lora_B.float().contiguous(), 1.0)
