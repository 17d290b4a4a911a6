// A conversation and the answers that are being made for it. Knows the service and the store, no elements.

import { ApiError } from "./api.js";
import { newAnswer, newConversation } from "./store.js";

const SAVE_EVERY = 3000; // milliseconds: a page that is closed in the middle of an answer keeps most of it
const TITLE_LENGTH = 80;

// Events: "open" (another conversation), "turn" (detail: turn), "answer" (detail: answer), "state" (running or not),
// "saved" (detail: how many old conversations had to leave), "unsaved" (detail: why not).
export class Chat extends EventTarget {
  #abort = null;
  #removed = new Set(); // ids that must not be saved again by an answer that still ends

  constructor(client, store) {
    super();
    this.client = client;
    this.store = store;
    this.conversation = newConversation();
  }

  get isRunning() {
    return this.#abort !== null;
  }

  open(conversation = newConversation()) {
    this.stop();
    this.conversation = conversation;
    this.#tell("open");
  }

  stop() {
    this.#abort?.abort();
  }

  remove(id) {
    this.#removed.add(id);
    if (this.conversation.id === id) this.open();
    this.store.remove(id);
  }

  restore(conversation) {
    this.#removed.delete(conversation.id);
    this.store.save(conversation);
  }

  // Ask one model, or two at the same time. system: text or ""; sampling: fields of the request.
  async ask(prompt, models, { system, sampling }) {
    if (this.isRunning) return;
    const { conversation } = this;
    const earlier = conversation.turns.slice();
    const turn = { prompt, answers: models.map(newAnswer) };
    conversation.turns.push(turn);
    conversation.title ||= titleOf(prompt);
    const abort = (this.#abort = new AbortController());
    this.#save(conversation);
    this.#tell("turn", turn);
    this.#tell("state");
    const timer = setInterval(() => this.#save(conversation), SAVE_EVERY);
    try {
      await Promise.all(
        turn.answers.map((answer, column) => {
          const messages = [...history(earlier, column, system), { role: "user", content: prompt }];
          return this.#fill(answer, { model: answer.model, messages, ...sampling }, abort.signal);
        }),
      );
    } finally {
      clearInterval(timer);
      if (this.#abort === abort) this.#abort = null;
      this.#save(conversation);
      this.#tell("state");
    }
  }

  // Take the last turn back; -> its prompt.
  takeBack() {
    const turn = this.conversation.turns.pop();
    this.#save(this.conversation);
    this.#tell("open");
    return turn.prompt;
  }

  async #fill(answer, body, signal) {
    const started = performance.now();
    const elapsed = () => (performance.now() - started) / 1000;
    try {
      for await (const part of this.client.chat(body, signal)) {
        if (part.text !== undefined) {
          answer.text += part.text;
          answer.firstSeconds ??= elapsed();
          answer.seconds = elapsed();
        }
        if (part.finish !== undefined) answer.finish = part.finish;
        if (part.usage !== undefined) readUsage(answer, part.usage);
        this.#tell("answer", answer);
      }
      answer.state = "done";
    } catch (error) {
      if (error.name === "AbortError") {
        answer.state = "stopped";
      } else if (error instanceof ApiError) {
        answer.state = "failed";
        answer.error = { kind: error.kind, detail: error.detail, retryAfter: error.retryAfter };
      } else {
        answer.state = "failed";
        throw error;
      }
    } finally {
      answer.seconds ??= elapsed();
      this.#tell("answer", answer);
    }
  }

  #save(conversation) {
    if (this.#removed.has(conversation.id)) return;
    conversation.updated = Date.now();
    let left = 0;
    try {
      if (conversation.turns.length === 0) this.store.remove(conversation.id);
      else left = this.store.save(conversation);
    } catch (error) {
      this.#tell("unsaved", error.message);
      return;
    }
    this.#tell("saved", left);
  }

  #tell(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

// What a column of the conversation has said so far. Where a turn has one answer, both columns go on from it.
export function history(turns, column, system) {
  const messages = system === "" ? [] : [{ role: "system", content: system }];
  for (const { prompt, answers } of turns) {
    const answer = answers[Math.min(column, answers.length - 1)];
    if (answer.text === "") continue; // nothing was said: two questions in a row confuse most templates
    messages.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
  }
  return messages;
}

// Tokens per second from the first token on, or null where that cannot be said.
export function speedOf({ completionTokens, firstSeconds, seconds }) {
  if (completionTokens === null || completionTokens < 2 || firstSeconds === null || seconds <= firstSeconds) return null;
  return (completionTokens - 1) / (seconds - firstSeconds);
}

function readUsage(answer, usage) {
  const count = (value) => (Number.isFinite(value) ? value : null);
  answer.promptTokens = count(usage.prompt_tokens);
  answer.completionTokens = count(usage.completion_tokens);
  answer.cachedTokens = count(usage.prompt_tokens_details?.cached_tokens);
}

function titleOf(prompt) {
  const line = prompt.trim().split("\n", 1)[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line;
}
