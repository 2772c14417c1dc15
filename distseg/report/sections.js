// The sections of the page, and the controls above them; follows curves.js in one scope.
const section = (id, title, note, ...children) => {
  document.querySelector("nav").append(make("a", { href: "#" + id }, title));
  document.body.append(make("h2", { id }, title), note ? make("p", { class: "note" }, note) : "", ...children);
};
const table = (head, rows) => make("div", { class: "scroll" }, make("table", {},
  make("tr", {}, ...head.map(([text, kind]) => make("th", kind ? { class: kind } : {}, text))),
  ...rows.map(({ cells, kind }) => make("tr", kind ? { class: kind } : {}, ...cells.map((cell, i) =>
    make("td", { class: head[i][1] || "" }, cell === null || cell === undefined ? "–" : cell))))));
const ofRun = (index) => { // its colour is set when the page is drawn: that of the curve that the run is in
  const node = swatch(index);
  node.dataset.run = index;
  return node;
};
const named = (index) => make("span", { class: "run" }, ofRun(index), make("span", {}, runs[index].name));
const spread = (score) => score.spread === null ? percent(score.mean) : `${percent(score.mean)} ± ${percent(score.spread)}`;

const SCORES = [["mean_iou", "mIoU"], ["pixel_accuracy", "pixel acc."], ["mean_class_accuracy", "class acc."],
  ["frequency_weighted_iou", "freq. IoU"]];
const runsTable = () => {
  const head = [["run"], ["mode"], ["seed", "number"], ["steps", "number"], ...SCORES.map(([, name]) => [name, "number"]),
    ["minutes", "number"], ["health", "text"]];
  const rows = runs.map((run, index) => ({ cells: [named(index), run.mode, run.seed,
    run.steps ? `${run.step} of ${run.steps}` : run.step, ...SCORES.map(([key]) => percent(run.scores[key])),
    run.minutes === null ? null : run.minutes.toFixed(1), verdictOf(run)] }));
  for (const group of data.groups.filter((g) => g.runs.length > 1)) {
    rows.push({ kind: "mean", cells: [make("span", { class: "run" }, swatch(group.runs[0]),
      make("span", {}, `mean: ${group.name} `, make("small", {}, group.note))), runs[group.runs[0]].mode, null, null,
      ...SCORES.map(([key]) => spread(group.scores[key])), null, null] });
  }
  return table(head, rows);
};
const verdictOf = (run) => {
  if (!run.health.length) return "no signals";
  const now = run.health.filter((lane) => lane.spans.some((span) => span.to === null));
  const past = run.health.filter((lane) => lane.spans.length && !now.includes(lane));
  if (now.length) return "at the end: " + now.map((lane) => data.checks[lane.name].title).join("; ");
  if (past.length) return "for a while: " + past.map((lane) => data.checks[lane.name].title).join("; ");
  const early = run.health.filter((lane) => lane.judged_from === null).length;
  return "nothing found" + (early ? `; too early to tell for ${early} of ${run.health.length} checks` : "");
};

