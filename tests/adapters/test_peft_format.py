"""PEFT as the oracle in both directions, and every way in which a folder can be wrong (fault cases 28 to 33)."""

from __future__ import annotations

import json
import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_lora.adapters.lora import Lora
from alpaca_lora.adapters.lora_linear import LoRALinear
from alpaca_lora.adapters.peft_format import adapter_folder, load_adapter, read_config, save_adapter
from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.errors import AdapterError, AlpacaLoraError, MachineError, ModelFileError, UserError
from alpaca_lora.models.decoder import CausalLM
from alpaca_lora.weights import safetensors_file
from tests.adapters.conftest import Twins, our_logits, train_a_little
from tests.tiny import tiny_model

Make = Callable[..., Any]
RECORD = AdapterRecord("base/model", "fingerprint-1", template={"name": "alpaca"}, stop_ids=[257])
# the warning is about PEFT's own use of transformers, whatever the folder
PEFT_ON_TRANSFORMERS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(model: CausalLM, options: Any, seed: int = 0) -> Lora:
    adapter = Lora.attach(model, options, seed=seed)
    train_a_little(adapter)
    return adapter


def saved(folder: Path, options: Any, record: AdapterRecord | None = None) -> Path:
    save_adapter(folder, trained(tiny_model(), options), record)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVED"}))


def is_untouched(model: CausalLM) -> bool:
    return not any(isinstance(module, LoRALinear) for module in model.modules())


# --- PEFT reads ours


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_target_modules": MLP, "lora_r": 3},
        {"lora_target_modules": ["all-linear"], "use_rslora": True},
        {"lora_target_modules": [r".*\.1\..*(q|up)_proj"], "lora_alpha": 2.5},
        {"lora_target_modules": [r".*\.0\..*_proj", "k_proj"], "lora_dropout": 0.25},
        {"lora_target_modules": [".*self_attn.*"]},  # matches modules that are no linear, which PEFT refuses
        {"lora_target_modules": [r".*\.mlp\..*"]},  # and one that only the other implementation has
    ],
)
def test_peft_loads_ours_and_says_the_same(
    twins: Twins, options: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    save_adapter(tmp_path / "a", trained(twins.ours, options(**changes)), RECORD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(twins.theirs, str(tmp_path / "a"))
    assert [w for w in caught if "is_gradient_checkpointing" not in str(w.message)] == []
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[key], ours[key]) for key in ours)
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig) and config.base_model_name_or_path == "base/model"
    difference = (twins.their_logits(model) - twins.our_logits()).abs().max()
    assert difference < 1e-5, difference
    assert (twins.our_logits() - our_logits(tiny_model())).abs().max() > 0.1  # the adapter does something


def test_files_and_keys_are_peft_s(options: Make, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", options(), RECORD)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "alpaca_lora.json"]
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys and len(keys) == 8
    assert safetensors_file.read_metadata(folder / "adapter_model.safetensors") == {"format": "pt"}


# --- we read PEFT's


@pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS)
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": MLP, "use_rslora": True, "lora_alpha": 3, "lora_dropout": 0.1},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}},
        {
            "target_modules": MLP, "rank_pattern": {r"^model\.layers\.0\..*": 5}, "use_rslora": True,
            "alpha_pattern": {"layers.1.mlp.up_proj": 5, "v_proj": 1},
        },
        {"target_modules": r".*\.(q|v|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*\.0\.self_attn\.o_proj"},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)  # fmt: skip
