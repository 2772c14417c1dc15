// The data, small helpers, and panels of curves. All texts are set as text nodes: names of runs and classes are no HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
// Okabe and Ito's colours, without the yellow that white swallows, then some of Tol's; told apart by colour-blind readers
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#882255", "#999933", "#332288", "#888888"];
const DASHES = ["", "7 4", "2 3"];
const SVG = "http://www.w3.org/2000/svg";
const hasGroups = data.groups.some((group) => group.runs.length > 1);
const state = { shown: runs.map(() => true), smoothing: 0.03, grouped: hasGroups && runs.length > 4 };
const redraws = [];

const make = (name, attributes, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "style") node.style.cssText = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};
const draw = (parent, name, attributes, text) => {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
};
const color = (index) => COLORS[index % COLORS.length];
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1));
const short = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + " G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + " M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + " k";
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(3));
};

// ---- groups of lines: single runs, or means over the runs of a group ----
const lines = () => state.grouped
  ? data.groups.map((group) => ({ index: group.runs[0], name: group.name, runs: group.runs.filter((r) => state.shown[r]) }))
    .filter((line) => line.runs.length)
  : runs.map((run, index) => ({ index, name: run.name, runs: [index] })).filter((line) => state.shown[line.index]);
// the run whose colour a run has: its own, or its group's first
const colorOf = (index) => (state.grouped ? data.groups.find((group) => group.runs.includes(index)).runs[0] : index);

const smooth = (values) => {
  const half = Math.floor(state.smoothing * values.length / 2);
  if (!half) return values;
  const sums = [0], counts = [0];
  values.forEach((v, i) => { sums.push(sums[i] + (v === null ? 0 : v)); counts.push(counts[i] + (v !== null)); });
  return values.map((_, i) => {
    const first = Math.max(0, i - half), end = Math.min(values.length, i + half + 1);
    const count = counts[end] - counts[first];
    return count ? (sums[end] - sums[first]) / count : null;
  });
};
const lastStep = (r, metric) => metric in runs[r].series ? runs[r].series[metric][0].at(-1) : -1;
// the mean of values, one of each run, in which the runs of one seed count as one
const meanOf = (members, values) => {
  const weights = members.map((r) => 1 / members.filter((other) => runs[other].seed === runs[r].seed).length);
  return values.reduce((sum, value, i) => sum + weights[i] * value, 0) / weights.reduce((a, b) => a + b);
};
// {name, steps, values, low, high} of a metric over the runs of a line; low and high enclose all runs where there are
// more; without: the runs that end before the last step, `end`, and are in no mean
const curve = (line, metric, noisy) => {
  const end = Math.max(...line.runs.map((r) => lastStep(r, metric)));
  if (end < 0) return null;
  const members = line.runs.filter((r) => lastStep(r, metric) === end); // a mean over others would jump where they end
  const about = { name: members.length > 1 ? line.name : runs[members[0]].name, end, without: line.runs.filter((r) => !members.includes(r)) };
  const parts = members.map((r) => runs[r].series[metric])
    .map(([steps, values]) => ({ steps, raw: values, values: noisy ? smooth(values) : values }));
  if (parts.length === 1) return { ...about, ...parts[0] };
  const at = parts.map((part) => new Map(part.steps.map((step, i) => [step, part.values[i]])));
  const steps = [...new Set(parts.flatMap((part) => part.steps))].sort((a, b) => a - b);
  const merged = { ...about, steps: [], values: [], low: [], high: [] };
  for (const step of steps) {
    const there = at.map((map) => map.get(step));
    if (there.includes(undefined)) continue; // a mean over fewer runs would jump
    const isFinite = !there.includes(null); // else a gap, as in the curve of one run
    merged.steps.push(step);
    merged.values.push(isFinite ? meanOf(members, there) : null);
    merged.low.push(isFinite ? Math.min(...there) : null);
    merged.high.push(isFinite ? Math.max(...there) : null);
  }
  return merged;
};

