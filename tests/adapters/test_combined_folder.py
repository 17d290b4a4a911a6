"""Folders in, a folder out: PEFT loads it and says what its own combination says; what does not agree is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_lora.adapters.combine import Combination
from alpaca_lora.adapters.combined_folder import combine_folders, read_source
from alpaca_lora.adapters.lora_config import DEFAULTS
from alpaca_lora.adapters.peft_format import load_adapter, write_adapter
from alpaca_lora.adapters.record import AdapterRecord, read_record
from alpaca_lora.errors import AdapterError, AlpacaLoraError, ConfigError, ModelFileError, NumericalError, UserError
from tests.adapters.conftest import Twins, our_logits
from tests.tiny import tiny_model

RECORD = AdapterRecord(
    "base/model", "fingerprint-1", template={"name": "alpaca", "text": "x"}, stop_ids=[257], stop_strings=["###"],
    tokenizer_fingerprint="t", data_hashes={"a.json": "1"}, config={"lora_r": 4}, metrics={"loss": 1.0},
)  # fmt: skip
PEFT_ON_TRANSFORMERS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
CAT = Combination("cat")


def adapter_folder(
    path: Path, seed: int = 0, record: AdapterRecord | None = RECORD, *, targets: Any = ("q_proj", "v_proj"),
    rank: int = 4, layers: tuple[int, ...] = (0, 1), **changes: Any,
) -> Path:  # fmt: skip
    """A LoRA folder for the tiny model, with random factors."""
    generator = torch.Generator().manual_seed(seed)
    model, tensors = tiny_model(), {}
    ends = ("q_proj", "v_proj") if isinstance(targets, str) else targets
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ends and any(f"layers.{layer}." in name for layer in layers):
            out, width = module.weight.shape  # type: ignore[union-attr]
            for key, shape in (("A", (rank, width)), ("B", (out, rank))):
                tensors[f"base_model.model.{name}.lora_{key}.weight"] = torch.randn(*shape, generator=generator) * 0.3
    chosen = targets if isinstance(targets, str) else list(targets)
    config = {**DEFAULTS, "r": rank, "lora_alpha": 8, "target_modules": chosen, "task_type": "CAUSAL_LM", **changes}
    write_adapter(path, tensors, config, record)
    return path


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def peft_logits(twins: Twins, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(twins.theirs, str(folder))
    return twins.their_logits(model)


def test_what_makes_up_for_rounding_is_to_be_there_once(tmp_path: Path) -> None:
    begun = dataclasses.replace(RECORD, config={"init_lora_weights": "rounding_error"})
    folders = [adapter_folder(tmp_path / name, seed, record) for seed, (name, record) in enumerate(
        (("a", begun), ("b", begun), ("c", RECORD))
    )]  # fmt: skip
    for weights, times in (([1.0, 0.5, 1.0], "1.5"), ([0.5, 0.5, 3.0], None), ([1, -0.25, 1.0], "0.75")):
        made = combine_folders(folders, weights, CAT, tmp_path / f"out-{times}")
        said = [message for message in made.messages if "make up for what quantizing took" in message]
        assert (said == []) is (times is None)
        assert times is None or f"it is made up for {times} times" in said[0]
        record = read_record(made.folder)
        assert record is not None and record.makes_up_for_rounding
    made = combine_folders([folders[2], folders[2]], [1, 1], CAT, tmp_path / "plain")
    record = read_record(made.folder)
    assert record is not None and not record.makes_up_for_rounding and made.messages == []


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize("kind", ["cat", "svd", "ties", "linear"])
@pytest.mark.parametrize(
    "other",
    [
        {},
        {"use_rslora": True},
        {"targets": ("v_proj", "down_proj")},
        {"targets": r".*\.(q|v)_proj"},
        {"layers": (1,), "layers_to_transform": [1]},
    ],
    ids=["same", "rslora", "other targets", "an expression", "one layer"],
)
def test_peft_and_we_read_what_was_written(twins: Twins, tmp_path: Path, kind: str, other: dict[str, Any]) -> None:
    folders = [adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", 1, **other)]
    how = Combination(kind, density=0.5 if kind == "ties" else None)
    made = combine_folders(folders, [0.7, -0.4], how, tmp_path / "c")
    base = our_logits(twins.ours)
    load_adapter(tmp_path / "c", twins.ours, "fingerprint-1")
    ours = our_logits(twins.ours)
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(peft_logits(twins, tmp_path / "c"), ours, rtol=0, atol=1e-4)
    # and the file holds the arithmetic's result: the weighted sum where the kind is exact
    sources = [read_source(folder).updates for folder in folders]
    result = read_source(tmp_path / "c").updates
    assert made.num_modules == len(result)
    if kind == "cat":
        for name, update in result.items():
            exact = sum(
                (w * s[name].delta() for w, s in zip([0.7, -0.4], sources, strict=True) if name in s), torch.zeros(())
            )
            torch.testing.assert_close(update.delta(), exact)


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
def test_folders_of_peft_are_combined_as_peft_does_it(twins: Twins, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        twins.theirs,
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
        adapter_name="one",
    )
    model.add_adapter("two", LoraConfig(r=5, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.2)
    model.save_pretrained(str(tmp_path))
    model.add_weighted_adapter(["one", "two"], [0.6, 0.9], "sum", combination_type="svd")
    model.set_adapter("sum")
    theirs = twins.their_logits(model)
    made = combine_folders([tmp_path / "one", tmp_path / "two"], [0.6, 0.9], Combination("svd"), tmp_path / "c")
    _, record = load_adapter(tmp_path / "c", twins.ours)
    assert record is None and sum("no alpaca_lora.json" in message for message in made.messages) == 2
    torch.testing.assert_close(our_logits(twins.ours), theirs, rtol=0, atol=1e-4)
    assert made.ranks == (3, 5)  # a module that only the first changes needs no more


def test_ranks_that_differ_stand_in_both_patterns(tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", 1, targets=("q_proj",), rank=2)]
    made = combine_folders(folders, [1.0, 1.0], CAT, tmp_path / "c")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert made.ranks == (4, 6) and config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {4} and len(config["rank_pattern"]) == 2
    assert {update.scale for update in read_source(tmp_path / "c").updates.values()} == {1.0}


def test_the_record_tells_where_it_comes_from(tmp_path: Path) -> None:
    other = dataclasses.replace(RECORD, data_hashes={"a.json": "2", "b.json": "3"})
    folders = [adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", 1, other)]
    made = combine_folders(folders, [0.5, 0.5], Combination("dare_linear", density=0.8, seed=4), tmp_path / "c")
    record = read_record(tmp_path / "c")
    assert record is not None and made.messages == []
    assert record.data_hashes == {"a.json": "1", f"{tmp_path / 'b'}: a.json": "2", "b.json": "3"}
    assert (record.template, record.stop_ids, record.base_fingerprint) == (RECORD.template, [257], "fingerprint-1")
    assert record.config["combination"] == "dare_linear" and record.config["seed"] == 4
    assert record.config["lora_weights"] == [str(folder) for folder in folders]
    assert all(len(digest) == 64 for digest in [*record.config["adapter_sha256"], record.adapter_sha256])
    assert record.metrics == {"combined_norm": made.overlap.norm, "combined_distance": made.overlap.distance}


def test_the_same_inputs_make_the_same_bytes(tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", 1)]
    for name in ("c", "d"):
        combine_folders(folders, [0.5, 0.5], Combination("dare_ties", density=0.5), tmp_path / name)
    for file in (tmp_path / "c").iterdir():
        assert file.read_bytes() == (tmp_path / "d" / file.name).read_bytes()


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", 1, None, targets=("v_proj",))]
    edit(folders[1], base_model_name_or_path="another/base")
    made = combine_folders(folders, [0.5, 0.5], CAT, tmp_path / "c")
    told = "\n".join(made.messages)
    assert "b: no alpaca_lora.json" in told and "base/model, another/base" in told
    assert "2 of 4 modules are not changed by every adapter" in told
    record = read_record(tmp_path / "c")
    assert record is not None and record.template == RECORD.template


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_fingerprint": "fingerprint-2"}, "fingerprint-1.*fingerprint-2"),
        ({"template": {"name": "chatml"}}, "'alpaca'.*'chatml'"),
        ({"template": {"name": "alpaca", "text": "y"}}, "'alpaca'.*another template 'alpaca'"),
        ({"stop_ids": [3]}, r"\[257\].*\[3\]"),
        ({"stop_strings": []}, r"\['###'\].*\[\]"),
        ({"system_prompt": "Be brief."}, "None.*Be brief"),
        ({"add_bos": True}, "False.*True"),
        ({"tokenizer_fingerprint": "u"}, "'t'.*'u'"),
    ],
)
def test_records_must_agree(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folders = [
        adapter_folder(tmp_path / "a"),
        adapter_folder(tmp_path / "b", 1, dataclasses.replace(RECORD, **changes)),
    ]
    with pytest.raises(AdapterError, match=says) as caught:
        combine_folders(folders, [0.5, 0.5], CAT, tmp_path / "c")
    assert str(tmp_path / "a") in str(caught.value) and str(tmp_path / "b") in str(caught.value)
    assert caught.value.field == next(iter(changes)) and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"peft_type": "VERA"}, AdapterError, "peft_type"),
        ({"use_dora": True}, AdapterError, "use_dora: DoRA's magnitudes cannot be added"),
        ({"modules_to_save": ["score"]}, AdapterError, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, AdapterError, "init_lora_weights: 'pissa' took a part out"),
        ({"lora_bias": True}, AdapterError, "lora_bias"),
        ({"r": 8}, AdapterError, "expected rank 8"),
    ],
)
def test_what_is_no_plain_lora(tmp_path: Path, changes: dict[str, Any], kind: type[AlpacaLoraError], says: str) -> None:
    folders = [adapter_folder(tmp_path / "a"), edit(adapter_folder(tmp_path / "b", 1, None), **changes)]
    with pytest.raises(kind, match=says) as caught:
        combine_folders(folders, [0.5, 0.5], CAT, tmp_path / "c")
    assert str(tmp_path / "b") in str(caught.value) and not (tmp_path / "c").exists()


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    good, bad = adapter_folder(tmp_path / "a"), adapter_folder(tmp_path / "b", 1, None)
    file = bad / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed: dict[str, torch.Tensor], kind: type[AlpacaLoraError], says: str) -> None:
        save_file(changed, file)
        with pytest.raises(kind, match=says):
            combine_folders([good, bad], [0.5, 0.5], CAT, tmp_path / "c")

    refused({k: t for k, t in tensors.items() if k != key}, AdapterError, "q_proj: lora_A is missing")
    embedding = {"base_model.model.wte.lora_embedding_A": torch.zeros(4, 264)}
    refused({**tensors, **embedding}, AdapterError, "is no LoRA matrix")
    refused({**tensors, key: torch.zeros(4, 31)}, AdapterError, r"a changes a weight of shape \(32, 32\).*\(32, 31\)")
    refused({**tensors, key: tensors[key] * torch.nan}, NumericalError, "NaN")
    refused({}, AdapterError, "holds no tensors")
    good_record = adapter_folder(tmp_path / "d", 2)
    save_file(tensors, good_record / "adapter_model.safetensors")
    with pytest.raises(ModelFileError, match="is not the file"):
        combine_folders([good, good_record], [0.5, 0.5], CAT, tmp_path / "c")


def test_nothing_comes_of_nothing(tmp_path: Path) -> None:
    one = adapter_folder(tmp_path / "a")
    with pytest.raises(AdapterError, match="changes nothing"):
        combine_folders([one, one], [0.0, 0.0], CAT, tmp_path / "c")
    with pytest.raises(ConfigError, match="at least two folders"):
        combine_folders([one], [1.0], CAT, tmp_path / "c")
    with pytest.raises(UserError, match="no such folder"):
        combine_folders([one, tmp_path / "nowhere"], [1.0, 1.0], CAT, tmp_path / "c")
    assert not (tmp_path / "c").exists()
