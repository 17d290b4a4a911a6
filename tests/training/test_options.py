from pathlib import Path

import pytest

from alpaca_lora.commands.schemas import FinetuneConfig
from alpaca_lora.config import resolve
from alpaca_lora.errors import ConfigError
from alpaca_lora.training.options import TrainingOptions
from tests.package_files import CHECKOUT

NEEDED = ["--base_model", "m", "--data_path", "a.json"]


def resolved(*words: str) -> FinetuneConfig:
    return resolve(FinetuneConfig, [*NEEDED, *words], "finetune").value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False), (["--gradient_checkpointing"], True), (["--no-gradient_checkpointing"], False),
        (["--gradient_checkpointing", "true"], True), (["--gradient_checkpointing", "false"], False),
        (["--gradient_checkpointing", "auto"], "auto"), (["--gradient_checkpointing=mlp"], "mlp"),
        (["--gradient-checkpointing", "norms"], "norms"),
    ],
)  # fmt: skip
def test_a_switch_that_takes_words_too(words: list[str], value: object) -> None:
    assert resolved(*words).gradient_checkpointing == value


@pytest.mark.parametrize(("text", "value"), [("true", True), ("no", False), ("auto", "auto"), ("mlp", "mlp")])
def test_the_same_in_a_file(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    path.write_text(f"gradient_checkpointing: {text}\n")
    found = resolved("--config", str(path))
    assert found.gradient_checkpointing == value and type(found.gradient_checkpointing) is type(value)


@pytest.mark.parametrize("word", ["layers", "2", "none"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is not possible.*true or false or auto or norms"):
        resolved("--gradient_checkpointing", word)


def test_averages_are_kept_in_three_ways() -> None:
    assert TrainingOptions().optimizer_state == "float32"
    assert [resolved("--optimizer_state", one).optimizer_state for one in ("int8", "disk")] == ["int8", "disk"]
    with pytest.raises(ConfigError, match="optimizer_state: 'int4' is not possible"):
        resolved("--optimizer_state", "int4")


def test_the_recipe_of_qlora() -> None:
    path = CHECKOUT / "configs/qlora.yml"
    recipe = resolve(FinetuneConfig, ["--config", str(path)], "finetune").value
    assert recipe.quantize == "nf4" and recipe.gradient_checkpointing == "auto" and recipe.lora_r == 16
    assert recipe.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
