// The training report of an adapter: its loss curve and its figures.

import { errorWords } from "./answer.js";
import { ApiError } from "./api.js";
import { drawChart, readAt, seriesOf } from "./chart.js";
import { make } from "./dom.js";
import { number, t } from "./i18n.js";

export class Report {
  #series = null;
  #summary = {};
  #problem = null;
  #name = "";
  #step = null;
  #request = 0;
  #width = 0; // that the curve was drawn for

  // elements: {dialog, title, body}
  constructor(elements, client) {
    this.elements = elements;
    this.client = client;
    // a wider or narrower window gets a new picture, so that its writing keeps its size
    const body = elements.body;
    new ResizeObserver(() => this.#series !== null && body.clientWidth !== this.#width && this.draw()).observe(body);
  }

  async open(adapter) {
    const request = ++this.#request;
    this.#name = adapter;
    this.#series = this.#problem = this.#step = null;
    this.draw();
    this.elements.dialog.showModal();
    try {
      const { metrics, summary } = await this.client.report(adapter);
      if (request !== this.#request) return; // another one was opened meanwhile
      this.#series = seriesOf(metrics);
      this.#summary = summary;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (request !== this.#request) return;
      this.#problem = error.kind === "missing" ? t("no-report") : errorWords(error);
    }
    this.draw();
  }

  draw() {
    const { title, body } = this.elements;
    title.textContent = t("report-of", { adapter: this.#name });
    if (this.#problem !== null) body.replaceChildren(make("p", { class: "notice", "data-level": "error" }, this.#problem));
    else if (this.#series === null) body.replaceChildren(make("p", { class: "hint" }, t("loading")));
    else body.replaceChildren(...this.#picture(), ...this.#figures());
  }

  #picture() {
    const series = this.#series;
    const steps = [...new Set([...series.train, ...series.validation].map(([step]) => step))].sort((one, other) => one - other);
    if (steps.length === 0) return [make("p", { class: "hint" }, t("no-curve"))];
    this.#width = this.elements.body.clientWidth;
    const { svg, point, stepAt } = drawChart(series, Math.max(260, this.#width));
    svg.setAttribute("aria-label", altText(series));
    const said = make("p", { class: "chart-said", "aria-live": "polite" }, t("chart-hint"));
    const say = (step) => {
      this.#step = step;
      point(step);
      said.textContent = step === null ? t("chart-hint") : readAt(series, step);
    };
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", (event) => say(stepAt(event.clientX - svg.getBoundingClientRect().left)));
    svg.addEventListener("pointerleave", () => say(null));
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const from = this.#step === null ? -1 : steps.indexOf(this.#step);
      say(steps[Math.min(Math.max(from + moves[event.key], 0), steps.length - 1)]);
    });
    if (this.#step !== null) say(this.#step);
    const entry = (name, words) => make("li", { class: name }, words);
    const legend = [entry("train", t("legend-train")), entry("mean", t("legend-mean"))];
    if (series.validation.length > 0) legend.push(entry("validation", t("legend-validation")));
    return [make("ul", { class: "legend" }, ...legend), svg, said];
  }

  #figures() {
    const entries = Object.entries(this.#summary).filter(([, value]) => value !== null);
    const terms = entries.map(([name, value]) =>
      make("div", {}, make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, valueText(value))),
    );
    return terms.length === 0 ? [] : [make("h3", {}, t("figures")), make("dl", { class: "figures" }, ...terms)];
  }
}

function altText({ mean, validation }) {
  if (mean.length === 0) return t("chart-alt-validation", { last: number(validation.at(-1)[1], 3) });
  const values = { first: number(mean[0][1], 3), last: number(mean.at(-1)[1], 3), steps: number(mean.at(-1)[0]) };
  return t("chart-alt", values);
}

function valueText(value) {
  if (typeof value === "number") {
    if (Number.isInteger(value)) return number(value);
    return Math.abs(value) >= 0.001 ? number(value, Math.abs(value) < 100 ? 4 : 1) : value.toExponential(2);
  }
  return typeof value === "string" ? value : JSON.stringify(value);
}
