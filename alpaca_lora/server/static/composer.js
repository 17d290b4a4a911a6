// Where people type: Enter sends, Shift+Enter makes a new line, and an input method's Enter does neither.

import { t } from "./i18n.js";

const MAX_HEIGHT = 240; // pixels

export class Composer {
  #running = false;
  #ready = false;

  constructor({ form, field, button }, { send, stop }) {
    this.field = field;
    this.button = button;
    this.send = send;
    this.stop = stop;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.stop();
      else this.#send();
    });
    field.addEventListener("input", () => this.#fit());
    field.addEventListener("keydown", (event) => {
      // 229: Safari ends the composition before it tells of the Enter that ended it
      const composing = event.isComposing || event.keyCode === 229;
      if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.altKey || event.metaKey || composing) return;
      event.preventDefault();
      if (!this.#running) this.#send();
    });
    this.draw();
  }

  set running(running) {
    this.#running = running;
    this.draw();
  }

  // Whether there is somebody to ask.
  set ready(ready) {
    this.#ready = ready;
    this.draw();
  }

  put(text) {
    this.field.value = text;
    this.#fit();
    this.field.focus();
  }

  draw() {
    const words = this.#running ? t("stop") : t("send");
    this.button.classList.toggle("stop", this.#running);
    this.button.querySelector("use").setAttribute("href", this.#running ? "#icon-stop" : "#icon-send");
    this.button.setAttribute("aria-label", words);
    this.button.title = words;
    this.button.disabled = !this.#running && (!this.#ready || this.field.value.trim() === "");
  }

  #send() {
    const text = this.field.value.trim();
    if (text === "" || !this.#ready) return;
    this.field.value = "";
    this.#fit();
    this.send(text);
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, MAX_HEIGHT)}px`;
    this.draw();
  }
}
