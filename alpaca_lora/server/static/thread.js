// The conversation on the page: a question and one answer, or two side by side, for each turn.

import { AnswerView } from "./answer.js";
import { icon, make } from "./dom.js";
import { t } from "./i18n.js";

const NEAR = 80; // pixels from the end that still count as reading along

export class Thread {
  #views = new Map(); // answer -> its view
  #follows = true;
  #lastTop = 0;

  // actions: {copy(text, button), edit(), askAgain()}
  constructor(element, scroller, jump, actions) {
    this.element = element;
    this.scroller = scroller;
    this.jump = jump;
    this.actions = actions;
    scroller.addEventListener("scroll", () => this.#scrolled());
    jump.addEventListener("click", () => this.follow());
    element.addEventListener("drawn", () => this.#keepUp());
  }

  show(turns) {
    this.#views.clear();
    this.element.replaceChildren();
    for (const turn of turns) this.#append(turn);
    this.#showActions();
    this.follow();
  }

  add(turn) {
    this.#append(turn);
    this.#showActions();
    this.follow();
  }

  update(answer) {
    this.#views.get(answer)?.update();
  }

  // The buttons of the last question: only while nothing is being made.
  setRunning(running) {
    this.element.classList.toggle("running", running);
  }

  follow() {
    this.#follows = true;
    this.#keepUp();
  }

  #append(turn) {
    const two = turn.answers.length === 2;
    const views = turn.answers.map((answer, column) => {
      const view = new AnswerView(answer, two ? "ab"[column] : null, this.actions.copy);
      this.#views.set(answer, view);
      return view.element;
    });
    const question = make(
      "div",
      { class: "question" },
      make("h3", { class: "unseen" }, t("you-asked")),
      make("div", { class: "bubble", dir: "auto" }, turn.prompt),
    );
    this.element.append(
      make("section", { class: two ? "turn two" : "turn" }, question, make("div", { class: "answers" }, ...views)),
    );
  }

  #showActions() {
    this.element.querySelector(".turn-actions")?.remove();
    const last = this.element.lastElementChild;
    if (last === null) return;
    const button = (name, words, action) =>
      make("button", { type: "button", class: "quiet small", "data-action": name, onclick: action }, icon(name), words);
    last.querySelector(".question").append(
      make(
        "div",
        { class: "turn-actions" },
        button("edit", t("edit"), this.actions.edit),
        button("again", t("ask-again"), this.actions.askAgain),
      ),
    );
  }

  #scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.scroller;
    const atEnd = scrollHeight - clientHeight - scrollTop < NEAR;
    // only a move upwards is the reader's: the text that grows moves the end away, too
    if (atEnd) this.#follows = true;
    else if (scrollTop < this.#lastTop) this.#follows = false;
    this.#lastTop = scrollTop;
    this.jump.hidden = this.#follows;
  }

  #keepUp() {
    if (this.#follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.jump.hidden = this.#follows;
  }
}
