"""The options of the data: which files, how rows are read, cleaned, cut, split and batched. No torch: the help reads
this file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from alpaca_lora.config import Options
from alpaca_lora.data.cleaning import RULE_NAMES
from alpaca_lora.errors import ConfigError, nearest


class DataOptions(Options):
    """Keys that decide what is trained on and how it is batched."""

    task: Literal["generation", "classification"] = Field(
        "generation", description="learn to answer, or to put a label on a text"
    )
    data_path: list[str] = Field(
        min_length=1,
        json_schema_extra={"commas": False},
        description="training files or globs: alpaca, messages, ShareGPT, prompt/completion or text; labelled texts as "
        ".tsv, .csv or JSON; .gz and .zst too",
    )
    val_data_path: list[str] = Field(
        [], json_schema_extra={"commas": False}, description="validation files; none: val_set_size rows of the data"
    )
    prompt_key: str | None = Field(
        None, min_length=1, description="field that holds the prompt, where it has another name"
    )
    input_key: str | None = Field(None, min_length=1, description="field that holds the prompt's further input")
    response_key: str | None = Field(None, min_length=1, description="field that holds the response")
    text_key: str | None = Field(
        None, min_length=1, description="classification: field or column of the text; a number (from 1) without header"
    )
    text_template: str = Field(
        "{text}",
        description="classification: what stands around each text, for example 'Review: {text} Sentiment:'; the last "
        "token of the whole is classified",
    )
    label_key: str | None = Field(
        None, min_length=1, description="classification: field or column of the label; a number (from 1) without header"
    )
    val_set_size: int | float = Field(2000, ge=0, description="validation rows: a count, or below 1 a share; 0: none")
    cutoff_len: int = Field(512, ge=2, description="most tokens of one row, BOS and EOS included")
    train_on_inputs: bool = Field(True, description="learn the prompt's tokens too, not only the responses")
    train_on_turns: Literal["all", "last"] = Field("all", description="which responses of a chat to learn")
    add_eos_token: bool = Field(
        True,
        description="end each response that was not cut with EOS, and learn it; classification (there false unless "
        "given): end each text with EOS, whose hidden state is classified",
    )
    over_length: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="what happens to a row above cutoff_len; a response that is cut gets no EOS, a text to classify "
        "keeps its own",
    )
    skip_cleaning: list[str] = Field([], description=f"cleaning rules to leave out: {', '.join(RULE_NAMES)} or all")
    skip_bad: int = Field(0, ge=0, description="most unreadable rows to pass over; they are written to rejects.jsonl")
    group_by_length: bool = Field(
        False, description="rows of like length share a micro-batch; never changes which rows a step sees"
    )
    batch_size: int = Field(128, ge=1, description="rows of one optimizer step")
    micro_batch_size: int = Field(4, ge=1, description="times cutoff_len: most tokens of one micro-batch")
    data_cache: bool = Field(True, description="keep the encoded rows for the next run")

    @model_validator(mode="before")
    @classmethod
    def _task_defaults(cls, data: Any) -> Any:
        """A text to classify ends with its last token: where PEFT and transformers look for it by themselves."""
        classifies = isinstance(data, dict) and data.get("task") == "classification"
        return {"add_eos_token": False, **data} if classifies else data

    @model_validator(mode="after")
    def _check_task(self) -> DataOptions:
        foreign = ("prompt_key", "input_key", "response_key")
        if self.task == "generation":
            foreign = ("text_key", "label_key")
        for key in foreign:
            if getattr(self, key):
                fix = "set task to classification" if self.task == "generation" else "give text_key and label_key"
                raise ConfigError(f"is not a key of task {self.task}", field=key, fix=fix)
        if self.text_template.count("{text}") != 1:
            raise ConfigError(
                f"{self.text_template!r} does not say where the text stands", field="text_template",
                expected="{text} in it, once",
            )  # fmt: skip
        if self.text_key and self.text_key == self.label_key:
            raise ConfigError(
                f"is {self.label_key!r}, as text_key is", field="label_key", expected="another column than the text's"
            )
        return self

    @model_validator(mode="after")
    def _check_together(self) -> DataOptions:
        for key in ("data_path", "val_data_path"):
            if "" in getattr(self, key):
                raise ConfigError("holds an empty path", field=key, expected="files or globs")
        for name in self.skip_cleaning:
            if name not in (*RULE_NAMES, "all"):
                hint = nearest(name, (*RULE_NAMES, "all"))
                fix = f"did you mean {hint[0]}?" if hint else None
                raise ConfigError(
                    f"no cleaning rule is named {name!r}",
                    field="skip_cleaning",
                    expected=f"one of {', '.join(RULE_NAMES)}, all",
                    fix=fix,
                )
        if self.val_set_size >= 1 and self.val_set_size != int(self.val_set_size):
            raise ConfigError(
                f"{self.val_set_size} is neither a count nor a share",
                field="val_set_size",
                expected="a whole number of rows, or a share below 1",
            )
        if self.input_key and not (self.prompt_key and self.response_key):
            raise ConfigError(
                "input_key is given alone",
                field="input_key",
                expected="prompt_key and response_key with it",
                fix="name all the fields of the rows, or none",
            )
        return self
