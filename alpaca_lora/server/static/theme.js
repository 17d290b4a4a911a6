// Light, dark, or as the system has it.

const NAME = "alpaca-lora.theme";
export const THEMES = ["auto", "light", "dark"];

export class Theme {
  constructor(memory) {
    this.memory = memory;
    const kept = memory.get(NAME);
    this.current = THEMES.includes(kept) ? kept : "auto";
    this.#show();
  }

  choose(theme) {
    this.current = THEMES.includes(theme) ? theme : "auto";
    this.memory.prefer(NAME, this.current);
    this.#show();
  }

  #show() {
    document.documentElement.dataset.theme = this.current;
  }
}