const ticks = (low, high, count) => {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
};
// of an axis from 10 ** low to 10 ** high: powers of ten, or 1, 2 and 5 times those, or evenly on less than a decade
const logTicks = (low, high) => {
  const first = Math.floor(low), last = Math.ceil(high), stride = Math.max(1, Math.ceil((last - first) / 5)), powers = [];
  for (let power = first; power <= last; power += stride) powers.push(10 ** power);
  const inside = (marks) => marks.filter((mark) => mark >= 10 ** low && mark <= 10 ** high);
  const finer = powers.flatMap((power) => [power, 2 * power, 5 * power]);
  return [inside(powers), inside(finer)].find((marks) => marks.length > 2 || stride > 1) || ticks(10 ** low, 10 ** high, 4);
};

const tip = make("div", { class: "tip", style: "display:none" });
const showTip = (event, rows) => {
  tip.replaceChildren(...rows);
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
};
const hideTip = () => { tip.style.display = "none"; };

// ---- one panel of curves ----
const panelFigure = (panel) => {
  const legend = make("div", { class: "legend" });
  const holder = make("div");
  const figure = make("figure", {}, make("figcaption", {}, panel.title + " ", make("small", {}, panel.unit)), holder, legend);
  redraws.push(() => {
    const noisy = !panel.metrics[0][0].startsWith("val/");
    const drawn = [];
    panel.metrics.forEach(([metric, label], m) => lines().forEach((line) => {
      const found = curve(line, metric, noisy);
      if (found) drawn.push({ ...found, label, m, line });
    }));
    const says = drawn.some((d) => d.values.some((v) => v !== null && v !== 0));
    figure.style.display = says ? "" : "none";
    if (says) drawPanel(holder, legend, panel, drawn, noisy);
  });
  return figure;
};

