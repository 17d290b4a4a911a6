"""Wrong configurations through the command (fault cases 1 to 8): one message, exit code 2, nothing written or run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca_lora.training.lock import RunLock
from tests.commands.conftest import Program, Write, small_and_quick, snapshot, write_base
from tests.tiny import ByteTokenizer

# --- the YAML file ---------------------------------------------------------------------------------------------------

FILES = {
    "1 unknown key": ("seed: 1\nlora_rank: 8\n", ":2: lora_rank: unknown key of finetune, did you mean 'lora_r'?"),
    "1 other case": ("Learning_Rate: 1e-4\n", ":1: Learning_Rate: unknown key", "did you mean 'learning_rate'?"),
    "1 config in config": ("config: x.yml\n", ":1: config: unknown key", "--help` lists the keys"),
    "2 duplicate key": ("seed: 1\nlora_r: 2\nseed: 3\n", ":3: seed: given twice, on line 1 and on line 3, delete one"),
    "3 text for a number": ("learning_rate: fast\n", ":1: learning_rate: 'fast' is not possible, expected a number >"),
    "3 hexadecimal": ("seed: 0x10\n", ":1: seed: '0x10' is not possible, expected an integer"),
    "3 endless integer": (f"seed: {'9' * 5000}\n", ":1: seed: inf is not possible, expected an integer"),
    "3 too large": (
        "eval_steps: 99999999999999999999\n",
        ":1: eval_steps: the number is too large, expected at most 2^",
    ),
    "3 truth for a number": ("seed: true\n", ":1: seed: true is not possible, expected an integer"),
    "3 nothing": ("data_path:\n", ":1: data_path: null is not possible, expected a list of text"),
    "5 rank": ("lora_r: 0\n", ":1: lora_r: 0 is not possible, expected an integer >= 1"),
    "5 alpha": ("lora_alpha: .nan\n", ":1: lora_alpha: nan is not possible, expected a number > 0"),
    "5 dropout": ("lora_dropout: 1.0\n", ":1: lora_dropout: 1.0 is not possible, expected a number >= 0 and < 1"),
    "5 all of it at once": ("lora_r: 0\nlora_rank: 1\nmethod: x\n", ":1: lora_r: 0", ":2: lora_rank: unknown key"),
    "6 cleaning rule": ("skip_cleaning: [whitespce]\n", ":1: skip_cleaning: no cleaning rule", "mean whitespace?"),
    "not flat": ("lora:\n  r: 8\n", ":2: lora: a mapping where a value is expected", "keys are flat"),
    "a list": ("- seed\n", ":1: the file is not a mapping, expected lines of `key: value`"),
    "not YAML": ("seed: [1, 2\n", ":2: not YAML:"),
    "a tab": ("seed: 1\n\tlora_r: 4\n", ":2: not YAML: while scanning"),
    "two documents": ("seed: 1\n---\nseed: 2\n", ":2: a second document, expected one document"),
    "Latin-1": (b"seed: 1 # caf\xe9\n", ":1: byte 13 is not UTF-8, save the file as UTF-8"),
    "NUL": (b"seed: 1\n\0", ":2: control character '\\x00', delete it"),
    "NUL escaped": ('output_dir: "a\\0b"\n', ":1: output_dir: holds a NUL character, delete it"),
    "a merge key": ("<<: {seed: 1}\n", ":1: merge keys are not read"),
    "not a configuration": ("x" * 300_000, "larger than 256 KiB, expected a configuration"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused_by_line_and_key(program: Program, write: Write, case: str) -> None:
    text, *says = FILES[case]
    path = write(text)
    first = f"{path}{says[0]}" if says[0].startswith(":") else f"{path}: {says[0]}"
    options = {key: None for key in ("output_dir", "lora_r", "learning_rate", "data_path") if f"{key}:" in str(text)}
    program.refuses("finetune", 2, first, *says[1:], words=(f"--config={path}",), **options)
    assert not (Path.cwd() / "lora-alpaca").exists()


@pytest.mark.parametrize("case", ["object", "tag", "alias", "nesting", "keys", "list"])
def test_7_a_yaml_bomb_runs_nothing_and_costs_nothing(
    program: Program, write: Write, tmp_path: Path, case: str
) -> None:
    canary = tmp_path / "canary"
    bombs = {
        "object": f'seed: !!python/object/apply:os.system ["touch {canary}"]\n',
        "tag": f'!!python/object/apply:os.system ["touch {canary}"]\n',
        "alias": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcd", "bcde", strict=True)),
        "nesting": "a: " + "[" * 100_000 + "]" * 100_000,
        "keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
        "list": f"data_path: [{'x,' * 100_000}]",
    }
    path = write(bombs[case])
    with small_and_quick():
        program.refuses("finetune", 2, f"{path}:", words=(f"--config={path}",))
    assert not canary.exists()


@pytest.mark.parametrize(("name", "says"), [("nowhere.yml", "no such file"), (".", "Is a directory")])
def test_a_config_that_is_not_there(program: Program, tmp_path: Path, name: str, says: str) -> None:
    program.refuses("finetune", 2, str(tmp_path / name), "--config", says, words=(f"--config={tmp_path / name}",))


def test_3_what_is_right_is_taken(program: Program, write: Write) -> None:
    path = write("learning_rate: 1e-4\nlora_r: 64 # more than the weights have\ntrain_on_inputs: yes\n")
    done = program("finetune", f"--config={path}", learning_rate=None, lora_r=None)
    assert done.code == 0
    assert "rank 64 is larger than the weight can have, 32" in done.err
    assert f"learning_rate: 0.0001  # {path}:1" in (program.folder / "out" / "config.yml").read_text()


# --- flags -----------------------------------------------------------------------------------------------------------

FLAGS = {
    "1 misspelled": (("--lora_rank=4",), "--lora_rank: unknown key of finetune, did you mean 'lora_r'?"),
    "1 one dash": (("-lora_r", "4"), "unknown flag '-lora_r', expected --key value"),
    "1 a stray word": (("configs/x.yml",), "word 'configs/x.yml' without a flag", "expected --key value"),
    "2 twice": (("--seed=1", "--seed=2"), "--seed: given 2 times"),
    "no value": (("--seed",), "--seed: no value, expected an integer"),
    "5 batch_size": (("--batch_size=0",), "--batch_size: 0 is not possible, expected an integer >= 1"),
    "5 cutoff_len": (("--cutoff_len=1",), "--cutoff_len: 1 is not possible, expected an integer >= 2"),
    "5 learning_rate": (("--learning_rate=-1",), "--learning_rate: -1 is not possible, expected a number > 0"),
    "5 learning_rate, endless": (("--learning_rate=1e300",), "--learning_rate: 1e+300 is not possible", "<= 1000"),
    "5 lora_alpha, endless": (("--lora_alpha=1e308",), "--lora_alpha: 1e+308 is not possible", "<= 1000000"),
    "5 lora_r, endless": (("--lora_r=1000000000",), "--lora_r: 1000000000 is not possible", "<= 16384"),
    "5 adam_epsilon": (("--adam_epsilon=1e-300",), "--adam_epsilon: 1e-300 is not possible", ">= 1e-30"),
    "5 num_threads": (("--num_threads=100000",), "--num_threads: 100000 is not possible", "<= 1024"),
    "5 max_memory_gb": (("--max_memory_gb=1e308",), "--max_memory_gb: 1e+308 is not possible"),
    "5 val_set_size": (("--val_set_size=1.5",), "--val_set_size: 1.5 is neither a count nor a share"),
    "5 choice": (("--lr_scheduler_type=cosin",), "'cosin' is not possible, expected linear or", "mean 'cosine'?"),
    "5 dtype": (("--dtype=float16",), "--dtype: 'float16' is not possible", "expected auto or float32 or bfloat16"),
    "6 input_key alone": (("--input_key=x",), "--input_key: input_key is given alone, expected prompt_key and resp"),
    "empty output_dir": (("--output_dir=",), "--output_dir: '' is not possible"),
    "empty base_model": (("--base_model=",), "--base_model: '' is not possible"),
    "empty data_path": (("--data_path=",), "--data_path: holds an empty path, expected files or globs"),
    "bytes in a path": (("--output_dir=\udcff",), "--output_dir: is not valid Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_is_refused_by_its_name(program: Program, case: str) -> None:
    words, *says = FLAGS[case]
    key = words[0].lstrip("-").partition("=")[0]
    program.refuses("finetune", 2, *says, words=words, **{key: None})


def test_every_problem_is_told_in_one_go(program: Program) -> None:
    says = ("base_model: missing", "give --base_model or write it", "data_path: missing", "--lora_rnk: unknown key")
    program.refuses("finetune", 2, *says, words=("--lora_rnk=1",), base_model=None, data_path=None)


def test_an_unknown_command(program: Program) -> None:
    done = program("finetun")
    assert done.code == 2 and "did you mean 'finetune'?" in done.result["error"]["message"]


# --- what only the model, the rows or the folder can tell ------------------------------------------------------------

LATER = {
    "4 target": ({"lora_target_modules": "q_proj,v_porj"}, "--lora_target_modules: 'v_porj' matches nothing (near"),
    "4 several": ({"lora_target_modules": "q_prj,x_y"}, "'q_prj' matches nothing (near", "'x_y' matches nothing"),
    "4 all linear": ({"lora_target_modules": "all_linear"}, "'all_linear' matches nothing (nearest: all-linear"),
    "4 no linear": ({"lora_target_modules": "embed_tokens"}, "'embed_tokens' matches model.embed_tokens, a Embedding"),
    "4 expression": ({"lora_target_modules": "(q"}, "'(q' is not a regular expression", "for example"),
    "6 schedule": ({"method": "adalora", "adalora_tinit": 2, "adalora_tfinal": 2}, "adalora_t"),
    "6 ranks": ({"method": "adalora", "adalora_init_r": 4}, "adalora_init_r: "),
    "6 prefix": ({"method": "prefix", "lora_r": None, "num_virtual_tokens": 5000}, "num_virtual_tokens: "),
    "6 biases": ({"method": "bitfit", "lora_r": None, "bitfit_parts": "biases"}, "bitfit_parts: "),
    "model": ({"base_model": "smollm2-135"}, "--base_model: there is no model 'smollm2-135'", "mean 'smollm2-135m'?"),
    "model folder": ({"base_model": "/no/model"}, "--base_model: there is no file or folder '/no/model', expected"),
    "model, long": ({"base_model": "a" * 300}, "--base_model: there is no model 'aaa"),
    "template": ({"prompt_template_name": "alpca"}, "--prompt_template_name: unknown template", "mean 'alpaca'?"),
    "template file": ({"prompt_template_name": "no.json"}, "no.json: prompt_template_name: cannot be read (No such"),
    "template, long": ({"prompt_template_name": "a" * 300}, "--prompt_template_name: unknown template"),
    "resume path": ({"resume_from_checkpoint": "/no/run"}, "/no/run: resume_from_checkpoint: no such folder, expected"),
    "6 resume and fresh": ({"resume_from_checkpoint": "auto", "fresh": "true"}, "--fresh: given together with resume_"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_what_only_the_run_can_tell_is_told_before_it_begins(program: Program, case: str) -> None:
    options, *says = LATER[case]
    program.refuses("finetune", 2, *says, **options)


def test_4_a_room_s_error_names_the_line_of_the_file(program: Program, write: Write) -> None:
    path = write("# recipe\nseed: 1\nlora_target_modules: [q_prj]\n")
    program.refuses("finetune", 2, f"{path}:3: lora_target_modules: 'q_prj' matches", words=(f"--config={path}",))


def test_a_device_that_is_not_here_is_the_machine_s_fault(program: Program) -> None:
    import torch

    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    program.refuses("finetune", 4, f"--device: device '{missing}' is not here, expected one of cpu", device=missing)


def test_a_run_that_cannot_fit_is_refused_before_it_begins(program: Program) -> None:
    program.refuses("finetune", 4, "the run needs", "GiB at its peak and may take", max_memory_gb=0.01)


def test_a_model_of_the_hub_without_a_network(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    program.refuses(
        "finetune", 4, "--base_model: no/model would come from the hub", "pip install", base_model="no/model"
    )


TEMPLATES = {
    "a.json": ("{", "a.json:1: ", "expected JSON"),
    "b.json": ('{"prompt_inputs": "x"}', "b.json:1: prompt_inputs: unknown key", "did you mean 'prompt_input'?"),
    "c.json": ('{"prompt_input": "{instruction}{input}"}', "c.json: prompt_no_input: is missing"),
    "d.yml": ("prompt_input: '{instruction}{inptu}'\nprompt_no_input: x\n", "d.yml: prompt_input: has the slots {i"),
    "e.json": ('{"prompt_input": "{instruction.__class__}", "prompt_no_input": "x"}', "e.json: prompt_input: has the"),
    "f.jinja": ("{% for %}", "f.jinja: chat_template: cannot be used", "choose another template"),
    "g.jinja": ("{{ ''.__class__.__mro__ }}{{ messages }}", "g.jinja: chat_template: cannot be used", "unsafe"),
    "h.jinja": ("{% for i in range(10**9) %}a{% endfor %}", "h.jinja: chat_template: cannot be used", "range"),
    "i.jinja": ('{% include "/etc/passwd" %}', "i.jinja: chat_template: cannot be used", "no loader"),
    "j.jinja": ('{{ "a" * 10**10 }}', "j.jinja: chat_template: cannot be used", "10000000000 characters"),
    "k.jinja": ("hello", "k.jinja: chat_template: cannot be used: it writes turn 1 (user) 0 times, not once"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_file_is_refused_by_key(program: Program, write: Write, name: str) -> None:
    text, *says = TEMPLATES[name]
    code = 3 if name.endswith(".jinja") else 2
    with small_and_quick():
        program.refuses("finetune", code, *says, prompt_template_name=write(text, name))


def test_chat_without_a_chat_template(program: Program, tmp_path: Path) -> None:
    base = write_base(tmp_path / "plain", ByteTokenizer())
    says = "--prompt_template_name: the model brings no chat template, expected one of alpaca"
    program.refuses("generate", 2, says, base_model=base, prompt_template_name="chat")


GENERATION = {
    "temperature": (-1, "--temperature: -1 is not possible, expected a number >= 0"),
    "top_p": (0, "--top_p: 0 is not possible, expected a number > 0 and <= 1"),
    "repetition_penalty": (1e-300, "--repetition_penalty: 1e-300 is not possible, expected a number >= 0.01"),
    "max_new_tokens": (0, "--max_new_tokens: 0 is not possible"),
    "stop": ("[a, '']", "--stop: is ('a', ''), expected texts of at least one character"),
    "prompt": ("a\udcffb", "--prompt: is not valid Unicode"),
    "lora_weight": ("x", "--lora_weight: unknown key of generate, did you mean 'lora_weights'?"),
}  # fmt: skip


@pytest.mark.parametrize("key", GENERATION)
def test_generate_refuses_impossible_values(program: Program, key: str) -> None:
    value, says = GENERATION[key]
    program.refuses("generate", 2, says, **{key: value})


# --- 8: the output folder --------------------------------------------------------------------------------------------


def test_8_a_live_run_keeps_its_folder(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunLock(out):
        says = (f"{out} is in use by a live run (pid {os.getpid()}, host ", "choose another folder")
        program.refuses("finetune", 2, *says)
        assert (out / ".lock").exists()


@pytest.mark.parametrize("left", ["all", "adapter", "log"])
def test_8_a_finished_or_broken_off_run_is_not_overwritten(
    program: Program, trained: Path, tmp_path: Path, left: str
) -> None:
    out = tmp_path / "out"
    keep = {"all": "*", "adapter": "adapter_*", "log": "metrics.jsonl"}[left]
    out.mkdir()
    for path in trained.glob(keep):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, out / path.name)
    says = (
        "out: output_dir: holds a run already",
        "--resume_from_checkpoint auto goes on with it, --fresh starts anew",
    )
    program.refuses("finetune", 2, f"{tmp_path}/{says[0]}", says[1])


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300])
def test_8_an_output_folder_that_cannot_be_one(program: Program, write: Write, tmp_path: Path, name: str) -> None:
    before = snapshot(write("mine", "file"))
    program.refuses("finetune", 2, str(tmp_path / name), "output_dir", "choose another", output_dir=tmp_path / name)
    assert snapshot(tmp_path / "file") == before


def test_8_check_writes_nothing(program: Program, tmp_path: Path) -> None:
    assert program("check").code == 0
    assert not (tmp_path / "out").exists()


# --- the shape of an error -------------------------------------------------------------------------------------------


def test_json_error_has_all_parts(program: Program, write: Write) -> None:
    path = write("seed: 1\ndtype: float\n")
    done = program("finetune", f"--config={path}", dtype=None)
    error = done.result["error"]
    assert set(done.result) == {"error", "exit_code"} and done.result["exit_code"] == 2
    assert (
        error["message"]
        == f"{path}:2: dtype: 'float' is not possible, expected auto or float32 or bfloat16, {error['fix']}"
    )
    kept = {"type": "ConfigError", "file": str(path), "line": 2, "field": "dtype", "fix": "did you mean 'float32'?"}
    assert {key: error[key] for key in kept} == kept
    assert done.out.count("\n") == 1 and done.err == f"error: {error['message']}\n"


def test_debug_shows_where_it_came_from(program: Program) -> None:
    done = program("finetune", "--debug", lora_target_modules="q_prj")
    assert done.code == 2 and "Traceback" in done.err and "find_targets" in done.err
    assert done.err.splitlines()[-1].startswith("error: --lora_target_modules: 'q_prj' matches nothing")


@pytest.mark.parametrize(
    ("flag", "code"), [("--lora_rank=8", 2), ("--data_path=/no/rows.json", 2), ("--base_model=/", 3)]
)
def test_the_program_exits_with_the_code_and_one_line(program: Program, tmp_path: Path, flag: str, code: int) -> None:
    key = flag[2:].partition("=")[0]
    options = {"base_model": program.base, "data_path": program.rows, "output_dir": tmp_path / "out", key: None}
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    done = subprocess.run(
        [sys.executable, "-m", "alpaca_lora", "finetune", *words, flag, "--json"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "ALPACA_LORA_HOME": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == code and json.loads(done.stdout.splitlines()[-1])["exit_code"] == code
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
