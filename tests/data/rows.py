"""Small files and tokenizers that the tests of this room share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alpaca_lora.data.options import DataOptions
from alpaca_lora.data.prepare import Prepared, prepare
from alpaca_lora.text.rendered import Rendered
from alpaca_lora.text.templates import load_template
from tests.tiny import CHATML, SPECIAL, ByteTokenizer


def alpaca_rows(count: int) -> list[dict[str, str]]:
    """Rows that all differ, of many lengths."""
    return [{"instruction": f"Say {i}.", "input": "", "output": f"{i} " * (1 + i * 7 % 29)} for i in range(count)]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare_rows(path: Path, tokenizer: ByteTokenizer | None = None, **options: Any) -> Prepared:
    """The rows of ``path`` under the alpaca template, or the chat template when the tokenizer brings one."""
    tokenizer = tokenizer or ByteTokenizer()
    template = load_template(None, tokenizer)
    return prepare(DataOptions(data_path=[str(path)], **options), tokenizer, template, system_prompt=None, seed=1)


def chat_tokenizer() -> ByteTokenizer:
    return ByteTokenizer(add_bos=False, chat_template=CHATML)


@dataclass(frozen=True)
class PairEncoded:
    """Ids and the characters of each."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def token_at(self, char: int) -> tuple[int, bool]:
        index = next((i for i, start in enumerate(self.starts) if start >= char), len(self.ids))
        return index, any(start < char < end for start, end in zip(self.starts, self.ends, strict=True))


class PairTokenizer:
    """Two characters a token: tokens reach over borders as those of a real vocabulary do."""

    bos_id, eos_id, add_bos, stop_ids, fingerprint = 1, 2, True, (2,), "pairs"
    special_tokens: Mapping[str, int] = MappingProxyType({"</s>": 2})

    def encode_many(self, rendered: Sequence[Rendered]) -> list[PairEncoded]:
        return [self.encode(one) for one in rendered]

    def encode(self, rendered: Rendered) -> PairEncoded:
        starts = list(range(0, len(rendered.text), 2))
        return PairEncoded([3] * len(starts), starts, [min(start + 2, len(rendered.text)) for start in starts])


def shown(ids: Sequence[int]) -> str:
    """Ids as text, special tokens spelled out."""
    words = {index: word for word, index in SPECIAL.items()}
    data = b"".join(words[i].encode() if i in words else bytes([i]) for i in map(int, ids))
    return data.decode("utf-8", "backslashreplace")
