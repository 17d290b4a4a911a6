import assert from "node:assert/strict";
import { test } from "node:test";
import { EventParser } from "./sse.js";

const read = (...pieces) => {
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(piece));
};

const STREAM = "\n: ping\ndata: one\n\ndata:two\ndata: more\n\nevent: x\nid: 7\ndata:  three\n\ndata\n\nretry: 5\n\ndata: open";
const EVENTS = ["one", "two\nmore", " three", ""];

test("events", () => assert.deepEqual(read(STREAM), EVENTS));

test("every kind of line end", () => {
  for (const end of ["\r\n", "\r"]) assert.deepEqual(read(STREAM.replaceAll("\n", end) + end + end), [...EVENTS, "open"]);
});

test("pieces may be cut anywhere", () => {
  for (const end of ["\n", "\r\n", "\r"]) {
    const stream = `${STREAM}\n\n`.replaceAll("\n", end);
    for (let size = 1; size < 12; size++) {
      const pieces = stream.match(new RegExp(`[^]{1,${size}}`, "g"));
      assert.deepEqual(read(...pieces), [...EVENTS, "open"], `${JSON.stringify(end)} ${size}`);
      assert.deepEqual(read(...pieces.flatMap((piece) => [piece, ""])), [...EVENTS, "open"], "empty pieces between");
    }
  }
});

test("an event without an end does not fill the memory", () => {
  const fill = (piece) => {
    const parser = new EventParser();
    for (let index = 0; index < 300; index++) parser.push(piece);
  };
  assert.throws(() => fill("x".repeat(10_000)), RangeError);
  assert.throws(() => fill(`data: ${"x".repeat(10_000)}\n`), RangeError);
  fill(`data: ${"x".repeat(10_000)}\n\n`);
});
