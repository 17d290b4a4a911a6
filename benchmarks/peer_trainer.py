"""The peer of bench_finetune.py: peft + the transformers Trainer on token ids that are handed to it.

Runs in the peer's own environment and imports nothing of ours: `python peer_trainer.py JOB.json`, the result is the
last line of standard output. JOB: model, rows (JSON file of {ids, labels}), recipe, output, steps, batch_size,
learning_rate, rank, alpha, targets, seed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

RECIPES = {
    # what people start from
    "default": {"dtype": torch.float32, "dropout": 0.05, "grouped": False, "autocast": False},
    # the best of it that we found: weights stored in bfloat16, rows of like length together, no dropout
    "best": {"dtype": torch.bfloat16, "dropout": 0.0, "grouped": True, "autocast": False},
}


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right padding to the longest row of the batch."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = [{"mask": [1] * len(row["input_ids"])} for row in rows]
    attention = torch.tensor([row["mask"] + [0] * (longest - len(row["mask"])) for row in mask])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": attention}


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.perf_counter())


class CountingTrainer(Trainer):
    """Counts the tokens that are not padding in each batch it trains on."""

    tokens: list[int]

    def training_step(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.tokens.append(int(inputs["attention_mask"].sum()))
        return super().training_step(model, inputs, *args, **kwargs)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    recipe = RECIPES[job["recipe"]]
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=recipe["dtype"])
    model.config.use_cache = False
    lora = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=recipe["dropout"], target_modules=job["targets"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, lora)
    rows = json.loads(Path(job["rows"]).read_text())
    data = [{"input_ids": r["ids"], "labels": r["labels"], "length": len(r["ids"])} for r in rows]
    grouping = {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    arguments = TrainingArguments(
        output_dir=job["output"], per_device_train_batch_size=job["batch_size"], max_steps=job["steps"],
        learning_rate=job["learning_rate"], lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", report_to=[], seed=job["seed"], remove_unused_columns=False, use_cpu=True,
        bf16=recipe["autocast"], disable_tqdm=True, dataloader_pin_memory=False,
        **(grouping if recipe["grouped"] else {}),
    )  # fmt: skip
    clock = Clock()
    trainer = CountingTrainer(model=model, args=arguments, train_dataset=data, data_collator=pad, callbacks=[clock])
    trainer.tokens = []
    trainer.train()
    model.save_pretrained(job["output"])
    steps = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    print(json.dumps({
        "tokens_per_second": sum(trainer.tokens[1:]) / sum(steps[1:]), "seconds": sum(steps), "steps": len(steps),
        "tokens": sum(trainer.tokens), "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
