import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";
import { WORDS } from "./words.js";

const holes = (text) => [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name).sort();

test("both languages have the same words with the same holes", () => {
  assert.deepEqual(Object.keys(WORDS.zh), Object.keys(WORDS.en));
  for (const [key, text] of Object.entries(WORDS.en)) assert.deepEqual(holes(WORDS.zh[key]), holes(text), key);
});

test("they are sorted", () => {
  for (const words of Object.values(WORDS)) assert.deepEqual(Object.keys(words), Object.keys(words).toSorted());
});

test("every key that is asked for is there, and every one that is there is asked for", () => {
  const sources = readdirSync(".").filter((name) => /\.js$/.test(name) && !/^words|test\.js$/.test(name));
  const text = sources.map((name) => readFileSync(name, "utf8")).join("\n");
  const quoted = new Set([...text.matchAll(/"([\w-]+)"/g)].map(([, key]) => key));
  const page = readFileSync("index.html", "utf8");
  const wanted = [...page.matchAll(/data-(?:text|label|placeholder)="([\w-]+)"/g)].map(([, key]) => key);
  wanted.push(...[...text.matchAll(/\bt\("([\w-]+)"/g)].map(([, key]) => key));
  for (const key of wanted) assert.ok(key in WORDS.en, key);
  const made = /^error-|-hint$/; // put together from parts
  const unused = Object.keys(WORDS.en).filter((key) => !quoted.has(key) && !wanted.includes(key) && !made.test(key));
  assert.deepEqual(unused, []);
});
