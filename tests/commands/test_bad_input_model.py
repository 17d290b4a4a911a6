"""Wrong model files through the command (fault cases 21 to 27): file and tensor, exit code 3, nothing run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.commands.conftest import Canary, Program, edit_json, small_and_quick, write_base

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
Copied = Callable[[Path], Path]


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "sharded", max_shard_bytes=20_000)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def header_of(entries: dict[str, Any], data: bytes = b"\0" * 16) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


# --- 21, 22: shards --------------------------------------------------------------------------------------------------


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "the file 'model-00002-of-00006.safetensors' that holds it is missing, fetch the model again"),
        (shorten, "but the file ends after"),
        (flip, "the header is not JSON"),
        (lambda path: path.write_bytes(b""), "0 bytes are too few for a safetensors file"),
    ],
)
def test_21_a_damaged_shard_is_named(program: Program, sharded: Path, copied: Copied, damage: Any, says: str) -> None:
    base = copied(sharded)
    assert program("generate", base_model=base).code == 0
    shard = next(base.glob("model-00002*"))
    damage(shard)
    done = program.refuses("generate", 3, shard.name, says, base_model=base)
    field = done.result["error"].get("field", "")
    assert field.startswith("model.layers.0.") or damage is flip or not shard.stat().st_size
    program.refuses("finetune", 3, shard.name, says, base_model=base)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "C:\\x.safetensors", "", "x.py"]
)
def test_22_an_index_that_leads_out_is_refused(program: Program, sharded: Path, copied: Copied, name: str) -> None:
    base = copied(sharded)
    content = json.loads((base / INDEX).read_text())
    content["weight_map"][Q] = name
    edit_json(base / INDEX, **content)
    program.refuses("generate", 3, f"{base / INDEX}: {Q}: names the file {name!r}, expected a ", base_model=base)


@pytest.mark.parametrize("name", ["model-00001-of-00006.safetensors", "config.json", "tokenizer.json", INDEX])
def test_22_a_link_that_leads_out_is_refused(
    program: Program, sharded: Path, copied: Copied, tmp_path: Path, name: str
) -> None:
    base = copied(sharded)
    (base / name).rename(tmp_path / "elsewhere")
    (base / name).symlink_to(tmp_path / "elsewhere")
    program.refuses("generate", 3, f"'{name}' is a link to a file outside of the folder", base_model=base)


# --- 23: lying headers -----------------------------------------------------------------------------------------------

LIES = {
    "header size": struct.pack("<Q", 2**63) + b"{}",
    "header above 16 MB": struct.pack("<Q", 17 * 2**20) + b" " * (17 * 2**20),
    "shape": header_of({Q: {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}}),
    "offsets": header_of({Q: {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}}),
    "negative": header_of({Q: {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}),
    "overlap": header_of({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}),
    "nesting": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
    "tensors": header_of(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}, b""
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_23_a_lying_header_costs_nothing(program: Program, tiny_base: Path, copied: Copied, case: str) -> None:
    base = copied(tiny_base)
    (base / WEIGHTS).write_bytes(LIES[case])
    with small_and_quick():
        program.refuses("generate", 3, f"{base / WEIGHTS}: ", base_model=base)


GGUFS = {
    "not one": (b"PK\x03\x04", "is not a GGUF file"),
    "empty": (b"", "is not a GGUF file"),
    "cut": (b"GGUF", "but the file ends after 4"),
    "version": (b"GGUF" + struct.pack("<IQQ", 99, 1, 1), "GGUF version 99, expected one of 2, 3"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1), "says it holds 1152921504606846976 tensors"),
    "fields": (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), "1152921504606846976"),
    "key length": (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62), "x.gguf: "),
}


@pytest.mark.parametrize("case", GGUFS)
def test_23_a_lying_gguf_costs_nothing(program: Program, tmp_path: Path, case: str) -> None:
    content, says = GGUFS[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with small_and_quick():
        program.refuses("generate", 3, f"{path}: ", says, "fetch it again", base_model=path)


# --- 24: configuration against tensors -------------------------------------------------------------------------------

CONFIGS = {
    "width": (
        {"hidden_size": 64},
        "21 tensors have another shape: model.embed_tokens.weight is 264x32, expected 264x64",
    ),
    "more layers": ({"num_hidden_layers": 3}, "9 tensors are missing: model.layers.2.self_attn.q_proj.weight"),
    "fewer layers": ({"num_hidden_layers": 1}, "9 tensors are not of this model: model.layers.1."),
    "vocabulary": (
        {"vocab_size": 10},
        "2 tensors have another shape: model.embed_tokens.weight is 264x32, expected 10x32",
    ),
    "endless": (
        {"hidden_size": 10**7, "num_hidden_layers": 10**6},
        "num_hidden_layers: is 1000000, expected 1 to 1000",
    ),
    "heads": ({"num_attention_heads": 5}, "num_key_value_heads: is 2, expected a divisor of num_attention_heads = 5"),
    "negative": ({"hidden_size": -1}, "hidden_size: is -1, expected 1 to"),
    "text": ({"hidden_size": "a"}, "hidden_size: is 'a', expected a whole number"),
    "absent": ({"hidden_size": ...}, "hidden_size: is missing, expected a whole number"),
    "architecture": (
        {"model_type": "lama"},
        "model_type: unsupported architecture 'lama', expected one of llama, mistral",
    ),
    "activation": ({"hidden_act": "reluu"}, "hidden_act: unknown activation 'reluu', expected one of silu"),
    "rope": ({"rope_scaling": {"type": "foo"}}, "rope_scaling.rope_type: unsupported 'foo', expected one of default"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_24_a_configuration_that_does_not_fit_allocates_nothing(
    program: Program, tiny_base: Path, copied: Copied, case: str
) -> None:
    base = copied(tiny_base)
    changes, says = CONFIGS[case]
    edit_json(base / "config.json", **changes)
    with small_and_quick():
        program.refuses("generate", 3, str(base), says, base_model=base)


def test_24_a_renamed_tensor_names_the_nearest(program: Program, tiny_base: Path, copied: Copied) -> None:
    base = copied(tiny_base)
    change_tensors(base, lambda tensors: tensors.update({Q.replace("q_proj", "q_prj"): tensors.pop(Q)}))
    says = f"1 tensors are missing: {Q} (there is {Q.replace('q_proj', 'q_prj')})"
    program.refuses("generate", 3, says, "1 tensors are not of this model", base_model=base)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "config.json:1: is not JSON"),
        ("config.json", "[]", "config.json: is not a JSON object"),
        ("config.json", None, "config.json: is missing, give the folder of a model"),
        (WEIGHTS, None, "holds no weights, expected model.safetensors or"),
        ("tokenizer.json", None, "has no tokenizer, expected tokenizer.json or tokenizer.model"),
        ("tokenizer.json", "{}", "tokenizer.json: is not a tokenizer"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json: is not JSON"),
        ("chat_template.jinja", "{% for x in %}", "chat_template: cannot be used"),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "chat_template: cannot be used"),
    ],
)  # fmt: skip
def test_24_other_files_of_the_folder(
    program: Program, tiny_base: Path, copied: Copied, name: str, content: str | None, says: str
) -> None:
    base = copied(tiny_base)
    (base / name).unlink() if content is None else (base / name).write_text(content)
    program.refuses("generate", 3, str(base), says, base_model=base)


# --- 25, 26, 27 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_25_a_pickle_is_refused_and_not_run(
    program: Program, tiny_base: Path, copied: Copied, tmp_path: Path, name: str
) -> None:
    base, canary = copied(tiny_base), tmp_path / "canary"
    (base / WEIGHTS).unlink()
    (base / name).write_bytes(pickle.dumps(Canary(canary)))
    says = "pickle files can run code, so they are never opened here"
    program.refuses(
        "generate", 3, f"{base}: holds only pickle weights ({name})", "save_pretrained", says, base_model=base
    )
    program.refuses("finetune", 3, "is a pickle", says, base_model=base / name)
    assert not canary.exists()
    pickle.loads((base / name).read_bytes())
    assert canary.exists()  # it would have sung


def test_25_code_of_the_folder_is_not_run(program: Program, tiny_base: Path, copied: Copied, tmp_path: Path) -> None:
    base, canary = copied(tiny_base), tmp_path / "canary"
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (base / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    done = program("generate", base_model=base)
    assert done.code == 0 and "auto_map is ignored: no code of a model is run" in done.err
    assert not canary.exists()


def test_26_more_ids_than_rows(program: Program, tiny_base: Path, copied: Copied) -> None:
    base = copied(tiny_base)
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    backend.add_tokens([f"token{i}" for i in range(20)])
    backend.save(str(base / "tokenizer.json"))
    says = "the tokenizer has 281 ids, the embedding 264 rows, take tokenizer and weights of the same model"
    program.refuses("finetune", 3, f"{base}: {says}", base_model=base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_27_a_weight_that_is_not_finite_is_named(
    program: Program, tiny_base: Path, copied: Copied, value: float
) -> None:
    base, name = copied(tiny_base), "model.layers.1.mlp.up_proj.weight"
    change_tensors(base, lambda tensors: tensors[name].__setitem__((0, 0), value))
    program.refuses("finetune", 5, f"{base / WEIGHTS}: {name}: weights that are NaN or infinite", base_model=base)


@pytest.mark.parametrize(("dtype", "word"), [(torch.int32, "I32"), (torch.int8, "I8"), (torch.bool, "BOOL")])
def test_27_integers_are_no_weights(
    program: Program, tiny_base: Path, copied: Copied, dtype: torch.dtype, word: str
) -> None:
    base = copied(tiny_base)
    change_tensors(base, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    program.refuses("generate", 3, f"{base / WEIGHTS}: {Q}: is stored as {word}, expected floating", base_model=base)


# --- what is no model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        (3, ".", "config.json: is missing, give the folder of a model"),
        (2, "rows.jsonl", "rows.jsonl: is no model, expected a folder or a .gguf file"),
        (2, "one.safetensors", "is one file of a model, give the folder that holds it and config.json"),
        (2, "none.gguf", "there is no file or folder"),
        (2, "adapter", "is the folder of an adapter, not of a model, give it as --lora_weights"),
    ],
)
def test_what_is_no_model(program: Program, tmp_path: Path, code: int, name: str, says: str) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"")
    os.mkdir(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for command in ("finetune", "generate"):
        program.refuses(command, code, says, base_model=tmp_path / name)


def test_pull_of_what_is_not_there(program: Program) -> None:
    program.refuses(
        "pull", 2, "there is no model 'smollm2-135', expected", "did you mean 'smollm2-135m'?", name="smollm2-135"
    )
