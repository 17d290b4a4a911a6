import assert from "node:assert/strict";
import { test } from "node:test";
import { history } from "./chat.js";
import { MAX_CHARACTERS, MAX_CONVERSATIONS, Store, newAnswer, newConversation, readConversation } from "./store.js";

class Shelf {
  #texts = new Map();
  room = Infinity;
  get = (name) => this.#texts.get(name) ?? null;
  names = () => [...this.#texts.keys()];
  remove = (name) => this.#texts.delete(name);
  set(name, text) {
    const others = [...this.#texts].filter(([other]) => other !== name).reduce((sum, [, { length }]) => sum + length, 0);
    if (others + text.length > this.room) throw Object.assign(new Error("full"), { name: "QuotaExceededError" });
    this.#texts.set(name, text);
  }
}

const make = (updated, size = 10) => ({
  ...newConversation(),
  updated,
  turns: [{ prompt: "x".repeat(size), answers: [{ ...newAnswer("m"), state: "done" }] }],
});

test("kept, listed with the newest first, removed", () => {
  const store = new Store(new Shelf());
  const [old, young] = [make(1), make(2)];
  store.save(young);
  store.save(old);
  assert.deepEqual(store.list(), [young, old]);
  assert.deepEqual(store.get(old.id), old);
  store.remove(old.id);
  assert.equal(store.get(old.id), null);
  store.clear();
  assert.deepEqual(store.list(), []);
});

test("the oldest leave: too many", () => {
  const store = new Store(new Shelf());
  for (let index = 0; index < MAX_CONVERSATIONS; index++) assert.equal(store.save(make(index)), 0);
  assert.equal(store.save(make(1000)), 1);
  assert.equal(store.list().length, MAX_CONVERSATIONS);
  assert.equal(store.list().at(-1).updated, 1);
});

test("the oldest leave: too large", () => {
  const store = new Store(new Shelf());
  for (let index = 0; index < 4; index++) store.save(make(index, MAX_CHARACTERS / 4 - 1000));
  assert.equal(store.save(make(9, MAX_CHARACTERS / 2)), 2);
  assert.throws(() => store.save(make(10, MAX_CHARACTERS)), RangeError);
  assert.equal(store.list()[0].updated, 9); // nothing left for one that cannot be kept
});

test("the oldest leave: the browser is full", () => {
  const shelf = new Shelf();
  const store = new Store(shelf);
  for (let index = 0; index < 4; index++) store.save(make(index, 1000));
  shelf.room = 4500;
  assert.equal(store.save(make(9, 1000)), 2);
  assert.throws(() => store.save(make(10, 9000)), { name: "QuotaExceededError" });
});

test("another tab's entry of the same conversation is written over, not doubled", () => {
  const store = new Store(new Shelf());
  const one = make(1);
  store.save(one);
  store.save({ ...one, updated: 2 });
  assert.equal(store.list().length, 1);
});

test("only known fields of the right kinds are read", () => {
  const good = JSON.parse(JSON.stringify(make(1)));
  assert.deepEqual(readConversation({ ...good, extra: 1, __proto__: { bad: 1 } }), good);
  const answer = { ...newAnswer("m"), text: "t", seconds: -1, promptTokens: "7", error: { kind: "busy", detail: 7 }, finish: 7 };
  const [turn] = readConversation({ ...good, turns: [{ prompt: "p", answers: [answer] }] }).turns;
  assert.deepEqual(turn.answers[0], {
    ...newAnswer("m"), text: "t", state: "stopped", error: { kind: "busy", detail: "", retryAfter: null },
  });
  for (const bad of [
    null, 7, [], {}, { ...good, id: "x" }, { ...good, id: "../../../../../../../x" }, { ...good, title: null }, { ...good, turns: {} },
    { ...good, turns: [null] }, { ...good, turns: [{ prompt: "p", answers: [] }] }, { ...good, updated: NaN },
    { ...good, turns: [{ prompt: "p", answers: [{ ...answer, state: "odd" }] }] },
    { ...good, turns: [{ prompt: "p", answers: [answer, answer, answer] }] },
  ]) {
    assert.equal(readConversation(bad), null, JSON.stringify(bad));
  }
});

test("exported, imported", () => {
  const store = new Store(new Shelf());
  const conversation = make(5);
  store.save(conversation);
  const other = new Store(new Shelf());
  assert.equal(other.import(store.export()), 1);
  assert.deepEqual(other.list(), [conversation]);
  other.save({ ...conversation, updated: 9, title: "newer" });
  assert.equal(other.import(store.export()), 0);
  assert.equal(other.get(conversation.id).title, "newer");
});

test("a turn without a text is left out of what was said", () => {
  const turns = [
    { prompt: "a", answers: [{ text: "A" }, { text: "B" }] },
    { prompt: "b", answers: [{ text: "" }, { text: "C" }] },
    { prompt: "c", answers: [{ text: "D" }] },
  ];
  const said = (column, system = "") => history(turns, column, system).map(({ content }) => content);
  assert.deepEqual(said(0), ["a", "A", "c", "D"]);
  assert.deepEqual(said(1, "S"), ["S", "a", "B", "b", "C", "c", "D"]);
});
