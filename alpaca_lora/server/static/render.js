// The tree of markdown.js as nodes of the page. Texts become text nodes; addresses were checked where the tree was made.

import { icon, make } from "./dom.js";
import { t } from "./i18n.js";
import { GrowingText } from "./markdown.js";

const MAX_BUTTONS = 200; // in one answer: a page of twenty thousand code blocks took 29 s to draw with a button for each
const INLINE_TAGS = { strong: "strong", emphasis: "em", strike: "s" };

// Shows a text that grows, drawing only its end anew.
export class MarkdownView {
  #text = new GrowingText();
  #buttons = 0;

  constructor(copy) {
    this.element = make("div", { class: "markdown", dir: "auto" });
    this.copy = copy; // what a code block's button calls with the code
  }

  // Shows the whole `text`, which usually begins with what is shown already.
  show(text) {
    if (!text.startsWith(this.#text.text)) {
      this.#text = new GrowingText();
      this.element.replaceChildren();
    }
    const { from, blocks } = this.#text.grow(text.slice(this.#text.text.length));
    while (this.element.children.length > from) this.element.lastElementChild.remove();
    this.#buttons = this.element.getElementsByTagName("button").length;
    this.element.append(...blocks.map((block) => this.#block(block)));
  }

  #block(block) {
    switch (block.kind) {
      case "heading":
        // the page's own headings come first: an answer's begin at the third level
        return make(`h${Math.min(block.level + 2, 6)}`, { class: `level-${block.level}` }, ...inlineNodes(block.inline));
      case "paragraph":
        return make("p", {}, ...inlineNodes(block.inline));
      case "rule":
        return make("hr");
      case "quote":
        return make("blockquote", {}, ...block.blocks.map((inner) => this.#block(inner)));
      case "code":
        return this.#code(block);
      case "list":
        return this.#list(block);
      case "table":
        return tableNode(block);
      default:
        throw new Error(`no such block: ${block.kind}`);
    }
  }

  #code({ language, text }) {
    const code = make("pre", { tabindex: "0" }, make("code", {}, text));
    if (this.#buttons >= MAX_BUTTONS) return make("div", { class: "code" }, code);
    this.#buttons += 1;
    const button = make("button", { type: "button", class: "quiet small", "data-action": "copy-code" }, icon("copy"), t("copy"));
    button.addEventListener("click", () => this.copy(text, button));
    return make(
      "div",
      { class: "code" },
      make("div", { class: "code-head" }, make("span", {}, language), button),
      code,
    );
  }

  #list({ ordered, first, items }) {
    const children = items.map(({ checked, blocks }) => {
      // one paragraph stands in the item as it is, so that plain lists stay close together
      const [only] = blocks;
      const plain = blocks[0]?.kind === "paragraph";
      const nodes = plain ? inlineNodes(only.inline) : [];
      const rest = (plain ? blocks.slice(1) : blocks).map((block) => this.#block(block));
      const box = checked === null ? null : make("input", { type: "checkbox", disabled: true, checked });
      return make("li", { class: checked === null ? null : "check" }, box, ...nodes, ...rest);
    });
    return ordered ? make("ol", { start: first }, ...children) : make("ul", {}, ...children);
  }
}

function inlineNodes(children, inLink = false) {
  return children.map((child) => {
    if (typeof child === "string") return document.createTextNode(child);
    if (child.kind === "break") return make("br");
    if (child.kind === "code") return make("code", {}, child.text);
    if (child.kind === "link") {
      if (inLink) return make("span", {}, ...inlineNodes(child.children, true));
      const attributes = { href: child.url, title: child.url, target: "_blank", rel: "noopener noreferrer nofollow" };
      return make("a", attributes, ...inlineNodes(child.children, true));
    }
    return make(INLINE_TAGS[child.kind], {}, ...inlineNodes(child.children, inLink));
  });
}

function tableNode({ align, head, rows }) {
  const cells = (tag, row) => row.map((cell, column) => make(tag, { class: align[column] }, ...inlineNodes(cell)));
  return make(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": t("table") },
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, ...cells("th", head))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))),
    ),
  );
}
