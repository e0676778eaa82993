"use strict";
// The page is a function of one snapshot (/api/state) and of how long ago it came. Nothing from the snapshot becomes
// markup: text goes in as text, shapes are built from numbers.

const NEWS_SECONDS = 4, POLL_SECONDS = 2, AGAIN_SECONDS = 15;
let state = null, cameAt = 0, source = null, polling = null;

const $ = (id) => document.getElementById(id);
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
const text = (id, value) => { const e = $(id); if (e.textContent !== value) e.textContent = value; };

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line"].includes(name);
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "width%") e.style.width = `${value}%`; else if (key === "height%") e.style.height = `${value}%`;
    else e.setAttribute(key, value);
  }
  e.append(...children.filter((c) => c !== null));
  return e;
}

// --- numbers as people read them

function seconds(x) {
  if (!known(x)) return ["–", ""];
  if (x < 1) return [(x * 1000).toFixed(0), "ms"];
  if (x < 120) return [x.toFixed(x < 10 ? 1 : 0), "s"];
  if (x < 7200) return [(x / 60).toFixed(x < 600 ? 1 : 0), "min"];
  if (x < 172800) return [(x / 3600).toFixed(1), "h"];
  return [(x / 86400).toFixed(0), "d"];
}
const span = (x) => seconds(x).join("\u00a0").trim();
const count = (x) => known(x) ? Math.round(x).toLocaleString("en") : "–";
const fixed = (x, digits) => known(x) ? x.toFixed(digits) : "–";
function bytes(x) {
  if (!known(x)) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) { if (x < 1000 || unit === "GB") return `${x < 10 && unit !== "B" ? x.toFixed(1) : Math.round(x)} ${unit}`; x /= 1000; }
}
function number(id, [value, unit]) {
  const e = $(id);
  if (e.dataset.value === value + unit) return;
  e.dataset.value = value + unit;
  e.replaceChildren(value, unit ? make("i", {}, unit) : "");
}

// --- how old: nothing old is shown as if it were now

const since = () => (performance.now() - cameAt) / 1000; // by our own clock: the monitor's may be another
const ageOf = (asOf) => known(asOf) ? (state.now_ms - asOf) / 1000 + since() : null;
const oldest = (...times) => times.every(known) ? Math.min(...times) : null;
function mark(element, asOf, never) {
  const age = ageOf(asOf), old = age === null || age > state.away_seconds;
  element.classList.toggle("old", old);
  let tag = element.querySelector(":scope > .age-tag");
  if (!old) { if (tag) tag.remove(); return; }
  if (!tag) { tag = make("span", { class: "age-tag" }); element.append(tag); }
  const says = age === null ? never : `as of ${span(age)} ago`;
  if (tag.textContent !== says) tag.textContent = says;
}

// --- charts

