// The two side panels: beside the conversation on wide screens, over it on narrow ones.

export class Panel {
  // elements: {panel, button, close, scrim, behind}; narrow: a media query under which the panel lies over `behind`
  constructor({ panel, button, close, scrim, behind }, narrow, isOpen) {
    this.panel = panel;
    this.button = button;
    this.scrim = scrim;
    this.behind = behind;
    this.narrow = matchMedia(narrow);
    button.addEventListener("click", () => this.#toggle());
    close.addEventListener("click", () => this.close());
    scrim.addEventListener("click", () => this.close());
    this.narrow.addEventListener("change", () => this.#set(!this.narrow.matches && isOpen));
    this.#set(!this.narrow.matches && isOpen);
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  get liesOver() {
    return this.isOpen && this.narrow.matches;
  }

  // Let the conversation be seen, where the panel lies over it.
  makeWay() {
    if (this.liesOver) this.#set(false);
  }

  close() {
    this.#set(false);
    this.button.focus();
  }

  #toggle() {
    this.#set(!this.isOpen);
    if (this.liesOver) this.panel.querySelector("button, input, textarea")?.focus();
  }

  #set(isOpen) {
    this.panel.hidden = !isOpen;
    this.button.setAttribute("aria-expanded", String(isOpen));
    this.scrim.hidden = !this.liesOver;
    this.behind.inert = this.liesOver;
  }
}
