"""The tiny model and tokenizer that the other rooms' tests stand on are themselves what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from alpaca_lora.models.attention import Packed
from alpaca_lora.text.rendered import Rendered, Span
from alpaca_lora.text.tokenizer import Tokenizer
from tests.tiny import CHATML, ByteTokenizer, tiny_model

TEXT = "<|im_start|>user\nhé 你好<|im_end|>!<|im_end|>\n"
USER = TEXT.index("hé"), TEXT.index("!") + 1


def rendered(special: bool = True) -> Rendered:
    return Rendered(TEXT, (Span(*USER),), (), special, False)


def test_special_tokens_only_where_the_template_put_them() -> None:
    encoded = ByteTokenizer().encode(rendered())
    assert [i for i in encoded.ids if i > 255] == [259, 260]
    assert ByteTokenizer().decode(encoded.ids, skip_special=False) == TEXT
    assert max(ByteTokenizer().encode(rendered(special=False)).ids) < 256


def test_boundaries_by_character() -> None:
    encoded = ByteTokenizer().encode(rendered())
    tokens = encoded.span_tokens(Span(*USER))
    assert bytes(encoded.ids[tokens.start : tokens.end]).decode() == TEXT[slice(*USER)]
    assert tokens.num_straddling == 0
    assert encoded.token_at(5).straddles  # inside of <|im_start|>


def test_saved_folder_gives_transformers_the_same_ids(tmp_path: Path) -> None:
    ByteTokenizer(chat_template=CHATML).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("!<|im_end|>", "!").replace("好<|im_end|>", "好")
    ours = ByteTokenizer().encode(Rendered(plain, (), (), True, False))
    assert theirs(plain, add_special_tokens=False)["input_ids"] == ours.ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (256, 257, 258)
    assert theirs.decode([259, 117, 260]) == "<|im_start|>u<|im_end|>"


@pytest.mark.parametrize("add_bos", [True, False])
def test_reloaded_from_its_folder_it_is_the_same(tmp_path: Path, add_bos: bool) -> None:
    made = ByteTokenizer(add_bos=add_bos, chat_template=CHATML)
    made.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.fingerprint == made.fingerprint
    assert (again.bos_id, again.eos_id, again.pad_id, again.add_bos) == (256, 257, 258, add_bos)
    assert (again.vocab_size, again.stop_ids, again.chat_template) == (261, (257, 260), CHATML)


@torch.no_grad()
def test_models_are_seeded_and_their_logits_are_not_flat() -> None:
    ids_T, positions_T = torch.arange(20), torch.arange(20)
    one, same, other = (m.logits(m(ids_T, positions_T, Packed((20,)))) for m in map(tiny_model, (0, 0, 1)))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.std() > 0.5
