// The list of conversations, and what can be done with all of them.

import { icon, make } from "./dom.js";
import { language, t } from "./i18n.js";

export class Sidebar {
  // elements: {list, empty}; actions: {open(id), remove(id)}
  constructor(elements, store, actions) {
    this.elements = elements;
    this.store = store;
    this.actions = actions;
  }

  draw(currentId) {
    const conversations = this.store.list();
    this.elements.empty.hidden = conversations.length > 0;
    this.elements.list.replaceChildren(...conversations.map((each) => this.#item(each, each.id === currentId)));
  }

  #item({ id, title, updated, turns }, isCurrent) {
    const name = title === "" ? t("untitled") : title;
    const models = [...new Set(turns.at(-1)?.answers.map(({ model }) => model) ?? [])].join(" · ");
    const open = make(
      "button",
      { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, onclick: () => this.actions.open(id) },
      make("span", { class: "title", dir: "auto" }, name),
      make("span", { class: "when" }, `${dateOf(updated)}${models === "" ? "" : ` · ${models}`}`),
    );
    const words = t("delete-named", { title: name });
    const remove = make(
      "button",
      { type: "button", class: "quiet icon-only", "data-action": "delete", "aria-label": words, title: t("delete") },
      icon("bin"),
    );
    remove.addEventListener("click", () => this.actions.remove(id));
    return make("li", {}, open, remove);
  }
}

// Hands the browser a file to save.
export function saveFile(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it a little later
}

function dateOf(milliseconds) {
  const date = new Date(milliseconds);
  const today = date.toDateString() === new Date().toDateString();
  const parts = today ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric" };
  return date.toLocaleString(language.current, parts);
}