def test_we_load_peft_s_and_say_the_same(twins: Twins, tmp_path: Path, config: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(twins.theirs, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **config))
    for name, parameter in theirs.named_parameters():
        # an update as large as PEFT's random one makes both sides' own rounding larger than 1e-5
        parameter.data.mul_(0.2 if "lora_B" in name else 1.0)
    theirs.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    adapter, record = load_adapter(tmp_path / "a", twins.ours)
    assert record is None and adapter.messages == [] and list(adapter.trained_parameters()) == []
    difference = (twins.their_logits(theirs.eval()) - twins.our_logits()).abs().max()
    assert difference < 1e-5, difference
    # and what we write of it is what PEFT wrote
    save_adapter(tmp_path / "b", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_save_load_save_is_byte_equal(options: Make, tmp_path: Path) -> None:
    first = saved(tmp_path / "a", options(lora_target_modules=["all-linear"], lora_dropout=0.1), RECORD)
    model = tiny_model()
    adapter, record = load_adapter(first, model, "fingerprint-1", trainable=True)
    assert len(list(adapter.trained_parameters())) == 28
    save_adapter(tmp_path / "b", adapter, record)
    for name in os.listdir(first):
        assert (tmp_path / "b" / name).read_bytes() == (first / name).read_bytes(), name


def test_unknown_keys_are_kept_and_told(options: Make, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", options())
    edit(folder, made_by="somebody", peft_version="9.9")
    adapter, _ = load_adapter(folder, tiny_model())
    assert len(adapter.messages) == 1 and "made_by: unknown key, kept" in adapter.messages[0]
    save_adapter(tmp_path / "b", adapter)
    assert read_config(tmp_path / "b")["made_by"] == "somebody"


# --- saving


def test_what_has_not_moved_is_not_published(options: Make, tmp_path: Path) -> None:
    adapter = Lora.attach(tiny_model(), options(), seed=0)
    with pytest.raises(AdapterError, match="did not move: the update of all 4 modules is zero"):
        save_adapter(tmp_path / "a", adapter)
    assert os.listdir(tmp_path) == []
    save_adapter(tmp_path / "a", adapter, allow_untrained=True)
    adapter.remove()
    with pytest.raises(AdapterError, match="no tensors"):
        save_adapter(tmp_path / "b", adapter, allow_untrained=True)


def test_nan_is_not_saved(options: Make, tmp_path: Path) -> None:
    adapter = trained(tiny_model(), options())
    adapter.layers["model.layers.0.self_attn.q_proj"].lora_A.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight: holds NaN"):
        save_adapter(tmp_path / "a", adapter)
    assert os.listdir(tmp_path) == []


def test_other_files_of_the_folder_stay(options: Make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path, options(), RECORD)
    saved(tmp_path, options(lora_r=2))  # saved again, without a record
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    adapter, record = load_adapter(tmp_path, tiny_model())
    assert record is None and adapter.config["r"] == 2


def test_a_disk_that_fails_leaves_the_adapter_that_was_there(
    options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "a", options(), RECORD)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "fsync", full)
    with pytest.raises(MachineError, match=r"No space left.*bytes are needed"):
        saved(folder, options(lora_r=2), RECORD)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    with pytest.raises(MachineError):
        saved(tmp_path / "new", options())
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_read_back_is_compared(options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alpaca_lora.adapters import peft_format

    def damaging(path: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> str:
        return safetensors_file.write_safetensors(path, {k: t + 1e-7 for k, t in tensors.items()}, metadata)

    monkeypatch.setattr(peft_format, "write_safetensors", damaging)
    with pytest.raises(ModelFileError, match="other values than were written"):
        saved(tmp_path / "a", options())
    assert os.listdir(tmp_path) == []


# --- folders that do not fit


def test_another_base_shows_both_fingerprints(options: Make, tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "a", options(), RECORD), tiny_model()
    with pytest.raises(AdapterError, match=r"base/model with fingerprint fingerprint-1, this one has fingerprint-2"):
        load_adapter(folder, model, "fingerprint-2")
    assert is_untouched(model)
    load_adapter(folder, model, "fingerprint-2", ignore_base_mismatch=True)
    load_adapter(folder, tiny_model(), "fingerprint-1")
    load_adapter(folder, tiny_model())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(Q), r"missing base_model.*0\.self_attn\.q_proj\.lora_A"),
        (lambda t: t.update({Q.replace("q_proj", "o_proj"): t[Q].clone()}), r"unexpected .*o_proj.*nearest: .*_proj"),
        (lambda t: t.update({Q.replace("_A", "_a"): t.pop(Q)}), r"missing .*lora_A.*\(nearest: .*lora_a.*unexpected"),
        (lambda t: t.update({Q: t[Q][:3]}), r"lora_A\.weight has shape \(3, 32\), expected \(4, 32\)"),
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t[Q].__setitem__((0, 0), float("inf")), "NaN or Inf"),
        (lambda t: t.update({Q: t[Q].int()}), "is stored as int32, expected floating point"),
    ],
)  # fmt: skip
def test_keys_shapes_and_values_are_checked_before_the_model_is_touched(
    options: Make, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], match: str
) -> None:
    folder, model = saved(tmp_path / "a", options()), tiny_model()
    rewrite(folder, change)
    with pytest.raises(AlpacaLoraError, match=match) as caught:
        load_adapter(folder, model)
    assert "adapter_model.safetensors" in str(caught.value) and caught.value.exit_code in (2, 3, 5)
    assert is_untouched(model)


