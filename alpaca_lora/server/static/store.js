// Conversations, kept in the browser: at most a number of them and of characters, the oldest leave first.
//
// {id, title, updated, turns: [{prompt, answers: [answer]}]}
// answer: {model, text, state: "running" | "done" | "stopped" | "failed", finish, error: {kind, detail, retryAfter} | null,
//          promptTokens, cachedTokens, completionTokens, firstSeconds, seconds} (numbers or null)
// Each one has a storage entry of its own, so that two tabs do not overwrite each other's.

const PREFIX = "alpaca-lora.conversation.";
const VERSION = 1;
export const MAX_CONVERSATIONS = 100;
export const MAX_CHARACTERS = 2_000_000; // browsers give five million to a site
export const MAX_IMPORT = 8_000_000;
const STATES = ["running", "done", "stopped", "failed"];

export class Store {
  constructor(memory) {
    this.memory = memory;
  }

  // Newest first; an entry that is not one of ours is left out.
  list() {
    return this.#entries().map(([, conversation]) => conversation);
  }

  get(id) {
    const text = this.memory.get(PREFIX + id);
    return text === null ? null : readConversation(parseJson(text));
  }

  // Keep it; -> how many old ones had to leave. Throws RangeError when it is too large by itself.
  save(conversation) {
    const text = JSON.stringify(conversation);
    if (text.length > MAX_CHARACTERS) throw new RangeError("the conversation is too large to keep");
    const others = this.#entries().filter(([name]) => name !== PREFIX + conversation.id);
    let characters = others.reduce((sum, [, , length]) => sum + length, text.length);
    let dropped = 0;
    const drop = () => {
      const [name, , length] = others.pop();
      this.memory.remove(name);
      characters -= length;
      dropped += 1;
    };
    while (others.length >= MAX_CONVERSATIONS || characters > MAX_CHARACTERS) drop();
    for (;;) {
      try {
        this.memory.set(PREFIX + conversation.id, text);
        return dropped;
      } catch (error) {
        if (error.name !== "QuotaExceededError" || others.length === 0) throw error;
        drop(); // the browser gives less than expected
      }
    }
  }

  remove(id) {
    this.memory.remove(PREFIX + id);
  }

  clear() {
    for (const [name] of this.#entries()) this.memory.remove(name);
  }

  export() {
    return JSON.stringify({ format: "alpaca-lora conversations", version: VERSION, conversations: this.list() }, null, 1);
  }

  // -> how many were taken over; of one that is here already the newer stays. Throws TypeError when it is none of ours.
  import(text) {
    const file = text.length <= MAX_IMPORT ? parseJson(text) : null;
    if (file?.version !== VERSION || !Array.isArray(file.conversations)) throw new TypeError("no such file");
    const read = file.conversations.slice(0, MAX_CONVERSATIONS).map(readConversation);
    if (read.includes(null)) throw new TypeError("no such conversation");
    // oldest first, so that what has to leave are the oldest
    const newer = read.filter(({ id, updated }) => (this.get(id)?.updated ?? -1) < updated);
    newer.sort((one, other) => one.updated - other.updated).forEach((conversation) => this.save(conversation));
    return newer.length;
  }

  #entries() {
    return this.memory
      .names()
      .filter((name) => name.startsWith(PREFIX))
      .map((name) => [name, this.memory.get(name) ?? ""])
      .map(([name, text]) => [name, readConversation(parseJson(text)), text.length])
      .filter(([name, conversation]) => conversation !== null && name === PREFIX + conversation.id)
      .sort(([, one], [, other]) => other.updated - one.updated);
  }
}

export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), turns: [] };
}

export function newAnswer(model) {
  return {
    model, text: "", state: "running", finish: null, error: null,
    promptTokens: null, cachedTokens: null, completionTokens: null, firstSeconds: null, seconds: null,
  };
}

function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // readers take it for what it is: not one of ours
  }
}

// Only known fields of the right kinds, or null: files come from anywhere.
export function readConversation(value) {
  if (typeof value?.id !== "string" || !/^[0-9a-f]{24}$/.test(value.id)) return null;
  if (typeof value.title !== "string" || !Number.isFinite(value.updated) || !Array.isArray(value.turns)) return null;
  const turns = value.turns.map(readTurn);
  return turns.includes(null) ? null : { id: value.id, title: value.title.slice(0, 200), updated: value.updated, turns };
}

function readTurn(value) {
  if (typeof value?.prompt !== "string" || !Array.isArray(value.answers)) return null;
  if (value.answers.length < 1 || value.answers.length > 2) return null;
  const answers = value.answers.map(readAnswer);
  return answers.includes(null) ? null : { prompt: value.prompt, answers };
}

function readAnswer(value) {
  if (typeof value?.model !== "string" || typeof value.text !== "string" || !STATES.includes(value.state)) return null;
  const count = (field) => (Number.isFinite(value[field]) && value[field] >= 0 ? value[field] : null);
  return {
    model: value.model,
    text: value.text,
    state: value.state === "running" ? "stopped" : value.state, // the page was left while it was made
    finish: typeof value.finish === "string" ? value.finish : null,
    error: typeof value.error?.kind === "string" ? readError(value.error) : null,
    promptTokens: count("promptTokens"),
    cachedTokens: count("cachedTokens"),
    completionTokens: count("completionTokens"),
    firstSeconds: count("firstSeconds"),
    seconds: count("seconds"),
  };
}

function readError({ kind, detail, retryAfter }) {
  return {
    kind,
    detail: typeof detail === "string" ? detail : "",
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : null,
  };
}
