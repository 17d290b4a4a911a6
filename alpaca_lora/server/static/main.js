// Puts the page together: who hears of what. Each part knows its own elements and nothing of the others.

import { errorWords, noticeOf } from "./answer.js";
import { ApiError, Client, SessionKey } from "./api.js";
import { Chat } from "./chat.js";
import { Classify } from "./classify.js";
import { copyText } from "./clipboard.js";
import { Models } from "./compare.js";
import { Composer } from "./composer.js";
import { byId, make } from "./dom.js";
import { firstLanguage, language, rememberLanguage, t, translate } from "./i18n.js";
import { Memory } from "./memory.js";
import { Notices } from "./notices.js";
import { Panel } from "./panels.js";
import { askForKey, confirm } from "./questions.js";
import { Report } from "./report.js";
import { Settings } from "./settings.js";
import { Sidebar, saveFile } from "./sidebar.js";
import { MAX_IMPORT, Store } from "./store.js";
import { Theme } from "./theme.js";
import { Thread } from "./thread.js";

const EXAMPLES = ["example-1", "example-2", "example-3", "example-4"];
const LOOK_AGAIN = 10_000; // milliseconds: adapters come and go while the page is open
const CURRENT = "alpaca-lora.current";
const SPOKEN = 500; // characters of an answer that are read aloud

const memory = new Memory(() => localStorage);
const tabMemory = new Memory(() => sessionStorage);
language.choose(firstLanguage(memory));
const theme = new Theme(memory);
const notices = new Notices(byId("notices"), byId("voice"));
const store = new Store(memory);
const key = new SessionKey(tabMemory);

const keyElements = { dialog: byId("key"), form: byId("key-form"), field: byId("key-field"), problem: byId("key-problem") };
const client = new Client(key, async (wasWrong) => {
  const given = await askForKey(keyElements, wasWrong);
  byId("forget-key").hidden = given === null && key.value === "";
  return given;
});

const chat = new Chat(client, store);
const settings = new Settings(
  { controls: byId("controls"), system: byId("system"), seed: byId("seed"), dice: byId("dice"), reset: byId("reset") },
  memory,
);
const models = new Models(
  {
    root: byId("models"), first: byId("model-first"), second: byId("model-second"), toggle: byId("compare"),
    firstFacts: byId("first-facts"), secondFacts: byId("second-facts"), swap: byId("swap"),
  },
  memory,
);
const composer = new Composer(
  { form: byId("composer"), field: byId("prompt"), button: byId("send") },
  { send: ask, stop: () => chat.stop() },
);
const thread = new Thread(byId("thread"), byId("scroller"), byId("jump"), {
  copy: (text, button) => copy(text, button),
  edit: () => composer.put(chat.takeBack()),
  askAgain: () => ask(chat.takeBack()),
});
const report = new Report({ dialog: byId("report"), title: byId("report-title"), body: byId("report-body") }, client);
const classify = new Classify(
  {
    dialog: byId("classify"), form: byId("classify-form"), model: byId("classify-model"), text: byId("classify-text"),
    button: byId("classify-send"), result: byId("classify-result"), opener: byId("classify-open"),
  },
  client,
);
const sidebar = new Sidebar({ list: byId("conversations"), empty: byId("no-conversations") }, store, {
  open: (id) => openConversation(store.get(id) ?? undefined),
  remove: (id) => removeConversation(id),
});
const sidebarPanel = new Panel(panelElements("sidebar"), "(max-width: 860px)", true);
const settingsPanel = new Panel(panelElements("settings"), "(max-width: 1180px)", false);

function panelElements(name) {
  const [button, close, scrim] = ["toggle", "close", "scrim"].map((part) => byId(`${name}-${part}`));
  return { panel: byId(name), button, close, scrim, behind: byId("page") };
}

function ask(prompt) {
  if (models.chosen.length === 0) return composer.put(prompt);
  notices.say(t("asking", { models: models.chosen.join(", ") }));
  void chat.ask(prompt, models.chosen, settings.values);
}

async function copy(text, button) {
  const done = await copyText(text);
  notices.say(t(done ? "copied" : "not-copied"));
  if (!done) return notices.show(t("not-copied"));
  button.classList.add("done");
  button.lastChild.textContent = t("copied");
  setTimeout(() => {
    button.classList.remove("done");
    button.lastChild.textContent = t("copy");
  }, 1500);
}

function openConversation(conversation) {
  chat.open(conversation);
  sidebarPanel.makeWay();
  byId("prompt").focus();
}

function removeConversation(id) {
  const conversation = store.get(id);
  chat.remove(id);
  drawSidebar();
  const restore = () => {
    chat.restore(conversation);
    drawSidebar();
  };
  if (conversation !== null) notices.show(t("deleted", { title: conversation.title }), { words: t("undo"), run: restore });
}

function drawSidebar() {
  sidebar.draw(chat.conversation.id);
}