def test_thousands_of_wrong_keys_are_told_quickly_and_counted(options: Make, tmp_path: Path) -> None:
    folder, started = saved(tmp_path / "a", options()), time.monotonic()
    rewrite(folder, lambda t: t.update({f"{Q}.{n}": torch.zeros(1) for n in range(5000)} | {Q: t[Q][:3]}))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, tiny_model())
    assert time.monotonic() - started < 20  # to look for the nearest name of each would take minutes
    told = str(caught.value)
    assert told.count("nearest: ") == 6 and told.endswith("; and 4995 more") and len(told) < 3000


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "REMOVED"}, "peft_type: missing"),
        ({"peft_type": "LOHA"}, "'LOHA' is not supported, expected one of LORA"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"use_dora": True}, r"missing .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"missing base_model\.model\.lm_head\.weight"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save: 'nothing' names no module"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not supported, expected none"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "takes a part out of the base weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 0}, "r: is 0"),
        ({"r": "8"}, "r: is '8'"),
        ({"r": True}, "r: is True"),
        ({"r": "REMOVED"}, "r: missing"),
        ({"lora_alpha": float("nan")}, "lora_alpha: is nan"),
        ({"lora_dropout": 1}, "lora_dropout: is 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 3}}, r"not a regular expression"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"target_modules": None}, "target_modules: is None"),
        ({"target_modules": ["c_attn"]}, "'c_attn' matches nothing"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"r": 5}, r"has shape \(4, 32\), expected \(5, 32\)"),
    ],
)
def test_settings_that_cannot_be_served_are_named(
    options: Make, tmp_path: Path, changes: dict[str, Any], match: str | None
) -> None:
    folder, model = saved(tmp_path / "a", options()), tiny_model()
    edit(folder, **changes)
    if match is None:
        load_adapter(folder, model)
        return
    with pytest.raises(AlpacaLoraError, match=match) as caught:
        load_adapter(folder, model)
    assert caught.value.exit_code in (2, 3) and is_untouched(model)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00", "\udcff"])
def test_damaged_configurations(options: Make, tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path / "a", options())
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFileError, match=r"adapter_config\.json: not"):
        load_adapter(folder, tiny_model())


def test_a_file_that_is_cut_or_changed_is_noticed(options: Make, tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "a", options(), RECORD), tiny_model()
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(ModelFileError, match=r"adapter_model\.safetensors"):
        load_adapter(folder, model)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one number
    with pytest.raises(ModelFileError, match="changed, or a save was cut"):
        load_adapter(folder, model)
    assert is_untouched(model)
    (folder / "alpaca_lora.json").unlink()
    load_adapter(folder, model)  # nothing says any more what it should be


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


def test_pickles_are_refused_unread(options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    folder = saved(tmp_path / "a", options())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match=r"adapter_model\.bin: .*pickle.*save it again"):
        load_adapter(folder, tiny_model())
    assert not (tmp_path / "canary").exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())  # the canary would have sung
    assert (tmp_path / "canary").exists()


def test_missing_folders_and_files(options: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_adapter(tmp_path / "nowhere", tiny_model())
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path, tiny_model())
    folder = saved(tmp_path / "a", options())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_adapter(folder, tiny_model())


@pytest.mark.parametrize("name", ["../x", "/x", "lora", "my_lora_1", "", ".", "a/b", "a\\b", "-x", "x" * 65, "a\n"])
def test_adapter_names_are_contained(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="bad adapter name"):
        adapter_folder(tmp_path, name)


def test_named_adapters_lie_inside(options: Make, tmp_path: Path) -> None:
    assert adapter_folder(tmp_path) == tmp_path
    saved(adapter_folder(tmp_path, "shop-1.zh"), options())
    load_adapter(tmp_path, tiny_model(), name="shop-1.zh")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "shop-1.zh")
    with pytest.raises(AdapterError, match="outside"):
        adapter_folder(tmp_path / "root", "out")
