"""One contender of bench_qlora.py in a process of its own: loads a model, takes optimizer steps, says what it took.

    python qlora_worker.py JOB.json        the result is the last line of standard output

JOB: contender (ours or peer), model (a folder or alias), quantize (nf4 or null), tokens (of the one row that a step
trains on), steps, rank, targets, seed, threads; ours also: checkpointing (the key gradient_checkpointing),
optimizer_state, max_memory_gb.

Memory is resident memory of the process, its high-water mark, loading and preflight included. Our preflight starts the
mark anew, so it is read before and after; the larger one counts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.device import peak_memory_bytes  # noqa: E402

LEARNING_RATE = 1e-4


def rows_of(job: dict[str, Any], vocabulary: int) -> list[np.ndarray]:
    """The same seeded ids for both contenders, a row for each step."""
    random = np.random.default_rng(job["seed"])
    return [random.integers(3, vocabulary, job["tokens"]).astype(np.int32) for _ in range(job["steps"])]


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    from alpaca_lora.adapters.lora import Lora
    from alpaca_lora.adapters.options import AdapterOptions
    from alpaca_lora.data.examples import TokenizedExample
    from alpaca_lora.data.loader import Loader
    from alpaca_lora.data.table import ExampleTable
    from alpaca_lora.device import pick_compute
    from alpaca_lora.quantization.load import load_base
    from alpaca_lora.training.activation_levels import describe
    from alpaca_lora.training.loss import causal_lm_loss
    from alpaca_lora.training.options import TrainingOptions
    from alpaca_lora.training.preflight import probe
    from alpaca_lora.training.trainer import Trainer

    compute = pick_compute("cpu", "bfloat16", job["threads"])
    before, started = peak_memory_bytes(), time.perf_counter()
    base = load_base(job["model"], compute, quantize=job["quantize"])
    loaded, load_seconds = peak_memory_bytes(), time.perf_counter() - started
    model = base.model
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    options = AdapterOptions(
        lora_r=job["rank"], lora_alpha=job["rank"], lora_dropout=0.0, lora_target_modules=job["targets"]
    )
    adapter = Lora.attach(model, options, seed=job["seed"])
    learned = np.arange(job["tokens"]) >= 1
    rows = rows_of(job, base.config.vocab_size)
    table = ExampleTable.from_examples([TokenizedExample(row, learned, i) for i, row in enumerate(rows)])
    training = TrainingOptions.model_validate({
        "max_steps": job["steps"], "learning_rate": LEARNING_RATE, "warmup_steps": 0, "lr_scheduler_type": "constant",
        "gradient_checkpointing": job["checkpointing"], "optimizer_state": job["optimizer_state"],
        "max_memory_gb": job["max_memory_gb"],
    })  # fmt: skip
    sizes = {"batch_size": 1, "micro_batch_size": 1, "cutoff_len": job["tokens"], **training.model_dump()}
    started = time.perf_counter()
    measured = probe(model, adapter, causal_lm_loss, table, _Sizes(sizes), device=compute.device)
    probe_seconds = time.perf_counter() - started
    loader = Loader(table, batch_size=1, token_budget=job["tokens"], seed=job["seed"])
    trainer = Trainer(model, adapter, loader, causal_lm_loss, training)
    written = model.activation_file.num_written
    trainer.train()
    steps = [record for record in trainer.log.records() if "train_loss" in record]
    return {
        "load_peak_bytes": loaded, "load_seconds": load_seconds, "import_bytes": before, "weight_bytes": weights,
        "probe_seconds": probe_seconds, "levels": describe(model.levels()), "needed_bytes": measured.needed_bytes,
        "step_seconds": [record["seconds"] for record in steps], "losses": [record["train_loss"] for record in steps],
        "peak_memory_bytes": max(loaded, peak_memory_bytes()), "trained": adapter.num_trained,
        "written_bytes_a_step": (model.activation_file.num_written - written) / job["steps"],
    }  # fmt: skip


class _Sizes:
    """The options of two rooms that the preflight reads, as attributes."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def run_peer(job: dict[str, Any]) -> dict[str, Any]:
    import bitsandbytes
    import peft
    import transformers

    torch.set_num_threads(job["threads"])
    torch.set_flush_denormal(True)
    before, started = peak_memory_bytes(), time.perf_counter()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}, low_cpu_mem_usage=True,
        attn_implementation="sdpa",
    )  # fmt: skip
    loaded, load_seconds = peak_memory_bytes(), time.perf_counter() - started
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    lora = peft.LoraConfig(
        r=job["rank"], lora_alpha=job["rank"], lora_dropout=0.0, target_modules=job["targets"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    seconds, losses = [], []
    for row in rows_of(job, model.config.vocab_size):
        started = time.perf_counter()
        ids_1T = torch.from_numpy(row.astype(np.int64))[None]
        loss = model(input_ids=ids_1T, labels=ids_1T).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    return {
        "load_peak_bytes": loaded, "load_seconds": load_seconds, "import_bytes": before, "weight_bytes": weights,
        "step_seconds": seconds, "losses": losses, "peak_memory_bytes": peak_memory_bytes(),
        "trained": sum(parameter.numel() for parameter in parameters),
        "versions": {m.__name__: m.__version__ for m in (bitsandbytes, peft, transformers)},
    }  # fmt: skip


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {"ours": run_ours, "peer": run_peer}[job["contender"]](job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
