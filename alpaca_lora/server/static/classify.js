// What a classifying adapter makes of a text: its label, and how probable each label is.

import { errorWords } from "./answer.js";
import { ApiError } from "./api.js";
import { make, shape } from "./dom.js";
import { number, t } from "./i18n.js";

export class Classify {
  #models = [];
  #request = 0;
  #state = {}; // {} | {running} | {found} | {problem}

  // elements: {dialog, form, model (select), text, button, result, opener}
  constructor(elements, client) {
    this.elements = elements;
    this.client = client;
    const { form, text, model, opener, dialog } = elements;
    opener.addEventListener("click", () => {
      dialog.showModal();
      text.focus();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#ask();
    });
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    for (const field of [text, model]) field.addEventListener("input", () => this.#forget());
  }

  // Take the classifiers that the service has now.
  take(models) {
    const { model, opener } = this.elements;
    const before = model.value;
    this.#models = models;
    model.replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
    if (models.some(({ id }) => id === before)) model.value = before;
    else this.#forget();
    opener.hidden = models.length === 0;
  }

  draw() {
    const { result, button } = this.elements;
    const { running, found, problem } = this.#state;
    button.disabled = running === true;
    if (running) result.replaceChildren(make("p", { class: "hint" }, t("loading")));
    else if (problem) result.replaceChildren(make("p", { class: "notice", "data-level": "error" }, errorWords(problem)));
    else if (found) result.replaceChildren(...picture(found));
    else result.replaceChildren();
  }

  async #ask() {
    const text = this.elements.text.value;
    if (text.trim() === "" || this.#models.length === 0 || this.#state.running) return;
    const request = ++this.#request;
    const end = (state) => {
      if (request !== this.#request) return; // the text or the classifier is another one by now
      this.#state = state;
      this.draw();
    };
    end({ running: true });
    try {
      end({ found: await this.client.classify(this.elements.model.value, text) });
    } catch (problem) {
      if (!(problem instanceof ApiError)) throw problem;
      end({ problem });
    }
  }

  // What is shown was said of another text, or by another classifier.
  #forget() {
    this.#request++;
    this.#state = {};
    this.draw();
  }
}

function picture({ label, probabilities, truncated }) {
  const entry = ([name, share]) =>
    make(
      "li",
      { class: name === label ? "first" : null },
      make("span", { class: "label" }, name),
      make("span", { class: "share" }, t("percent", { n: number(share * 100, 1) })),
      shape("svg", { class: "bar", "aria-hidden": "true" }, shape("rect", { width: `${share * 100}%`, height: "100%" })),
    );
  return [
    make("ol", { class: "shares" }, ...probabilities.map(entry)),
    truncated ? make("p", { class: "hint" }, t("text-cut")) : null,
  ].filter((part) => part !== null);
}
