// The conversations, token by token. What a model wrote is only ever put into text nodes.
(() => {
  const host = document.getElementById("episodes");
  if (!host) return;
  const choose = document.getElementById("step"), tip = document.getElementById("tip"), legend = document.getElementById("legend");
  // Tokens that are shown at once; more of them on request.
  const AT_ONCE = 4000;
  const facts = new WeakMap();
  let shade = "advantage";
  let most = 1;

  const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  // What would not be seen, or would turn the text around, by its name.
  function visible(text) {
    return text
      .replace(/[\u0000-\u0008\u000b-\u001f]/g, (each) => String.fromCharCode(0x2400 + each.charCodeAt(0)))
      .replace(/[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g, (each) => `⟨U+${each.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  }

  function tint(fact) {
    if (!fact.mask) return "";
    if (shade === "mask") return mix("--c2", 0.3);
    if (shade === "logprob") return mix("--c3", Math.min(1, -fact.logprob / 4) * 0.75);
    return mix(fact.advantage >= 0 ? "--c0" : "--c1", (Math.abs(fact.advantage) / most) * 0.6);
  }

  const mix = (name, part) => `color-mix(in srgb, var(${name}) ${(100 * part).toFixed(1)}%, transparent)`;

  function paint(span) {
    span.style.backgroundColor = tint(facts.get(span));
  }

  function tokenOf(sample, at) {
    const text = sample.tokens[at];
    const span = make("span", { className: sample.mask[at] ? "sampled" : "given" }, visible(text));
    if (text === "") span.append(make("i", { className: "mark" }, "·"));
    else if (text.includes("\n")) span.prepend(make("i", { className: "mark" }, "↵"));
    facts.set(span, { place: at, text, mask: sample.mask[at], logprob: sample.logprobs[at], advantage: sample.advantages[at] });
    paint(span);
    return span;
  }

  function textOf(sample) {
    const body = make("div", { className: "tokens" });
    const parts = [body];
    let from = 0;
    const more = make("button", { type: "button", className: "more" });
    const extend = () => {
      const until = Math.min(sample.tokens.length, from + AT_ONCE);
      const list = document.createDocumentFragment();
      for (; from < until; from += 1) list.append(tokenOf(sample, from));
      body.append(list);
      more.hidden = from >= sample.tokens.length;
      more.textContent = `show more of the ${sample.tokens.length.toLocaleString("en")} tokens`;
    };
    more.addEventListener("click", extend);
    extend();
    parts.push(more);
    return parts;
  }

  function episodeOf(episode) {
    const count = (name) => episode.samples.reduce((sum, sample) => sum + name(sample), 0);
    const trained = count((sample) => sample.mask.reduce((sum, each) => sum + each, 0));
    const all = count((sample) => sample.tokens.length);
    const total = count((sample) => sample.logprobs.reduce((sum, each) => sum + (each || 0), 0));
    const highest = Math.max(...episode.samples.flatMap((sample) => sample.advantages.filter((_, at) => sample.mask[at]).slice(0, 1)), -Infinity);
    const summary = make("summary", {},
      make("span", { className: "reward" }, `reward ${number(episode.reward, 2)}`),
      make("b", {}, visible(String(episode.task))),
      make("span", {}, episode.correct ? "✓ correct" : "✗ not correct"),
      make("span", {}, `group ${episode.group}`),
      make("span", {}, `${trained.toLocaleString("en")} of ${all.toLocaleString("en")} tokens trained on`),
      make("span", {}, `advantage ${Number.isFinite(highest) ? number(highest, 2) : "–"}`),
      make("span", {}, `mean logprob ${trained ? number(total / trained, 3) : "–"}`),
      make("span", {}, `ended by ${String(episode.samples.at(-1)?.finish_reason)}`));
    const details = make("details", { className: "episode" }, summary);
    const open = () => {
      if (details.open && details.childElementCount === 1) details.append(...episode.samples.flatMap(textOf));
    };
    details.addEventListener("toggle", open);
    return details;
  }

  function show() {
    const { episodes } = DATA.samples[Number(choose.value)];
    most = Math.max(1e-9, ...episodes.flatMap((each) => each.samples.map((sample) => sample.advantages.reduce((high, value) => Math.max(high, Math.abs(value)), 0))));
    host.replaceChildren(...episodes.map(episodeOf));
    host.firstElementChild.open = true;
    explain();
  }

  function explain() {
    const ramp = (names) => make("span", { className: "ramp" }, ...names.map(([name, part]) => {
      const cell = make("i", {});
      cell.style.backgroundColor = mix(name, part);
      return cell;
    }));
    const parts = {
      advantage: ["Orange was worse than its group, blue better:", ramp([["--c1", 0.6], ["--c1", 0.3], ["--c0", 0.05], ["--c0", 0.3], ["--c0", 0.6]]), "."],
      logprob: ["The darker, the less likely the token was when it was sampled:", ramp([["--c3", 0.05], ["--c3", 0.4], ["--c3", 0.75]]), "."],
      mask: ["Green tokens are trained on:", ramp([["--c2", 0.3]]), "."],
    };
    legend.replaceChildren(...parts[shade]);
  }

  function point(event) {
    const fact = event.target instanceof Element && facts.get(event.target.closest(".tokens > span"));
    tip.hidden = !fact;
    if (!fact) return;
    const figures = fact.mask
      ? `logprob ${number(fact.logprob, 4)}, probability ${number(Math.exp(fact.logprob), 3)}\nadvantage ${number(fact.advantage, 4)}`
      : "given: not trained on";
    tip.textContent = `${visible(JSON.stringify(fact.text))}\ntoken ${fact.place + 1}\n${figures}`;
    const { clientWidth, clientHeight } = document.documentElement;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, clientWidth - tip.offsetWidth - 8))}px`;
    const below = event.clientY + 18;
    tip.style.top = `${below + tip.offsetHeight > clientHeight ? event.clientY - tip.offsetHeight - 12 : below}px`;
  }

  DATA.samples.forEach(({ step }, index) => choose.append(make("option", { value: String(index) }, step.toLocaleString("en"))));
  choose.value = String(DATA.samples.length - 1);
  choose.addEventListener("change", show);
  document.querySelectorAll("[data-shade]").forEach((button) => button.addEventListener("click", () => {
    shade = button.dataset.shade;
    document.querySelectorAll("[data-shade]").forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
    host.querySelectorAll(".tokens > span").forEach(paint);
    explain();
  }));
  host.addEventListener("mousemove", point);
  host.addEventListener("click", point);
  host.addEventListener("mouseleave", () => { tip.hidden = true; });
  show();
})();
