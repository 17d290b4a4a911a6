// The loss curve as SVG: training of each step, its running mean, validation; the learning rate below.

import { shape } from "./dom.js";
import { number, t } from "./i18n.js";

const SMOOTHING = 0.9; // share of the running mean that stays from one step to the next
const MAX_POINTS = 600; // of the faint line: more than that is the lowest and the highest of each part
const LEFT = 52;
const RIGHT = 12;
const LOSS = { top: 12, height: 220 };
const RATE = { top: 256, height: 56 };
const HEIGHT = 346;

// {train: [[step, loss]], mean: [[step, loss]], validation: [[step, loss]], rate: [[step, learning rate]]} in step order
export function seriesOf(metrics) {
  const pick = (field) =>
    metrics
      .filter((record) => Number.isFinite(record?.step) && Number.isFinite(record[field]))
      .map((record) => [record.step, record[field]])
      .sort(([one], [other]) => one - other);
  const train = pick("train_loss");
  return { train, mean: runningMean(train), validation: pick("val_loss"), rate: pick("learning_rate") };
}

// With the bias of its start taken out, as Adam does it.
export function runningMean(points) {
  let mean = 0;
  return points.map(([step, value], index) => {
    mean = SMOOTHING * mean + (1 - SMOOTHING) * value;
    return [step, mean / (1 - SMOOTHING ** (index + 1))];
  });
}

// About `count` round values that lie within the range.
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const values = [];
  for (let index = Math.ceil(low / step); index * step <= high + step * 1e-9; index++) values.push(index * step);
  return values;
}

// The picture of a width in pixels; point(step) moves the hair line and says what is there, point(null) takes it away.
export function drawChart(series, width) {
  const all = [...series.train, ...series.validation];
  const steps = all.map(([step]) => step);
  const x = scale(least(steps), most(steps), LEFT, width - RIGHT);
  const losses = all.map(([, loss]) => loss); // the running mean lies between them
  const low = least(losses);
  const high = most(losses);
  const pad = (high - low || Math.abs(high) || 1) * 0.05;
  const y = scale(low - pad, high + pad, LOSS.top + LOSS.height, LOSS.top);
  const svg = shape("svg", { class: "chart", width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  svg.append(
    ...rows(y, ticks(low - pad, high + pad, 5), width),
    ...columns(x, width),
    line("train", thinned(series.train), x, y),
    line("mean", series.mean, x, y),
    line("validation", series.validation, x, y),
    ...series.validation.map(([step, loss]) => shape("circle", { class: "validation", cx: x(step), cy: y(loss), r: 3 })),
  );
  if (series.rate.length > 0) {
    const top = most(series.rate.map(([, rate]) => rate)) || 1;
    const yRate = scale(0, top * 1.1, RATE.top + RATE.height, RATE.top);
    svg.append(...rows(yRate, [0, top], width, scientific), line("rate", series.rate, x, yRate));
  }
  const hair = shape("line", { class: "hair", y1: LOSS.top, y2: RATE.top + RATE.height, visibility: "hidden" });
  svg.append(hair);
  const point = (step) => {
    hair.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step === null) return;
    hair.setAttribute("x1", x(step));
    hair.setAttribute("x2", x(step));
  };
  return { svg, point, stepAt: (pixels) => nearest(steps, x.inverse(pixels)) };
}

// What the curves say at a step.
export function readAt(series, step) {
  const at = (points) => points.find(([other]) => other === step)?.[1];
  const facts = [t("chart-step", { n: number(step) })];
  const add = (key, value, digits) => value !== undefined && facts.push(t(key, { n: number(value, digits) }));
  add("chart-train", at(series.train), 3);
  add("chart-mean", at(series.mean), 3);
  add("chart-validation", at(series.validation), 3);
  const rate = at(series.rate);
  if (rate !== undefined) facts.push(t("chart-rate", { n: scientific(rate) }));
  return facts.join(" · ");
}

function scientific(value) {
  return value === 0 ? "0" : value.toExponential(1).replace(".0e", "e");
}

function scale(from, to, start, end) {
  const span = to - from || 1;
  const place = (value) => start + ((value - from) / span) * (end - start);
  place.inverse = (pixels) => from + ((pixels - start) / (end - start)) * span;
  place.range = [from, to];
  return place;
}

function line(name, points, x, y) {
  const text = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  return shape("polyline", { class: name, points: text });
}

function rows(y, values, width, say = (value) => number(value, decimals(values))) {
  return values.flatMap((value) => [
    shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
    shape("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, say(value)),
  ]);
}

function columns(x, width) {
  const whole = ticks(...x.range, width < 480 ? 4 : 8).filter(Number.isInteger);
  const labels = whole.map((step) =>
    shape("text", { x: x(step), y: RATE.top + RATE.height + 18, "text-anchor": "middle" }, number(step)),
  );
  const name = shape("text", { x: width - RIGHT, y: HEIGHT - 1, "text-anchor": "end", class: "name" }, t("chart-x"));
  const loss = shape("text", { x: LEFT, y: LOSS.top - 2, class: "name" }, t("chart-y"));
  const rate = shape("text", { x: LEFT, y: RATE.top - 6, class: "name" }, t("chart-y-rate"));
  return [...labels, name, loss, rate];
}

function decimals(values) {
  const step = values.length > 1 ? values[1] - values[0] : 1;
  return Math.max(0, Math.min(4, -Math.floor(Math.log10(step) + 1e-9)));
}

function thinned(points) {
  if (points.length <= MAX_POINTS) return points;
  const size = Math.ceil((points.length / MAX_POINTS) * 2);
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const part = points.slice(start, start + size).sort(([, one], [, other]) => one - other);
    kept.push(...[part[0], part.at(-1)].sort(([one], [other]) => one - other));
  }
  return kept;
}

// Math.min(...values) has a limit on how many there are.
function least(values) {
  return values.reduce((low, value) => Math.min(low, value), Infinity);
}

function most(values) {
  return values.reduce((high, value) => Math.max(high, value), -Infinity);
}

function nearest(steps, wanted) {
  return steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), steps[0]);
}
