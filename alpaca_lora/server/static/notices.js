// Short messages at the edge of the page, read aloud; and what only the voice says.

import { icon, make } from "./dom.js";
import { t } from "./i18n.js";

const SHOWN = 8000; // milliseconds
const SPOKEN = 3; // sentences that wait for the voice: two answers may end at once

export class Notices {
  constructor(list, voice) {
    this.list = list;
    this.voice = voice;
  }

  // action: null or {words, run}
  show(words, action = null) {
    const element = make("li", {}, make("span", {}, words));
    const leave = () => element.remove();
    if (action !== null) {
      const run = () => {
        leave();
        action.run();
      };
      element.append(make("button", { type: "button", class: "quiet", "data-action": "undo", onclick: run }, action.words));
    }
    element.append(
      make("button", { type: "button", class: "quiet icon-only", "aria-label": t("close"), onclick: leave }, icon("close")),
    );
    this.list.append(element);
    setTimeout(leave, SHOWN);
  }

  // For those who hear the page: nothing is seen.
  say(words) {
    this.voice.append(make("p", {}, words));
    while (this.voice.children.length > SPOKEN) this.voice.firstElementChild.remove();
  }
}
