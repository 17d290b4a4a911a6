import assert from "node:assert/strict";
import { test } from "node:test";
import { parseInline, webAddress } from "./inline.js";
import { GrowingText, parse } from "./markdown.js";

const kinds = (text) => parse(text).map(({ kind }) => kind);
const plain = (nodes) =>
  nodes.map((node) => (typeof node === "string" ? node : node.kind === "break" ? "\n" : (node.text ?? plain(node.children)))).join("");
const outline = (nodes) =>
  nodes
    .map((node) => {
      if (typeof node === "string") return node;
      if (node.kind === "break") return "<br>";
      return `<${node.kind}${node.url ? ` ${node.url}` : ""}>${node.text ?? outline(node.children)}</>`;
    })
    .join("");

const INLINE = [
  ["plain", "plain"],
  ["*a* **b** ***c***", "<emphasis>a</> <strong>b</> <strong><emphasis>c</></>"],
  ["_a_ __b__ ~~c~~", "<emphasis>a</> <strong>b</> <strike>c</>"],
  ["2 * 3 * 4", "2 * 3 * 4"],
  ["snake_case_name and a_b", "snake_case_name and a_b"],
  ["**open and *more", "**open and *more"],
  ["**a *b** c*", "<strong>a *b</> c*"],
  ["中文**重点。**后面", "中文<strong>重点。</>后面"],
  ["**bold *both* bold**", "<strong>bold <emphasis>both</> bold</>"],
  ["****", "****"],
  ["~a~", "~a~"],
  ["\\*a\\* \\q", "*a* \\q"],
  ["`a *b*` ``c ` d``", "<code>a *b*</> <code>c ` d</>"],
  ["`open *a*", "`open <emphasis>a</>"],
  ["` `` `", "<code>``</>"],
  ["[a](https://x.test/y)", "<link https://x.test/y>a</>"],
  ['[a](https://x.test/y "title")', "<link https://x.test/y>a</>"],
  ["[a](<https://x.test/y>)", "<link https://x.test/y>a</>"],
  ["[*a*](https://x.test/(y))", "<link https://x.test/(y)><emphasis>a</></>"],
  ["![a](https://x.test/y.png)", "<link https://x.test/y.png>a</>"],
  ["[](https://x.test/)", "<link https://x.test/>https://x.test/</>"],
  ["[a](javascript:alert)", "[a](javascript:alert)"],
  ["[a](data:text/html,x)", "[a](data:text/html,x)"],
  ["[a](//x.test)", "[a](//x.test)"],
  ["[a](/x)", "[a](/x)"],
  ["[a](https://x.test", "[a](<link https://x.test/>https://x.test</>"],
  ["see https://x.test/a_b_c.", "see <link https://x.test/a_b_c>https://x.test/a_b_c</>."],
  ["(https://x.test/a(b))", "(<link https://x.test/a(b)>https://x.test/a(b)</>)"],
  ["**https://x.test**", "<strong><link https://x.test/>https://x.test</></>"],
  ["见https://x.test/路。好", "见<link https://x.test/>https://x.test/</>路。好"],
  ["xhttps://x.test", "xhttps://x.test"],
  ["<https://x.test>", "<link https://x.test/>https://x.test</>"],
  ["<javascript:x> <b>", "<javascript:x> <b>"],
  ["a<br>b<br/>c", "a<br>b<br>c"],
  ["&lt;b&gt; &amp;amp; &#65;&#x42; &#0; &#xd800; &#1114112; &nope;", "<b> &amp; AB \ufffd \ufffd \ufffd &nope;"],
];
for (const [text, wanted] of INLINE) {
  test(`inline: ${text}`, () => assert.equal(outline(parseInline(text)), wanted));
}

test("only web addresses are links", () => {
  for (const text of ["javascript:x", " javascript:x", "java\nscript:x", "data:,x", "file:///x", "x", "//x", "blob:https://x"]) {
    assert.equal(webAddress(text), null, text);
  }
  assert.equal(webAddress("HTTPS://X.test"), "https://x.test/");
});

test("blocks", () => {
  assert.deepEqual(kinds("# a\n\nb\nc\n\n---\n> q\n\n- l\n\n1. o\n\n|a|b|\n|-|-|\n|1|2|\n```\ncode\n```\n"), [
    "heading", "paragraph", "rule", "quote", "list", "list", "table", "code",
  ]);
});

test("headings lose their closing marks", () => {
  const text = (source) => plain(parse(source)[0].inline);
  assert.equal(text("## a ##"), "a");
  assert.equal(text("# C#"), "C#");
  assert.equal(text("#"), "");
  assert.deepEqual(kinds("#hashtag"), ["paragraph"]);
});

test("a fence ends with its like, and may be left open", () => {
  assert.equal(parse("````md\n```\nx\n```\n````\n")[0].text, "```\nx\n```");
  assert.equal(parse("```py extra\nx = 1\n\ny")[0].text, "x = 1\n\ny");
  assert.equal(parse("```py extra\n")[0].language, "py");
  assert.deepEqual(kinds("``` a ` b"), ["paragraph"]);
  assert.equal(parse("  ```\n    x\n  ```\nafter")[0].text, "  x");
});