const drawPanel = (holder, legend, panel, drawn, noisy) => {
  const width = Math.max(260, holder.clientWidth), height = 230;
  const box = { left: 52, right: width - 10, top: 10, bottom: height - 26 };
  const onScale = (v) => (v === null ? null : panel.is_log ? (v > 0 ? Math.log10(v) : null) : v);
  const ends = (get) => drawn.flatMap(get).map(onScale).filter((v) => v !== null);
  const values = ends((d) => [...d.values, ...(d.low || []), ...(d.high || [])]);
  if (panel.reference) values.push(...[onScale(panel.reference[0])].filter((v) => v !== null));
  const steps = drawn.flatMap((d) => [d.steps[0], d.steps[d.steps.length - 1]]);
  let low = Math.min(...values), high = Math.max(...values);
  const firstStep = Math.min(0, ...steps), lastStep = Math.max(1, ...steps);
  if (panel.is_share) { low = 0; high = 1; }
  else if (!panel.is_log) { low = Math.min(0, low); high = high > low ? high + 0.05 * (high - low) : low + 1; }
  else { const pad = Math.max(0.1, 0.05 * (high - low)); low -= pad; high += pad; }
  const x = (step) => box.left + (box.right - box.left) * (step - firstStep) / (lastStep - firstStep);
  const y = (value) => box.bottom - (box.bottom - box.top) * (onScale(value) - low) / (high - low);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", panel.title);
  const marks = panel.is_log ? logTicks(low, high) : ticks(low, high, 5);
  for (const mark of marks) {
    draw(svg, "line", { x1: box.left, x2: box.right, y1: y(mark), y2: y(mark), stroke: "#e6e6e6" });
    draw(svg, "text", { x: box.left - 6, y: y(mark) + 4, "text-anchor": "end" }, short(mark));
  }
  for (const mark of ticks(firstStep, lastStep, Math.max(2, width / 110))) {
    draw(svg, "line", { x1: x(mark), x2: x(mark), y1: box.bottom, y2: box.bottom + 4, stroke: "#999" });
    draw(svg, "text", { x: x(mark), y: box.bottom + 18, "text-anchor": "middle" }, short(mark));
  }
  draw(svg, "line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, stroke: "#999" });
  if (panel.reference) {
    const level = y(panel.reference[0]);
    draw(svg, "line", { x1: box.left, x2: box.right, y1: level, y2: level, stroke: "#000", "stroke-dasharray": "1 4" });
  }
  const path = (steps, values) => {
    let text = "", pen = false;
    steps.forEach((step, i) => {
      if (onScale(values[i]) === null) { pen = false; return; }
      text += (pen ? "L" : "M") + x(step).toFixed(1) + " " + y(values[i]).toFixed(1);
      pen = true;
    });
    return text;
  };
  for (const d of drawn) {
    const stroke = color(d.line.index), style = { fill: "none", stroke, "stroke-dasharray": DASHES[d.m % 3] };
    if (d.low) {
      const inside = d.steps.map((_, i) => i).filter((i) => onScale(d.low[i]) !== null);
      const there = inside.map((i) => `${x(d.steps[i])},${y(d.high[i])}`);
      const back = inside.reverse().map((i) => `${x(d.steps[i])},${y(d.low[i])}`);
      draw(svg, "polygon", { points: [...there, ...back].join(" "), fill: stroke, opacity: 0.15 });
    } else if (noisy && d.raw && state.smoothing && drawn.length <= 4) {
      draw(svg, "path", { ...style, d: path(d.steps, d.raw), "stroke-width": 0.7, opacity: 0.35, "clip-path": "none" });
    }
    draw(svg, "path", { ...style, d: path(d.steps, d.values), "stroke-width": 2 });
    if (!noisy || d.steps.length === 1) {
      d.steps.forEach((step, i) => {
        if (onScale(d.values[i]) !== null) draw(svg, "circle", { cx: x(step), cy: y(d.values[i]), r: 3, fill: stroke });
      });
    }
  }
  const cursor = draw(svg, "line", { y1: box.top, y2: box.bottom, stroke: "#666", visibility: "hidden" });
  svg.addEventListener("pointermove", (event) => {
    const place = (event.clientX - svg.getBoundingClientRect().left) * width / svg.getBoundingClientRect().width;
    const step = firstStep + (place - box.left) / (box.right - box.left) * (lastStep - firstStep);
    const all = drawn.map((d) => d.steps[nearest(d.steps, step)]), found = all[nearest(all, step)];
    const there = drawn.map((d) => ({ ...d, at: nearest(d.steps, found) })).filter((d) => Math.abs(d.steps[d.at] - found) <= interval(d.steps));
    cursor.setAttribute("x1", x(found));
    cursor.setAttribute("x2", x(found));
    cursor.setAttribute("visibility", "visible");
    showTip(event, [make("strong", {}, "step " + found), ...there.slice(0, 14).map((d) => make("div", {}, swatch(d.line.index, d.m),
      `${d.name}${panel.metrics.length > 1 ? ", " + d.label : ""}: ${short(d.values[d.at])}`
        + (d.steps[d.at] === found ? "" : ` (step ${d.steps[d.at]})`)))]);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
  holder.replaceChildren(svg);
  const kinds = [...new Set(drawn.map((d) => d.m))];
  const entries = panel.metrics.length > 1 ? kinds.map((m) => make("span", {}, swatch(null, m), panel.metrics[m][1])) : [];
  if (panel.reference) entries.push(make("span", {}, "····· " + panel.reference[1]));
  const without = [...new Set(drawn.flatMap((d) => d.without))].map((r) => runs[r].name);
  if (without.length) entries.push(make("span", {}, `no value at step ${drawn.find((d) => d.without.length).end}, so in no mean: ${without.join(", ")}`));
  legend.replaceChildren(...entries);
};
const nearest = (steps, step) => {
  let best = 0;
  steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
};
// the mean number of steps between two points of a curve: how far from a point its value says something
const interval = (steps) => steps.length > 1 ? (steps.at(-1) - steps[0]) / (steps.length - 1) : 0;
const swatch = (index, kind) => make("i", { class: "swatch",
  style: `border-top-color:${index === null ? "#555" : color(index)};border-top-style:${["solid", "dashed", "dotted"][(kind || 0) % 3]}` });
