// The curves, drawn by uPlot, and the page's filters. Text is only ever put into text nodes.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

// A new element; `options` are its properties, `children` texts or elements.
function make(tag, options, ...children) {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...children);
  return element;
}

(() => {
  const host = document.getElementById("charts");
  if (!host) return;

  // Title, unit, and its curves: name, label, colour; the first is what runs are compared by.
  const CHARTS = [
    { title: "Reward", unit: "reward", base: "val:reward_mean", spread: "train:reward_std", curves: [
      ["train:reward_mean", "training, mean", 1], ["val:reward_mean", "validation, mean", 0]] },
    { title: "Accuracy", unit: "part of the episodes", base: "val:accuracy", curves: [
      ["val:accuracy", "validation", 0], ["train:accuracy", "training", 1]] },
    { title: "Loss", unit: "loss", curves: [["train:loss", "loss", 0]] },
    { title: "KL", unit: "nats", curves: [["train:approx_kl", "of the update", 0],
      ["train:gen_kl_error", "engine and trainer", 1], ["train:kl_penalty", "from the reference", 2]] },
    { title: "Entropy", unit: "nats", curves: [["train:entropy", "of the next token", 0]] },
    { title: "Lengths", unit: "tokens", curves: [["train:completion_tokens_mean", "completion, mean", 0],
      ["train:completion_tokens_max", "completion, longest", 1], ["train:prompt_tokens_mean", "prompt, mean", 2]] },
    { title: "Speed per GPU", unit: "tokens/s", zero: true, curves: [["perf:tokens_per_sec_per_gpu", "whole step", 0],
      ["perf:generation_tokens_per_sec_per_gpu", "generation", 1],
      ["perf:policy_training_tokens_per_sec_per_gpu", "update", 2]] },
    { title: "Time per step", unit: "seconds", zero: true, stacked: true, curves: [["time:step", "whole step", 0]] },
    { title: "Gradient", unit: "norm", zero: true, curves: [["train:grad_norm", "before it is scaled down", 0]] },
    { title: "Clipped", unit: "part of the tokens", zero: true, curves: [["train:clip_fraction", "all", 0],
      ["train:clip_fraction_low", "at the lower bound", 1], ["train:clip_fraction_high", "at the upper bound", 2]] },
    { title: "Idle", unit: "part of the step", zero: true, curves: [["perf:trainer_idle", "policy's ranks", 0],
      ["perf:engines_idle", "engines", 1]] },
    { title: "Any figure", unit: "", pick: true, curves: [] },
  ];
  const single = DATA.runs.length === 1;
  const figures = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.columns)))].filter((name) => name !== "step");
  const shown = [];
  let smooth = false;
  let following = false;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const has = (name) => figures.includes(name);

  function format(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 10000) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 0.001) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  // A running mean: each value counts 0.9 times as much as the next.
  function smoothed(values) {
    let mean = null;
    return values.map((value) => {
      if (value === null) return null;
      mean = mean === null ? value : 0.9 * mean + 0.1 * value;
      return mean;
    });
  }

  // The series of a chart over its steps: label, values to tell, values to draw, and how.
  function seriesOf(chart) {
    const steps = [...new Set(DATA.runs.flatMap((run) => run.columns.step || []))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, index) => [step, index]));
    const column = (run, name) => {
      const values = new Array(steps.length).fill(null);
      (run.columns[name] || []).forEach((value, index) => { values[place.get(run.columns.step[index])] = value; });
      return values;
    };
    const ease = (name, values) => (smooth && !name.startsWith("val:") ? smoothed(values) : values);
    const list = [];
    if (!single) {
      const name = chart.curves.length ? chart.curves[0][0] : "";
      DATA.runs.forEach((run, index) => {
        const values = column(run, name);
        if (values.some((value) => value !== null)) list.push({ label: run.name, tint: `--c${index % 7}`, values, draw: ease(name, values), dash: index >= 7 });
      });
      return { steps, list };
    }
    const [run] = DATA.runs;
    if (chart.stacked) {
      const sums = new Array(steps.length).fill(0);
      const whole = column(run, "time:step");
      DATA.phases.forEach((phase, index) => {
        const values = column(run, `time:${phase}`);
        if (!values.some((value) => value > 0)) return;
        const draw = values.map((value, at) => (whole[at] === null ? null : (sums[at] += Math.max(0, value || 0))));
        list.push({ label: phase, tint: `--c${index}`, values, draw, area: true });
      });
      return { steps, list };
    }
    for (const [name, label, tint] of chart.curves) {
      if (!has(name)) continue;
      const values = column(run, name);
      list.push({ label, tint: `--c${tint}`, values, draw: ease(name, values), dots: name.startsWith("val:") });
    }
    if (chart.spread && has(chart.spread)) {
      const mean = column(run, "train:reward_mean"), spread = column(run, chart.spread);
      const edge = (sign) => ease("", mean.map((value, at) => (value === null || spread[at] === null ? null : value + sign * spread[at])));
      list.push({ label: "± standard deviation", tint: "--c1", values: spread, draw: edge(1), edge: true });
      list.push({ label: "", tint: "--c1", values: spread, draw: edge(-1), edge: true });
    }
    if (chart.base && has(chart.base)) {
      const first = column(run, chart.base)[place.get(0)];
      if (first !== null && first !== undefined) {
        const values = steps.map(() => first);
        list.push({ label: "before training", tint: "--soft", values, draw: values, dash: true, flat: true });
      }
    }
    return { steps, list };
  }

  function bandsOf(list) {
    const bands = [];
    list.forEach((each, index) => {
      if (each.area && index > 0) bands.push({ series: [index + 1, index], fill: colour(each.tint) });
    });
    const upper = list.findIndex((each) => each.edge);
    if (upper >= 0) bands.push({ series: [upper + 1, upper + 2], fill: `${colour("--c1")}2e` });
    return bands;
  }

  function draw(card) {
    const { chart, plot, chips } = card;
    const { steps, list } = seriesOf(chart);
    if (card.uplot) card.uplot.destroy();
    card.list = list;
    card.steps = steps;
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const options = {
      width: Math.max(200, plot.clientWidth),
      height: 210,
      legend: { show: false },
      cursor: { sync: { key: "step" }, y: false, points: { size: 7 }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { range: (_, low, high) => range(low, high, chart.zero) } },
      axes: [
        { ...axis, size: 30, space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000], values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en")) },
        { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (Math.abs(tick) < 1000 ? String(Number(tick.toPrecision(3))) : format(tick))) },
      ],
      bands: bandsOf(list),
      series: [{}, ...list.map((each, index) => ({
        label: each.label,
        stroke: each.edge ? "transparent" : colour(each.tint),
        width: each.area ? 0 : each.flat ? 1 : 1.6,
        dash: each.dash ? [5, 4] : undefined,
        fill: each.area && index === 0 ? colour(each.tint) : undefined,
        spanGaps: true,
        points: { show: each.edge || each.flat || each.area ? false : each.dots || undefined, size: 5, fill: colour(each.tint) },
      }))],
      hooks: {
        setCursor: [(self) => tell(card, self.cursor.idx)],
        setScale: [(self, key) => {
          if (key !== "x") return;
          plot.dataset.steps = `${self.scales.x.min} ${self.scales.x.max}`;
          follow(card, self.scales.x.min, self.scales.x.max);
        }],
      },
    };
    card.uplot = new uPlot(options, [steps, ...list.map((each) => each.draw)], plot);
    chips.replaceChildren();
    list.forEach((each, index) => {
      if (!each.label) return;
      const value = make("b", {});
      const swatch = make("i", { className: "swatch" });
      swatch.style.background = colour(each.tint);
      const chip = make("button", { type: "button", className: "chip" }, swatch, `${each.label} `, value);
      chip.setAttribute("aria-pressed", "true");
      chip.addEventListener("click", () => {
        const show = chip.getAttribute("aria-pressed") !== "true";
        chip.setAttribute("aria-pressed", String(show));
        card.uplot.setSeries(index + 1, { show });
        if (each.edge) card.uplot.setSeries(index + 2, { show });
      });
      each.value = value;
      chips.append(chip);
    });
    tell(card, null);
  }

  function range(low, high, zero) {
    if (low === null || high === null) return [0, 1];
    if (zero) return [0, high > 0 ? high * 1.08 : 1];
    const room = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  }

  // The values at a place, and those that were last known where the pointer is away.
  function tell(card, index) {
    const at = index === null || index === undefined ? null : index;
    for (const each of card.list) {
      if (!each.value) continue;
      const known = at === null ? each.values.filter((value) => value !== null).at(-1) : each.values[at];
      each.value.textContent = format(known);
    }
    card.where.textContent = at === null ? card.chart.unit : `step ${card.steps[at].toLocaleString("en")} · ${card.chart.unit}`;
  }

  // Zooming one chart zooms all of them.
  function follow(from, min, max) {
    if (following || min === null || min === undefined || max === null || max === undefined) return;
    following = true;
    for (const card of shown) if (card !== from && card.uplot) card.uplot.setScale("x", { min, max });
    following = false;
    const steps = from.steps;
    const whole = min <= steps[0] && max >= steps.at(-1);
    document.querySelectorAll("[data-part]").forEach((button) => {
      const start = startOf(steps, Number(button.dataset.part));
      const pressed = button.dataset.part === "1" ? whole : !whole && min === start && max === steps.at(-1);
      button.setAttribute("aria-pressed", String(pressed));
    });
  }

  function startOf(steps, part) {
    return steps.at(-1) - Math.max(1, Math.round((steps.at(-1) - steps[0]) * part));
  }

  function addCard(chart) {
    if (!single && chart.curves.length && chart.curves[0][1] !== chart.unit) chart.unit = `${chart.curves[0][1]} · ${chart.unit}`;
    const where = make("small", {}, chart.unit);
    const title = make("h3", {}, chart.title, where);
    const chips = make("div", { className: "chips" });
    const plot = make("div", { className: "plot" });
    const card = { chart, where, chips, plot };
    if (chart.pick) {
      const pick = make("select", { id: "pick" }, ...figures.map((name) => make("option", { value: name }, name)));
      pick.setAttribute("aria-label", "Figure");
      pick.value = has("train:token_mult_prob_error") ? "train:token_mult_prob_error" : figures[0];
      const take = () => { chart.curves = [[pick.value, pick.value, 3]]; };
      take();
      pick.addEventListener("change", () => { take(); keep(() => draw(card)); });
      title.replaceChildren(pick, where);
    } else if (!chart.curves.some(([name]) => has(name))) {
      return;
    }
    host.append(make("article", { className: "card" }, title, chips, plot));
    shown.push(card);
  }

  // Draw again at the same zoom.
  function keep(redraw) {
    const { min, max } = shown[0].uplot.scales.x;
    redraw();
    for (const card of shown) card.uplot.setScale("x", { min, max });
  }

  CHARTS.forEach(addCard);
  shown.forEach(draw);
  new ResizeObserver(() => {
    for (const card of shown) {
      const width = Math.max(200, card.plot.clientWidth);
      if (card.uplot.width !== width) card.uplot.setSize({ width, height: 210 });
    }
  }).observe(host);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => keep(() => shown.forEach(draw)));
  document.getElementById("smooth").addEventListener("change", (event) => {
    smooth = event.target.checked;
    keep(() => shown.forEach(draw));
  });
  document.querySelectorAll("[data-part]").forEach((button) => button.addEventListener("click", () => {
    const { steps, uplot } = shown[0];
    const part = Number(button.dataset.part);
    uplot.setScale("x", { min: part === 1 ? steps[0] : startOf(steps, part), max: steps.at(-1) });
  }));
  document.querySelectorAll("[data-run]").forEach((swatch) => {
    swatch.style.background = `var(--c${Number(swatch.dataset.run) % 7})`;
  });
})();

(() => {
  const table = document.getElementById("values");
  if (!table) return;
  const defaults = document.getElementById("defaults"), find = document.getElementById("find");
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    for (const [row, text] of rows) {
      row.hidden = wanted ? !text.includes(wanted) : row.classList.contains("default") && !defaults.checked;
    }
  };
  defaults.addEventListener("change", filter);
  find.addEventListener("input", filter);
  filter();
})();
