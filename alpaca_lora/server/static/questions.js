// Dialogs that ask something: for the key, and whether something is really to be done.

import { t } from "./i18n.js";

// -> the key, or null when there is none to be given
export function askForKey({ dialog, form, field, problem }, wasWrong) {
  problem.hidden = !wasWrong;
  problem.textContent = wasWrong ? t("key-wrong") : "";
  field.value = "";
  return answerOf(dialog, form, () => (field.value.trim() === "" ? null : field.value.trim()));
}

// -> whether it was agreed to
export async function confirm({ dialog, form, words }, question) {
  words.textContent = question;
  return (await answerOf(dialog, form, () => true)) === true;
}

// What `read` gives when the form is sent, null when the dialog is left.
function answerOf(dialog, form, read) {
  return new Promise((resolve) => {
    const done = new AbortController();
    const { signal } = done;
    const end = (value) => {
      done.abort();
      dialog.close();
      resolve(value);
    };
    form.addEventListener("submit", (event) => (event.preventDefault(), end(read())), { signal });
    form.querySelector("[data-action=cancel]").addEventListener("click", () => end(null), { signal });
    dialog.addEventListener("close", () => end(null), { signal }); // Escape
    dialog.showModal();
  });
}
