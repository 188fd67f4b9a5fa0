// The live page of a run. The coordinator sends events; this file keeps what they say and draws what has changed, at
// most once a frame. Names and reasons come from workers, so data becomes text, never HTML. The server's content policy
// forbids style attributes: styles are classes, SVG attributes, or set through `element.style`.
"use strict";

// ---------------------------------------------------------------------------------------------- numbers as text

const NONE = "–";
const isNumber = (n) => typeof n === "number" && Number.isFinite(n);
const count = (n) => (isNumber(n) ? n.toLocaleString("en-US") : NONE);
const percent = (n) => (isNumber(n) ? `${(100 * n).toFixed(1)} %` : NONE);
const seconds = (n) => (isNumber(n) ? `${short(n)} s` : NONE);

/** In few digits, as the program's other outputs: 0.25, 12.5, 3200, 12.8k, 1.5M. */
function short(n, digits = 3) {
  if (!isNumber(n)) return NONE;
  const size = Math.abs(n);
  const units = [[999.5e6, 1e9, "G"], [999.5e3, 1e6, "M"], [9995, 1e3, "k"], [0, 1, ""]];
  const [, unit, suffix] = units.find(([from]) => size >= from);
  if (size > 0 && size < 1e-4) return n.toExponential(1).replaceAll("-", "−").replace(".0e", "e");
  const scaled = n / unit;
  const places = scaled === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(scaled))));
  const text = scaled.toFixed(Math.min(places, 12));
  return (text.includes(".") ? text.replace(/\.?0+$/, "") : text).replace("-", "−") + suffix;
}

/** In its two largest units: 2 d 3 h, 1 h 5 min, 12 s. */
function duration(n) {
  if (!isNumber(n)) return NONE;
  const s = Math.round(n);
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = units.findIndex(([size]) => s >= size);
  if (first < 0) return "0 s";
  const [[size, unit], next] = [units[first], units[first + 1]];
  const rest = next ? Math.floor((s % size) / next[0]) : 0;
  return `${Math.floor(s / size)} ${unit}` + (rest > 0 ? ` ${rest} ${next[1]}` : "");
}

function bytes(n) {
  if (!isNumber(n)) return NONE;
  const [size, unit] = n >= 2 ** 30 ? [2 ** 30, "GiB"] : n >= 2 ** 20 ? [2 ** 20, "MiB"] : [1024, "KiB"];
  return `${short(n / size)} ${unit}`;
}