const healthSection = () => {
  const holder = make("div");
  const texts = make("div");
  redraws.push(() => {
    const shown = runs.map((run, index) => ({ run, index })).filter(({ index }) => state.shown[index]);
    const names = Object.keys(data.checks).filter((name) => shown.some(({ run }) => run.health.some((lane) => lane.name === name)));
    const rows = names.flatMap((name) => shown.map(({ run, index }) =>
      ({ name, index, lane: run.health.find((lane) => lane.name === name), step: run.step })));
    if (!rows.length) {
      holder.replaceChildren(make("p", {}, "No signals yet."));
      texts.replaceChildren();
      return;
    }
    const width = Math.max(320, holder.clientWidth), left = Math.min(270, width * 0.42), rowHeight = 9;
    const last = Math.max(1, ...shown.map(({ run }) => run.step));
    const x = (step) => left + (width - left - 10) * step / last;
    const svg = document.createElementNS(SVG, "svg");
    let top = 4;
    for (const name of names) {
      const own = rows.filter((row) => row.name === name), lineHeight = Math.max(20, own.length * rowHeight + 6);
      draw(svg, "text", { x: left - 8, y: top + lineHeight / 2 + 4, "text-anchor": "end" }, data.checks[name].title);
      own.forEach((row, i) => {
        const y = top + (lineHeight - own.length * rowHeight) / 2 + i * rowHeight + rowHeight / 2;
        if (!row.lane) return;
        const judged = row.lane.judged_from === null ? row.step : row.lane.judged_from;
        const early = draw(svg, "line", { x1: x(0), x2: x(judged), y1: y, y2: y, stroke: "#999", "stroke-width": 2, "stroke-dasharray": "2 5" });
        draw(early, "title", {}, `${runs[row.index].name}: ${data.checks[name].title}? Too early to tell`);
        draw(svg, "line", { x1: x(judged), x2: x(row.step), y1: y, y2: y, stroke: "#d9d9d9", "stroke-width": 2 });
        for (const span of row.lane.spans) {
          const bar = draw(svg, "line", { x1: x(span.since), x2: Math.max(x(span.since) + 3, x(span.to === null ? row.step : span.to)),
            y1: y, y2: y, stroke: color(colorOf(row.index)), "stroke-width": 7 });
          draw(bar, "title", {}, `${runs[row.index].name}: ${data.checks[name].title}, since step ${span.since}`);
        }
      });
      top += lineHeight;
      draw(svg, "line", { x1: 0, x2: width, y1: top, y2: top, stroke: "#eee" });
    }
    for (const mark of ticks(0, last, Math.max(2, (width - left) / 110))) {
      draw(svg, "text", { x: Math.min(x(mark), width - 14), y: top + 16, "text-anchor": "middle" }, short(mark));
    }
    svg.setAttribute("viewBox", `0 0 ${width} ${top + 22}`);
    svg.setAttribute("height", top + 22);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "when each verdict held");
    holder.replaceChildren(svg);
    const found = rows.filter((row) => row.lane && row.lane.spans.length);
    const early = names.filter((name) => rows.some((row) => row.name === name && row.lane && row.lane.judged_from === null))
      .map((name) => data.checks[name].title);
    texts.replaceChildren(...(found.length ? found.map((row) => make("div", { class: "verdict" },
      make("strong", {}, `${runs[row.index].name}: ${data.checks[row.name].title}`), " ",
      row.lane.spans.map((s) => `from step ${s.since} ${s.to === null ? "to the end" : "to " + s.to}` + (s.detail ? ` (${s.detail})` : "")).join(", ")
        + ". " + data.checks[row.name].meaning + " " + data.checks[row.name].advice))
      : [make("div", { class: early.length ? "verdict open" : "verdict good" },
        "Nothing found in the runs that are shown, by the signals that they wrote." + (early.length ? ` Too early to tell: ${early.join("; ")}.` : ""))]));
  });
  section("health", "Health", "A bar: the verdict held over these steps. A thin line: its signal was there and good. "
    + "Dotted: too few rows or steps to tell. "
    + "No line: the run did not write the signal.", holder, texts);
};