function line(id, points, { keys, floor = null, ceiling = null, target = null, show }) {
  const holder = $(id), first = points.findIndex((p) => keys.some((k) => known(p[k])));
  points = points.slice(Math.max(0, first));
  const values = points.flatMap((p) => keys.map((k) => p[k])).filter(known);
  if (values.length < 2) { holder.replaceChildren(make("p", { class: "quiet" }, "not enough readings yet")); return; }
  let low = floor ?? Math.min(...values), high = Math.max(...values, ceiling ?? -Infinity);
  if (floor !== null) high *= 1.25; // some air above
  if (target !== null && target < high * 3) high = Math.max(high, target * 1.08);
  if (high - low < 1e-9) { high += Math.abs(high) * 0.1 + 0.01; }
  const width = 600, height = 100, from = points[0].ms, to = points.at(-1).ms;
  const x = (ms) => to > from ? (ms - from) / (to - from) * width : 0, y = (v) => height - (v - low) / (high - low) * height;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(make("line", { class: "rule", x1: 0, x2: width, y1: height, y2: height }));
  if (target !== null && target <= high) svg.append(make("line", { class: "target", x1: 0, x2: width, y1: y(target), y2: y(target) }));
  keys.forEach((key, place) => {
    let path = "", area = "", open = null, last = null;
    for (const p of points) { // a gap stays a gap
      if (!known(p[key])) { if (open !== null) area += `L${last},${height}Z`; open = null; continue; }
      const at = `${x(p.ms).toFixed(1)},${y(p[key]).toFixed(1)}`;
      if (open === null) { open = x(p.ms).toFixed(1); path += `M${at}`; area += `M${open},${height}L${at}`; } else { path += `L${at}`; area += `L${at}`; }
      last = x(p.ms).toFixed(1);
    }
    if (open !== null) area += `L${last},${height}Z`;
    if (keys.length === 1) svg.append(make("path", { class: "fill", d: area }));
    svg.append(make("path", { class: place ? "stroke second" : "stroke", d: path }));
  });
  const chart = make("div", { class: "chart", role: "img", "aria-label": `from ${show(Math.min(...values))} to ${show(Math.max(...values))}` }, svg,
    make("span", { class: "top" }, show(high)), make("span", { class: "bottom" }, show(low)),
    make("span", { class: "first" }, `${span((to - from) / 1000)} ago`), make("span", { class: "last" }, "now"));
  holder.replaceChildren(chart);
}

// --- the parts, top to bottom

function hero() {
  const f = state.freshness, w = state.weights, t = state.traffic;
  number("age", seconds(f.age_seconds));
  text("age-note", `target ${span(f.target_seconds)}`);
  const share = known(f.age_seconds) ? Math.min(1, f.age_seconds / f.target_seconds) : 0;
  $("age-bar").style.width = `${share * 100}%`;
  $("age-bar").classList.toggle("over", share >= 1);
  number("share", known(f.share_within_target) ? [(f.share_within_target * 100).toFixed(f.share_within_target > 0.9995 ? 0 : 1), "%"] : ["–", ""]);
  text("share-note", f.answered.n ? `of ${count(f.answered.n)} answers; p50 ${span(f.answered.p50)}, p99 ${span(f.answered.p99)}` : `no answers in the last ${span(state.window_seconds)}`);
  number("version", known(w.served) ? [`v${w.served}`, ""] : ["–", ""]);
  const newest = known(w.newest) ? `newest published v${w.newest}` : "nothing published yet";
  text("version-note", w.pinned ? `pinned at v${w.pinned}; ${newest}` : newest);
  number("rate", known(t.events_per_second) ? [t.events_per_second < 10 ? t.events_per_second.toFixed(1) : count(t.events_per_second), ""] : ["–", ""]);
  text("rate-note", known(t.targets_per_second) ? `${count(t.targets_per_second)} targets learned a second` : "");
}

const SCALE = [0.01, 1000]; // seconds, of the hops' bars
const along = (x) => known(x) && x > 0 ? Math.max(1.5, Math.min(100, Math.log10(x / SCALE[0]) / Math.log10(SCALE[1] / SCALE[0]) * 100)) : 0;

function hops() {
  const rows = state.hops.map((h) => {
    const age = ageOf(h.as_of_ms), old = age === null || age > state.away_seconds;
    const figures = old ? (age === null ? "never read" : `as of ${span(age)} ago`) : h.n ? `${span(h.p50)} · ${span(h.p99)}` : "none lately";
    return make("div", { class: old ? "hop old" : "hop" }, make("span", {}, h.label),
      make("div", { class: "bar", "aria-hidden": "true" }, h.n ? make("u", { "width%": along(h.p99) }) : null, h.n ? make("i", { "width%": along(h.p50) }) : null),
      make("span", { class: old ? "figures age-tag" : "figures" }, figures));
  });
  $("hops").replaceChildren(...rows);
  text("hops-note", `p50 · p99 of the last ${span(state.window_seconds)}`);
}

