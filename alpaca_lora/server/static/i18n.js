// Which language the page speaks, and its words in it.

import { WORDS } from "./words.js";

const NAME = "alpaca-lora.language";

class Language extends EventTarget {
  current = "en";

  choose(language) {
    this.current = Object.hasOwn(WORDS, language) ? language : "en";
    document.documentElement.lang = this.current === "zh" ? "zh-CN" : "en";
    this.dispatchEvent(new Event("change"));
  }
}

export const language = new Language();

// What was chosen here before, or what the browser prefers.
export function firstLanguage(memory) {
  const chosen = memory.get(NAME);
  if (chosen !== null && Object.hasOwn(WORDS, chosen)) return chosen;
  const wanted = navigator.languages ?? [navigator.language];
  return wanted.map((tag) => tag.toLowerCase().split("-")[0]).find((tag) => Object.hasOwn(WORDS, tag)) ?? "en";
}

export function rememberLanguage(memory) {
  memory.prefer(NAME, language.current);
}

// The words of a key, with {name} replaced by values.name.
export function t(key, values = {}) {
  const words = WORDS[language.current][key];
  if (words === undefined) throw new Error(`no words for ${key}`);
  return words.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

export function number(value, digits = 0) {
  return value.toLocaleString(language.current, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// Put words into everything below `root` that asks for them: data-text, data-label (read aloud, and a button's
// hint), data-placeholder.
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.label);
  }
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
}