const iouSection = () => {
  const classes = [...new Set(runs.flatMap((run) => run.classes))];
  if (!classes.length) return;
  const steps = [...new Set(runs.flatMap((run) => run.iou.map((e) => e.step)))].sort((a, b) => a - b);
  const holder = make("div"), label = make("output", {});
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, step: 1,
    "aria-label": "evaluation", oninput: () => redrawIou() });
  const redrawIou = () => {
    const step = steps[+slider.value];
    label.textContent = `evaluation at step ${step}`;
    const shown = lines().map((line) => {
      const found = line.runs.map((r) => ({ r, at: runs[r].iou.filter((e) => e.step <= step).at(-1) })).filter(({ at }) => at);
      const newest = Math.max(...found.map(({ at }) => at.step));
      const per = found.filter(({ at }) => at.step === newest)
        .map(({ r, at }) => ({ r, values: new Map(runs[r].classes.map((c, i) => [c, at.values[i]])) }));
      return { line, per, name: per.length === 1 ? runs[per[0].r].name : line.name };
    });
    const width = Math.max(300, Math.min(900, holder.clientWidth)), left = 110, barHeight = shown.length > 3 ? 7 : 11;
    const rowHeight = Math.max(18, shown.length * (barHeight + 1) + 8), height = rowHeight * classes.length + 24;
    const right = shown.some(({ per }) => per.length > 1) ? 140 : 52; // for the figures
    const x = (v) => left + (width - left - right) * v;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.style.maxWidth = width + "px";
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "intersection over union of each class");
    for (const mark of [0, 0.25, 0.5, 0.75, 1]) {
      draw(svg, "line", { x1: x(mark), x2: x(mark), y1: 0, y2: height - 20, stroke: "#e2e2e2" });
      draw(svg, "text", { x: x(mark), y: height - 5, "text-anchor": "middle" }, 100 * mark + " %");
    }
    classes.forEach((name, row) => {
      const shortName = name.length > 16 ? name.slice(0, 15) + "…" : name;
      const text = draw(svg, "text", { x: left - 8, y: row * rowHeight + rowHeight / 2 + 4, "text-anchor": "end" }, shortName);
      draw(text, "title", {}, name);
      shown.forEach(({ line, per, name: whose }, i) => {
        const there = per.map(({ r, values }) => ({ r, value: values.get(name) })).filter(({ value }) => value !== undefined && value !== null);
        const values = there.map(({ value }) => value);
        const y = row * rowHeight + (rowHeight - shown.length * (barHeight + 1)) / 2 + i * (barHeight + 1);
        if (!values.length) {
          if (shown.length <= 3) draw(svg, "text", { x: x(0) + 4, y: y + barHeight - 1, "font-size": 11 }, "absent");
          return;
        }
        const mean = meanOf(there.map(({ r }) => r), values);
        const range = values.length > 1 ? ` (${percent(Math.min(...values))} to ${percent(Math.max(...values))})` : "";
        const bar = draw(svg, "rect", { x: x(0), y, width: Math.max(0.5, x(mean) - x(0)), height: barHeight, fill: color(line.index) });
        draw(bar, "title", {}, `${whose}, ${name}: ${percent(mean)} %${range}`);
        if (values.length > 1) draw(svg, "line", { x1: x(Math.min(...values)), x2: x(Math.max(...values)), y1: y + barHeight / 2, y2: y + barHeight / 2, stroke: "#000" });
        if (shown.length <= 3) draw(svg, "text", { x: x(values.length > 1 ? Math.max(...values) : mean) + 5, y: y + barHeight - 1, "font-size": 11 },
          (range ? "mean " : "") + percent(mean) + range);
      });
    });
    holder.replaceChildren(svg);
  };
  redraws.push(redrawIou);
  const controls = steps.length > 1 ? make("label", {}, slider, label) : label;
  section("iou", "IoU of each class", "Of several runs in a mean, the black line spans the lowest to the highest. "
    + "A run without an evaluation at the step shows its last one before; a mean is over the runs that have the newest.", make("div", { class: "controls" }, controls), holder);
};

