import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpaca_lora.device import pick_compute
from alpaca_lora.errors import UserError
from alpaca_lora.models.build import build_model
from alpaca_lora.models.load import load_base
from benchmarks.make_random_llama import byte_tokenizer, config_of, make, normal, random_tensors
from tests.package_files import CHECKOUT
from tests.training.tiny_run import tiny_trainer

PROGRAM = CHECKOUT / "benchmarks/make_random_llama.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "tiny"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--shape", "tiny", "--output_dir", str(path), "--seed", "3"], check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parameters"] * 2 == result["bytes"] and "100%" in done.stderr
    return path


def test_the_7b_shape_is_llamas() -> None:
    config = config_of("7b")
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 11008)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (32, 32, 32000)
    assert build_model(config).num_parameters() == 6_738_415_616  # as Meta's
    assert config_of("7b", 4).num_layers == 4


def test_what_was_made_loads_and_trains_a_step(folder: Path) -> None:
    base = load_base(str(folder), pick_compute("cpu", "bfloat16", 1))
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.tokenizer.vocab_size == 259 <= base.config.vocab_size
    trainer = tiny_trainer(model=base.model, max_steps=1, validation=False)
    state = trainer.train()
    assert state.last_loss is not None
    # logits of random weights are small: the loss is about that of a guess
    assert state.last_loss == pytest.approx(torch.tensor(float(base.config.vocab_size)).log().item(), rel=0.15)


def test_every_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    text = "Größe: 你好 \t\x7f"
    ids = tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(text.encode()) and min(ids) >= 3 and tokenizer.decode(ids) == text


def test_tensors_are_a_function_of_seed_and_name() -> None:
    config = config_of("tiny")
    one, two, other = (dict(random_tensors(config, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    more = dict(random_tensors(config_of("tiny", 3), 0))
    name = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(one[name], more[name])
    weight = normal((512, 513), 0.5, 0, "x")
    assert float(weight.float().std()) == pytest.approx(0.5, rel=0.01)


def test_a_folder_that_holds_something_is_left_alone(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="exists already"):
        make(folder, "tiny")
    assert sorted(path.name for path in folder.iterdir()) == before
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--shape", "tiny", "--output_dir", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "exists already" in done.stderr


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(name: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "model", "tiny", on_progress=fail)
    assert list(tmp_path.iterdir()) == []