function drawWelcome() {
  byId("welcome").hidden = chat.conversation.turns.length > 0;
  byId("page").classList.toggle("empty", chat.conversation.turns.length === 0);
  byId("welcome-words").textContent = models.isComparing ? t("welcome-compare") : t("welcome-words");
  byId("examples").replaceChildren(
    ...EXAMPLES.map((name) => {
      const put = () => composer.put(t(name));
      return make("li", {}, make("button", { type: "button", class: "example", onclick: put }, t(name)));
    }),
  );
}

let lookedAt = 0;

async function lookForModels() {
  lookedAt = performance.now();
  const trouble = byId("trouble");
  let words = "";
  try {
    const served = await client.models();
    const gone = models.take(served.filter(({ kind }) => kind !== "classifier"));
    classify.take(served.filter(({ kind }) => kind === "classifier"));
    for (const id of gone) notices.show(t("model-gone", { model: id }));
    if (models.chosen.length === 0) words = t("no-models");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    words = errorWords({ kind: error.kind, detail: error.kind === "key" ? "" : error.detail, retryAfter: error.retryAfter });
  }
  trouble.hidden = words === "";
  trouble.firstElementChild.textContent = words;
}

function showModels() {
  composer.ready = models.chosen.length > 0;
  byId("report-open").disabled = models.current?.kind !== "adapter";
  drawWelcome();
}

// Everything that has words in it, in the language of now.
function drawAll() {
  translate(document);
  models.draw();
  settings.draw();
  composer.draw();
  drawSidebar();
  drawWelcome();
  thread.show(chat.conversation.turns);
  if (byId("report").open) report.draw();
  classify.draw();
}

chat.addEventListener("open", () => {
  tabMemory.set(CURRENT, chat.conversation.id);
  thread.show(chat.conversation.turns);
  drawSidebar();
  drawWelcome();
});
chat.addEventListener("turn", ({ detail: turn }) => {
  thread.add(turn);
  drawWelcome();
});
chat.addEventListener("answer", ({ detail: answer }) => {
  thread.update(answer);
  if (answer.state === "running") return;
  notices.say(`${t("answer-of", { model: answer.model })}: ${answer.text.slice(0, SPOKEN)} ${noticeOf(answer)[0]}`);
});
chat.addEventListener("state", () => {
  composer.running = chat.isRunning;
  thread.setRunning(chat.isRunning);
  drawSidebar();
});
chat.addEventListener("saved", ({ detail: left }) => {
  tabMemory.set(CURRENT, chat.conversation.id);
  if (left > 0) notices.show(t("old-left", { n: left }));
});
chat.addEventListener("unsaved", () => notices.show(t("not-kept")));

models.addEventListener("change", showModels);
language.addEventListener("change", drawAll);

byId("language").value = language.current;
byId("language").addEventListener("change", (event) => {
  language.choose(event.target.value);
  rememberLanguage(memory);
});
byId("theme").value = theme.current;
byId("theme").addEventListener("change", (event) => theme.choose(event.target.value));
byId("new").addEventListener("click", () => openConversation());
byId("export").addEventListener("click", () => saveFile("alpaca-lora-conversations.json", store.export()));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file === undefined) return;
  try {
    if (file.size > MAX_IMPORT * 4) throw new TypeError("too large");
    notices.show(t("imported", { n: store.import(await file.text()) }));
  } catch (error) {
    notices.show(error instanceof TypeError ? t("not-imported") : t("not-kept"));
  }
  drawSidebar();
});
byId("delete-all").addEventListener("click", async () => {
  const elements = { dialog: byId("sure"), form: byId("sure-form"), words: byId("sure-words") };
  if (!(await confirm(elements, t("delete-all-sure")))) return;
  chat.remove(chat.conversation.id);
  store.clear();
  drawSidebar();
});
byId("forget-key").hidden = key.value === "";
byId("forget-key").addEventListener("click", () => {
  key.value = "";
  byId("forget-key").hidden = true;
  notices.show(t("key-forgotten"));
});
byId("retry").addEventListener("click", lookForModels);
byId("report-open").addEventListener("click", () => report.open(models.current.id));
for (const name of ["report", "classify"]) byId(`${name}-close`).addEventListener("click", () => byId(name).close());

document.addEventListener("keydown", (event) => {
  // an input method's Escape gives up what is being composed; otherwise it closes what lies on top, or stops
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]") !== null) return;
  const over = [sidebarPanel, settingsPanel].find((panel) => panel.liesOver);
  if (over !== undefined) over.close();
  else chat.stop();
});
window.addEventListener("focus", () => performance.now() - lookedAt > LOOK_AGAIN && lookForModels());
window.addEventListener("storage", drawSidebar); // another tab kept or deleted something

drawAll();
chat.open(store.get(tabMemory.get(CURRENT) ?? "") ?? undefined);
if (!memory.lasts) notices.show(t("not-lasting"));
if (matchMedia("(hover: hover)").matches) byId("prompt").focus(); // elsewhere it would open the keyboard
void lookForModels(); // not awaited: the page is shown before the service has answered
