// How answers are made: an empty field leaves it to the service.

import { make } from "./dom.js";
import { t } from "./i18n.js";

const NAME = "alpaca-lora.settings";
const MAX_SEED = 2 ** 31 - 1;
// name of the request's field, range, step of the slider (one: a whole number), where the slider stands while nothing is
// set; first: what is set at first. An untuned model may never end by itself, so the number of tokens is.
const CONTROLS = [
  { name: "temperature", low: 0, high: 2, step: 0.05, start: 1 },
  { name: "top_p", low: 0.01, high: 1, step: 0.01, start: 1 },
  { name: "top_k", low: 0, high: 200, step: 1, start: 0 },
  { name: "min_p", low: 0, high: 1, step: 0.01, start: 0 },
  { name: "max_tokens", low: 1, high: 4096, step: 1, start: 512, first: 512 },
];

export class Settings {
  #fields = new Map(); // name -> input
  #sliders = new Map();

  // elements: {controls, system, seed, dice, reset}
  constructor(elements, memory) {
    this.elements = elements;
    this.memory = memory;
    for (const control of CONTROLS) this.#build(control);
    const { system, seed, dice, reset } = elements;
    seed.addEventListener("change", () => this.#set(seed, wholeNumber(seed.value, 0, MAX_SEED)));
    dice.addEventListener("click", () => this.#set(seed, crypto.getRandomValues(new Uint32Array(1))[0] >>> 1));
    system.addEventListener("input", () => this.#keep());
    reset.addEventListener("click", () => {
      system.value = seed.value = "";
      this.#setFirst();
      this.#keep();
    });
    this.#setFirst();
    this.#recall();
    this.draw();
  }

  // {system, sampling}: what goes into a request
  get values() {
    const fields = [...this.#fields, ["seed", this.elements.seed]].filter(([, field]) => field.value !== "");
    const sampling = Object.fromEntries(fields.map(([name, field]) => [name, Number(field.value)]));
    return { system: this.elements.system.value.trim(), sampling };
  }

  draw() {
    for (const { name, start } of CONTROLS) {
      const field = this.#fields.get(name);
      const slider = this.#sliders.get(name);
      field.placeholder = t("default");
      slider.value = field.value === "" ? start : field.value;
      slider.classList.toggle("unset", field.value === "");
      slider.setAttribute("aria-valuetext", field.value === "" ? t("default") : field.value);
      slider.setAttribute("aria-label", t(name));
    }
    this.elements.seed.placeholder = t("random");
  }

  #build({ name, low, high, step, start }) {
    const id = `setting-${name}`;
    const field = make("input", { id, type: "number", min: low, max: high, step: step === 1 ? 1 : "any", inputmode: "decimal" });
    const slider = make("input", { type: "range", min: low, max: high, step, value: start, "aria-describedby": `${id}-hint` });
    field.addEventListener("change", () => {
      const value = step === 1 ? wholeNumber(field.value, low, high) : realNumber(field.value, low, high);
      this.#set(field, value);
    });
    slider.addEventListener("input", () => this.#set(field, slider.value));
    this.#fields.set(name, field);
    this.#sliders.set(name, slider);
    this.elements.controls.append(
      make(
        "div",
        { class: "control" },
        make("label", { for: id, "data-text": name }),
        field,
        slider,
        make("p", { class: "hint", id: `${id}-hint`, "data-text": `${name}-hint` }),
      ),
    );
  }

  #setFirst() {
    for (const { name, first = "" } of CONTROLS) this.#fields.get(name).value = String(first);
  }

  #set(field, value) {
    field.value = value === null ? "" : String(value);
    this.#keep();
  }

  #keep() {
    const { system, sampling } = this.values;
    this.memory.prefer(NAME, JSON.stringify({ system, sampling }));
    this.draw();
  }

  #recall() {
    let kept = {};
    try {
      kept = JSON.parse(this.memory.get(NAME) ?? "{}");
    } catch {
      return; // an entry that is not ours
    }
    if (typeof kept?.system !== "string" || typeof kept.sampling !== "object") return;
    this.elements.system.value = kept.system;
    for (const { name, low, high, step } of [...CONTROLS, { name: "seed", low: 0, high: MAX_SEED, step: 1 }]) {
      const field = this.#fields.get(name) ?? this.elements.seed;
      const value = kept.sampling?.[name] ?? "";
      field.value = String((step === 1 ? wholeNumber(value, low, high) : realNumber(value, low, high)) ?? "");
    }
  }
}

// The number within its range, or null of a text that is none.
function realNumber(text, low, high) {
  const value = text === "" ? NaN : Number(text); // Number("") is 0
  return Number.isNaN(value) ? null : Math.min(Math.max(value, low), high);
}

function wholeNumber(text, low, high) {
  const value = realNumber(text, low, high);
  return value === null ? null : Math.round(value);
}
