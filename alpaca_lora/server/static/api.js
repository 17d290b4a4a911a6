// The service's HTTP interface: models, chats as streams, labels, training reports. Knows no page.

import { EventParser } from "./sse.js";

const MAX_DETAIL = 500; // characters of a message of the server that are shown

// kind: "key" (401) | "busy" (429, 503) | "missing" (404) | "refused" (other 4xx) | "failed" (5xx, an error in the
// stream) | "unreachable" | "broken" (the stream ended early or is not what it should be). detail: the server's words.
export class ApiError extends Error {
  constructor(kind, detail = "", retryAfter = null) {
    super(`${kind}: ${detail}`);
    this.kind = kind;
    this.detail = detail.slice(0, MAX_DETAIL);
    this.retryAfter = retryAfter; // seconds, or null
  }
}

// The key lives as long as the tab and nowhere else.
export class SessionKey {
  static #NAME = "alpaca-lora.key";

  // tabMemory: the Memory of this tab's session
  constructor(tabMemory) {
    this.memory = tabMemory;
  }

  get value() {
    return this.memory.get(SessionKey.#NAME) ?? "";
  }

  set value(key) {
    if (key === "") this.memory.remove(SessionKey.#NAME);
    else this.memory.set(SessionKey.#NAME, key);
  }
}

export class Client {
  // askForKey(wasWrong) -> the key or null; asked once for requests that fail at the same time
  constructor(key, askForKey) {
    this.key = key;
    this.askForKey = askForKey;
    this.asking = null;
  }

  // [{id, kind: "base" | "adapter" | "classifier", method, rank, template}]
  async models() {
    const { data } = await this.#json("v1/models");
    if (!Array.isArray(data)) throw new ApiError("broken", "/v1/models");
    return data
      .filter((model) => typeof model?.id === "string" && model.id !== "")
      .map(({ id, kind, method, rank, template }) => ({ id, kind, method, rank, template }));
  }

  // {label, probabilities: [[label, share]], likeliest first, truncated}
  async classify(model, input) {
    const { data } = await this.#json("v1/classify", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "application/json" },
      body: JSON.stringify({ model, input }),
    });
    const found = Object(Array.isArray(data) ? data[0] : null);
    const probabilities = Object.entries(Object(found.probabilities)).filter(([, share]) => Number.isFinite(share));
    if (typeof found.label !== "string" || probabilities.length === 0) throw new ApiError("broken", "/v1/classify");
    // an object's keys that are numbers come first, whatever the order was
    probabilities.sort(([, one], [, other]) => other - one);
    return { label: found.label, probabilities, truncated: found.truncated === true };
  }

  // {metrics: [{step, train_loss?, val_loss?, learning_rate?}], summary: {}}
  async report(adapter) {
    const { metrics, summary } = await this.#json(`v1/adapters/${encodeURIComponent(adapter)}/report`);
    if (!Array.isArray(metrics)) throw new ApiError("broken", "report");
    return { metrics, summary: summary !== null && typeof summary === "object" ? summary : {} };
  }

  // The answer as it comes: {text} | {finish} | {usage}; throws ApiError, or AbortError when the signal fires.
  async *chat(body, signal) {
    const response = await this.#request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!(response.headers.get("Content-Type") ?? "").startsWith("text/event-stream")) {
      throw new ApiError("broken", "Content-Type");
    }
    let finished = false;
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parseChunk(data);
      const [choice] = Array.isArray(chunk.choices) ? chunk.choices : [];
      if (typeof choice?.delta?.content === "string" && choice.delta.content !== "") yield { text: choice.delta.content };
      if (typeof choice?.finish_reason === "string") {
        finished = true;
        yield { finish: choice.finish_reason };
      }
      if (chunk.usage !== null && typeof chunk.usage === "object") yield { usage: chunk.usage };
    }
    if (!finished) throw new ApiError("broken");
  }

  async #json(path, options = { headers: { Accept: "application/json" } }) {
    const response = await this.#request(path, options);
    try {
      return Object(await response.json());
    } catch (error) {
      throw new ApiError("broken", error.message);
    }
  }

  async #request(path, options) {
    for (;;) {
      const key = this.key.value;
      const headers = key === "" ? options.headers : { ...options.headers, Authorization: `Bearer ${key}` };
      let response;
      try {
        response = await fetch(path, { ...options, headers, cache: "no-store" });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("unreachable", error.message);
      }
      if (response.ok) return response;
      const problem = await problemOf(response);
      if (response.status !== 401) throw problem;
      if (this.key.value === key && !(await this.#renewKey(key !== ""))) throw problem;
    }
  }

  // Whether there is a new key to try.
  async #renewKey(wasWrong) {
    this.asking ??= this.askForKey(wasWrong).finally(() => (this.asking = null));
    const key = await this.asking;
    if (key !== null) this.key.value = key;
    return key !== null;
  }
}

async function* events(stream) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("broken", error.message); // the connection was cut, or an event has no end
  } finally {
    reader.cancel().catch(() => undefined); // the stream may have failed already, which was told of above
  }
}

function parseChunk(data) {
  let chunk;
  try {
    chunk = Object(JSON.parse(data));
  } catch (error) {
    throw new ApiError("broken", error.message);
  }
  if (chunk.error) throw new ApiError("failed", String(chunk.error.message ?? chunk.error));
  return chunk;
}

async function problemOf(response) {
  let detail = response.statusText;
  try {
    detail = String((await response.json()).error.message);
  } catch {
    // a proxy's page instead of the service's error: the status has to do
  }
  const { status } = response;
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const kinds = { 401: "key", 404: "missing", 429: "busy", 503: "busy" };
  return new ApiError(kinds[status] ?? (status < 500 ? "refused" : "failed"), detail, Number.isNaN(seconds) ? null : seconds);
}
