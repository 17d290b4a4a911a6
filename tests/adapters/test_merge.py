"""A merged folder says what base + adapter said: to us, to transformers, tied or not; else it is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.merge import FLOAT32_BOUND, check_free, merge_into_folder, storage_dtype
from alpaca_lora.adapters.record import AdapterRecord, read_record
from alpaca_lora.device import Compute
from alpaca_lora.errors import AdapterError, NumericalError, UserError
from alpaca_lora.models.load import Base, load_base
from alpaca_lora.weights.huggingface import write_folder
from tests.adapters.conftest import IDS, our_logits, train_a_little
from tests.tiny import CHATML, SPECIAL, tiny_model

Make = Callable[..., Any]
COMPUTE = Compute(torch.device("cpu"), torch.float32, 1, "test")
RECORD = AdapterRecord("base/model", "f", template={"name": "chat"}, stop_ids=[260])


def byte_level_tokenizer(folder: Path) -> None:
    """A real tokenizer.json over the ids of `tests.tiny`: one token per byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "add_bos_token": True, "chat_template": CHATML, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def base_folder(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    model = tiny_model(**overrides)
    tensors = ((name, parameter.data.to(dtype)) for name, parameter in model.named_parameters())
    return write_folder(folder, tensors, model.config.to_hf(), tokenizer_saver=byte_level_tokenizer)


def adapted(folder: Path, options: Any) -> tuple[Base, Lora]:
    base = load_base(str(folder), COMPUTE)
    adapter = Lora.attach(base.model, options, seed=0)
    train_a_little(adapter)
    return base, adapter


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_folder_and_says_the_same(options: Make, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = base_folder(tmp_path / "base", tie_word_embeddings=tied)
    base, adapter = adapted(source, options(lora_target_modules=["all-linear"]))
    wanted = our_logits(base.model)
    report = merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, record=RECORD, dtype=torch.float32)
    assert report.dtype == torch.float32 and report.bound == FLOAT32_BOUND
    assert 0 < report.max_logit_difference < 1e-4 and report.mean_logit_difference < report.max_logit_difference
    assert report.mean_adapter_effect > 0.1 and report.num_tokens > 100
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32 and theirs.config.tie_word_embeddings is tied
    tied_now = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert tied_now is tied
    with torch.no_grad():
        assert (theirs(input_ids=IDS[None]).logits[0] - wanted).abs().max() < 1e-4
    ours = load_base(str(tmp_path / "merged"), COMPUTE)
    assert (our_logits(ours.model) - wanted).abs().max() < 1e-4
    assert (our_logits(ours.model) - our_logits(load_base(str(source), COMPUTE).model)).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "几点?"}]
    expected = "<|im_start|>user\n几点?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    assert theirs.generation_config.eos_token_id == [257, 260] and theirs.generation_config.bos_token_id == 256
    assert read_record(tmp_path / "merged") == RECORD


def test_bfloat16_bases_stay_bfloat16_and_round_once(options: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, adapter = adapted(base_folder(tmp_path / "base", torch.bfloat16), options())
    merged = {name: weight.bfloat16() for name, weight in adapter.merged_tensors()}
    untouched = base.model.get_submodule("model.layers.0.mlp.up_proj").weight.clone()  # pyright: ignore
    report = merge_into_folder(base, adapter, tmp_path / "merged", COMPUTE, dtype=torch.bfloat16)
    assert report.dtype == torch.bfloat16 and FLOAT32_BOUND < report.max_logit_difference < report.bound
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert all(torch.equal(state[name], weight) for name, weight in merged.items())
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"].float(), untouched)  # pyright: ignore


def test_what_auto_means() -> None:
    model = tiny_model()
    assert storage_dtype(model) == torch.float32
    assert storage_dtype(model.bfloat16().float()) == torch.bfloat16


def refused(tmp_path: Path, merge: Callable[[], object], match: str) -> None:
    with pytest.raises(NumericalError, match=match) as caught:
        merge()
    assert caught.value.exit_code == 5 and "nothing was" in str(caught.value)
    assert os.listdir(tmp_path) == ["base"]


def test_a_difference_above_the_bound_publishes_nothing(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = adapted(base_folder(tmp_path / "base"), options())

    def without_the_last(self: Lora) -> Any:
        yield from list(merged_tensors(self))[:-1]

    merged_tensors = Lora.merged_tensors
    monkeypatch.setattr(Lora, "merged_tensors", without_the_last)
    refused(
        tmp_path,
        lambda: merge_into_folder(base, adapter, tmp_path / "m", COMPUTE, dtype=torch.float32),
        r"differ .*at most 0\.001",
    )


def test_a_bound_of_one_s_own(options: Make, tmp_path: Path) -> None:
    base, adapter = adapted(base_folder(tmp_path / "base"), options())
    refused(
        tmp_path,
        lambda: merge_into_folder(base, adapter, tmp_path / "m", COMPUTE, dtype=torch.float32, bound=1e-12),
        "1e-12",
    )


def test_an_adapter_that_rounding_would_eat_is_refused(options: Make, tmp_path: Path) -> None:
    base, adapter = adapted(base_folder(tmp_path / "base"), options())
    for _, parameter in adapter.trained_parameters():
        parameter.data.mul_(0.02)
    refused(
        tmp_path, lambda: merge_into_folder(base, adapter, tmp_path / "m", COMPUTE, dtype=torch.bfloat16),
        r"much of it is lost, nothing .*store it as float32",
    )  # fmt: skip


def test_nan_publishes_nothing(options: Make, tmp_path: Path) -> None:
    base, adapter = adapted(base_folder(tmp_path / "base"), options())
    next(iter(adapter.layers.values())).lora_A.data[0, 0] = float("nan")
    refused(
        tmp_path, lambda: merge_into_folder(base, adapter, tmp_path / "m", COMPUTE, dtype=torch.float32), "NaN or Inf"
    )


def test_a_folder_with_content_is_never_overwritten(options: Make, tmp_path: Path) -> None:
    base, adapter = adapted(base_folder(tmp_path / "base"), options())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        merge_into_folder(base, adapter, tmp_path / "m", COMPUTE, dtype=torch.float32)
    assert os.listdir(tmp_path / "m") == ["mine.txt"]
    (tmp_path / "m" / "mine.txt").unlink()
    merge_into_folder(base, adapter, tmp_path / "m", COMPUTE, dtype=torch.float32)  # an empty folder is fine
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["base", "m"]


def test_an_adapter_that_changes_nothing_is_not_published(options: Make, tmp_path: Path) -> None:
    base = load_base(str(base_folder(tmp_path / "base")), COMPUTE)
    adapter = Lora.attach(base.model, options(), seed=0)
    with pytest.raises(AdapterError, match="changes nothing"):
        merge_into_folder(base, adapter, tmp_path / "out", COMPUTE, dtype=torch.float32)
    assert os.listdir(tmp_path) == ["base"]


def test_a_file_in_the_way_is_the_user_s_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/out", "a" * 300):
        with pytest.raises(UserError):
            check_free(tmp_path / name)
    check_free(tmp_path / "new" / "out")
