// Draws the traces of the embedded data. Texts from traced processes only ever become text nodes.
(() => {
"use strict";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { texts, resources, traces, spans: S } = data;
const COUNT = S.id.length;
const ERROR = 2;
const KINDS = ["", "internal", "server", "client", "producer", "consumer"];
const COLOURS = 12;
const ROW = 26, TRACE = 58;
/// Rows that a trace shows at first, about.
const AT_FIRST = 150;

// Texts

/// A text without escape sequences; other characters that cannot be seen are shown by name.
function clean(text) {
  return String(text)
    .replace(/\x1b\[[0-?]*[ -\/]*[@-~]/g, "")
    .replace(/\r\n/g, "\n")
    .replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
      c => c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "‹U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "›");
}
const oneLine = text => clean(text).replace(/\s+/g, " ");
const plural = (number, what) => number.toLocaleString("en") + " " + what + (number === 1 ? "" : /s$|ch$/.test(what) ? "es" : "s");

function took(ns) {
  if (ns < 1e3) return ns + " ns";
  if (ns < 1e6) return number(ns / 1e3) + " µs";
  if (ns < 999.5e6) return number(ns / 1e6) + " ms";
  const s = ns / 1e9;
  if (s < 60) return number(s) + " s";
  const whole = Math.round(s);
  if (whole < 3600) return Math.floor(whole / 60) + "m " + String(whole % 60).padStart(2, "0") + "s";
  return Math.floor(whole / 3600) + "h " + String(Math.floor(whole / 60) % 60).padStart(2, "0") + "m";
}
const number = x => x >= 99.95 ? x.toFixed(0) : x >= 9.995 ? x.toFixed(1) : x.toFixed(2);
const percent = (part, whole) => whole > 0 ? (part / whole * 100 >= 9.95 ? Math.round(part / whole * 100) : (part / whole * 100).toFixed(1)) + " %" : "–";
function date(ms) {
  const d = new Date(ms), two = n => String(n).padStart(2, "0");
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
}

function el(tag, classes, ...content) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...content.filter(part => part !== null && part !== undefined));
  return made;
}
function button(label, title, act, classes) {
  const made = el("button", classes, label);
  made.type = "button";
  if (title) made.title = title;
  made.addEventListener("click", act);
  return made;
}

// The data

const value = raw => typeof raw === "number" ? texts[raw] : raw[0];
const pairs = list => {
  const found = [];
  for (let i = 0; i < list.length; i += 2) found.push([texts[list[i]], value(list[i + 1])]);
  return found;
};
const byIndex = list => new Map(list);
const eventsOf = byIndex(S.events), logsOf = byIndex(S.logs), linksOf = byIndex(S.links), criticalOf = byIndex(S.critical), missingParent = byIndex(S.orphans);
const places = resources.map(list => {
  const all = Object.fromEntries(pairs(list));
  const service = oneLine(all["service.name"] ?? "unknown");
  const pid = all["process.pid"] ?? null;
  return { service, pid, process: pid === null ? service : `${service} · pid ${pid}` };
});
/// Index of the parent, -1 for a root; index of the trace; whether the span or one below it failed.
const parent = new Int32Array(COUNT).fill(-1), traceOf = new Int32Array(COUNT), failing = new Uint8Array(COUNT);
const end = new Float64Array(COUNT), onPath = new Float64Array(COUNT);
traces.forEach((trace, number) => {
  const open = [];
  const last = trace.first + trace.count;
  trace.errors = 0;
  trace.roots = [];
  for (let i = trace.first; i < last; i++) {
    open.length = S.depth[i];
    if (open.length) parent[i] = open[open.length - 1]; else trace.roots.push(i);
    open.push(i);
    traceOf[i] = number;
    end[i] = S.start[i] + S.length[i];
    if (S.status[i] === ERROR) trace.errors++;
  }
  for (let i = last - 1; i >= trace.first; i--) {
    if (S.status[i] === ERROR) failing[i] = 1;
    if (failing[i] && parent[i] >= 0) failing[parent[i]] = 1;
  }
});
for (const [i, parts] of criticalOf) for (let p = 0; p < parts.length; p += 2) onPath[i] += parts[p + 1] - parts[p];
const ERRORS = traces.reduce((sum, trace) => sum + trace.errors, 0);
let spanById = null;
function find(traceId, spanId) {
  spanById ??= new Map(S.id.map((id, i) => [traces[traceOf[i]].id + id, i]));
  return spanById.get(traceId + spanId) ?? -1;
}

// State

const state = {
  trace: 0, selected: -1, query: "", errors: false, order: "tree", colour: "", group: "", traceOrder: "start",
  from: 0, to: 1, critical: true, details: false,
};
let collapsed = new Set();
/// Per span: matches the query; per trace: how many. `null`: no query.
let hits = null, hitsOf = null;
let rows = new Int32Array(0), traceRows = [];
const trace = () => traces[state.trace];
const groups = { key: "", of: new Map(), list: [] };

// Search

let lower = null;
/// Words that must all match: `text`, `key=text`, `key="exactly"`, `>500ms`, `<2s`; `-` before one: must not.
function parse(query) {
  const terms = [];
  const pattern = /(-?)(?:([<>])(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)(?=\s|$)|(?:([^\s="<>]+)=)?(?:"([^"]*)"|(\S+)))/g;
  const units = { ns: 1, us: 1e3, "µs": 1e3, ms: 1e6, s: 1e9, m: 6e10, h: 3.6e12 };
  for (const [, not, compare, amount, unit, key, exact, word] of query.matchAll(pattern)) {
    if (compare) terms.push({ not: !!not, compare, limit: amount * units[unit] });
    else terms.push({ not: !!not, key: key?.toLowerCase(), exact: key && exact !== undefined ? exact : null, text: (exact ?? word).toLowerCase() });
  }
  return terms;
}

function matcher(term) {
  if (term.compare === ">") return i => S.length[i] > term.limit;
  if (term.compare === "<") return i => S.length[i] < term.limit;
  lower ??= texts.map(text => text.toLowerCase());
  // Each different text is looked at once, however many spans have it.
  const test = term.exact !== null ? text => text === term.exact : text => text.toLowerCase().includes(term.text);
  const hit = new Uint8Array(texts.length);
  for (let i = 0; i < texts.length; i++) hit[i] = term.exact !== null ? texts[i] === term.exact : lower[i].includes(term.text);
  const valueHits = raw => typeof raw === "number" ? hit[raw] === 1 : test(shown(raw[0]));
  if (term.key) {
    const key = new Uint8Array(texts.length);
    for (let i = 0; i < texts.length; i++) key[i] = lower[i] === term.key || lower[i].endsWith("." + term.key);
    const inList = list => {
      for (let i = 0; i < list.length; i += 2) if (key[list[i]] && valueHits(list[i + 1])) return true;
      return false;
    };
    const ofResource = resources.map(inList);
    return i => inList(S.attributes[i]) || ofResource[S.resource[i]] || (eventsOf.get(i) ?? []).some(([, , list]) => inList(list))
      || (logsOf.get(i) ?? []).some(([, , , , list]) => inList(list))
      || (term.key === "name" && hit[S.name[i]] === 1);
  }
  const inList = list => {
    for (let i = 0; i < list.length; i += 2) if (hit[list[i]] || valueHits(list[i + 1])) return true;
    return false;
  };
  const ofResource = resources.map(list => {
    for (let i = 0; i < list.length; i += 2) if (valueHits(list[i + 1])) return true;
    return false;
  });
  return i => hit[S.name[i]] === 1 || inList(S.attributes[i]) || hit[S.message[i]] === 1 || ofResource[S.resource[i]]
    || S.id[i] === term.text || traces[traceOf[i]].id === term.text
    || (eventsOf.get(i) ?? []).some(([, name, list]) => hit[name] || inList(list))
    || (logsOf.get(i) ?? []).some(([, level, logger, body, list]) => hit[level] || hit[logger] || valueHits(body) || inList(list));
}

function search() {
  const terms = parse(state.query);
  hits = hitsOf = null;
  if (!terms.length) return;
  const tests = terms.map(term => [matcher(term), term.not]);
  hits = new Uint8Array(COUNT);
  hitsOf = new Int32Array(traces.length);
  for (let i = 0; i < COUNT; i++) {
    if (tests.every(([test, not]) => test(i) !== not)) {
      hits[i] = 1;
      hitsOf[traceOf[i]]++;
    }
  }
}

// Which rows

/// What is folded at first: what makes a trace of many spans unreadable, but never what leads to an error.
function foldAtFirst() {
  const { first, count } = trace();
  collapsed = new Set();
  if (count <= AT_FIRST) return;
  const atDepth = [];
  for (let i = first; i < first + count; i++) atDepth[S.depth[i]] = (atDepth[S.depth[i]] ?? 0) + 1;
  let depth = 0, shown = atDepth[0];
  while (depth + 1 < atDepth.length && (shown + atDepth[depth + 1] <= AT_FIRST || depth === 0)) shown += atDepth[++depth];
  const few = trace().errors <= AT_FIRST;
  for (let i = first; i < first + count; i++)
    if (S.below[i] && S.depth[i] >= depth && !(few && failing[i] && hasFailingChild(i))) collapsed.add(i);
}
function hasFailingChild(i) {
  for (let child = i + 1; child <= i + S.below[i]; child += S.below[child] + 1) if (failing[child]) return true;
  return false;
}

const wanted = i => (!hits || hits[i]) && (!state.errors || S.status[i] === ERROR);
const inWindow = i => S.start[i] <= state.to && end[i] >= state.from;

function chooseRows() {
  const { first, count } = trace(), last = first + count;
  const filtered = !!hits || state.errors;
  const chosen = [];
  if (state.order === "tree") {
    let keep = null;
    if (filtered) {
      keep = new Uint8Array(count);
      for (let i = last - 1; i >= first; i--) {
        if (wanted(i)) keep[i - first] = 1;
        if (keep[i - first] && parent[i] >= 0) keep[parent[i] - first] = 1;
      }
    }
    for (let i = first; i < last; i++) {
      if ((!keep || keep[i - first]) && inWindow(i)) chosen.push(i);
      if (!keep && collapsed.has(i)) i += S.below[i];
    }
  } else {
    for (let i = first; i < last; i++)
      if (wanted(i) && inWindow(i) && (state.order !== "critical" || onPath[i] > 0)) chosen.push(i);
    const by = { length: S.length, own: S.own, critical: onPath }[state.order];
    chosen.sort(by ? (a, b) => by[b] - by[a] || a - b : (a, b) => S.start[a] - S.start[b] || a - b);
  }
  rows = Int32Array.from(chosen);
}

function chooseTraces() {
  traceRows = traces.map((_, i) => i).filter(i => (!hitsOf || hitsOf[i]) && (!state.errors || traces[i].errors));
  const by = { length: i => -traces[i].length, errors: i => -traces[i].errors }[state.traceOrder];
  if (by) traceRows.sort((a, b) => by(a) - by(b) || a - b);
}

// Colours

/// What kind of work a span is, by its name: `dbt.model` of `dbt.model.orders`, `SELECT` of `SELECT shop.orders`.
function family(name, parts) {
  const head = oneLine(name).split(" ")[0].split(".");
  return head.slice(0, head.length > parts ? parts : head.length).join(".");
}
function chooseGroups() {
  const { first, count } = trace(), last = first + count;
  const distinct = of => {
    const found = new Set();
    for (let i = first; i < last && found.size <= COLOURS; i++) found.add(of(i));
    return found.size;
  };
  const modes = {
    service: i => places[S.resource[i]].service,
    process: i => places[S.resource[i]].process,
    work: i => family(texts[S.name[i]], 2),
  };
  if (distinct(modes.work) > COLOURS) modes.work = i => family(texts[S.name[i]], 1);
  const mode = state.colour || (distinct(modes.service) > 1 ? "service" : distinct(modes.process) > 1 ? "process" : "work");
  groups.mode = mode;
  groups.name = modes[mode];
  const sums = new Map();
  for (let i = first; i < last; i++) {
    const name = modes[mode](i), sum = sums.get(name) ?? { name, count: 0, own: 0 };
    sum.count++;
    sum.own += S.own[i];
    sums.set(name, sum);
  }
  groups.list = [...sums.values()].sort((a, b) => b.own - a.own);
  groups.list.forEach((group, place) => { group.colour = place % COLOURS; });
  groups.of = sums;
  if (!sums.has(state.group)) state.group = "";
}
const colourOf = i => groups.of.get(groups.name(i)).colour;

// A list of rows of one height, of which only those in sight are in the page

function list(container, height, count, make, id) {
  const space = container.firstElementChild;
  let drawn = new Map(), asked = false;
  const draw = () => {
    asked = false;
    const from = Math.max(0, Math.floor(container.scrollTop / height) - 6);
    const to = Math.min(count(), Math.ceil((container.scrollTop + container.clientHeight) / height) + 6);
    for (const [place, row] of drawn) if (place < from || place >= to) { row.remove(); drawn.delete(place); }
    const fresh = document.createDocumentFragment();
    for (let place = from; place < to; place++) {
      if (drawn.has(place)) continue;
      const row = make(place);
      row.style.top = place * height + "px";
      row.id = id + place;
      drawn.set(place, row);
      fresh.append(row);
    }
    container.append(fresh);
  };
  const ask = () => { if (!asked) { asked = true; requestAnimationFrame(draw); } };
  container.addEventListener("scroll", ask, { passive: true });
  new ResizeObserver(ask).observe(container);
  return {
    /// Draws all again.
    renew() {
      for (const row of drawn.values()) row.remove();
      drawn = new Map();
      space.style.height = count() * height + "px";
      draw();
    },
    show(place) {
      const top = place * height, room = container.clientHeight;
      if (top < container.scrollTop) container.scrollTop = Math.max(0, top - height * 2);
      else if (top + height > container.scrollTop + room) container.scrollTop = top - room + height * 3;
    },
  };
}

// The rows of spans

const share = at => (at - state.from) / (state.to - state.from) * 100;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

function mark(i) {
  if (S.status[i] === ERROR) return ["error", "✗"];
  if (S.incomplete[i] >= 0) return ["odd", "?"];
  const outcome = S.outcome[i] >= 0 ? texts[S.outcome[i]] : "";
  if (outcome === "skipped") return ["odd", "–"];
  if (outcome === "warn") return ["odd", "!"];
  return ["", outcome || S.status[i] === 1 ? "✓" : ""];
}

/// A name, with what was searched for marked in it.
function named(i) {
  const text = oneLine(texts[S.name[i]]) || "(no name)";
  const label = el("span", "label");
  const word = hits && parse(state.query).find(term => !term.not && term.text && !term.key)?.text;
  const at = word ? text.toLowerCase().indexOf(word) : -1;
  if (at < 0) label.append(text);
  else label.append(text.slice(0, at), el("mark", "", text.slice(at, at + word.length)), text.slice(at + word.length));
  label.title = text;
  return label;
}

function spanRow(place) {
  const i = rows[place], tree = state.order === "tree", filtered = !!hits || state.errors;
  const above = parent[i] >= 0 ? places[S.resource[parent[i]]] : null, mine = places[S.resource[i]];
  const failed = S.status[i] === ERROR, open = S.incomplete[i] >= 0;
  const row = el("div", "row" + (failed ? " failed" : "") + (open ? " open" : "") + (S.depth[i] === 0 ? " top" : ""));
  const faded = (state.group && groups.name(i) !== state.group) || (filtered && !wanted(i));
  if (faded) row.classList.add("faded");
  row.setAttribute("role", "row");
  row.setAttribute("aria-level", S.depth[i] + 1);
  row.setAttribute("aria-rowindex", place + 1);
  row.setAttribute("aria-selected", i === state.selected);
  row.dataset.span = S.id[i];

  const names = el("div", "names");
  names.setAttribute("role", "gridcell");
  const folds = tree && !filtered && S.below[i] > 0, folded = folds && collapsed.has(i);
  if (tree) names.style.paddingLeft = 6 + Math.min(S.depth[i], 24) * 15 + "px"; else names.style.paddingLeft = "6px";
  if (folds) row.setAttribute("aria-expanded", !folded);
  const fold = el("button", "fold", folds ? (folded ? "▶" : "▼") : "");
  fold.type = "button";
  fold.tabIndex = -1;
  fold.setAttribute("aria-hidden", "true");
  const swatch = el("span", "swatch");
  swatch.style.background = `var(--c${colourOf(i)})`;
  const [kind, sign] = mark(i);
  const notes = [];
  if (!above || above.process !== mine.process) notes.push(above && above.service === mine.service ? "pid " + mine.pid : mine.process);
  const outcome = S.outcome[i] >= 0 ? oneLine(texts[S.outcome[i]]) : "";
  if (outcome && !["success", "pass"].includes(outcome)) notes.push(outcome);
  if (open) notes.push(oneLine(texts[S.incomplete[i]]));
  names.append(fold, swatch, el("span", "mark " + kind, sign), named(i));
  if (folded) names.append(el("span", "hidden" + (hasFailingChild(i) ? " bad" : ""), "+" + S.below[i].toLocaleString("en")));
  if (notes.length) names.append(el("span", "note", notes.join(" · ")));

  const times = el("div", "times");
  times.setAttribute("role", "gridcell");
  for (const tick of ticks()) {
    const line = el("i", "line");
    line.style.left = share(tick) + "%";
    times.append(line);
  }
  const left = clamp(share(S.start[i]), -2, 102), right = clamp(share(end[i]), -2, 102);
  const bar = el("div", "span");
  bar.style.left = left + "%";
  bar.style.width = right - left + "%";
  bar.style.background = `var(--c${colourOf(i)})`;
  times.append(bar);
  const parts = state.critical ? criticalOf.get(i) ?? [] : [];
  for (let p = 0; p < parts.length && p < 400; p += 2) {
    const from = clamp(share(parts[p]), -1, 101), to = clamp(share(parts[p + 1]), -1, 101);
    if (to <= from) continue;
    const part = el("i", "crit");
    part.style.left = from + "%";
    part.style.width = to - from + "%";
    times.append(part);
  }
  for (const [at, name] of (eventsOf.get(i) ?? []).slice(0, 50)) {
    const event = el("i", "event" + (texts[name] === "exception" ? " bad" : ""));
    event.style.left = clamp(share(at), -2, 102) + "%";
    event.title = oneLine(texts[name]) + " at " + took(Math.max(0, at));
    times.append(event);
  }
  const length = el("span", "took", S.length[i] ? took(S.length[i]) : "");
  if (right < 84) length.style.left = `calc(${Math.max(0, right)}% + 8px)`;
  else if (left > 16) length.style.right = `calc(${100 - left}% + 8px)`;
  else { length.classList.add("inside"); length.style.left = `calc(${Math.max(0, left)}% + 7px)`; }
  times.append(length);
  row.append(names, times);
  return row;
}

function steps() {
  const width = Math.max(200, $("ruler").clientWidth), span = state.to - state.from, about = span / Math.max(2, Math.floor(width / 110));
  const nice = [];
  for (let power = 1; power < 1e10; power *= 10) nice.push(power, 2 * power, 5 * power);
  nice.push(10e9, 15e9, 30e9, 60e9, 120e9, 300e9, 600e9, 900e9, 1800e9, 3600e9, 7200e9, 21600e9, 86400e9);
  return nice.find(step => step >= about) ?? Math.ceil(about / 86400e9) * 86400e9;
}
let ticksFor = "", tickList = [], tickStep = 1;
function ticks() {
  const key = state.from + " " + state.to + " " + $("ruler").clientWidth;
  if (key !== ticksFor) {
    ticksFor = key;
    tickStep = steps();
    tickList = [];
    for (let at = Math.ceil(state.from / tickStep) * tickStep; at < state.to && tickList.length < 60; at += tickStep) tickList.push(at);
  }
  return tickList;
}
function tickLabel(at) {
  if (at === 0) return "0";
  if (tickStep >= 60e9) return took(at);
  const [unit, name] = tickStep >= 1e9 || at >= 10e9 ? [1e9, "s"] : tickStep >= 1e6 || at >= 10e6 ? [1e6, "ms"] : tickStep >= 1e3 || at >= 10e3 ? [1e3, "µs"] : [1, "ns"];
  const digits = Math.max(0, Math.ceil(-Math.log10(tickStep / unit) - 1e-9));
  return (at / unit).toFixed(digits) + " " + name;
}
function drawRuler() {
  $("ruler").replaceChildren(...ticks().map(at => {
    const tick = el("span", "", tickLabel(at));
    tick.style.left = share(at) + "%";
    return tick;
  }));
}

// The rows of traces

function traceRow(place) {
  const number = traceRows[place], it = traces[number], root = it.roots[0];
  const row = el("div", "trace");
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", number === state.trace);
  row.dataset.trace = it.id;
  row.title = oneLine(texts[S.name[root]]);
  const more = it.roots.length > 1 ? ` +${it.roots.length - 1}` : "";
  const facts = [places[S.resource[root]].service, plural(it.count, "span")];
  if (hitsOf) facts.push(plural(hitsOf[number], "match"));
  const line = el("div", "more", el("span", "", facts.join(" · ")));
  if (it.errors) line.append(el("span", "bad", "✗ " + it.errors.toLocaleString("en")));
  const share = el("div", "share");
  share.style.width = `calc((100% - 32px) * ${it.length / Math.max(1, longest)})`;
  row.append(el("div", "what", el("b", "", oneLine(texts[S.name[root]]) + more), el("span", "", took(it.length))), line, share);
  return row;
}
const longest = traces.reduce((most, trace) => Math.max(most, trace.length), 0);

const spanList = list($("rows"), ROW, () => rows.length, spanRow, "r");
const traceList = list($("trace-list"), TRACE, () => traceRows.length, traceRow, "t");

// The overview of a trace

function drawOverview() {
  const canvas = $("overview").firstElementChild, scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width) return;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const draw = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  draw.scale(scale, scale);
  const colours = Array.from({ length: COLOURS }, (_, c) => style.getPropertyValue("--c" + c));
  const red = style.getPropertyValue("--error");
  const { first, count, length } = trace(), whole = Math.max(1, length);
  const room = height - 8, step = Math.min(5, room / count), thick = Math.max(1, step * 0.75);
  for (const failed of [false, true]) {
    for (let i = first; i < first + count; i++) {
      if ((S.status[i] === ERROR) !== failed) continue;
      draw.globalAlpha = state.group && groups.name(i) !== state.group ? 0.15 : failed ? 1 : 0.85;
      draw.fillStyle = failed ? red : colours[colourOf(i)];
      draw.fillRect(S.start[i] / whole * width, 4 + (i - first) * step, Math.max(1, S.length[i] / whole * width), failed ? Math.max(2, thick) : thick);
    }
  }
}
function drawWindow(from = state.from, to = state.to) {
  const whole = Math.max(1, trace().length), all = from <= 0 && to >= whole;
  $("window").hidden = all;
  $("window").style.left = from / whole * 100 + "%";
  $("window").style.width = (to - from) / whole * 100 + "%";
}

// The details of a span

const shown = value => value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);

function copyButton(text) {
  const made = button("copy", "Copy", async () => {
    try { await navigator.clipboard.writeText(text); made.textContent = "copied"; } catch { made.textContent = "no clipboard"; }
    setTimeout(() => { made.textContent = "copy"; }, 1200);
  }, "copy");
  return made;
}

function table(attributes) {
  const body = el("tbody");
  for (const [key, value] of attributes) {
    const text = shown(value), visible = clean(text);
    const filter = button(oneLine(key), "Search for this", () => setQuery(`${key}=${/["\n]/.test(text) ? text.split(/["\n]/)[0] : `"${text}"`}`));
    const content = el("div", text.length > 600 ? "long" : "", visible);
    const cell = el("td", "value", content);
    if (typeof value === "number" || typeof value === "boolean") content.className = "number";
    if (text.length > 60) cell.append(copyButton(text));
    body.append(el("tr", "", el("td", "key", filter), cell));
  }
  return el("table", "", body);
}

function stack(text) {
  return el("pre", "stack", clean(text));
}

function fact(name, content, title) {
  const made = el("div", "", el("small", "", name), el("b", "", content));
  if (title) made.title = title;
  return made;
}

function drawDetails() {
  const panel = $("details"), i = state.selected;
  panel.hidden = i < 0 || !state.details;
  if (panel.hidden) { panel.replaceChildren(); return; }
  const it = trace(), place = places[S.resource[i]];
  const swatch = el("span", "swatch");
  swatch.style.background = `var(--c${colourOf(i)})`;
  const heading = el("header", "", el("h3", "", oneLine(texts[S.name[i]]) || "(no name)"),
    button("zoom", "Zoom to this span (z)", () => zoomTo(i)), button("✕", "Close (Esc)", () => { state.details = false; drawDetails(); layout(); }));
  const kind = KINDS[S.kind[i]] && S.kind[i] !== 1 ? " · " + KINDS[S.kind[i]] : "";
  const parts = [heading, el("div", "service", swatch, place.process + kind)];

  const attributes = pairs(S.attributes[i]), events = eventsOf.get(i) ?? [];
  const message = texts[S.message[i]];
  const exceptions = events.filter(([, name]) => texts[name] === "exception").map(([at, , list]) => ({ at, ...Object.fromEntries(pairs(list)) }));
  const told = new Set();
  for (const exception of exceptions) {
    const text = exception["exception.message"] ?? "";
    told.add(text);
    const box = el("div", "problem" + (S.status[i] === ERROR ? "" : " mild"), el("b", "", oneLine(exception["exception.type"] ?? "exception")));
    if (text) box.append(el("pre", "long", clean(text)));
    parts.push(box);
    if (exception["exception.stacktrace"]) parts.push(stack(exception["exception.stacktrace"]));
  }
  if (message && !told.has(message) && !exceptions.some(e => message.endsWith(e["exception.message"] ?? "\0"))) {
    parts.push(el("div", "problem" + (S.status[i] === ERROR ? "" : " mild"), el("b", "", S.status[i] === ERROR ? "Error" : "Status"), el("pre", "long", clean(message))));
  } else if (S.status[i] === ERROR && !message && !exceptions.length) {
    parts.push(el("div", "problem", el("b", "", "Error"), "There is no message."));
  }
  if (S.incomplete[i] >= 0) {
    parts.push(el("div", "problem mild", el("b", "", "Its end was not seen"), oneLine(texts[S.incomplete[i]])));
  }
  const grid = el("div", "grid",
    fact("Duration", took(S.length[i]), S.length[i].toLocaleString("en") + " ns"),
    fact("Own time", `${took(S.own[i])} · ${percent(S.own[i], S.length[i])}`, "Time in which no span below it ran"),
    fact("Begins at", "+" + took(S.start[i]), date(it.start + S.start[i] / 1e6)),
    fact("Of the trace", percent(S.length[i], it.length)),
    fact("Critical path", onPath[i] ? `${took(onPath[i])} · ${percent(onPath[i], it.length)}` : "not on it", "What the duration of the trace consists of"),
    fact("Spans below", S.below[i].toLocaleString("en")));
  parts.push(grid);

  if (attributes.length) parts.push(el("h4", "", "Attributes"), table(attributes));
  const others = events.filter(([, name]) => texts[name] !== "exception");
  if (others.length) parts.push(el("h4", "", "Events"));
  for (const [at, name, list] of others.slice(0, 200)) {
    const trail = pairs(list);
    const item = el("div", "happening", el("b", "", oneLine(texts[name]) || "(no name)"), el("span", "", "+" + took(Math.max(0, at - S.start[i]))));
    if (trail.length) item.append(table(trail));
    parts.push(item);
  }
  if (others.length > 200) parts.push(el("div", "happening", `and ${plural(others.length - 200, "more event")}`));
  for (const exception of exceptions) {
    const rest = Object.entries(exception).filter(([key]) => key !== "at" && !["exception.type", "exception.message", "exception.stacktrace"].includes(key));
    if (rest.length) parts.push(el("h4", "", "Exception"), table(rest));
  }
  const logs = logsOf.get(i) ?? [];
  if (logs.length) parts.push(el("h4", "", "Log"));
  for (const [at, level, logger, body, list] of logs.slice(0, 200)) {
    const text = clean(shown(value(body))), trail = pairs(list);
    const item = el("div", "happening log", el("b", "", oneLine(texts[level]) || "–"), el("span", "", `+${took(Math.max(0, at - S.start[i]))} ${oneLine(texts[logger])}`),
      el("div", text.length > 600 ? "long" : "", text));
    if (trail.length) item.append(table(trail));
    parts.push(item);
  }
  if (logs.length > 200) parts.push(el("div", "happening", `and ${plural(logs.length - 200, "more log record")}`));
  const links = linksOf.get(i) ?? [];
  if (links.length || parent[i] >= 0 || missingParent.has(i)) parts.push(el("h4", "", "Parent and links"));
  if (parent[i] >= 0) parts.push(button("↑ parent: " + oneLine(texts[S.name[parent[i]]]), "Go to the parent", () => select(parent[i]), "link"));
  if (missingParent.has(i)) parts.push(el("div", "", "↑ parent: ", el("code", "", missingParent.get(i)), " is not in these files"));
  for (const [traceId, spanId, list] of links) {
    const target = find(traceId, spanId);
    if (target >= 0) parts.push(button("→ link: " + oneLine(texts[S.name[target]]), "Go to the linked span", () => select(target), "link"));
    else parts.push(el("div", "", "→ link: span ", el("code", "", spanId), " of trace ", el("code", "", traceId), ", not in these files"));
    if (list.length) parts.push(table(pairs(list)));
  }
  const more = el("details", "", el("summary", "", "Process and resource"), table(pairs(resources[S.resource[i]])));
  const ids = table([["span", S.id[i]], ["trace", it.id]]);
  parts.push(more, el("h4", "", "Ids"), ids);
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
}

// The head of a trace

function drawHead() {
  const it = trace(), root = it.roots[0];
  $("name").textContent = oneLine(texts[S.name[root]]) + (it.roots.length > 1 ? ` and ${plural(it.roots.length - 1, "other root")}` : "");
  const processes = new Set();
  for (let i = it.first; i < it.first + it.count; i++) processes.add(places[S.resource[i]].process);
  const bit = (content, what, classes) => el("span", classes, el("b", "", content), what ? " " + what : "");
  const facts = [bit(took(it.length)), bit(date(it.start)), bit(it.count.toLocaleString("en"), it.count === 1 ? "span" : "spans")];
  facts.push(bit(it.errors.toLocaleString("en"), it.errors === 1 ? "error" : "errors", it.errors ? "bad" : ""));
  facts.push(processes.size === 1 ? el("span", "", [...processes][0]) : bit(processes.size, "processes"));
  facts.push(el("span", "", "trace ", el("code", "", it.id), " ", copyButton(it.id)));
  $("facts").replaceChildren(...facts);
  $("lost").hidden = it.lost === null;
  $("lost").textContent = it.lost === null ? "" : `This trace is not complete: ${plural(it.lost, "event")} of the kernel's were lost while it ran.`;
}

function drawLegend() {
  const choice = el("select");
  choice.setAttribute("aria-label", "What the colours mean");
  for (const [mode, label] of [["service", "colour: service"], ["process", "colour: process"], ["work", "colour: kind of work"]]) {
    const option = el("option", "", label);
    option.value = mode;
    option.selected = mode === groups.mode;
    choice.append(option);
  }
  choice.addEventListener("change", () => { state.colour = choice.value; state.group = ""; chooseGroups(); drawLegend(); drawOverview(); spanList.renew(); drawDetails(); });
  const entries = groups.list.slice(0, 24).map(group => {
    const swatch = el("span", "swatch");
    swatch.style.background = `var(--c${group.colour})`;
    const made = button(swatch, `${group.name}: ${plural(group.count, "span")}, own time ${took(group.own)}`, () => {
      state.group = state.group === group.name ? "" : group.name;
      drawLegend();
      drawOverview();
      spanList.renew();
    });
    made.append(el("span", "", group.name), el("small", "", group.own ? took(group.own) : ""));
    made.setAttribute("aria-pressed", state.group === group.name);
    return made;
  });
  if (groups.list.length > 24) entries.push(el("span", "", `and ${groups.list.length - 24} more`));
  const path = button("critical path", "The dark lines: what the duration of the trace consists of", () => {
    state.critical = !state.critical;
    drawLegend();
    spanList.renew();
  });
  path.setAttribute("aria-pressed", state.critical);
  $("legend").replaceChildren(choice, ...entries, path);
}

// Putting it together

function drawRows(keepPlace) {
  chooseRows();
  const none = $("rows").querySelector(".none");
  if (none) none.remove();
  if (!rows.length) $("rows").append(el("div", "none", "No span of this trace is in this selection. Esc takes it back."));
  if (!keepPlace) $("rows").scrollTop = 0;
  $("rows").setAttribute("aria-rowcount", rows.length);
  spanList.renew();
  pointAt();
  drawStatus();
  drawRuler();
  drawWindow();
}

function pointAt() {
  const place = rows.indexOf(state.selected);
  if (place >= 0) $("rows").setAttribute("aria-activedescendant", "r" + place); else $("rows").removeAttribute("aria-activedescendant");
  return place;
}

function drawStatus() {
  const it = trace(), parts = [];
  parts.push(el("span", "", rows.length === it.count ? `all ${plural(it.count, "span")}` : `${rows.length.toLocaleString("en")} of ${plural(it.count, "span")}`));
  if (state.from > 0 || state.to < it.length) {
    parts.push(el("span", "", `${took(Math.round(state.to - state.from))} of ${took(it.length)}`), button("whole trace", "0", () => zoom(0, it.length)));
  }
  if (data.files.length) parts.push(el("span", "keys", "↑ ↓ ← →  move · Enter details · z zoom · e next error · ? all keys"));
  $("status").replaceChildren(...parts);
}

function drawTraces() {
  chooseTraces();
  $("trace-count").textContent = traceRows.length === traces.length ? plural(traces.length, "trace") : `${traceRows.length} of ${plural(traces.length, "trace")}`;
  traceList.renew();
}

function drawSearch() {
  const found = hits ? hits.reduce((sum, hit) => sum + hit, 0) : 0;
  $("found").textContent = hits ? (found ? plural(found, "match") : "nothing found") : "";
  $("errors").textContent = ERRORS ? `✗ ${plural(ERRORS, "error")}` : "no errors";
  $("errors").classList.toggle("some", ERRORS > 0);
  $("errors").setAttribute("aria-pressed", state.errors);
}

function layout() {
  const rows = $("rows");
  document.documentElement.style.setProperty("--scrollbar", rows.offsetWidth - rows.clientWidth + "px");
  drawRuler();
  drawOverview();
}

/// Shows a trace; `span`: with this one chosen. Without one, the error that the others came from is.
function open(number, span = -1) {
  state.trace = number;
  state.from = 0;
  state.to = Math.max(1, trace().length);
  foldAtFirst();
  chooseGroups();
  if (span < 0 && trace().errors) {
    const { first, count } = trace();
    for (let i = first; i < first + count && span < 0; i++) if (S.status[i] === ERROR && !hasFailingChild(i)) span = i;
  }
  state.selected = span;
  state.details = span >= 0;
  drawHead();
  drawLegend();
  drawDetails();
  layout();
  reveal(span);
  drawRows();
  if (span >= 0) spanList.show(pointAt());
  traceList.renew();
  remember();
}

/// Unfolds what hides a span.
function reveal(span) {
  for (let at = span >= 0 ? parent[span] : -1; at >= 0; at = parent[at]) collapsed.delete(at);
}

function select(span, details = true) {
  if (traceOf[span] !== state.trace) { open(traceOf[span], span); return; }
  state.selected = span;
  state.details = state.details || details;
  let place = rows.indexOf(span);
  if (place < 0) {
    reveal(span);
    if (!inWindow(span)) { state.from = 0; state.to = Math.max(1, trace().length); }
    if (state.order === "critical") $("order").value = state.order = "tree";
    if (!wanted(span) && rowsAreFiltered()) { clearFilters(); }
    drawRows(true);
    place = rows.indexOf(span);
  }
  drawDetails();
  spanList.show(place);
  spanList.renew();
  pointAt();
  remember();
}
const rowsAreFiltered = () => !!hits || state.errors;
function clearFilters() {
  state.query = $("query").value = "";
  state.errors = false;
  search();
  drawSearch();
  drawTraces();
}

function fold(span, folded, all) {
  if (all) for (let i = span; i <= span + S.below[span]; i++) folded ? S.below[i] && collapsed.add(i) : collapsed.delete(i);
  else folded ? collapsed.add(span) : collapsed.delete(span);
  drawRows(true);
}

function zoom(from, to) {
  const whole = Math.max(1, trace().length), least = Math.min(whole, 100);
  if (to - from < least) { const middle = (from + to) / 2; from = middle - least / 2; to = middle + least / 2; }
  from = clamp(from, 0, whole - least);
  to = clamp(to, from + least, whole);
  state.from = from;
  state.to = to;
  drawRows(true);
  remember();
}
function zoomTo(span) {
  const margin = Math.max(50, S.length[span] * 0.04);
  zoom(S.start[span] - margin, end[span] + margin);
  spanList.show(Math.max(0, rows.indexOf(span)));
}
function zoomBy(factor, at = (state.from + state.to) / 2) {
  zoom(at - (at - state.from) * factor, at + (state.to - at) * factor);
}

function setQuery(query) {
  state.query = query;
  if ($("query").value !== query) $("query").value = query;
  filter();
}
function filter() {
  search();
  drawSearch();
  drawTraces();
  if (traceRows.length && !traceRows.includes(state.trace)) { open(traceRows[0], firstHit(traceRows[0])); return; }
  drawRows();
  remember();
}
function firstHit(number) {
  const { first, count } = traces[number];
  for (let i = first; i < first + count; i++) if (wanted(i)) return i;
  return -1;
}

function nextError(step) {
  if (!ERRORS) return;
  let i = state.selected >= 0 ? state.selected : step > 0 ? trace().first - 1 : trace().first + trace().count;
  for (let tries = 0; tries < COUNT; tries++) {
    i = (i + step + COUNT) % COUNT;
    if (S.status[i] === ERROR) { select(i); return; }
  }
}

/// The state is in the address, so that it can be kept and passed on.
function remember() {
  const words = new URLSearchParams();
  if (traces.length > 1) words.set("trace", trace().id);
  if (state.selected >= 0 && state.details) words.set("span", S.id[state.selected]);
  if (state.query) words.set("q", state.query);
  if (state.errors) words.set("errors", "1");
  if (state.order !== "tree") words.set("order", state.order);
  if (state.from > 0 || state.to < trace().length) { words.set("from", Math.round(state.from)); words.set("to", Math.round(state.to)); }
  try { history.replaceState(null, "", "#" + words); } catch { /* not everywhere with files */ }
}

function start() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.query = $("query").value = words.get("q") ?? "";
  state.errors = words.get("errors") === "1";
  if (["critical", "length", "own", "start"].includes(words.get("order"))) $("order").value = state.order = words.get("order");
  search();
  chooseTraces();
  let number = traces.findIndex(trace => trace.id === words.get("trace"));
  if (number < 0 && rowsAreFiltered()) number = traceRows[0] ?? 0;
  if (number < 0) number = traces.findIndex(trace => trace.errors);
  if (number < 0) number = traces.reduce((most, trace, i) => trace.count > traces[most].count ? i : most, 0);
  const span = words.has("span") ? find(traces[number].id, words.get("span")) : rowsAreFiltered() ? firstHit(number) : -1;
  const from = Number(words.get("from")), to = Number(words.get("to"));
  const names = data.files.map(file => file.split("/").pop()).join(", ");
  $("title").textContent = oneLine(names);
  $("title").title = `${clean(data.files.join(", "))} · floe-agent ${data.agent}`;
  document.title = `${oneLine(texts[S.name[traces[number].roots[0]]])} · ${oneLine(names)}`;
  $("traces").hidden = traces.length === 1;
  $("notes").hidden = !data.notes.length;
  $("notes").replaceChildren(...data.notes.map(note => el("div", "", clean(note))));
  drawSearch();
  open(number, span);
  drawTraces();
  traceList.show(traceRows.indexOf(number));
  if (to > from && from >= 0) zoom(from, to);
  $("rows").focus({ preventScroll: true });
}

// Input

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}
function kept(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* not everywhere with files */ }
  return null;
}
const preference = matchMedia("(prefers-color-scheme: dark)");
theme((kept("floe-theme") ?? (preference.matches ? "dark" : "light")) === "dark");
function otherTheme() {
  const dark = document.documentElement.dataset.theme !== "dark";
  theme(dark);
  kept("floe-theme", dark ? "dark" : "light");
  drawOverview();
}