const confusionSection = () => {
  const having = runs.map((_, i) => i).filter((i) => runs[i].confusion);
  if (!having.length) {
    section("confusion", "Confusion matrix", "None of these runs has one of its own classes in its evaluation.json; `distseg evaluate RUN` makes one.");
    return;
  }
  const holder = make("div", { class: "scroll" }), source = make("output", {});
  const choice = make("select", { "aria-label": "run", onchange: () => redrawMatrix() }, ...having.map((i) => make("option", { value: i }, runs[i].name)));
  const redrawMatrix = () => {
    const run = runs[+choice.value], matrix = run.confusion.matrix, n = run.classes.length, left = 120, top = 96;
    const cell = Math.max(n > 40 ? 7 : 15, Math.min(58, (Math.min(1000, holder.clientWidth) - left - 10) / n));
    const width = left + cell * n + 60, height = top + cell * n + 6, svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.cssText = `width:${width}px;height:${height}px`;
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "confusion matrix");
    const named = (name) => name.length > 15 ? name.slice(0, 14) + "…" : name;
    run.classes.forEach((name, i) => {
      const size = Math.min(12, cell);
      if (cell >= 9) {
        draw(svg, "text", { x: left - 6, y: top + cell * (i + 0.5) + 4, "text-anchor": "end", "font-size": size }, named(name));
        const px = left + cell * (i + 0.5) + 4;
        draw(svg, "text", { x: px, y: top - 6, transform: `rotate(-45 ${px} ${top - 6})`, "font-size": size }, named(name));
      }
      const total = matrix[i].reduce((a, b) => a + b, 0);
      matrix[i].forEach((count, j) => {
        const share = total ? count / total : 0;
        const box = draw(svg, "rect", { x: left + cell * j, y: top + cell * i, width: cell - 1, height: cell - 1, fill: blue(share) });
        draw(box, "title", {}, `${name} taken for ${run.classes[j]}: ${percent(share)} % (${count} pixels)`);
        if (cell >= 30 && total) {
          const text = draw(svg, "text", { x: left + cell * (j + 0.5), y: top + cell * (i + 0.5) + 4, "text-anchor": "middle", "font-size": Math.min(12, cell / 3), "pointer-events": "none" }, (100 * share).toFixed(cell >= 40 ? 1 : 0));
          if (share > 0.3) text.style.fill = "#fff";
        }
      });
    });
    draw(svg, "text", { x: 4, y: top - 6, "font-size": 12 }, "truth ↓  predicted →");
    holder.replaceChildren(svg);
    const { file, split, step } = run.confusion;
    source.textContent = `from ${file}` + (split ? `: split ${split}` : "") + (step === null ? "" : `, checkpoint of step ${step}`);
  };
  redraws.push(redrawMatrix);
  section("confusion", "Confusion matrix", "Per cent of the pixels of each true class (row) that were taken for each class (column); void excluded.",
    make("div", { class: "controls" }, make("label", {}, "run ", choice), source), holder);
};
const blue = (share) => { // white to dark blue, evenly dark for all readers
  const t = Math.sqrt(share), mix = (a, b) => Math.round(a + (b - a) * t);
  return `rgb(${mix(247, 8)},${mix(251, 48)},${mix(255, 107)})`;
};

const gallerySection = () => {
  const keys = [...new Set(runs.flatMap((run) => run.samples.map((s) => s.key)))];
  if (!keys.length) return;
  const holder = make("div", { class: "gallery" }), label = make("output", {});
  const slider = make("input", { type: "range", min: 0, max: keys.length - 1, value: 0, step: 1, "aria-label": "picture", oninput: () => redraw() });
  const redrawGallery = () => {
    const key = keys[+slider.value];
    label.textContent = `picture ${+slider.value + 1} of ${keys.length}: ${key}`;
    const shown = runs.map((run, index) => ({ run, index, sample: run.samples.find((s) => s.key === key) })).filter((it) => state.shown[it.index] && it.sample);
    holder.replaceChildren(...shown.map(({ run, index, sample }) =>
      make("div", {}, named(index), make("img", { src: sample.url, alt: `${key}: picture, label, prediction and errors of ${run.name}` }))));
  };
  redraws.push(redrawGallery);
  section("gallery", "Predictions", "Above: picture, label, prediction, errors (red). Below: the probability of each class.",
    make("div", { class: "controls" }, make("label", {}, slider, label)), holder);
};

