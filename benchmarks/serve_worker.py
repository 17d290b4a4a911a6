"""One contender of bench_serve.py in a process of its own: loads, warms up, answers the prompts, says when tokens came.

    python serve_worker.py JOB.json        the result is the last line of standard output

JOB: kind (engine, transformers, server or llama), model (a folder or alias), dtype, quantize, threads, new_tokens,
parts, adapters (folders), python and gguf (of llama.cpp), and the prompts of each part, each as ids and as text.
RESULT: part -> its runs (see serve_figures.py); in this process also the ids of the answers, over HTTP of ours the
milliseconds of /health while long prompts are read and answered.

Each part is warmed up with other prompts of the same shape: a matrix library compiles its kernels for each shape.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import serve_client  # noqa: E402

PROBE_SECONDS = 0.02
Prompt = dict[str, Any]
Run = dict[str, Any]
Answer = Callable[[Sequence[Prompt], int], Run]


def measure(answer: Answer, job: dict[str, Any]) -> dict[str, Any]:
    """The parts that every contender has: prompts one by one, a long one, and many at once."""
    new, parts = job["new_tokens"], job["parts"]
    warm, found = job["warm"], {}
    if "single" in parts:
        answer(warm["single"], 4)
        found["single"] = [answer([prompt], new) for prompt in job["single"]]
    if "prefill" in parts:
        answer(warm["prefill"], 1)
        found["prefill"] = [answer([prompt], 1) for prompt in job["prefill"]]
    if "batch" in parts:
        answer(warm["batch"], 4)
        found["batch"] = [answer(job["batch"], new)]
    return found


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """Our engine without a server. Adapters: all prompts at once, each with one of the first 0, 1, 4, ... of them."""
    from alpaca_lora.device import pick_compute
    from alpaca_lora.inference.adapter_bank import AdapterBank
    from alpaca_lora.inference.engine import Engine
    from alpaca_lora.inference.request import Request, SamplingParams
    from alpaca_lora.quantization.load import load_base

    base = load_base(job["model"], pick_compute("cpu", job["dtype"], job["threads"]), quantize=job["quantize"])

    def answer_with(engine: Engine, names: Sequence[str] = ()) -> Answer:
        def answer(prompts: Sequence[Prompt], new: int) -> Run:
            engine.forget_prefixes()
            params = SamplingParams(max_new_tokens=new)
            chosen = [names[place * len(names) // len(prompts)] if names else None for place in range(len(prompts))]
            start = time.perf_counter()
            places = {
                engine.add(Request(tuple(prompt["ids"]), params, adapter=name)): place
                for place, (prompt, name) in enumerate(zip(prompts, chosen, strict=True))
            }
            times: list[list[float]] = [[] for _ in prompts]
            ids: list[list[int]] = [[] for _ in prompts]
            while engine.has_work:
                for event in engine.step():
                    times[places[event.index]] += [time.perf_counter() - start] * len(event.token_ids)
                    ids[places[event.index]] += event.token_ids
            return {"times": times, "counts": list(map(len, times)), "ids": ids}

        return answer

    found = measure(answer_with(Engine(base.model, base.tokenizer)), job)
    if "adapters" in job["parts"] and job["adapters"]:
        bank = AdapterBank(base.model, base.fingerprint)
        names = [bank.load(Path(path).name, Path(path)).name for path in job["adapters"]]
        banked = Engine(base.model, base.tokenizer, bank=bank)
        for count in (0, 1, 4, 8):
            answer = answer_with(banked, names[:count])
            answer(job["warm"]["batch"], 4)
            found[f"adapters_{count}"] = [answer(job["batch"], job["new_tokens"])]
    return found


def transformers_generate(job: dict[str, Any]) -> dict[str, Any]:
    """transformers over the very tensors that ours has, with its key/value cache and its default attention."""
    import torch
    import transformers

    from alpaca_lora.device import pick_compute
    from alpaca_lora.models.load import load_base
    from benchmarks.bench_generate import as_transformers

    model = as_transformers(load_base(job["model"], pick_compute("cpu", job["dtype"], job["threads"])))

    class Clock(transformers.StoppingCriteria):
        """Never stops; notes when it is asked, which is after each token."""

        def __init__(self) -> None:
            self.ticks: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.ticks.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    @torch.inference_mode()
    def answer(prompts: Sequence[Prompt], new: int) -> Run:
        clock, start = Clock(), time.perf_counter()
        ids = torch.tensor([prompt["ids"] for prompt in prompts])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
            eos_token_id=None, pad_token_id=0, stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )  # fmt: skip
        times = [tick - start for tick in clock.ticks]
        said = out[:, ids.shape[1] :].tolist()
        return {"times": [times] * len(prompts), "counts": list(map(len, said)), "ids": said}

    return measure(answer, job)


def over_http(url: str, *, by_ids: bool) -> Answer:
    """Streams of /v1/completions. A piece of text may be of two tokens, so the tokens are counted by the server."""

    def answer(prompts: Sequence[Prompt], new: int) -> Run:
        more = {"stream_options": {"include_usage": True}} if by_ids else {}
        bodies = [
            {
                "model": "base",
                "prompt": prompt["ids" if by_ids else "text"],
                "max_tokens": new,
                "temperature": 0,
                **more,
            }
            for prompt in prompts
        ]
        told = asyncio.run(serve_client.read_streams(url, bodies))
        for one in told:
            if one.error is not None or not one.times:
                raise RuntimeError(f"an answer failed: {one}")
        counts = [
            one.usage["completion_tokens"] if one.usage else new if one.finish_reason == "length" else len(one.times)
            for one in told
        ]
        return {"times": [one.times for one in told], "counts": counts, "texts": [one.text for one in told]}

    return answer


def server(job: dict[str, Any]) -> dict[str, Any]:
    """Our service as users meet it; the client takes its share of the same processors."""
    words = ["--dtype", job["dtype"], "--num_threads", str(job["threads"]), "--log_level", "warning"]
    with serve_client.ours(job["model"], *words) as one:
        answer = over_http(one.url, by_ids=True)
        found = measure(answer, job)
        if "health" in job["parts"]:
            with serve_client.Prober(one.url, PROBE_SECONDS) as prober:
                found["loaded"] = [answer(job["long_batch"], job["new_tokens"])]
            found |= {"health": prober.milliseconds, "health_failures": prober.failures}
    return found


def llama(job: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp behind llama-cpp-python's server."""
    with serve_client.llama(job["python"], job["gguf"], job["threads"]) as one:
        return measure(over_http(one.url, by_ids=False), job)


KINDS = {"engine": engine, "transformers": transformers_generate, "server": server, "llama": llama}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(KINDS[job["kind"]](job)))


if __name__ == "__main__":
    main()