function showKeys() {
  const keys = [
    ["↑ ↓, j k", "previous, next span"], ["← →", "fold or to the parent, unfold"], ["Enter", "details"], ["z, 0", "zoom to the span, whole trace"],
    ["+ −", "zoom in, out; also Ctrl and the wheel; drag over the overview or the ruler"], ["e, Shift e", "next, previous error"], ["/", "search"],
    ["c, x", "collapse all, expand all"], ["n, p", "next, previous trace"], ["t", "light or dark"], ["Esc", "back: search, zoom, details"],
  ];
  const body = el("tbody", "", ...keys.map(([key, what]) => el("tr", "", el("td", "", el("kbd", "", key)), el("td", "", what))));
  const hint = el("p", "", "Search: all words must occur, in a name, an attribute, an event, a log record or the resource. ",
    el("code", "", "key=text"), ", ", el("code", "", "key=\"exactly\""), ", ", el("code", "", ">500ms"), ", ", el("code", "", "<2s"), ", ", el("code", "", "-word"), ".");
  const close = button("close", "", () => $("keys").close());
  $("keys").replaceChildren(el("h3", "", "Keys"), el("table", "", body), hint, el("p", "", close));
  $("keys").showModal();
}

function step(by) {
  if (!rows.length) return;
  const place = rows.indexOf(state.selected);
  select(rows[clamp(place < 0 ? (by > 0 ? 0 : rows.length - 1) : place + by, 0, rows.length - 1)], false);
}
function stepTrace(by) {
  const place = traceRows.indexOf(state.trace), next = traceRows[clamp(place + by, 0, traceRows.length - 1)];
  if (next === undefined || next === state.trace) return;
  open(next, rowsAreFiltered() ? firstHit(next) : -1);
  traceList.show(traceRows.indexOf(next));
}
function back() {
  if (state.query || state.errors) { clearFilters(); drawRows(); remember(); }
  else if (state.from > 0 || state.to < trace().length) zoom(0, trace().length);
  else if (state.details) { state.details = false; drawDetails(); layout(); remember(); }
}
function left(i) {
  const folds = state.order === "tree" && !rowsAreFiltered() && S.below[i] > 0;
  if (folds && !collapsed.has(i)) fold(i, true); else if (parent[i] >= 0) select(parent[i], false);
}
function right(i) {
  if (collapsed.has(i)) fold(i, false); else if (S.below[i] > 0) select(i + 1, false);
}
function all(folded) {
  const { first, count } = trace();
  for (let i = first; i < first + count; i++) if (folded && S.below[i] && S.depth[i] >= (trace().roots.length > 1 ? 0 : 1)) collapsed.add(i); else collapsed.delete(i);
  drawRows();
  const place = pointAt();
  if (place >= 0) spanList.show(place);
}
const page = () => Math.max(1, Math.floor($("rows").clientHeight / ROW) - 1);

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const typing = event.target.closest?.("input, select"), i = state.selected;
  if (typing) {
    if (event.key === "Escape" && event.target === $("query")) { setQuery(""); $("rows").focus(); }
    else if (event.key === "Enter" && event.target === $("query")) { $("rows").focus(); if (rows.length && !wanted(i)) select(firstHit(state.trace), true); }
    else return;
    event.preventDefault();
    return;
  }
  const inTraces = event.target === $("trace-list");
  const act = {
    ArrowDown: () => inTraces ? stepTrace(1) : step(1), ArrowUp: () => inTraces ? stepTrace(-1) : step(-1), j: () => step(1), k: () => step(-1),
    PageDown: () => step(page()), PageUp: () => step(-page()), Home: () => rows.length && select(rows[0], false), End: () => rows.length && select(rows[rows.length - 1], false),
    ArrowLeft: () => i >= 0 && left(i), ArrowRight: () => i >= 0 && right(i),
    z: () => i >= 0 && zoomTo(i), 0: () => zoom(0, trace().length), "+": () => zoomBy(0.5), "=": () => zoomBy(0.5), "-": () => zoomBy(2),
    e: () => nextError(1), E: () => nextError(-1), "/": () => $("query").select(), c: () => all(true), x: () => all(false),
    n: () => stepTrace(1), p: () => stepTrace(-1), t: otherTheme, "?": showKeys, Escape: back,
  }[event.key];
  if (act) { event.preventDefault(); act(); return; }
  if ((event.key === "Enter" || event.key === " ") && !event.target.closest("button, a, summary")) {
    event.preventDefault();
    if (i < 0) return;
    state.details = !state.details;
    drawDetails();
    layout();
    remember();
  }
});

