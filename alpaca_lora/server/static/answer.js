// One answer on the page: whose it is, its text as it comes, how it ended, what it cost.

import { speedOf } from "./chat.js";
import { icon, make } from "./dom.js";
import { number, t } from "./i18n.js";
import { MarkdownView } from "./render.js";

const PATIENCE = 4; // a long text may take at most one part in five of the time to draw
const DEFECT = { kind: "failed", detail: "", retryAfter: null };

export class AnswerView {
  #drawing = false;
  #notBefore = 0;

  // column: null, or "a" or "b" of a comparison
  constructor(answer, column, copy) {
    this.answer = answer;
    this.text = new MarkdownView(copy);
    this.notice = make("p", { class: "notice", hidden: true });
    this.facts = make("p", { class: "facts" });
    this.copyButton = make("button", { type: "button", class: "quiet small", "data-action": "copy-answer" });
    this.copyButton.addEventListener("click", () => copy(answer.text, this.copyButton));
    this.waiting = make("p", { class: "waiting", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
    const tag = column === null ? null : make("span", { class: `tag ${column}` }, column.toUpperCase());
    this.element = make(
      "article",
      { class: "answer", "data-column": column },
      make("header", {}, tag, make("span", { class: "name" }, answer.model)),
      this.text.element,
      this.waiting,
      this.notice,
      make("footer", {}, this.facts, this.copyButton),
    );
    this.draw();
  }

  // Draw soon: many pieces between two pictures of the screen are drawn once.
  update() {
    if (!this.#drawing) {
      this.#drawing = true;
      const delay = Math.max(0, this.#notBefore - performance.now());
      setTimeout(() => requestAnimationFrame(() => this.#drawNow()), delay);
    }
    if (this.answer.state !== "running") this.#drawNow();
  }

  #drawNow() {
    if (!this.#drawing) return;
    this.#drawing = false;
    const started = performance.now();
    this.draw();
    const now = performance.now();
    this.#notBefore = now + PATIENCE * (now - started);
    this.element.dispatchEvent(new Event("drawn", { bubbles: true }));
  }

  draw() {
    const { answer } = this;
    const running = answer.state === "running";
    this.text.show(answer.text);
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    this.element.setAttribute("aria-label", t("answer-of", { model: answer.model }));
    this.waiting.hidden = !running || answer.text !== "";
    const [words, level] = noticeOf(answer);
    this.notice.hidden = words === "";
    this.notice.textContent = words;
    this.notice.dataset.level = level;
    this.facts.replaceChildren(...factsOf(answer));
    this.copyButton.hidden = running || answer.text === "";
    this.copyButton.replaceChildren(icon("copy"), t("copy"));
  }
}

// What is to be said of the end of an answer: [words, "plain" | "warning" | "error"].
export function noticeOf({ state, finish, error, text }) {
  if (state === "failed") return [errorWords(error ?? DEFECT), "error"];
  if (state === "stopped") return [t("stopped"), "plain"];
  if (state === "running") return ["", "plain"];
  if (finish === "content_filter") return [t("filtered"), "warning"];
  if (finish === "length") return [t("cut-short"), "warning"];
  if (finish === "error") return [errorWords(DEFECT), "error"];
  return text.trim() === "" ? [t("empty-answer"), "plain"] : ["", "plain"];
}

export function errorWords({ kind, detail, retryAfter }) {
  const words = kind === "busy" && retryAfter !== null ? t("error-busy-for", { seconds: retryAfter }) : t(errorKey(kind));
  return detail === "" ? words : `${words} (${detail})`;
}

function errorKey(kind) {
  const known = ["key", "busy", "missing", "refused", "unreachable", "broken"];
  return known.includes(kind) ? `error-${kind}` : "error-failed";
}

function factsOf(answer) {
  const { promptTokens, cachedTokens, completionTokens, firstSeconds, seconds, state } = answer;
  if (state === "running") return firstSeconds === null ? [] : [t("seconds", { n: number(seconds, 1) })];
  const facts = [];
  const add = (name, text, hint) => facts.push(make("span", { "data-fact": name, title: hint }, text));
  if (completionTokens !== null) add("completion", t("tokens-out", { n: number(completionTokens) }), t("tokens-out-hint"));
  if (promptTokens !== null) {
    const cached = cachedTokens ? t("tokens-cached", { n: number(cachedTokens) }) : "";
    add("prompt", t("tokens-in", { n: number(promptTokens) }) + cached, t("tokens-in-hint"));
  }
  const speed = speedOf(answer);
  if (speed !== null) add("speed", t("speed", { n: number(speed, 1) }), t("speed-hint"));
  if (firstSeconds !== null) add("first", t("first-token", { n: number(firstSeconds, 2) }), t("first-token-hint"));
  return facts;
}
