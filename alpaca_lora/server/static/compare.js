// Whom the next question goes to: one model, or two side by side.

import { make } from "./dom.js";
import { t } from "./i18n.js";

const NAME = "alpaca-lora.models";

// Event: "change".
export class Models extends EventTarget {
  #models = [];
  #comparing = false;

  // elements: {first, second (selects), firstFacts, secondFacts, toggle, swap, root}
  constructor(elements, memory) {
    super();
    this.elements = elements;
    this.memory = memory;
    this.#wanted = this.#remembered();
    const { first, second, toggle, swap } = elements;
    for (const select of [first, second]) select.addEventListener("change", () => this.#changed());
    toggle.addEventListener("click", () => {
      this.#comparing = !this.#comparing;
      this.#changed();
    });
    swap.addEventListener("click", () => {
      [first.value, second.value] = [second.value, first.value];
      this.#changed();
    });
    this.draw();
  }

  #wanted;

  // Ids of one model or of two; empty while there are none.
  get chosen() {
    const { first, second } = this.elements;
    if (this.#models.length === 0) return [];
    return this.#comparing ? [first.value, second.value] : [first.value];
  }

  get isComparing() {
    return this.#comparing;
  }

  // The model of the first column, or undefined.
  get current() {
    return this.#models.find(({ id }) => id === this.elements.first.value);
  }

  has(id) {
    return this.#models.some((model) => model.id === id);
  }

  // Take what the service has now; -> ids that were chosen and are gone.
  take(models) {
    const gone = this.chosen.filter((id) => !models.some((model) => model.id === id));
    this.#models = models;
    const [first, second] = this.#wanted;
    const adapter = models.find(({ kind }) => kind === "adapter");
    const base = models.find(({ kind }) => kind === "base");
    this.#fill(this.elements.first, first, adapter ?? base);
    this.#fill(this.elements.second, second, base ?? adapter);
    this.draw();
    this.dispatchEvent(new Event("change"));
    return gone;
  }

  draw() {
    const { root, first, second, firstFacts, secondFacts, toggle, swap } = this.elements;
    root.classList.toggle("two", this.#comparing);
    second.closest(".picker").hidden = !this.#comparing;
    swap.hidden = !this.#comparing;
    toggle.setAttribute("aria-pressed", String(this.#comparing));
    for (const [select, facts] of [[first, firstFacts], [second, secondFacts]]) {
      for (const group of select.querySelectorAll("optgroup")) group.label = t(group.dataset.kind);
      facts.textContent = factsOf(this.#models.find(({ id }) => id === select.value));
    }
  }

  #fill(select, wanted, fallback) {
    const group = (kind) => {
      const options = this.#models
        .filter((model) => (model.kind === "base" ? "base" : "adapter") === kind)
        .map(({ id }) => make("option", { value: id }, id));
      return options.length === 0 ? null : make("optgroup", { "data-kind": kind, label: t(kind) }, ...options);
    };
    select.replaceChildren(...[group("adapter"), group("base")].filter((part) => part !== null));
    select.disabled = this.#models.length === 0;
    select.value = this.has(wanted) ? wanted : (fallback?.id ?? this.#models[0]?.id ?? "");
  }

  #changed() {
    const { first, second } = this.elements;
    if (this.#models.length > 0) this.#wanted = [first.value, second.value];
    this.memory.prefer(NAME, JSON.stringify({ chosen: this.#wanted, comparing: this.#comparing }));
    this.draw();
    this.dispatchEvent(new Event("change"));
  }

  #remembered() {
    try {
      const { chosen, comparing } = JSON.parse(this.memory.get(NAME) ?? "{}");
      this.#comparing = comparing === true;
      return Array.isArray(chosen) ? chosen : [];
    } catch {
      return []; // an entry that is not ours
    }
  }
}

// "LoRA · rank 16 · alpaca"
function factsOf(model) {
  if (model === undefined) return "";
  const facts = [];
  if (model.kind === "base") facts.push(t("base-facts"));
  if (typeof model.method === "string") facts.push(model.method);
  if (Number.isFinite(model.rank)) facts.push(t("rank", { n: model.rank }));
  if (typeof model.template === "string") facts.push(model.template);
  return facts.join(" · ");
}
