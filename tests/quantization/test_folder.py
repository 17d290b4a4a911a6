"""A quantized folder: what was written is what is read, bit for bit; what does not fit is one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alpaca_lora.device import Compute
from alpaca_lora.errors import AlpacaLoraError, ConfigError, MachineError, ModelFileError, NumericalError, UserError
from alpaca_lora.models.load import PACKED_CONFIG, Base, packed_linears
from alpaca_lora.models.load import load_base as load_dense
from alpaca_lora.quantization.calibrate import quantize_model
from alpaca_lora.quantization.folder import Origin, is_quantized, read_origin, write_quantized
from alpaca_lora.quantization.load import load_base, packed_fingerprint
from alpaca_lora.quantization.plan import Plan
from alpaca_lora.quantization.scheme import SCHEMES
from alpaca_lora.weights.safetensors_file import read_safetensors, write_safetensors
from tests.adapters.conftest import our_logits
from tests.commands.conftest import edit_json, write_base

COMPUTE = Compute(torch.device("cpu"), torch.float32, 1, "test")
ROWS = [torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
TENSOR = "model.layers.0.mlp.up_proj"
Edit = Callable[[dict[str, torch.Tensor]], object]


def made(folder: Path, scheme: str = "int8", **options: Any) -> tuple[Path, Base]:
    """folder/base and folder/<scheme>, and the base that the latter was written from."""
    source = folder / "base"
    if not source.exists():
        write_base(source, qkv_bias=True, output_bias=True)
    base = load_dense(str(source), COMPUTE)
    plan, _ = quantize_model(base, Plan.uniform(base.model, scheme), ROWS)
    origin = Origin("the/base", base.fingerprint, calibration_sha256="ab", calibration_tokens=180, statistics={"m": 1})
    path = write_quantized(
        folder / scheme, base.model, plan, origin, fingerprint=packed_fingerprint(origin, plan),
        config=base.config.to_hf(), dense_dtype=torch.float32, tokenizer_saver=base.tokenizer.save, **options,
    )  # fmt: skip
    return path, base


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_written_is_read(tmp_path: Path, scheme: str) -> None:
    path, base = made(tmp_path, scheme, max_shard_bytes=20_000)
    assert is_quantized(path) and not is_quantized(tmp_path / "base")
    assert len(list(path.glob("*.safetensors"))) > 1
    again = load_base(str(path), COMPUTE)
    for (name, linear), (twin_name, twin) in zip(
        packed_linears(base.model), packed_linears(again.model), strict=True
    ):  # fmt: skip
        assert name == twin_name and linear.scheme == twin.scheme  # pyright: ignore[reportAttributeAccessIssue]
        for part, tensor in linear.named_buffers():
            same = twin.get_buffer(part)
            assert tensor.dtype == same.dtype and torch.equal(tensor.view(torch.uint8), same.view(torch.uint8))
    assert torch.equal(our_logits(again.model), our_logits(base.model))
    assert read_origin(path) == Origin(
        "the/base", base.fingerprint, calibration_sha256="ab", calibration_tokens=180, statistics={"m": 1}
    )
    content = json.loads((path / "quantization.json").read_text())
    assert again.fingerprint == content["fingerprint"] != base.fingerprint


def test_on_load_and_from_a_folder_it_is_the_same_base(tmp_path: Path) -> None:
    for scheme in ("nf4", "fp4", "fp8", "int8", "int4", "int8_dynamic"):
        path, _ = made(tmp_path, scheme)
        stored, quantized = load_base(str(path), COMPUTE), load_base(str(tmp_path / "base"), COMPUTE, quantize=scheme)
        assert stored.fingerprint == quantized.fingerprint
        assert stored.description == quantized.description
        assert torch.equal(our_logits(stored.model), our_logits(quantized.model))


def test_writing_twice_gives_equal_files(tmp_path: Path) -> None:
    one, other = made(tmp_path / "a", "nf4")[0], made(tmp_path / "b", "nf4")[0]
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_tied_model_and_its_biases(tmp_path: Path) -> None:
    write_base(tmp_path / "base", tie_word_embeddings=True, qkv_bias=True, output_bias=True)
    path, base = made(tmp_path)
    names = set().union(*(read_safetensors(file) for file in path.glob("*.safetensors")))
    assert "lm_head.weight" not in names and "model.layers.0.self_attn.q_proj.bias" in names
    again = load_base(str(path), COMPUTE)
    assert again.model.lm_head is None and torch.equal(our_logits(again.model), our_logits(base.model))


def test_transformers_refuses_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, _ = made(tmp_path)
    assert json.loads((path / "config.json").read_text())["quantization_config"] == PACKED_CONFIG
    with pytest.raises(ValueError, match="quantization config"):
        AutoModelForCausalLM.from_pretrained(path)


def test_who_does_not_know_packing_refuses_it(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    with pytest.raises(ModelFileError, match=r"config\.json: quantization_config: quantized weights in this format"):
        load_dense(str(path), COMPUTE)


def test_nothing_is_overwritten_and_nothing_half_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = made(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        made(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("pathlib.Path.write_bytes", _full)
    with pytest.raises(MachineError):
        made(tmp_path, "nf4")
    assert sorted(tmp_path.iterdir()) == before and is_quantized(path)


def _full(*_: object) -> int:
    raise OSError(28, "No space left on device")


# ---- what cannot be


def change(path: Path, edit: Edit) -> None:
    file = path / "model.safetensors"
    tensors = read_safetensors(file)
    edit(tensors)
    file.unlink()
    write_safetensors(file, tensors, {"format": "pt"})


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{TENSOR}.scales"][5] = float("nan")


AGAIN = ", quantize the model again"
WRONG_FILES: list[tuple[str, Edit, type[AlpacaLoraError], str]] = [
    ("int8", lambda t: t.update({f"{TENSOR}.scales": torch.ones(47)}), ModelFileError,
     f"{TENSOR}.scales: has shape 47, which does not fit its linear of 48 x 32 weights, expected 48{AGAIN}"),
    ("int8", lambda t: t.update({f"{TENSOR}.codes": t[f"{TENSOR}.codes"][:, :16].contiguous()}), ModelFileError,
     f"{TENSOR}.codes: has shape 48 x 16, which does not fit its linear of 48 x 32 weights, expected 48 x 32{AGAIN}"),
    ("int4", lambda t: t.update({f"{TENSOR}.scales": torch.ones(48, 2).half()}), ModelFileError,
     f"{TENSOR}.scales: has shape 48 x 2, which does not fit its linear of 48 x 32 weights, expected 48 x 1{AGAIN}"),
    ("int8", lambda t: t.pop(f"{TENSOR}.scales"), ModelFileError, f"{TENSOR}.scales: is missing, expected 48{AGAIN}"),
    ("int8", lambda t: t.update({f"{TENSOR}.scales": t[f"{TENSOR}.scales"].half()}), ModelFileError,
     f"{TENSOR}.scales: is stored as float16, expected float32 of scheme int8{AGAIN}"),
    ("int8", lambda t: t.update({f"{TENSOR}.codes": t[f"{TENSOR}.codes"].float()}), ModelFileError,
     f"{TENSOR}.codes: is stored as float32, expected int8 of scheme int8{AGAIN}"),
    ("int8", set_nan, NumericalError, f"{TENSOR}.scales: weights that are NaN or infinite, fetch the file again"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "edit", "kind", "says"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_file_that_does_not_fit_names_tensor_and_file(
    tmp_path: Path, scheme: str, edit: Edit, kind: type[AlpacaLoraError], says: str
) -> None:
    path, _ = made(tmp_path, scheme)
    change(path, edit)
    with pytest.raises(kind) as caught:
        load_base(str(path), COMPUTE)
    assert str(caught.value) == f"{path / 'model.safetensors'}: {says}"


def test_tensors_that_nobody_knows(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    change(path, lambda t: t.update({f"{TENSOR}.weight": torch.ones(48, 32)}))
    with pytest.raises(ModelFileError, match=rf"1 tensors are not of this model: {TENSOR}\.weight"):
        load_base(str(path), COMPUTE)


WRONG_RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"plan": ...}, "plan: names no layer, expected a list of entries"),
    ({"plan": [{"modules": ["q_proj"], "scheme": "int8"}]}, "plan[0].modules: 'q_proj' names no linear of this model"),
    ({"plan": [{"modules": [TENSOR], "scheme": "int9"}]}, "plan[0].scheme: unknown scheme 'int9'"),
    ({"plan": [{"modules": [TENSOR], "scheme": "int4", "group_size": 5}]}, "plan[0].group_size: is 5, expected"),
    ({"format_version": 2}, "format_version: format 2 is newer than this program, expected at most 1, update alpaca"),
    ({"format_version": ...}, "format_version: is missing or no number"),
    ({"fingerprint": "ab"}, "fingerprint: is missing or not 64 digits"),
    ({"base_fingerprint": ...}, "base_fingerprint: is missing"),
    ({"calibration_tokens": "many"}, "calibration_tokens: is 'many', expected int"),
    ({"colour": "red"}, "colour: unknown key, expected one of base_model"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG_RECORDS, ids=range(len(WRONG_RECORDS)))
def test_a_record_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path, _ = made(tmp_path)
    edit_json(path / "quantization.json", **changes)
    with pytest.raises(ModelFileError) as caught:
        load_base(str(path), COMPUTE)
    assert str(caught.value).startswith(f"{path / 'quantization.json'}: {says}")


def test_a_record_that_is_not_json_or_elsewhere(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    file = path / "quantization.json"
    content = file.read_bytes()
    file.write_text("{\n1}")
    with pytest.raises(ModelFileError, match=r"quantization\.json:2: is not JSON"):
        load_base(str(path), COMPUTE)
    file.unlink()
    (tmp_path / "outside.json").write_bytes(content)
    file.symlink_to(tmp_path / "outside.json")
    with pytest.raises(ModelFileError, match="is a link to a file outside of the folder"):
        load_base(str(path), COMPUTE)


def test_quantizing_it_once_more_is_refused(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^quantize: .*int8 is quantized already, leave it out, or give the dense mod"
    ):
        load_base(str(path), COMPUTE, quantize="nf4")
    with pytest.raises(ConfigError, match=r"^quantization_plan: .*int8 is quantized already"):
        load_base(str(path), COMPUTE, plan_of=lambda model: Plan.uniform(model, "nf4"))