$("rows").addEventListener("click", event => {
  const row = event.target.closest(".row");
  if (!row) return;
  const i = rows[Number(row.id.slice(1))];
  if (event.target.closest(".fold, .hidden") && S.below[i] && state.order === "tree" && !rowsAreFiltered()) fold(i, !collapsed.has(i), event.shiftKey);
  else select(i);
});
$("rows").addEventListener("dblclick", event => {
  const row = event.target.closest(".row");
  if (row && !event.target.closest(".fold")) zoomTo(rows[Number(row.id.slice(1))]);
});
$("rows").addEventListener("wheel", event => {
  if (!event.ctrlKey && !event.shiftKey) return;
  event.preventDefault();
  const box = $("ruler").getBoundingClientRect(), at = state.from + (event.clientX - box.left) / box.width * (state.to - state.from);
  if (event.ctrlKey) zoomBy(event.deltaY > 0 ? 1.25 : 0.8, clamp(at, state.from, state.to));
  else { const by = (event.deltaX || event.deltaY) / 800 * (state.to - state.from), whole = trace().length, width = state.to - state.from, from = clamp(state.from + by, 0, whole - width); zoom(from, from + width); }
}, { passive: false });
$("trace-list").addEventListener("click", event => {
  const row = event.target.closest(".trace");
  if (row) { const number = traceRows[Number(row.id.slice(1))]; open(number, rowsAreFiltered() ? firstHit(number) : -1); }
});