function pairs(id, rows) {
  $(id).replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function canary() {
  const c = state.canary, lost = Object.entries(c.lost).map(([hop, n]) => `${n} at ${hop}`).join(", ");
  text("canary-note", c.every_seconds ? `a marked event every ${span(c.every_seconds)}` : "off");
  const row = (name, s) => make("tr", {}, ...[name, span(s.last), span(s.p50), span(s.p99)].map((v) => make("td", {}, v)));
  $("canary").replaceChildren(make("tr", {}, ...["it is served", "last", "p50", "p99"].map((h) => make("th", { scope: "col" }, h))),
    row("by the sequence, after", c.sequence), row("by the weights, after", c.weights));
  const seen = Math.max(c.sequence.as_of_ms || 0, c.weights.as_of_ms || 0);
  text("canary-lost", `${seen ? `last seen ${span(Math.max(0, ageOf(seen)))} ago` : "none seen yet"}; ${lost ? `lost: ${lost}` : "none lost"}`);
}

const MODELS = { continuous: "continuous, learns on", frozen: "frozen weights", popularity: "popularity", oracle: "oracle, the best possible" };

function learning() {
  const q = state.quality, compared = q.compared.normalized_entropy || {}, hits = q.compared.hit_rate_at_10 || {};
  line("ne-line", state.points, { keys: Object.keys(compared).length ? ["ne", "frozen"] : ["ne"], ceiling: 1, show: (v) => v.toFixed(2), target: 1 });
  const table = make("table");
  if (Object.keys(compared).length) {
    table.append(make("tr", {}, ...["on the same targets", "NE", "HR@10"].map((h) => make("th", { scope: "col" }, h))));
    for (const [model, label] of Object.entries(MODELS)) {
      if (model in compared) table.append(make("tr", {}, make("td", {}, make("span", { class: model === "frozen" ? "swatch second" : model === "continuous" ? "swatch" : "" }), label), make("td", {}, fixed(compared[model], 3)), make("td", {}, fixed(hits[model], 3))));
    }
  } else {
    table.append(make("tr", {}, ...["task", "NE", "AUC", "calibration", "base rate"].map((h) => make("th", { scope: "col" }, h))));
    for (const [task, t] of Object.entries(q.tasks)) table.append(make("tr", {}, ...[task, fixed(t.normalized_entropy, 3), fixed(t.auc, 3), fixed(t.calibration, 2), fixed(t.base_rate, 3)].map((v) => make("td", {}, v))));
  }
  $("models").replaceChildren(table);
}

function online() {
  const o = state.online, table = $("online"), tasks = Object.keys(o.tasks);
  text("online-note", o.window_seconds ? `last ${span(o.window_seconds)}` : "off");
  const row = (name, task, f) => make("tr", {}, ...[name, task, count(f.targets), fixed(f.normalized_entropy, 3), fixed(f.auc, 3), fixed(f.calibration, 2), fixed(f.ctr, 3)].map((v) => make("td", {}, v)));
  const rows = tasks.filter((t) => o.tasks[t].targets).map((t) => row("all versions", t, o.tasks[t]));
  for (const g of o.versions) if (tasks.length) rows.push(row(g.first === g.last ? `v${g.first}` : `v${g.first}–${g.last}`, tasks[0], g.tasks[tasks[0]]));
  if (!rows.length) {
    const why = !o.window_seconds ? "not judged (monitor.online_window_seconds = 0)" : o.samples ? `${count(o.samples)} sampled answers, none decided yet` : "no sampled answers (scorer.score_sample)";
    table.replaceChildren(make("tr", {}, make("td", { class: "quiet" }, why)));
    return;
  }
  table.replaceChildren(make("tr", {}, ...["weights", "task", "shown", "NE", "AUC", "calib.", "rate"].map((h) => make("th", { scope: "col" }, h))), ...rows);
}

function weights() {
  const w = state.weights, versions = w.versions, largest = Math.max(1, ...versions.map((v) => v.bytes));
  const served = new Set(Object.values(w.served_by));
  const bars = versions.map((v) => make("i", {
    class: `${v.kind}${served.has(v.version) ? " served" : ""}${v.fenced ? " fenced" : ""}`, "height%": Math.max(4, Math.sqrt(v.bytes / largest) * 100),
    title: `v${v.version}, ${v.kind}, ${bytes(v.bytes)}${v.fenced ? ", fenced off" : ""}`,
  }));
  const key = (kind, name) => make("span", {}, make("span", { class: `swatch ${kind}` }), name);
  $("weights").replaceChildren(versions.length
    ? make("div", { role: "img", "aria-label": `${versions.length} versions, v${versions[0].version} to v${versions.at(-1).version}, the largest ${bytes(largest)}` },
        make("div", { class: "versions" }, ...bars),
        make("div", { class: "legend quiet" }, key("", "snapshot"), make("span", {}, make("span", { class: "swatch delta" }), "delta"), key("second", "served"),
          make("span", {}, `last ${bytes(versions.at(-1).bytes)}, largest ${bytes(largest)}, ${cadence(versions)}`)))
    : make("p", { class: "quiet" }, "no version in the manifests yet"));
  const told = (counts) => Object.entries(counts).map(([reason, n]) => `${n} ${reason}`).join(", ");
  const note = [w.pinned ? `pinned at v${w.pinned}` : "", told(w.rejected) && `refused: ${told(w.rejected)}`, told(w.withheld) && `withheld: ${told(w.withheld)}`].filter(Boolean).join("; ");
  text("weights-note", note || "none refused, none withheld");
  const words = { pin: (m) => `pinned at v${m.version}${m.why ? ` (${m.why})` : ""}`, unpin: (m) => `pin of v${m.version} taken away`, claim: (m) => `a trainer took over${m.version ? ` after v${m.version}` : ""}` };
  $("marks").replaceChildren(...w.marks.slice(-5).reverse().map((m) => make("li", {}, `${span(Math.max(0, ageOf(m.at_ms)))} ago: ${(words[m.kind] || (() => m.kind))(m)}`)));
}
function cadence(versions) {
  if (versions.length < 2) return "";
  return `one every ${span((versions.at(-1).published_ms - versions[0].published_ms) / 1000 / (versions.length - 1))}`;
}

function vocabulary() {
  const v = state.vocabulary, share = v.slots ? v.used / v.slots : 0;
  text("slots", count(v.used));
  text("slots-note", known(v.slots) ? `of ${count(v.slots)} slots (${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %)` : "");
  $("slots-bar").style.width = `${share * 100}%`;
  const reasons = Object.entries(v.evictions), gone = reasons.reduce((sum, [, n]) => sum + n, 0);
  pairs("vocabulary", [
    ["admitted", `${count(v.admissions)} (${fixed(v.admissions_per_second, 1)}/s)`],
    ["evicted", `${known(v.slots) ? count(gone) : "–"} (${fixed(v.evictions_per_second, 1)}/s)`],
    ...reasons.filter(([, n]) => n).map(([reason, n]) => [`… ${reason}`, count(n)]),
  ]);
}

function letters() {
  const d = state.dead_letters, rows = Object.entries(d.by_reason), most = Math.max(1, ...rows.map(([, n]) => n));
  text("letters", count(d.hour));
  text("letters-note", d.hour ? "records that broke the contract" : "every record kept the contract");
  $("reasons").replaceChildren(...rows.map(([reason, n]) => make("div", { class: "hop" }, make("span", {}, reason),
    make("div", { class: "bar", "aria-hidden": "true" }, make("i", { "width%": n / most * 100 })), make("span", { class: "figures" }, count(n)))));
}

function lag() {
  const rows = state.lag.map((l) => {
    const row = make("tr", {}, make("td", {}, `${l.source}: ${l.topic.split(".").pop()}`), make("td", {}, count(l.records)), make("td", {}, l.records ? span(l.seconds) : "–"));
    const age = ageOf(l.as_of_ms);
    if (age > state.away_seconds) { row.classList.add("old"); row.firstChild.append(make("span", { class: "age-tag" }, `as of ${span(age)} ago`)); }
    return row;
  });
  $("lag").replaceChildren(make("tr", {}, ...["who reads what", "records", "behind"].map((h) => make("th", { scope: "col" }, h))), ...rows);
}

function sources() {
  $("sources").replaceChildren(...state.sources.map((s) => {
    const quiet = s.silent_seconds + since();
    const away = !s.up || quiet > state.away_seconds;
    const says = away ? `no answer for ${span(quiet)}${s.why ? ` (${s.why})` : ""}` : s.why ? `not ready: ${s.why}` : "answers, ready";
    return make("li", {}, make("span", { class: `dot ${away ? "away" : s.why ? "waiting" : ""}`, "aria-hidden": "true" }), make("b", {}, s.name), make("span", { class: "quiet" }, says));
  }));
}

function banner() {
  const silent = since(), f = state.freshness, stale = ageOf(f.as_of_ms);
  const gone = state.sources.filter((s) => !s.up || s.silent_seconds + silent > state.away_seconds).map((s) => `${s.name}: no answer for ${span(s.silent_seconds + silent)}`);
  const says = silent > NEWS_SECONDS ? [`no news from the monitor for ${span(silent)}`] : gone;
  $("away").hidden = !says.length;
  if (says.length && $("away").textContent !== says.join("; ")) $("away").textContent = says.join("; ");
  const lost = silent > NEWS_SECONDS || stale === null || stale > state.away_seconds;
  const status = lost ? "unknown" : f.status;
  $("status").className = `pill ${status}`;
  text("status", { fresh: "fresh", stale: "stale: older than its target", unknown: "freshness not known" }[status]);
}

const PARTS = [hero, hops, canary, learning, online, weights, vocabulary, letters, lag, sources];

function draw() {
  if (!state) return;
  text("title", state.title);
  document.title = state.title;
  text("window", String(Math.round(state.window_seconds)));
  text("clock", new Date(state.now_ms).toLocaleTimeString());
  line("age-line", state.points, { keys: ["age"], floor: 0, target: state.freshness.target_seconds, show: span });
  for (const part of PARTS) part();
  age();
}

function age() { // between two snapshots only time goes on
  if (!state) return;
  banner();
  const q = state.quality, broker = state.broker.as_of_ms;
  const asOf = {
    freshness: state.freshness.as_of_ms, traffic: state.traffic.as_of_ms, vocabulary: state.vocabulary.as_of_ms, online: broker, letters: broker,
    weights: oldest(state.weights.as_of_ms, broker), quality: q.compared_as_of_ms ? oldest(q.as_of_ms, q.compared_as_of_ms) : q.as_of_ms,
  };
  for (const element of document.querySelectorAll("[data-group]")) if (element.dataset.group in asOf) mark(element, asOf[element.dataset.group], "never read");
  if (since() > NEWS_SECONDS) { hops(); lag(); sources(); }
}

// --- news: server-sent events, and polling where they do not get through

function take(content) { state = content; cameAt = performance.now(); draw(); }
async function poll() {
  try {
    const answer = await fetch("/api/state", { cache: "no-store" });
    if (answer.ok) take(await answer.json());
  } catch { /* the banner says that there is no news */ }
}
function fallBack() {
  if (source) source.close();
  source = null;
  if (!polling) polling = setInterval(poll, POLL_SECONDS * 1000);
  setTimeout(listen, AGAIN_SECONDS * 1000);
}
function listen() {
  if (source) return;
  source = new EventSource("/api/live");
  source.onmessage = (event) => { clearInterval(polling); polling = null; take(JSON.parse(event.data)); };
  source.onerror = fallBack;
}
poll().then(listen);
setInterval(age, 1000);
