// Markdown inside of a line: emphasis, code, links, entities. Pure: text -> tree, no DOM.
//
// A node is a text or {kind: "strong" | "emphasis" | "strike", children} | {kind: "code", text} | {kind: "break"} |
// {kind: "link", url, children}. HTML stays text. A link has an http or https address or it stays text.
// Time is linear in the length, whatever the text: every look ahead is bounded or remembers that it found nothing.

const SPECIAL = /[\\`*_~[!<&\n]|https?:\/\//g;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const LABEL = /!?\[((?:[^[\]\\\n]|\\.){0,1000})\]\(/y;
const BETWEEN_ANGLES = /<(https?:\/\/[^\s<>]{1,2000})>/iy;
const LINE_BREAK = /<br[ \t]?\/?>/iy;
const BARE_URL = /https?:\/\/[^\s<>"'`|\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]{1,2000}/y;
const ENTITY = /&(?:#(\d{1,7})|#x([0-9a-f]{1,6})|(amp|lt|gt|quot|apos|nbsp));/iy;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const LETTER = /[\p{L}\p{N}]/u;
const MAX_ADDRESS = 1000; // characters between the parentheses of a link
const KINDS = { "*": ["emphasis", "strong"], _: ["emphasis", "strong"], "~": [null, "strike"] };

// The address as the browser reads it, or null where it is no plain web address.
export function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

export function parseInline(text) {
  return new InlineParser(text).parse();
}

function match(pattern, text, position) {
  pattern.lastIndex = position;
  return pattern.exec(text);
}

class InlineParser {
  constructor(text) {
    this.text = text;
    this.position = 0;
    // open emphasis, outermost first; a kind of mark is open at most once, so the depth is at most five
    this.frames = [{ mark: "", kind: null, children: [] }];
    this.runsWithoutEnd = new Set();
  }

  parse() {
    while (this.position < this.text.length) {
      SPECIAL.lastIndex = this.position;
      const found = SPECIAL.exec(this.text);
      const next = found === null ? this.text.length : found.index;
      this.say(this.text.slice(this.position, next));
      this.position = next;
      if (found !== null && !this.special(found[0])) {
        this.say(found[0]);
        this.position += found[0].length;
      }
    }
    while (this.frames.length > 1) this.giveUp();
    return this.frames[0].children;
  }

  add(node) {
    this.frames.at(-1).children.push(node);
  }

  // Text, joined to the text before it.
  say(text) {
    const children = this.frames.at(-1).children;
    if (text === "") return;
    if (typeof children.at(-1) === "string") children.push(children.pop() + text);
    else children.push(text);
  }

  // Whether the mark at the position was read; if so the position stands behind it.
  special(mark) {
    if (mark === "\n") {
      this.position += 1;
      this.add({ kind: "break" });
      return true;
    }
    if (mark === "`") return this.code();
    if (mark in KINDS) return this.emphasis(mark);
    if (mark === "[" || mark === "!") return this.link();
    if (mark === "\\") return this.take(ESCAPED, (found) => this.say(found[1]));
    if (mark === "&") return this.entity();
    if (mark === "<") {
      return (
        this.take(LINE_BREAK, () => this.add({ kind: "break" })) ||
        this.take(BETWEEN_ANGLES, (found) => this.addLink(found[1], [found[1]]))
      );
    }
    return this.bareUrl();
  }

  take(pattern, use) {
    const found = match(pattern, this.text, this.position);
    if (found === null || use(found) === false) return false;
    this.position += found[0].length;
    return true;
  }

  addLink(address, children) {
    const url = webAddress(address);
    if (url === null) return false;
    this.add({ kind: "link", url, children });
    return true;
  }

  entity() {
    return this.take(ENTITY, ([, decimal, hexadecimal, name]) => {
      if (name !== undefined) return this.say(NAMED[name.toLowerCase()]);
      const code = decimal === undefined ? parseInt(hexadecimal, 16) : parseInt(decimal, 10);
      const valid = code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
      return this.say(valid ? String.fromCodePoint(code) : "\ufffd");
    });
  }

  code() {
    const { text, position } = this;
    const width = runLength(text, position);
    const run = "`".repeat(Math.min(width, 32));
    let end = width > 32 || this.runsWithoutEnd.has(width) ? -1 : text.indexOf(run, position + width);
    while (end !== -1 && runLength(text, end) !== width) end = text.indexOf(run, end + runLength(text, end));
    if (end === -1) {
      this.runsWithoutEnd.add(width);
      this.say(text.slice(position, position + width));
      this.position = position + width;
      return true;
    }
    let inner = text.slice(position + width, end).replaceAll("\n", " ");
    if (inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "") inner = inner.slice(1, -1);
    this.add({ kind: "code", text: inner });
    this.position = end + width;
    return true;
  }

  emphasis(mark) {
    const { text, position } = this;
    let width = runLength(text, position);
    const before = text[position - 1] ?? " ";
    const after = text[position + width] ?? " ";
    this.position = position + width;
    let opens = /\S/.test(after);
    let closes = /\S/.test(before);
    if (mark === "_" && LETTER.test(before)) opens = false; // snake_case is no emphasis
    if (mark === "_" && LETTER.test(after)) closes = false;
    while (width > 0 && width <= 3) {
      const open = closes ? this.openFrame(mark, width) : -1;
      if (open > 0) {
        while (this.frames.length - 1 > open) this.giveUp();
        const frame = this.frames.pop();
        this.add({ kind: frame.kind, children: frame.children });
        width -= frame.mark.length;
        continue;
      }
      const size = width >= 2 && !this.isOpen(mark + mark) ? 2 : 1;
      const kind = KINDS[mark][size - 1];
      if (!opens || kind === null || this.isOpen(mark.repeat(size))) break;
      this.frames.push({ mark: mark.repeat(size), kind, children: [] });
      width -= size;
    }
    this.say(mark.repeat(width));
    return true;
  }

  // The frame that so many marks close: one of just that width, or else the innermost narrower one; -1: none.
  openFrame(mark, width) {
    const exact = this.frames.findLastIndex((frame) => frame.mark === mark.repeat(width));
    return exact > 0 ? exact : this.frames.findLastIndex((frame) => frame.mark[0] === mark && frame.mark.length < width);
  }

  isOpen(mark) {
    return this.frames.some((frame) => frame.mark === mark);
  }

  // The innermost mark was never closed: it was text.
  giveUp() {
    const frame = this.frames.pop();
    this.say(frame.mark);
    for (const child of frame.children) {
      if (typeof child === "string") this.say(child);
      else this.add(child);
    }
  }

  // [label](address "title"); of an image only the link: the page fetches nothing from elsewhere.
  link() {
    const found = match(LABEL, this.text, this.position);
    if (found === null) return false;
    const start = this.position + found[0].length;
    const end = this.closingParenthesis(start);
    if (end === -1) return false;
    const [address = ""] = this.text.slice(start, end).trim().split(/[ \t]/, 1);
    const label = parseInline(found[1]);
    const plain = address.startsWith("<") && address.endsWith(">") ? address.slice(1, -1) : address;
    if (!this.addLink(plain, label.length > 0 ? label : [plain])) return false;
    this.position = end + 1;
    return true;
  }

  // Where the parenthesis that was open before `start` ends, on the same line; -1: nowhere near.
  closingParenthesis(start) {
    const last = Math.min(this.text.length, start + MAX_ADDRESS);
    let depth = 1;
    for (let at = start; at < last; at++) {
      const code = this.text.charCodeAt(at);
      if (code === 10) return -1;
      if (code === 40) depth += 1;
      if (code === 41 && --depth === 0) return at;
    }
    return -1;
  }

  bareUrl() {
    const found = match(BARE_URL, this.text, this.position);
    if (found === null || /[A-Za-z0-9]/.test(this.text[this.position - 1] ?? "")) return false;
    let url = found[0];
    let surplus = url.split(")").length - url.split("(").length;
    while (/[.,;:!?*_~)\]}]/.test(url.at(-1))) {
      if (url.at(-1) === ")" && surplus-- <= 0) break;
      url = url.slice(0, -1);
    }
    if (!this.addLink(url, [url])) return false;
    this.position += url.length;
    return true;
  }
}

// How often the character at the position stands there in a row.
function runLength(text, position) {
  let end = position + 1;
  while (text[end] === text[position]) end += 1;
  return end - position;
}