/** A local time; with the date unless it is today. */
function clock(unixSeconds) {
  if (!isNumber(unixSeconds)) return NONE;
  const [at, two] = [new Date(unixSeconds * 1000), (n) => String(n).padStart(2, "0")];
  const time = [at.getHours(), at.getMinutes(), at.getSeconds()].map(two).join(":");
  if (at.toDateString() === new Date().toDateString()) return time;
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${time}`;
}

// ---------------------------------------------------------------------------------------------- elements

const $ = (id) => document.getElementById(id);

function el(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function svg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** Sets a text only where it differs: screen readers announce, and selections end, with every change. */
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Makes a table's rows those of `rows`, lists of cells: a text, or {text, mark: its class, share: length of a bar}. */
function fill(table, rows) {
  const body = table.tBodies[0];
  rows.forEach((cells, index) => {
    const tr = body.rows[index] ?? body.appendChild(tableRow(cells));
    cells.forEach((cell, column) => {
      const { text = cell, mark = "", share } = typeof cell === "object" ? cell : {};
      const td = tr.cells[column];
      put(td, text);
      if (td.className !== mark) td.className = mark;
      if (share !== undefined) td.style.setProperty("--share", share.toFixed(3));
    });
  });
  while (body.rows.length > rows.length) body.lastChild.remove();
  table.closest("section").classList.toggle("empty", rows.length === 0);
}

function tableRow(cells) {
  const tr = el("tr");
  cells.forEach((_, column) => tr.append(el(column === 0 ? "th" : "td")));
  tr.firstChild.scope = "row";
  return tr;
}

// ---------------------------------------------------------------------------------------------- what is known

const run = { status: null, training: [], teacher: [], student: [], events: [], checkpoints: [], pictures: [] };
const STATES = ["waiting", "training", "finishing", "succeeded", "stopped", "failed"];
const EVENTS_SHOWN = 500;

function addRow(row) {
  if (row.kind === "iteration") run.training.push(row);
  else addOnce(row.subject === "teacher" ? run.teacher : run.student, row);
}

/** Adds an item, known by its iteration, in order; a newer one replaces the older. */
function addOnce(list, item) {
  const iteration = (any) => any.iteration ?? any;
  const others = list.filter((other) => iteration(other) !== iteration(item));
  list.splice(0, list.length, ...[...others, item].sort((a, b) => iteration(a) - iteration(b)));
}

const HANDLERS = {
  snapshot(all) {
    const { status, events, checkpoints, pictures } = all;
    Object.assign(run, { status, events, checkpoints, pictures, training: [], teacher: [], student: [] });
    all.rows.forEach(addRow);
    eventsDrawn = 0;
    $("events").tBodies[0].replaceChildren();
    changed(...Object.keys(PARTS));
  },
  status(status) {
    run.status = status;
    changed("status", "members");
  },
  row(row) {
    addRow(row);
    changed("status", "curves", "scores");
  },
  rewind({ iteration }) {
    run.training = run.training.filter((row) => row.iteration <= iteration);
    run.student = run.student.filter((row) => row.iteration <= iteration);
    changed("status", "curves", "scores");
  },
  event(event) {
    run.events.push(event);
    changed("events");
  },
  /** The whole list: older ones have been removed. */
  checkpoints(checkpoints) {
    run.checkpoints = checkpoints;
    changed("status", "checkpoints");
  },
  checkpoint(checkpoint) {
    addOnce(run.checkpoints, checkpoint);
    changed("status", "checkpoints");
  },
  picture({ iteration }) {
    addOnce(run.pictures, iteration);
    changed("picture");
  },
};

// ---------------------------------------------------------------------------------------------- drawing, once a frame

const PARTS = {
  status: drawStatus, members: drawMembers, curves: drawCurves, reading: drawReadings, scores: drawScores,
  events: drawEvents, checkpoints: drawCheckpoints, picture: drawPicture,
};
const pending = new Set();

function changed(...parts) {
  if (pending.size === 0) requestAnimationFrame(draw);
  parts.forEach((part) => pending.add(part));
  // A hidden tab draws no frame, but its title is seen.
  if (run.status) document.title = `${progress(run.status)} · ${run.status.run} · ${run.status.state}`;
}

function draw() {
  const parts = Object.keys(PARTS).filter((part) => pending.has(part));
  pending.clear();
  if (run.status) parts.forEach((part) => PARTS[part]());
}

/** Not 100 % before the last iteration is done. */
function progress({ iteration, iterations }) {
  if (!(iterations > 0)) return NONE;
  return iteration < iterations ? percent(Math.min(iteration / iterations, 0.999)) : "100 %";
}

// ---------------------------------------------------------------------------------------------- state and progress

const TILES = Object.fromEntries(
  ["Iteration", "Time left", "Time so far", "Images", "Images/s", "Workers", "Newest checkpoint", "Repeated iterations"]
    .map((name) => {
      const [tile, value, detail] = [el("div"), el("dd", "", NONE), el("dd")];
      tile.append(el("dt", "", name), value, detail);
      $("tiles").append(tile);
      return [name, { value, detail }];
    }),
);

function tile(name, value, detail, mark = "") {
  put(TILES[name].value, value);
  put(TILES[name].detail, detail);
  TILES[name].detail.className = mark;
}

/** Seconds of one iteration, over the newest rows: as the program's own bar, evaluations and waiting do not count. */
function pace() {
  const rows = run.training.slice(-20).filter((row) => isNumber(row.seconds?.total));
  const iterations = rows.reduce((sum, row) => sum + row.iterations, 0);
  return iterations > 0 ? rows.reduce((sum, row) => sum + row.seconds.total * row.iterations, 0) / iterations : null;
}

function drawStatus() {
  const s = run.status;
  put($("run"), s.run);
  put($("state-word"), s.state);
  put($("reason"), s.reason);
  put($("over"), ended ? "The run has ended; this page no longer updates." : "");
  $("state").className = `banner ${STATES.includes(s.state) ? s.state : ""}`;
  $("bar").value = s.iterations > 0 ? s.iteration / s.iterations : 0;

  const [newest, each] = [run.training.at(-1), pace()];
  const over = ["succeeded", "stopped", "failed"].includes(s.state);
  const dropped = run.training.reduce((sum, row) => sum + (row.non_finite_samples ?? 0), 0);
  const standby = s.members.filter((member) => member.rank == null).length;
  const checkpoint = run.checkpoints.at(-1);
  tile("Iteration", count(s.iteration), `of ${count(s.iterations)}, ${progress(s)}`);
  const left = over || each === null ? NONE : duration(each * Math.max(0, s.iterations - s.iteration));
  tile("Time left", left, each === null ? "" : `${short(each)} s per iteration`);
  tile("Time so far", duration(s.wall_seconds), "of all attempts");
  const [finite, mark] = dropped > 0 ? [`${count(dropped)} not finite, dropped`, "warn"] : ["all finite", ""];
  tile("Images", short(s.images, 4), finite, mark);
  const window = newest ? `over ${count(newest.iterations)} iteration${newest.iterations === 1 ? "" : "s"}` : "";
  tile("Images/s", short(newest?.images_per_second), window);
  const waiting = standby > 0 ? `, ${count(standby)} standby` : "";
  tile("Workers", count(s.members_total), `generation ${count(s.generation)}${waiting}`);
  const saved = checkpoint?.iteration === s.committed_iteration ? checkpoint : undefined;
  const details = [bytes(saved?.bytes), clock(saved?.time)].filter((text) => text !== NONE);
  tile("Newest checkpoint", s.committed_iteration === null ? "none" : count(s.committed_iteration), details.join(", "));
  tile("Repeated iterations", count(s.repeated_iterations), "computed again");
}

function drawMembers() {
  const { members, members_total: total } = run.status;
  const order = (member) => member.rank ?? Infinity;
  const sorted = [...members].sort((a, b) => order(a) - order(b) || 0);
  const slowest = Math.max(...members.map((member) => member.compute_seconds ?? 0));
  fill($("members"), sorted.map((m) => [
    m.rank == null ? "standby" : count(m.rank),
    { text: m.worker, mark: "free" },
    { text: m.host, mark: "free" },
    { text: m.device, mark: "free" },
    m.compute_seconds == null ? NONE : {
      text: seconds(m.compute_seconds) + (m.straggles ? " ▲ slow" : ""),
      mark: m.straggles ? "share warn" : "share",
      share: slowest > 0 ? m.compute_seconds / slowest : 0,
    },
    m.liveness === "alive" ? { text: "✓ alive", mark: "good" } : { text: `? ${m.liveness}`, mark: "warn" },
    { text: m.activity, mark: "free" },
    { text: m.cursor, mark: "soft" },
    { text: String(m.pid), mark: "soft" },
  ]));
  const listed = `${count(members.length)} of ${count(total)} workers are listed.`;
  put($("members-text"), total > members.length ? listed : "");
}

// ---------------------------------------------------------------------------------------------- scores, lists, picture

const SCORES = [
  ["FID", "fid", short], ["Precision", "precision", percent], ["Recall", "recall", percent],
  ["Class agreement", "agreement", percent], ["CLIP score", "clip_score", short], ["Diversity", "diversity", short],
  ["Evaluations per image", "evaluations_per_image", count], ["Images/s when sampling", "images_per_second", short],
];

function drawScores() {
  const [teacher, student] = [run.teacher.at(-1), run.student.at(-1)];
  const rows = SCORES.map(([name, key, as]) => [name, as(teacher?.scores[key]), as(student?.scores[key])]);
  fill($("scores"), rows.filter(([, t, s]) => t !== NONE || s !== NONE));
  const text = student ? `The student at iteration ${count(student.iteration)}.` : "The student is not evaluated yet.";
  put($("scores-text"), text);
}

const LEVELS = { info: ["info", "soft"], warn: ["▲ warn", "warn"], error: ["✕ error", "bad"] };
let eventsDrawn = 0;

/** Prepends only what is new, so that a reader who has scrolled to older events stays there. */
function drawEvents() {
  const body = $("events").tBodies[0];
  for (const event of run.events.slice(eventsDrawn).slice(-EVENTS_SHOWN)) {
    const [level, mark] = LEVELS[event.level] ?? LEVELS.info;
    const cells = [[clock(event.time), ""], [level, mark], [event.what, "free"], [event.reason, "free"]];
    const tr = tableRow(cells);
    cells.forEach(([text, className], column) => Object.assign(tr.cells[column], { textContent: text, className }));
    body.prepend(tr);
  }
  while (body.rows.length > EVENTS_SHOWN) body.lastChild.remove();
  run.events = run.events.slice(-EVENTS_SHOWN);
  eventsDrawn = run.events.length;
  $("events").closest("section").classList.toggle("empty", eventsDrawn === 0);
}

function drawCheckpoints() {
  const newestFirst = [...run.checkpoints].reverse();
  fill($("checkpoints"), newestFirst.map((c) => [count(c.iteration), bytes(c.bytes), clock(c.time)]));
}

// The picture that the reader chose; null follows the newest.
let chosen = null;
let shown = null;

function drawPicture() {
  const [pictures, slider] = [run.pictures, $("slider")];
  const wanted = pictures.includes(chosen) ? chosen : pictures.at(-1);
  $("frame").classList.toggle("none", shown === null);
  slider.disabled = pictures.length < 2;
  if (wanted === undefined) return;
  slider.max = pictures.length - 1;
  slider.value = pictures.indexOf(wanted);
  const text = `Iteration ${count(wanted)}${wanted === pictures.at(-1) ? ", the newest" : ""}`;
  const place = `${pictures.indexOf(wanted) + 1} of ${pictures.length}`;
  slider.setAttribute("aria-valuetext", text);
  put($("picture-text"), `${text} · ${place}`);
  if (wanted === shown) return;
  // The old picture stays until the new one is decoded, so that nothing flickers.
  const image = new Image();
  image.alt = `Samples of the student at iteration ${count(wanted)}`;
  image.src = `pictures/${wanted}.png`;
  shown = wanted;
  image.decode().then(() => {
    if (shown !== wanted) return;
    $("frame").style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
    $("frame").classList.remove("none");
    $("frame").replaceChildren(image);
  }, () => {
    if (shown !== wanted) return;
    shown = null;
    put($("picture-text"), `Iteration ${count(wanted)}: the picture cannot be loaded`);
  });
}

$("slider").addEventListener("input", () => {
  const index = Number($("slider").value);
  chosen = index === run.pictures.length - 1 ? null : run.pictures[index];
  changed("picture");
});

// ---------------------------------------------------------------------------------------------- axes

const AXES = {
  images: { name: "images", text: (x) => `${short(x, 4)} images` },
  iteration: { name: "iterations", text: (x) => `iteration ${count(x)}` },
  wall_seconds: { name: "time", text: duration },
};
let axis = "images";

function linearTicks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  // 3 · 0.1 is not 0.3.
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Powers of ten, or 1, 2 and 5 times these where few fit; a narrow range gets even steps. */
function logTicks(low, high, most) {
  const powers = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) powers.push(p);
  const within = (factors, every) => powers.filter((p) => p % every === 0)
    .flatMap((p) => factors.map((n) => Number(`${n}e${p}`))).filter((t) => t >= low && t <= high);
  const choices = [within([1, 2, 5], 1), ...[1, 2, 3, 5, 10].map((every) => within([1], every))];
  const ticks = choices.find((choice) => choice.length <= most);
  return ticks?.length >= 2 ? ticks : linearTicks(low, high, most).filter((t) => t > 0);
}

const TIME_UNITS = [[1, "s", [1, 2, 5, 10, 20, 30]], [60, "min", [1, 2, 5, 10, 20, 30]], [3600, "h", [1, 2, 4, 6, 12]],
  [86400, "d", [1, 2, 5, 10, 20, 50, 100]]];

function timeTicks(high, most) {
  const steps = TIME_UNITS.flatMap(([size, unit, counts]) => counts.map((n) => ({ n, size, unit })));
  const { n, size, unit } = steps.find((step) => high / (step.n * step.size) <= most) ?? steps.at(-1);
  const ticks = Array.from({ length: Math.floor(high / (n * size)) + 1 }, (_, i) => i * n);
  return ticks.map((t) => [t * size, t === 0 ? "0" : `${t} ${unit}`]);
}

/** Ticks with as many digits as it takes to tell them apart. */
function labelled(ticks, format) {
  if (format !== short) return ticks.map((t) => [t, format(t)]);
  for (let digits = 3; ; digits++) {
    const labels = ticks.map((t) => short(t, digits));
    if (digits > 8 || new Set(labels).size === labels.length) return ticks.map((t, i) => [t, labels[i]]);
  }
}

/** The range of an axis. A few values far outside, as of the first iterations, must not flatten the curve. */
function domain(values, { log, zero }) {
  const sorted = Float64Array.from(values).sort();
  let [low, high] = [sorted[0], sorted.at(-1)];
  if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
  const [p2, p98] = [0.02, 0.98].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
  if (sorted.length >= 50 && high - low > 3 * (p98 - p2) && p98 > p2) {
    [low, high] = [Math.max(low, p2 - 0.4 * (p98 - p2)), Math.min(high, p98 + 0.4 * (p98 - p2))];
  }
  if (zero) low = Math.min(0, low);
  const margin = high > low ? 0.06 * (high - low) : Math.abs(high) * 0.1 || 1;
  return [zero && low === 0 ? 0 : low - margin, high + margin];
}

// ---------------------------------------------------------------------------------------------- curves

const HEIGHT = 190;
const PLOT = { left: 46, right: 10, top: 8, bottom: 36 };

const scoreChart = (title, unit, key, more = {}) => ({
  title, unit, optional: true, ...more,
  series: [
    { name: "student", colour: "blue", from: "student", of: (row) => row.scores[key] },
    { name: "teacher", colour: "orange", from: "teacher", of: (row) => row.scores[key] },
  ],
});
const line = (name, colour, of, more = {}) => ({ name, colour, of, from: "training", ...more });

const CHARTS = [
  scoreChart("FID", "lower is better, log", "fid", { log: true }),
  scoreChart("Precision", "share of samples that look real", "precision", { format: percent }),
  scoreChart("Recall", "share of the reference covered", "recall", { format: percent }),
  scoreChart("Class agreement", "share of samples", "agreement", { format: percent }),
  scoreChart("CLIP score", "text against image, 0 to 100", "clip_score"),
  scoreChart("Diversity", "feature distance within a condition", "diversity"),
  { title: "Generator loss", unit: "mean over samples", series: [
    line("generator", "purple", (r) => r.generator_loss),
  ] },
  { title: "Fake score loss", unit: "mean over samples", series: [
    line("fake score", "green", (r) => r.fake_score_loss),
  ] },
  { title: "Adversarial losses", unit: "mean over samples", optional: true, series: [
    line("generator", "purple", (r) => r.generator_adversarial_loss),
    line("discriminator", "orange", (r) => r.discriminator_loss),
  ] },
  { title: "Score difference", unit: "squared, log", log: true, series: [
    line("mean", "blue", (r) => r.score_difference),
  ] },
  { title: "Gradient norms", unit: "L2, log", log: true, series: [
    line("generator", "purple", (r) => r.generator_grad_norm),
    line("fake score", "green", (r) => r.fake_score_grad_norm),
  ] },
  { title: "Seconds per iteration", unit: "slowest rank", zero: true, series: [
    line("compute", "blue", (r) => r.seconds?.compute, { area: true }),
    line("communication", "sand", (r) => r.seconds?.communication, { area: true }),
    line("optimizer", "wine", (r) => r.seconds?.optimizer, { area: true }),
    line("total", "ink", (r) => r.seconds?.total),
  ] },
  { title: "Throughput", unit: "images/s, training alone", zero: true, series: [
    line("images/s", "blue", (r) => r.images_per_second),
  ] },
  { title: "Loss scales", unit: "fp16, log", log: true, optional: true, series: [
    line("generator", "purple", (r) => r.loss_scales?.[1]), line("fake score", "green", (r) => r.loss_scales?.[0]),
  ] },
];

/**
 * A line's points on the screen, in segments that end where a value is missing. Of the points in one column of pixels
 * the first, lowest, highest and last are kept: a long run draws as fast as a short one, and no peak is lost.
 */
function segments(xs, ys, toX, toY) {
  const all = [];
  let [segment, column] = [null, null];
  const close = () => {
    if (!column) return;
    const kept = new Set([column.first, column.low, column.high, column.last].sort((a, b) => a.index - b.index));
    segment.push(...kept);
    column = null;
  };
  ys.forEach((value, index) => {
    if (value === null) {
      close();
      segment = null;
      return;
    }
    if (!segment) all.push((segment = []));
    const point = { index, x: toX(xs[index]), y: toY(value) };
    const pixel = Math.round(point.x);
    if (column?.pixel !== pixel) {
      close();
      column = { pixel, first: point, low: point, high: point };
    }
    if (point.y < column.low.y) column.low = point;
    if (point.y > column.high.y) column.high = point;
    column.last = point;
  });
  close();
  return all;
}

/** Means over equal shares of a line, one for every four pixels: the trend where the line itself is a band. */
function trend(xs, ys, toX, toY, width) {
  const shares = Math.floor(width / 4);
  const mean = (numbers) => numbers.reduce((sum, n) => sum + n, 0) / numbers.length;
  return Array.from({ length: shares }, (_, i) => {
    const [from, to] = [i, i + 1].map((share) => Math.floor((share * ys.length) / shares));
    const own = ys.slice(from, to).filter((y) => y !== null);
    return own.length > 0 && { x: toX(mean(xs.slice(from, to))), y: toY(mean(own)) };
  }).filter(Boolean);
}

const joined = (points) => points.map((p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("L");

/** The index of the value nearest to x in ascending numbers. */
function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

class Chart {
  constructor(spec, number) {
    Object.assign(this, { format: short }, spec);
    this.figure = el("figure", "chart");
    this.figure.hidden = spec.optional === true;
    const [caption, legend] = [el("figcaption"), el("ul")];
    caption.append(el("strong", "", spec.title), spec.unit);
    this.svg = svg("svg", { role: "img", tabindex: 0, height: HEIGHT });
    this.clip = svg("rect", { y: PLOT.top - 4, height: HEIGHT - PLOT.top - PLOT.bottom + 4 });
    const clipPath = svg("clipPath", { id: `clip-${number}` });
    clipPath.append(this.clip);
    [this.axes, this.hover] = [svg("g"), svg("g")];
    const lines = svg("g", { "clip-path": `url(#clip-${number})` });
    for (const s of this.series) {
      const look = s.area ? "area" : s.from === "teacher" ? "line dashed" : "line";
      s.path = svg("path", { class: `${look} ${s.colour}` });
      s.dots = svg("path", { class: `dots ${s.colour}` });
      s.trend = svg("path", { class: `line ${s.colour}` });
      [s.item, s.value] = [el("li", s.colour), el("b")];
      s.item.append(el("i", look), s.name, s.value);
      legend.append(s.item);
    }
    // A stack is drawn from its top, so that each layer covers the foot of the one above it.
    const stack = this.series.filter((s) => s.area).reverse();
    for (const s of [...stack, ...this.series.filter((s) => !s.area)]) lines.append(s.path, s.trend, s.dots);
    this.svg.append(clipPath, this.axes, lines, this.hover);
    this.figure.append(caption, legend, this.svg);
    this.svg.addEventListener("pointermove", (event) => this.read(this.toData(event.offsetX)));
    this.svg.addEventListener("pointerdown", (event) => this.read(this.toData(event.offsetX)));
    // A finger that is lifted leaves the reading where it was.
    this.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.read(null));
    this.svg.addEventListener("blur", () => this.read(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  /** All charts show their values at the same place. */
  read(x) {
    if (x === reading) return;
    reading = x;
    changed("reading");
  }

  key(event) {
    const xs = this.series[0].xs ?? [];
    const [now, step] = [reading === null ? xs.length : nearest(xs, reading), Math.max(1, Math.round(xs.length / 200))];
    const to = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") this.read(null);
    if (to === undefined || xs.length === 0) return;
    event.preventDefault();
    this.read(xs[Math.min(Math.max(to, 0), xs.length - 1)]);
  }

  toData(pixels) {
    return this.plot ? Math.max(0, ((pixels - PLOT.left) / this.plot.width) * this.plot.lastX) : null;
  }

  draw(data, lastX) {
    let values = [];
    const base = [];
    for (const s of this.series) {
      Object.assign(s, { xs: data[s.from].xs, raw: data[s.from].rows.map(s.of) });
      s.ys = s.raw.map((y) => (isNumber(y) && !(this.log && y <= 0) ? y : null));
      if (s.area) s.ys = s.ys.map((y, i) => (y === null ? null : (base[i] = (base[i] ?? 0) + y)));
      s.newest = s.raw.findLast(isNumber);
      const own = s.ys.filter((y) => y !== null);
      values = values.concat(s.from === "teacher" ? own.slice(-1) : own);
    }
    this.figure.hidden = this.optional === true && values.length === 0;
    if (this.figure.hidden) return;

    const width = Math.max(120, (this.svg.clientWidth || 320) - PLOT.left - PLOT.right);
    const [height, foot] = [HEIGHT - PLOT.top - PLOT.bottom, HEIGHT - PLOT.bottom];
    const [low, high] = values.length > 0 ? domain(values, this) : this.log ? [0.1, 10] : [0, 1];
    const size = this.log ? Math.log10 : (v) => v;
    const toX = (x) => PLOT.left + (x / lastX) * width;
    const toY = (y) => foot - ((size(y) - size(low)) / (size(high) - size(low))) * height;
    this.plot = { width, foot, lastX, toX, toY };
    this.clip.setAttribute("x", PLOT.left - 5);
    this.clip.setAttribute("width", width + 10);

    this.drawAxes(low, high, values);
    for (const s of this.series) this.drawSeries(s);
    const newest = this.series.map((s) => `${s.name} ${this.format(s.newest)}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}, ${this.unit}: ${newest}, over ${AXES[axis].name}`);
    this.drawReading();
  }

  drawAxes(low, high, values) {
    const { width, foot, lastX, toX, toY } = this.plot;
    const nodes = [];
    const right = PLOT.left + width;
    const most = Math.max(2, Math.floor(width / 72));
    if (values.length > 0) {
      const ticks = (this.log ? logTicks : linearTicks)(low, high, 6);
      for (const [y, label] of labelled(ticks, this.format === percent ? (t) => `${short(100 * t)} %` : short)) {
        nodes.push(svg("line", { class: "grid", x1: PLOT.left, x2: right, y1: toY(y), y2: toY(y) }));
        nodes.push(svg("text", { x: PLOT.left - 6, y: toY(y) + 4, "text-anchor": "end" }, label));
      }
      const xTicks = axis === "wall_seconds" ? timeTicks(lastX, most) : labelled(linearTicks(0, lastX, most), short);
      for (const [x, label] of xTicks) {
        nodes.push(svg("line", { class: "axis", x1: toX(x), x2: toX(x), y1: foot, y2: foot + 4 }));
        // The last label would stand out of the picture.
        const [at, anchor] = toX(x) > right - 14 ? [right + 6, "end"] : [toX(x), "middle"];
        nodes.push(svg("text", { x: at, y: foot + 17, "text-anchor": anchor }, label));
      }
      nodes.push(svg("text", { x: PLOT.left + width / 2, y: HEIGHT - 4, "text-anchor": "middle" }, AXES[axis].name));
      if (values.some((y) => y < low || y > high)) {
        nodes.push(svg("text", { x: right, y: HEIGHT - 4, "text-anchor": "end" }, "peaks are cut"));
      }
    } else {
      nodes.push(svg("text", { x: PLOT.left + width / 2, y: foot / 2 + 8, "text-anchor": "middle" }, "no data yet"));
    }
    nodes.push(svg("line", { class: "axis", x1: PLOT.left, x2: right, y1: foot, y2: foot }));
    this.axes.replaceChildren(...nodes);
  }

  drawSeries(s) {
    const { width, foot, toX, toY } = this.plot;
    s.item.hidden = s.newest === undefined;
    if (s.from === "teacher") {
      const y = s.ys.findLast((value) => value !== null);
      s.path.setAttribute("d", y === undefined ? "" : `M${PLOT.left} ${toY(y)}h${width}`);
      return;
    }
    const parts = segments(s.xs, s.ys, toX, toY).filter((points) => points.length > 0);
    const closed = (points) => `M${points[0].x} ${foot}L${joined(points)}V${foot}Z`;
    const dense = !s.area && s.ys.length > 3 * width;
    s.path.classList.toggle("faint", dense);
    const means = dense ? trend(s.xs, s.ys, toX, toY, width) : [];
    s.trend.setAttribute("d", means.length > 0 ? `M${joined(means)}` : "");
    s.path.setAttribute("d", parts.map((points) => (s.area ? closed(points) : `M${joined(points)}`)).join(""));
    // Few points are marked, and a point alone would not be seen as a line.
    const marked = parts.filter((points) => !s.area && (s.from === "student" || points.length === 1)).flat();
    s.dots.setAttribute("d", marked.length > width / 12 ? "" : marked.map((p) => `M${p.x} ${p.y}h0`).join(""));
  }

  drawReading() {
    if (!this.plot || this.figure.hidden) return;
    const { foot, toX, toY } = this.plot;
    const nodes = [];
    let at = null;
    for (const s of this.series) {
      const index = reading === null || s.from === "teacher" || s.xs.length === 0 ? -1 : nearest(s.xs, reading);
      put(s.value, this.format(index < 0 ? s.newest : s.raw[index]));
      if (index < 0) continue;
      at ??= s.xs[index];
      const y = s.ys[index];
      if (y !== null && toY(y) >= PLOT.top - 4 && toY(y) <= foot) {
        nodes.push(svg("circle", { class: `reading ${s.colour}`, cx: toX(s.xs[index]), cy: toY(y), r: 4 }));
      }
    }
    if (at !== null) {
      const text = AXES[axis].text(at);
      const half = 3.6 * text.length + 6;
      const x = Math.min(Math.max(toX(at), PLOT.left - 30 + half), PLOT.left + this.plot.width + PLOT.right - half);
      nodes.unshift(
        svg("line", { class: "crosshair", x1: toX(at), x2: toX(at), y1: PLOT.top, y2: foot }),
        // It stands in the place of the ticks' labels.
        svg("rect", { class: "pill", x: 0, y: foot + 5, width: PLOT.left + this.plot.width + PLOT.right, height: 16 }),
        svg("text", { class: "at", x, y: foot + 17, "text-anchor": "middle" }, text),
      );
    }
    this.hover.replaceChildren(...nodes);
  }
}

// The place on the horizontal axis that is read; null where none is.
let reading = null;
const charts = CHARTS.map((spec, number) => new Chart(spec, number));
$("charts").append(...charts.map((chart) => chart.figure));

function drawCurves() {
  const data = {};
  for (const from of ["training", "student", "teacher"]) {
    data[from] = { rows: run[from], xs: run[from].map((row) => row[axis]) };
  }
  const lastX = Math.max(data.training.xs.at(-1) ?? 0, data.student.xs.at(-1) ?? 0) || 1;
  // Which charts are shown decides how wide they are.
  for (const chart of charts) chart.draw(data, lastX);
}

function drawReadings() {
  for (const chart of charts) chart.drawReading();
}

new ResizeObserver(() => changed("curves")).observe($("charts"));
$("axis").addEventListener("change", (event) => {
  axis = event.target.value;
  reading = null;
  changed("curves");
});

// ---------------------------------------------------------------------------------------------- the connection

let ended = false;
let lostSince = null;

function answered() {
  lostSince = null;
  $("lost").hidden = true;
  put($("updated"), `updated ${clock(Date.now() / 1000)}`);
}

function lost() {
  lostSince ??= Date.now() / 1000;
  put($("lost"), `The coordinator does not answer since ${clock(lostSince)}; trying again.`);
  $("lost").hidden = false;
}

function connect() {
  const source = new EventSource("stream");
  for (const [name, handle] of Object.entries(HANDLERS)) {
    source.addEventListener(name, (message) => {
      answered();
      handle(JSON.parse(message.data));
    });
  }
  source.addEventListener("end", () => {
    source.close();
    ended = true;
    put($("updated"), `ended ${clock(Date.now() / 1000)}`);
    changed("status");
  });
  source.onerror = () => {
    lost();
    // The browser tries again by itself unless the answer was no event stream.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}

connect();
