"""Rotary position embeddings: positions -> cos and sin, with every scaling we read. Knows positions only, no attention.

A pair of channels (i, i + E/2) of a head turns by the angle position * f_i, f_i = theta^(-2i/E) (Su et al.,
arXiv 2104.09864). The scalings change the f_i; yarn also scales cos and sin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclass(frozen=True)
class RopeConfig:
    """The frequencies of one kind of layer. Fields after ``factor`` matter only to the kinds named beside them."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    trained_positions: int = 2048  # dynamic, llama3, yarn: the context of pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: from factor
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


class Rope:
    """cos and sin for one `RopeConfig`. Not an `nn.Module`: the frequencies stay float32 when the model is cast."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config, self.head_dim = config, head_dim
        self.inv_freq_E, self.magnitude = inverse_frequencies(config, head_dim)

    def __call__(
        self, positions_T: torch.Tensor, dtype: torch.dtype, first_position: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos_TE, sin_TE) in ``dtype``, both halves of E equal. Angles are computed in float32.

        ``first_position``: of each sequence, after a prefix; only dynamic NTK asks.
        """
        positions_T1 = positions_T[:, None].float()
        if self.config.kind == "dynamic":
            angles = positions_T1 * dynamic_frequencies(self.config, self.head_dim, positions_T, first_position)
        else:
            if self.inv_freq_E.device != positions_T.device:
                self.inv_freq_E = self.inv_freq_E.to(positions_T.device)
            angles = positions_T1 * self.inv_freq_E
        angles_TE = torch.cat((angles, angles), dim=-1)
        cos_TE, sin_TE = angles_TE.cos(), angles_TE.sin()
        if self.magnitude != 1.0:
            cos_TE, sin_TE = cos_TE * self.magnitude, sin_TE * self.magnitude
        return cos_TE.to(dtype), sin_TE.to(dtype)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """(f of shape (E/2,) in float32, factor of cos and sin); for ``dynamic`` those of short sequences."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return inv_freq / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(config, inv_freq), 1.0
    if config.kind == "yarn":
        return _yarn(config, inv_freq, head_dim)
    return inv_freq, 1.0


def dynamic_frequencies(
    config: RopeConfig, head_dim: int, positions_T: torch.Tensor, first_position: int = 0
) -> torch.Tensor:
    """f of shape (T, E/2) of dynamic NTK: the base grows with the sequence once that is longer than pre-training.

    A packed stream has several sequences: a run of consecutive positions from the first on is one, its length its last
    position + 1, so a packed sequence is rotated as it is alone. A token outside of such a run was decoded (or
    prefilled in a later chunk): its length is its own position + 1, so each key keeps the base of the moment it was
    made, as in transformers' cached generation.
    """
    starts_T = torch.ones_like(positions_T, dtype=torch.bool)
    starts_T[1:] = positions_T[1:] != positions_T[:-1] + 1
    run_T = starts_T.cumsum(0) - 1
    last_T = starts_T.roll(
        -1
    )  # the token before a start ends its run; the stream's last token precedes the first start
    from_first_T = positions_T[starts_T][run_T] == first_position
    length_T = torch.where(from_first_T, positions_T[last_T][run_T], positions_T) + 1
    length_T = length_T.clamp(min=config.trained_positions).float()
    stretch_T = config.factor * length_T / config.trained_positions - (config.factor - 1)
    theta_T = config.theta * stretch_T ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    return 1.0 / theta_T[:, None] ** exponents


def _llama3(config: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: slow channels are slowed by ``factor``, fast ones kept, those between blended."""
    turns = config.trained_positions * inv_freq / (2 * math.pi)  # full turns within the trained context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / config.factor + blend * inv_freq


def _yarn(config: RopeConfig, inv_freq: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): interpolate slow channels, keep fast ones, ramp between; scale cos, sin."""

    def channel(turns: float) -> float:
        """The channel that makes ``turns`` full turns within the trained context."""
        return head_dim * math.log(config.trained_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    def magnitude(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    low, high = channel(config.beta_fast), channel(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0.0, 1.0)
    scale = config.attention_factor
    if scale is None:
        if config.mscale and config.mscale_all_dim:
            scale = magnitude(config.mscale) / magnitude(config.mscale_all_dim)
        else:
            scale = magnitude(1.0)
    return inv_freq / config.factor * ramp + inv_freq * (1 - ramp), scale
