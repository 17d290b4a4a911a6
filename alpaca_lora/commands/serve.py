"""`alpaca-lora serve`: one base model, many adapters, OpenAI's API and a page, until a signal.

Puts keys, socket, base, bank, policies and engine together, the quick ones first: a wrong option is told before a model
is loaded. The service itself is an extra; its room is imported when it is there.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import ipaddress
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from alpaca_lora.adapters.record import RECORD_NAME, read_record
from alpaca_lora.commands.base_model import open_base
from alpaca_lora.commands.schemas import ServeConfig
from alpaca_lora.config import Resolved
from alpaca_lora.device import pick_compute
from alpaca_lora.errors import ConfigError, MachineError, Stopped
from alpaca_lora.inference.adapter_bank import AdapterBank
from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.grammar import GrammarCompiler
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.models.load import Base
from alpaca_lora.safety.classifier import Classifier
from alpaca_lora.safety.policy import Policy
from alpaca_lora.text.templates import load_template

EXTRA = ("fastapi", "uvicorn", "prometheus_client")
REQUESTS, AUDIT = "alpaca_lora.server", "alpaca_lora.audit"  # loggers, as of server/request_log.py
LOGGERS = (REQUESTS, AUDIT, "uvicorn.error")
EVERYONE = "*"  # the policy of models that are not named
Say = Callable[[str], None]


def run(config: ServeConfig, *, resolved: Resolved[ServeConfig], console: Console) -> dict[str, Any]:
    """Serves until SIGINT or SIGTERM, which end as `Stopped` when all is done; never returns otherwise.

    ConfigError for options that do not fit together, MachineError for an address that is taken or a missing extra.
    """
    say: Say = partial(console.print, style="dim", markup=False, highlight=False, soft_wrap=True)
    listener, keys = _room("listener"), _room("keys")
    for notice in resolved.notices:
        say(notice)
    adapters, policies = _pairs(config.lora, "lora"), _policy_files(config.safety_policy)
    ring = keys.KeyRing.read(config.api_keys_file)
    if not ring and not _is_loopback(config.host):
        raise ConfigError(
            f"{config.host} is not this machine alone, and there are no API keys", field="host",
            fix=f"set {keys.KEYS_VARIABLE} or api_keys_file, or leave host out",
        )  # fmt: skip
    with listener.bind(config.host, config.port) as socket, _logging(config):
        app = _application(config, adapters, policies, ring, say)
        server = listener.Listener(app, config)
        served = ", ".join(app.state.service.models.names())
        address = _address(config.host, socket.getsockname()[1])
        console.print(f"{address} serves {served}; Ctrl-C stops it", style="bold", markup=False, soft_wrap=True)
        server.run(sockets=[socket])
    if server.received is None:
        raise MachineError("the server did not start", fix="its log above says why")
    how = "every answer was finished" if server.was_drained else "answers that took too long were broken off"
    raise Stopped(server.received, f"stopped by {signal.Signals(server.received).name}: {how}")


def _application(
    config: ServeConfig, adapters: Mapping[str, str], policies: Mapping[str, str], ring: Any, say: Say
) -> Any:
    """Load everything and put it together."""
    compute = pick_compute(config.device, config.dtype, config.num_threads)
    base = open_base(config, compute, lora_weights=next(iter(adapters.values()), None), say=say)
    say(f"base model: {base.name}: {base.description} ({compute.reason})")
    for notice in base.notices:
        say(notice)
    if base.model.score is not None:
        raise ConfigError("classifies; a base that writes is served, with classifying adapters", field="base_model")
    name = config.served_model_name or _name_of(config.base_model)
    bank = AdapterBank(
        base.model, base.fingerprint, max_bytes=_bytes(config.max_adapter_gb), base_name=name,
        tokenizer_fingerprint=base.tokenizer.fingerprint,
    )  # fmt: skip
    classifiers = _room("rail_classifiers").RailClassifiers(_load(bank, adapters, say))
    engine = Engine(
        base.model, base.tokenizer, bank=bank, max_running=config.max_running, step_tokens=config.step_tokens,
        cache_bytes=_bytes(config.kv_cache_gb), keep_prefixes=True,
    )  # fmt: skip
    grammars = GrammarCompiler(base.tokenizer)
    grammars.prepare()
    app = _room("app").create_app(
        engine, bank, _prompts(config, base), config, base_name=name, fingerprint=base.fingerprint,
        grammars=grammars, policy_of=_policies(policies, name, bank, classifiers), keys=ring,
    )  # fmt: skip
    classifiers.bind(app.state.service)
    # what is there now stays; to look through all of it again holds up every thread for a tenth of a second
    gc.collect()
    gc.freeze()
    return app


def _room(name: str) -> Any:
    """A module of the server room. MachineError where its packages are not installed."""
    missing = [package for package in EXTRA if importlib.util.find_spec(package) is None]
    if missing:
        raise MachineError(f"{', '.join(missing)} not installed", fix="pip install 'alpaca-lora[serve]'")
    return importlib.import_module(f"alpaca_lora.server.{name}")


def _pairs(words: Sequence[str], key: str) -> dict[str, str]:
    """NAME=VALUE words as a table. ConfigError for one without a name or a value, or a name twice."""
    pairs: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value:
            raise ConfigError(
                f"{word!r} is not possible", field=key, expected="NAME=DIR" if key == "lora" else "NAME=FILE"
            )
        if name in pairs:
            raise ConfigError(f"{name!r} is given twice", field=key, fix="keep one")
        pairs[name] = value
    return pairs


def _policy_files(words: Sequence[str]) -> dict[str, str]:
    """Name of a model (`EVERYONE`: all others) -> file, ``bundled`` or ``none``."""
    return _pairs([word if "=" in word else f"{EVERYONE}={word}" for word in words], "safety_policy")


def _policies(
    files: Mapping[str, str], base_name: str, bank: AdapterBank, classifiers: Mapping[str, Classifier]
) -> Callable[[str | None], Policy | None]:
    """The policy of an adapter by its name, of the base by None. ConfigError for a wrong file or an unknown name."""
    unknown = [name for name in files if name not in (EVERYONE, base_name, *bank.names())]
    if unknown:
        raise ConfigError(f"no model {unknown[0]!r} is served", field="safety_policy", expected="a name of lora")
    read: dict[str, Policy | None] = {
        file: None if file == "none" else Policy.bundled() if file == "bundled" else Policy.from_file(file, classifiers)
        for file in dict.fromkeys(files.values())
    }

    def policy_of(adapter: str | None) -> Policy | None:
        file = files.get(adapter or base_name, files.get(EVERYONE))
        return None if file is None else read[file]

    return policy_of


def _load(bank: AdapterBank, adapters: Mapping[str, str], say: Say) -> list[str]:
    """Read the adapters; the names of those that classify."""
    for name, folder in adapters.items():
        loaded = bank.load(name, Path(folder))
        say(f"adapter {name}: {folder} ({loaded.method}, {loaded.num_bytes / 1e6:.1f} MB)")
        for message in loaded.messages:
            say(f"adapter {name}: {message}")
    return [name for name in bank.names() if bank.get(name).labels]


def _prompts(config: ServeConfig, base: Base) -> PromptFormat:
    """The base's own format; a merged folder has that of the adapter that went into it."""
    record = read_record(base.path) if base.path.is_dir() else None
    if record is None or not record.template or config.prompt_template_name is not None:
        template = load_template(config.prompt_template_name, base.tokenizer)
        return PromptFormat.of(template, base.tokenizer, system_prompt=config.system_prompt)
    prompts = PromptFormat.from_record(record, base.tokenizer, file=base.path / RECORD_NAME)
    return prompts if config.system_prompt is None else replace(prompts, system_prompt=config.system_prompt)


def _name_of(base_model: str) -> str:
    """A folder's or file's own name; an alias or a hub id as it is."""
    return Path(base_model).resolve().name if os.path.exists(base_model) else base_model


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@contextmanager
def _logging(config: ServeConfig) -> Iterator[None]:
    """One line for each event on standard error; the audit into its own file where there is one, lines of JSON only."""
    shape = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    with ExitStack() as until_the_end:
        for name in LOGGERS:
            handler: logging.Handler = logging.StreamHandler()
            handler.setFormatter(shape)
            if name == AUDIT and config.audit_log is not None:
                try:
                    handler = logging.FileHandler(config.audit_log, encoding="utf-8")
                except OSError as error:
                    raise MachineError(
                        f"cannot be written: {error.strerror}", file=config.audit_log, field="audit_log"
                    ) from error
            logger = logging.getLogger(name)
            until_the_end.callback(_restore, logger, logger.handlers, logger.propagate, logger.level)
            until_the_end.callback(handler.close)
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.INFO if name == REQUESTS and config.log_level == "info" else logging.WARNING)
        yield


def _restore(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int) -> None:
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
