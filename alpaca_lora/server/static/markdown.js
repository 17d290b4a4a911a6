// Markdown's blocks: headings, lists, quotes, tables, code. Pure: text -> tree, no DOM; inline.js reads what is in a line.
//
// A block is {kind, start, ...}; start: where it begins in the text (of outermost blocks only).
//   heading {level, inline} | paragraph {inline} | rule | code {language, text} | quote {blocks}
//   list {ordered, first, items: [{checked: true | false | null, blocks}]} | table {align, head: [inline], rows: [[inline]]}
// HTML and indented code are paragraphs. A newline in a paragraph is a line break, as people who chat expect it.

import { parseInline } from "./inline.js";

const MAX_DEPTH = 8; // of lists and quotes in each other; deeper ones are paragraphs
const MAX_COLUMNS = 100;
const FENCE = /^(`{3,}|~{3,})/;
const HEADING = /^(#{1,6})(?=[ \t]|$)/;
const ITEM = /^([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;
const CHECK = /^\[([ xX])\] /;
const DELIMITER = /^:?-+:?$/;

// All blocks of the text.
export function parse(text) {
  const lines = text.split("\n").map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line));
  const starts = [0];
  for (let end = text.indexOf("\n"); end !== -1; end = text.indexOf("\n", end + 1)) starts.push(end + 1);
  return blocksOf(lines, 0).map((block) => ({ ...block, start: starts[block.line] }));
}

// Reads a text that grows: blocks before the last one are never read again.
export class GrowingText {
  #stable = 0; // where the first block begins that may still change
  text = "";

  // -> {from, blocks}: the first `from` blocks stay as they are, `blocks` follow them.
  grow(text) {
    this.text += text;
    const blocks = parse(this.text.slice(this.#stable));
    const from = this.count;
    // a line without its end may still become anything, and a table is known by its second line: a block is final once
    // another begins before the last whole line
    const end = this.text.lastIndexOf("\n");
    const whole = end < 1 ? 0 : this.text.lastIndexOf("\n", end - 1) + 1;
    let last = blocks.length - 1;
    while (last > 0 && this.#stable + blocks[last].start >= whole) last -= 1;
    if (last > 0) {
      this.#stable += blocks[last].start;
      this.count += last;
    }
    return { from, blocks };
  }

  count = 0; // blocks that are final
}

function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    blocks.push({ ...block, line: at });
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const body = lines[at].trimStart();
  if (isFence(body)) return readCode(lines, at);
  const heading = HEADING.exec(body);
  if (heading !== null) return [{ kind: "heading", level: heading[1].length, inline: parseInline(headingText(body)) }, at + 1];
  if (isRule(body)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && body.startsWith(">")) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(body)) return readList(lines, at, depth);
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

// Whether a line begins a block even right behind a paragraph.
function interrupts(lines, at, depth) {
  const body = lines[at].trimStart();
  if (body === "" || isFence(body) || HEADING.test(body) || isRule(body) || isTable(lines, at)) return true;
  if (depth >= MAX_DEPTH) return false;
  if (body.startsWith(">")) return true;
  const item = ITEM.exec(body);
  return item !== null && body.length > item[0].length; // a lone dash or number in a paragraph is no list
}

function readParagraph(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && !interrupts(lines, next, depth)) next += 1;
  const text = lines.slice(at, next).map((line) => line.trim()).join("\n");
  return [{ kind: "paragraph", inline: parseInline(text) }, next];
}

function headingText(body) {
  const text = body.slice(HEADING.exec(body)[1].length).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1; // closing marks: only where a space is before them
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trimEnd() : text;
}

function isRule(body) {
  const mark = body[0];
  if (mark !== "-" && mark !== "*" && mark !== "_") return false;
  let count = 0;
  for (const character of body) {
    if (character === mark) count += 1;
    else if (character !== " " && character !== "\t") return false;
  }
  return count >= 3;
}

function isFence(body) {
  const fence = FENCE.exec(body);
  return fence !== null && !(body[0] === "`" && body.indexOf("`", fence[0].length) !== -1);
}

function readCode(lines, at) {
  const body = lines[at].trimStart();
  const indent = lines[at].length - body.length;
  const [fence] = FENCE.exec(body);
  const language = body.slice(fence.length).trim().split(/\s/, 1)[0].slice(0, 40);
  let next = at + 1;
  const isEnd = (line) => line.startsWith(fence) && line.replaceAll(fence[0], "") === "";
  while (next < lines.length && !isEnd(lines[next].trim())) next += 1;
  const text = lines.slice(at + 1, next).map((line) => dedent(line, indent)).join("\n");
  return [{ kind: "code", language, text }, Math.min(next + 1, lines.length)];
}

function readQuote(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length; next++) {
    const body = lines[next].trimStart();
    if (body.startsWith(">")) inner.push(body.slice(body[1] === " " ? 2 : 1));
    else if (next > at && !interrupts(lines, next, depth)) inner.push(body); // a paragraph's line without its mark
    else break;
  }
  return [{ kind: "quote", blocks: blocksOf(inner, depth + 1) }, next];
}

function readList(lines, at, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[at].trimStart())[1]);
  const outer = indentOf(lines[at]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const body = lines[next].trimStart();
    const item = ITEM.exec(body);
    if (item === null || isRule(body) || /\d/.test(item[1]) !== ordered || indentOf(lines[next]) > outer + 3) break;
    const end = itemEnd(lines, next, item[1].length, depth);
    items.push(readItem(lines.slice(next, end), item[1].length, depth));
    next = end;
  }
  const first = ordered ? parseInt(lines[at].trimStart(), 10) : 1;
  return [{ kind: "list", ordered, first, items }, next];
}

// The line behind an item: behind its indented lines, the lists in it, and its paragraph's further lines.
function itemEnd(lines, at, width, depth) {
  const inside = indentOf(lines[at]) + width + 1;
  let next = at + 1;
  for (; next < lines.length; next++) {
    const line = lines[next];
    if (line.trim() === "") {
      let ahead = next + 1;
      while (ahead < lines.length && lines[ahead].trim() === "") ahead += 1;
      // blank lines belong to the list only where it goes on behind them
      if (ahead === lines.length || !(indentOf(lines[ahead]) >= inside || ITEM.test(lines[ahead].trimStart()))) break;
      if (indentOf(lines[ahead]) < indentOf(lines[at]) + 2) return ahead;
      next = ahead - 1;
      continue;
    }
    // two columns are enough for a list in a list: models indent so below "1."
    if (indentOf(line) >= inside || (indentOf(line) >= indentOf(lines[at]) + 2 && ITEM.test(line.trimStart()))) continue;
    if (!mayGoOn(lines[next - 1].trim()) || interrupts(lines, next, depth) || ITEM.test(line.trimStart())) break;
  }
  return next;
}

// Whether a paragraph's line without its indent may follow.
function mayGoOn(body) {
  return body !== "" && !isFence(body) && !HEADING.test(body) && !isRule(body);
}

function readItem(lines, width, depth) {
  const outer = indentOf(lines[0]);
  let first = lines[0].trimStart().slice(width).trimStart();
  const check = CHECK.exec(first);
  if (check !== null) first = first.slice(check[0].length);
  const nested = lines.slice(1).map((line) => dedent(line, Math.min(outer + width + 1, indentOf(line))));
  return { checked: check === null ? null : check[1] !== " ", blocks: blocksOf([first, ...nested], depth + 1) };
}

function cellsOf(line) {
  const cells = [""];
  const body = line.trim();
  for (let at = 0; at < body.length; at++) {
    if (body[at] === "\\" && body[at + 1] === "|") {
      cells.push(cells.pop() + "|");
      at += 1;
    } else if (body[at] === "|") {
      cells.push("");
    } else {
      cells.push(cells.pop() + body[at]);
    }
  }
  if (cells[0] === "") cells.shift();
  if (cells.length > 0 && cells.at(-1).trim() === "") cells.pop();
  return cells.map((cell) => cell.trim());
}

function isTable(lines, at) {
  const below = lines[at + 1];
  if (below === undefined || !lines[at].includes("|") || !below.includes("-") || !/^[ \t]*[|:-]/.test(below)) return false;
  const marks = cellsOf(below);
  if (marks.length === 0 || marks.length > MAX_COLUMNS || !marks.every((mark) => DELIMITER.test(mark))) return false;
  return cellsOf(lines[at]).length === marks.length;
}

function readTable(lines, at) {
  const align = cellsOf(lines[at + 1]).map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left",
  );
  let next = at + 2;
  const rows = [];
  for (; next < lines.length && lines[next].includes("|"); next++) {
    // a short row is not filled up: a few wide heads would make a small text a huge table
    rows.push(cellsOf(lines[next]).slice(0, align.length).map(parseInline));
  }
  return [{ kind: "table", align, head: cellsOf(lines[at]).map(parseInline), rows }, next];
}

function indentOf(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns += 1;
    else if (character === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

function dedent(line, columns) {
  let at = 0;
  let gone = 0;
  while (gone < columns && (line[at] === " " || line[at] === "\t")) {
    gone += line[at] === "\t" ? 4 - (gone % 4) : 1;
    at += 1;
  }
  return line.slice(at);
}