/// Dragging over `area` chooses a stretch of time between what its edges stand for.
function draggable(area, edges) {
  area.addEventListener("pointerdown", down => {
    if (down.button) return;
    area.setPointerCapture(down.pointerId);
    const [low, high] = edges(), box = area.getBoundingClientRect();
    const time = event => low + clamp((event.clientX - box.left) / box.width, 0, 1) * (high - low);
    const stretch = event => [Math.min(time(down), time(event)), Math.max(time(down), time(event))];
    const drag = new AbortController(), options = { signal: drag.signal };
    area.addEventListener("pointermove", event => drawWindow(...stretch(event)), options);
    area.addEventListener("pointercancel", () => { drag.abort(); drawWindow(); }, options);
    area.addEventListener("pointerup", event => {
      drag.abort();
      if (Math.abs(event.clientX - down.clientX) > 3) zoom(...stretch(event)); else drawWindow();
    }, options);
  });
  area.addEventListener("dblclick", () => zoom(0, trace().length));
}
draggable($("overview"), () => [0, Math.max(1, trace().length)]);
draggable($("ruler"), () => [state.from, state.to]);

function names(share) {
  document.documentElement.style.setProperty("--names", clamp(share, 12, 80) + "%");
  layout();
  spanList.renew();
}
let nameShare = 42;
$("divider").addEventListener("pointerdown", down => {
  $("divider").setPointerCapture(down.pointerId);
  const box = $("columns").getBoundingClientRect();
  const move = event => names(nameShare = (event.clientX - box.left) / box.width * 100);
  $("divider").addEventListener("pointermove", move);
  $("divider").addEventListener("pointerup", () => $("divider").removeEventListener("pointermove", move), { once: true });
});
$("divider").addEventListener("keydown", event => {
  const by = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
  if (by) { event.stopPropagation(); event.preventDefault(); names(nameShare = clamp(nameShare + by, 12, 80)); }
});

let typing = 0;
$("query").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => { state.query = $("query").value; filter(); }, COUNT > 5000 ? 150 : 30);
});
$("errors").addEventListener("click", () => { state.errors = !state.errors && ERRORS > 0; filter(); });
$("theme").addEventListener("click", otherTheme);
$("help").addEventListener("click", showKeys);
$("collapse").addEventListener("click", () => all(true));
$("expand").addEventListener("click", () => all(false));
$("order").addEventListener("change", () => { state.order = $("order").value; drawRows(); remember(); $("rows").focus(); });
$("trace-order").addEventListener("change", () => { state.traceOrder = $("trace-order").value; drawTraces(); });
preference.addEventListener("change", () => { if (!kept("floe-theme")) { theme(preference.matches); drawOverview(); } });
let resized = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(resized); resized = requestAnimationFrame(() => { layout(); drawWindow(); spanList.renew(); }); });

window.addEventListener("hashchange", start);
start();
})();