const configSection = () => {
  if (runs.length > 1) {
    const head = [["key"], ...runs.map((run) => [run.name, "text"])];
    const rows = data.differences.map((row) => ({ cells: [row.key, ...row.values.map((v) => v === null ? null : String(v))] }));
    section("differences", "What differs between the configurations", rows.length ? "" : "Nothing but the run's directory.",
      ...(rows.length ? [table(head, rows)] : []));
  }
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const rows = keys.map((key) => ({ cells: [key, ...runs.map((run) => key in run.config ? String(run.config[key]) : null)] }));
  section("configuration", "Configuration", "", make("details", {}, make("summary", {}, `all ${keys.length} keys`),
    table([["key"], ...runs.map((run) => [run.name, "text"])], rows)));
};

const environmentSection = () => {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.environment)))];
  if (!keys.length) return;
  const rows = keys.map((key) => ({ cells: [key, ...runs.map((run) => run.environment[key] === undefined ? null : String(run.environment[key]))] }));
  section("environment", "Environment", "Of each run's last attempt.", table([["fact"], ...runs.map((run) => [run.name, "text"])], rows));
};

const attemptsSection = () => {
  const having = runs.map((_, i) => i).filter((i) => runs[i].attempts.length);
  if (!having.length) return;
  const kinds = { ranks: "number", "from step": "number", "to step": "number", reason: "text" };
  const keys = Object.keys(runs[having[0]].attempts[0])
    .filter((key) => key !== "label" || having.some((i) => runs[i].attempts.some((row) => row.label)));
  const rows = having.flatMap((i) => runs[i].attempts.map((row, n) =>
    ({ cells: [named(i), String(n + 1), ...keys.map((key) => row[key] === null ? null : String(row[key]))] })));
  section("attempts", "Attempts and requeues", "One line for each start of a run.",
    table([["run"], ["attempt", "number"], ...keys.map((key) => [key, kinds[key]])], rows));
};

// ---- the page ----
const redraw = () => {
  redraws.forEach((work) => work());
  document.body.classList.toggle("means", state.grouped);
  for (const node of document.querySelectorAll("[data-run]")) node.style.borderTopColor = color(colorOf(+node.dataset.run));
};
document.body.append(tip, make("h1", {}, runs.length === 1 ? runs[0].name : `${runs.length} runs`),
  make("p", { class: "note" }, `distseg report of ${data.made}`), make("nav"));
const bar = make("div", { class: "bar" });
section("runs", "Runs", hasGroups
  ? "Scores in per cent. Means are over the finished runs that differ in the seed only; ±: the sample standard deviation over seeds." : "Scores in per cent.", runsTable());
document.body.append(bar);
if (runs.length > 1) runs.forEach((run, index) => bar.append(make("label", {}, make("input", { type: "checkbox", checked: "",
  onchange: (event) => { state.shown[index] = event.target.checked; redraw(); } }), ofRun(index), run.name)));
if (hasGroups) bar.append(make("label", {}, make("input", { type: "checkbox", id: "means", ...(state.grouped ? { checked: "" } : {}),
  onchange: (event) => { state.grouped = event.target.checked; redraw(); } }), "means over seeds"));
bar.append(make("label", {}, "smoothing", make("input", { type: "range", min: 0, max: 0.2, step: 0.01, value: state.smoothing,
  style: "width:110px", oninput: (event) => { state.smoothing = +event.target.value; redraw(); } })));
healthSection();
const noRows = make("p", {}, "No rows yet.");
section("curves", "Curves", "Over training steps. Thin: single logged steps; thick: their running mean; of several runs in a mean, "
  + "the shaded band spans the lowest to the highest.", noRows, make("div", { class: "charts" }, ...data.panels.map(panelFigure)));
redraws.push(() => { noRows.style.display = lines().every((line) => line.runs.every((r) => !Object.keys(runs[r].series).length)) ? "" : "none"; });
iouSection();
confusionSection();
gallerySection();
attemptsSection();
configSection();
environmentSection();
redraw();
let pending = 0;
addEventListener("resize", () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(redraw); });
document.body.dataset.ready = "1";
