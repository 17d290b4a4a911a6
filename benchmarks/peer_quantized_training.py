"""The peer of bench_quantized_training.py: peft beside a base of transformers, dense or in bitsandbytes' NF4.

`python peer_quantized_training.py JOB.json`; the last line of standard output is the result. It learns from the very
rows of each of our steps, in their order, at our learning rates; loss, optimizer and clipping are ours in plain torch.
JOB: model (a dense Hugging Face folder), flags (those of our run), quantized, threads.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpaca_lora.commands.schemas import FinetuneConfig  # noqa: E402
from alpaca_lora.config import resolve  # noqa: E402
from alpaca_lora.data.example import TokenizedExample  # noqa: E402
from alpaca_lora.data.loader import Loader  # noqa: E402
from alpaca_lora.data.prepare import prepare  # noqa: E402
from alpaca_lora.models.load import load_tokenizer, open_source  # noqa: E402
from alpaca_lora.text.templates import load_template  # noqa: E402
from alpaca_lora.training.schedule import Schedule, warmup_steps  # noqa: E402
from alpaca_lora.weights.hub import resolve as resolve_model  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(job: dict[str, Any], config: FinetuneConfig) -> Any:
    """The base with a LoRA of the run's rank and scale on all linears of its layers."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}
    if job["quantized"]:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], **options)
    model.config.use_cache = False
    lora = peft.LoraConfig(
        r=config.lora_r, lora_alpha=int(config.lora_alpha), lora_dropout=0.0, target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, lora).train()


def summed_loss(model: Any, rows: list[TokenizedExample]) -> torch.Tensor:
    """-log p summed over the supervised tokens of some rows, padded at the right."""
    longest = max(row.num_tokens for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        ids_T = torch.tensor(row.ids_T, dtype=torch.int64)
        ids[place, : len(ids_T)], mask[place, : len(ids_T)] = ids_T, 1
        labels[place, : len(ids_T)] = torch.where(torch.tensor(row.supervised_T), ids_T, -100)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def supervised(rows: Iterable[TokenizedExample]) -> int:
    return sum(int(row.supervised_T.sum()) for row in rows)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = resolve(FinetuneConfig, job["flags"], "finetune").value
    torch.set_num_threads(job["threads"] or torch.get_num_threads())
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    source = open_source(resolve_model(config.base_model))
    tokenizer = load_tokenizer(source)
    source.close()
    template = load_template(config.prompt_template_name, tokenizer)
    table = prepare(config, tokenizer, template, system_prompt=config.system_prompt, seed=config.seed)
    assert table.val is not None and config.max_steps is not None
    loader = Loader(table.train, batch_size=config.batch_size, token_budget=1, seed=config.seed)
    model = load(job, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    steps = config.max_steps
    schedule = Schedule(config.lr_scheduler_type, config.learning_rate, steps, warmup_steps(config.warmup_steps, steps))
    started, tokens, loss = time.perf_counter(), 0, 0.0
    for step in range(steps):
        rows = sorted((table.train[int(row)] for row in loader.step_rows(step)), key=lambda row: row.num_tokens)
        count, loss = supervised(rows), 0.0
        for place in range(0, len(rows), config.micro_batch_size):
            part = summed_loss(model, rows[place : place + config.micro_batch_size]) / count
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(row.num_tokens for row in rows)
        print(f"step {step + 1}/{steps}  loss {loss:.4f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    model.eval()
    rows = sorted(table.val, key=lambda row: row.num_tokens)
    with torch.no_grad():
        total = sum(
            float(summed_loss(model, rows[place : place + config.micro_batch_size]))
            for place in range(0, len(rows), config.micro_batch_size)
        )
    print(json.dumps({
        "val_loss": total / supervised(rows), "train_loss": loss,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "tokens_per_second": tokens / seconds, "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
