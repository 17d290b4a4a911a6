// Copying a text, also where the page is not served from a secure address and the browser gives no clipboard.

import { make } from "./dom.js";

// -> whether it was copied
export async function copyText(text) {
  if (navigator.clipboard !== undefined) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // refused by a permission: the older way may still be allowed
    }
  }
  const field = make("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  field.value = text;
  const { activeElement } = document;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  activeElement?.focus();
  return done;
}