test("lists in lists, also with too little room before them", () => {
  for (const text of ["1. a\n   - b\n   - c\n2. d", "1. a\n  - b\n  - c\n2. d", "1. a\n\n   - b\n   - c\n\n2. d"]) {
    const [list] = parse(text);
    assert.equal(list.items.length, 2, text);
    assert.equal(list.items[0].blocks[1].items.length, 2, text);
  }
  assert.equal(parse("3. a\n4. b")[0].first, 3);
  assert.deepEqual(parse("- [x] a\n- [ ] b\n- c")[0].items.map(({ checked }) => checked), [true, false, null]);
});

test("an item keeps its further paragraphs and code", () => {
  const [list, ...rest] = parse("- a\n  more\n\n  second\n\n  ```\n  code\n  ```\nlazy? no\n");
  assert.deepEqual(list.items[0].blocks.map(({ kind }) => kind), ["paragraph", "paragraph", "code"]);
  assert.deepEqual(rest.map(({ kind }) => kind), ["paragraph"]);
});

test("a number in a paragraph begins no list by itself", () => {
  assert.deepEqual(kinds("In the year\n1984.\nit was"), ["paragraph"]);
});

test("tables", () => {
  const [table] = parse("| a | b |\n|:-:|--:|\n| 1 \\| 2 | 3 | 4 |\n| 5 |\nafter");
  assert.deepEqual(table.align, ["center", "right"]);
  assert.deepEqual(table.rows.map((row) => row.map(plain)), [["1 | 2", "3"], ["5"]]);
  assert.deepEqual(kinds("a | b\n--|--\n1 | 2"), ["table"]);
  assert.deepEqual(kinds("a | b\n---"), ["paragraph", "rule"]);
});

test("nothing is lost of what is not Markdown", () => {
  for (const text of ["<div>\n<b>x</b>", "a < b > c", "a\\", "[", "![", "](", "|", "&", "~", "\u0000\u202e"]) {
    assert.equal(parse(text).map((block) => plain(block.inline)).join("\n"), text);
  }
});

// a small generator of texts that are full of marks
function* texts(count) {
  let state = 7;
  const draw = (n) => ((state = (state * 1103515245 + 12345) % 2147483648) >> 8) % n;
  const parts = [
    "a", "word ", "\n", "\n", "\n\n", "- ", "1. ", "  ", "    ", "> ", "# ", "**", "*", "_", "`", "```", "```py\n", "|", "|-|-|\n",
    "---", "[x](https://y.test)", "https://z.test ", "\\", "&amp;", "- [ ] ", "~~", "\r\n", "中文", "<b>",
  ];
  for (let index = 0; index < count; index++) {
    yield Array.from({ length: 1 + draw(40) }, () => parts[draw(parts.length)]).join("");
  }
}

test("a text that grows ends as the whole text", () => {
  let seed = 1;
  const draw = (n) => ((seed = (seed * 1103515245 + 12345) % 2147483648) >> 8) % n;
  const strip = ({ start, line, ...block }) => block;
  for (const text of texts(1000)) {
    const growing = new GrowingText();
    const shown = [];
    for (let at = 0; at < text.length; ) {
      const size = 1 + draw(6);
      const { from, blocks } = growing.grow(text.slice(at, at + size));
      shown.splice(from, Infinity, ...blocks);
      at += size;
    }
    assert.deepEqual(shown.map(strip), parse(text).map(strip), JSON.stringify(text));
  }
});

// texts that make a careless reader go over the rest again at each mark
const hostile = (n) => [
  "*a ".repeat(n), "**".repeat(n), "_a_".repeat(n), "[".repeat(n), "[a](".repeat(n), "`".repeat(n), "` `` ".repeat(n), "<".repeat(n),
  "&#".repeat(n), "https://".repeat(n), "> ".repeat(n), "- ".repeat(n), "- a\n".repeat(n), "  - a\n".repeat(n), "```\n".repeat(n),
  `#${" ".repeat(n)}x`, "#".repeat(n) + "x", "|".repeat(n) + "\n" + "-|".repeat(n), "\n".repeat(n), `- a${"\n".repeat(n)}b`,
  "-".repeat(n) + "x", `\`\`\`${" ".repeat(n)}\``, "![](".repeat(n), "1. ".repeat(n), "\\".repeat(n), "a\n> ".repeat(n),
  "|a|\n".repeat(n), "-|\n".repeat(n), "~~a".repeat(n), "(https://a.test/(".repeat(n / 10), "[a](https://a.test/(".repeat(n / 10),
];
// of the processor, not of the clock: other programs run beside this one
function milliseconds(work) {
  const before = process.cpuUsage();
  work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1000;
}

test("four times the text takes about four times the work", () => {
  const large = hostile(48_000);
  for (const [index, text] of hostile(12_000).entries()) {
    const one = Math.min(...[1, 2].map(() => milliseconds(() => parse(text))));
    const four = milliseconds(() => parse(large[index]));
    assert.ok(four < 500 || four < 10 * one, `${JSON.stringify(text.slice(0, 20))}: ${one} ms, then ${four} ms`);
  }
});
