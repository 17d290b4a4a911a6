import assert from "node:assert/strict";
import { test } from "node:test";
import { runningMean, seriesOf, ticks } from "./chart.js";

test("ticks are round and within the range", () => {
  assert.deepEqual(ticks(0, 10, 5), [0, 2, 4, 6, 8, 10]);
  assert.deepEqual(ticks(1, 120, 8), [20, 40, 60, 80, 100, 120]);
  assert.deepEqual(ticks(3, 3, 5), [3]);
  for (const value of ticks(0.93, 2.81, 5)) assert.ok(value >= 0.93 && value <= 2.81);
});

test("the running mean begins at the first value and follows a constant", () => {
  const mean = runningMean([[1, 3], [2, 3], [3, 3]]);
  for (const [, value] of mean) assert.ok(Math.abs(value - 3) < 1e-12);
  const [, second] = runningMean([[1, 1], [2, 2]]);
  assert.ok(Math.abs(second[1] - (0.9 * 0.1 * 1 + 0.1 * 2) / (1 - 0.81)) < 1e-12);
});

test("records of every kind are sorted into their curves", () => {
  const series = seriesOf([
    { step: 2, train_loss: 1, learning_rate: 0.1 }, { step: 1, train_loss: 2, learning_rate: 0.2 }, { step: 2, val_loss: 3 }, null, 7,
    { step: "3", train_loss: 1 }, { step: 4, train_loss: null },
  ]);
  assert.deepEqual(series.train, [[1, 2], [2, 1]]);
  assert.deepEqual(series.validation, [[2, 3]]);
  assert.deepEqual(series.rate, [[1, 0.2], [2, 0.1]]);
});
