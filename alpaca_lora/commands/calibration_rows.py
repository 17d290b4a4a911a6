"""Rows to calibrate on: any file that training reads -> token ids, as training would have made them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from alpaca_lora.data.encode import EncodePolicy, Encoder
from alpaca_lora.data.formats import BadRow, Keys, read_rows
from alpaca_lora.errors import ConfigError
from alpaca_lora.text.templates import load_template
from alpaca_lora.text.tokenizer import Tokenizer

ROW_TOKENS = 512  # long texts are cut into rows of so many tokens
LEAST_TOKENS = 128  # fewer say nothing about what a model's activations are like


def calibration_rows(
    path: str, num_tokens: int, tokenizer: Tokenizer, *, template: str | None, system_prompt: str | None
) -> list[torch.Tensor]:
    """The first rows of a file, of ``num_tokens`` in all (the last one is cut); int64 (T,) each, in the file's order.

    ConfigError when the file is not there or too short; DataError for a row that cannot be read.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path!r}", field="calibration_data", expected="a text or data file")
    policy = EncodePolicy(ROW_TOKENS)
    encoder = Encoder(tokenizer, load_template(template, tokenizer), policy, system_prompt=system_prompt)
    rows: list[torch.Tensor] = []
    left = num_tokens
    for row in read_rows(Path(path), Keys(), lambda _: None, lambda _: None):
        if isinstance(row, BadRow):
            raise row.error
        for ids_T, _ in encoder.encode_many([row])[0].pieces:
            if left > 0:
                rows.append(torch.from_numpy(ids_T[:left].astype("int64")))
                left -= len(rows[-1])
        if left <= 0:
            break
    found = num_tokens - max(left, 0)
    if found < LEAST_TOKENS:
        raise ConfigError(
            f"{path} holds {found} tokens" if left > 0 else f"{found} tokens are too few",
            field="calibration_data" if left > 0 else "calibration_tokens", expected=f"at least {LEAST_TOKENS}",
        )  # fmt: skip
    return rows


def rows_sha256(rows: Sequence[torch.Tensor]) -> str:
    """64 hexadecimal digits of the token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
    return digest.hexdigest()
