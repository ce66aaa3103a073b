(() => {
  "use strict";
  const $ = id => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  if (!data.rows) return;
  const PAGE = 50, SVG = "http://www.w3.org/2000/svg";
  const listed = data.paths.length;
  const code = new Map(data.classes.map(([name], index) => [name, index]));
  const classOf = data.predicted.map(name => code.get(name) ?? data.classes.length - 1);
  const figures = new Map([...document.querySelectorAll("figure[data-row]")]
    .map(figure => [+figure.dataset.row, figure]));
  const classRows = [...document.querySelector("#classes tbody").rows];
  const detectors = data.detectors.map(each => ({
    ...each,
    scores: Float64Array.from(each.scores, score => score ?? Infinity),
    silent: new Set(each.silent),
  }));
  let now, threshold, order = [], start = 0, by = "score", down = true;

  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
  const percent = share => `${+(100 * share).toPrecision(share < 0.1 ? 2 : 3)}\u00a0%`;
  const short = number => Number.isFinite(number) ? String(+number.toPrecision(4)) : "inf";
  const flagged = row =>
    !now.silent.has(row) && (now.scores[row] === Infinity || now.scores[row] > (threshold ?? Infinity));
  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent?.append(element);
    return element;
  };
  const cut = text => {
    const whole = document.createElement("span");
    if (text.length <= 16) return whole.textContent = text, whole;
    whole.className = "cut";
    for (const part of [text.slice(0, -10), text.slice(-10)]) {
      whole.append(Object.assign(document.createElement("span"), {textContent: part}));
    }
    return whole;
  };

  // --- counts -------------------------------------------------------------------------------

  function stepOf(value) {
    let best = 0;
    now.steps.forEach((step, index) => {
      if (Math.abs(step - value) < Math.abs(now.steps[best] - value)) best = index;
    });
    return best;
  }

  function counts() {  // flagged images of each class
    const found = new Array(data.classes.length).fill(0);
    if (data.complete) {
      for (let row = 0; row < listed; row++) if (flagged(row)) found[classOf[row]]++;
      return found;
    }
    const step = threshold === null ? -1 : stepOf(threshold);
    return found.map((_, index) => step < 0 ? 0 : now.above[index][step]);
  }

  function falseAlarms() {  // the share of the calibration above the threshold
    const values = now.quantiles.map(each => each ?? Infinity), last = values.length - 1;
    const next = values.findIndex(each => each > threshold);
    if (next <= 0) return next ? 0 : 1;
    const [low, high] = [values[next - 1], values[next]];
    const part = Number.isFinite(high) && high > low ? (threshold - low) / (high - low) : 0;
    return 1 - (next - 1 + part) / last;
  }

  function update() {
    const found = counts(), all = found.reduce((a, b) => a + b, 0);
    classRows.forEach((row, index) => {
      const images = data.classes[index][1], median = now.medians[index] ?? Infinity;
      const cells = [[found[index].toLocaleString("en"), found[index]],
        [(100 * found[index] / images).toFixed(1), found[index] / images], [short(median), median]];
      cells.forEach(([text, value], column) => {
        row.cells[column + 2].textContent = text;
        row.cells[column + 2].dataset.value = Number.isFinite(value) ? value : 1e308;
      });
    });
    const moved = threshold !== now.threshold;
    $("sentence").textContent = (!moved ? now.sentence :
      `${all.toLocaleString("en")} of ${count(now.judged, "image")} (${percent(all / Math.max(now.judged, 1))}) ` +
      `${all === 1 ? "scores" : "score"} above ${short(threshold)} by ${now.name}` +
      (now.quantiles ? `, as do about ${percent(falseAlarms())} of the calibration’s images.` : ".")).replaceAll("-", "\u2011");
    $("more").textContent = now.more;
    $("reset").disabled = !moved;
    if (document.activeElement !== $("number")) $("number").value = threshold === null ? "" : short(threshold);
    const [low, high, last] = range();
    $("slider").value = data.complete ? Math.round(last * ((threshold ?? high) - low) / (high - low))
      : threshold === null ? last : stepOf(threshold);
    $("slider").setAttribute("aria-valuetext",
      threshold === null ? "no threshold" : `${short(threshold)}, ${all.toLocaleString("en")} flagged`);
    for (const [row, figure] of figures) mark(figure, row);
    moveLine();
    if ($("which").value) filter(); else for (const row of $("list").querySelectorAll("tbody tr")) mark(row, +row.dataset.row);
  }

  function mark(element, row) {
    element.classList.toggle("flagged", flagged(row));
  }

  // --- the histogram ------------------------------------------------------------------------

  const range = () => [now.low, now.high, data.complete ? 400 : now.steps.length - 1];
  let width = 0, x, moveLine = () => {};

  function draw() {
    const box = $("histogram");
    width = Math.max(box.clientWidth, 280);
    const height = width < 600 ? 200 : 240, left = 8, right = width - 8, base = height - 24, top = 24;
    const tallest = Math.max(...now.bins, ...now.expected, 1);
    const span = now.high - now.low, step = (right - left) / now.bins.length;
    x = value => left + (right - left) * Math.min(Math.max((value - now.low) / span, 0), 1);
    const y = rows => base - (base - top) * rows / tallest;
    const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img"});
    svg.setAttribute("aria-label", `Histogram of the scores of ${now.name}`);
    const points = now.expected.map((rows, k) => `L${left + k * step} ${y(rows)}H${left + (k + 1) * step}`);
    const expected = `M${left} ${base}${points.join("")}V${base}`;
    if (points.length) make("path", {class: "back", d: expected}, svg);
    const clips = ["below", "over"].map(id => make("rect", {y: 0, height}, make("clipPath", {id}, svg)));
    ["bar", "on"].forEach((kind, k) => {
      const group = make("g", {class: kind, "clip-path": `url(#${["below", "over"][k]})`}, svg);
      now.bins.forEach((rows, bin) => {
        if (!rows) return;
        const tall = Math.max(base - y(rows), 1.5);
        const bar = make("rect", {x: left + bin * step + 0.5, y: base - tall, width: Math.max(step - 1, 1), height: tall}, group);
        make("title", {}, bar).textContent =
          `${count(rows, "image")} from ${short(now.low + span * bin / now.bins.length)} to ${short(now.low + span * (bin + 1) / now.bins.length)}`;
      });
    });
    if (points.length) make("path", {class: "outline", d: expected}, svg);
    make("line", {x1: left, x2: right, y1: base, y2: base}, svg);
    for (const tick of ticks(now.low, now.high, width / 110)) {
      const text = make("text", {x: x(tick), y: base + 17, "text-anchor": "middle"}, svg);
      text.textContent = String(tick);
    }
    const line = make("line", {class: "at", y1: top - 6, y2: base}, svg);
    const label = make("text", {class: "name", y: 12}, svg);
    moveLine = () => {
      const at = threshold === null ? right : x(threshold);
      line.style.display = label.style.display = threshold === null ? "none" : "";
      line.setAttribute("x1", at);
      line.setAttribute("x2", at);
      label.setAttribute("x", Math.min(Math.max(at, 60), width - 60));
      label.setAttribute("text-anchor", "middle");
      label.textContent = `threshold ${short(threshold ?? 0)}`;
      clips[0].setAttribute("width", Math.max(at, 0));
      clips[1].setAttribute("x", at);
      clips[1].setAttribute("width", Math.max(width - at, 0));
    };
    const drag = event => {
      if (!event.buttons) return;
      const area = svg.getBoundingClientRect();
      const part = ((event.clientX - area.left) * width / area.width - left) / (right - left);
      set(now.low + span * Math.min(Math.max(part, 0), 1));
    };
    svg.addEventListener("pointerdown", drag);
    svg.addEventListener("pointermove", drag);
    box.replaceChildren(svg);
  }

  function ticks(low, high, wanted) {
    const rough = (high - low) / Math.max(wanted, 2), power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find(each => each * power >= rough);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(+(k * step).toPrecision(6));
    return found;
  }

  // --- the list -----------------------------------------------------------------------------

  let lower;  // made at the first search

  function filter() {
    const words = $("search").value.trim().toLowerCase(), which = $("which").value;
    order = Array.from({length: listed}, (_, row) => row);
    if (words) {
      lower ??= data.paths.map((path, row) => [data.prefix + path, data.names[data.predicted[row]],
        data.names[data.labels?.[row]] ?? ""].join("\n").toLowerCase());
      order = order.filter(row => lower[row].includes(words));
    }
    if (which) order = order.filter(row => flagged(row) === (which === "1"));
    const keys = {
      path: data.paths,
      class: data.predicted.map(name => data.names[name]),
      score: now.scores,
      p: now.p?.map(p => p === "" ? 2 : +p),
    }[by] ?? now.scores;
    const sign = down ? -1 : 1;
    order.sort((a, b) => keys[a] < keys[b] ? -sign : keys[a] > keys[b] ? sign : a - b);
    start = 0;
    list();
  }

  function list() {
    const rows = order.slice(start, start + PAGE).map(row => {
      const line = document.createElement("tr"), head = document.createElement("th");
      const name = Object.assign(document.createElement("button"), {type: "button", title: data.prefix + data.paths[row]});
      const picture = figures.get(row)?.querySelector("img");
      if (picture) name.append(Object.assign(document.createElement("img"), {alt: "", src: picture.src}));
      name.append(cut(data.paths[row]));
      head.scope = "row";
      head.append(name);
      if (now.why[row]) head.append(Object.assign(document.createElement("small"), {textContent: now.why[row]}));
      line.append(head);
      const cells = {predicted: data.names[data.predicted[row]], score: short(now.scores[row])};
      if (now.p) cells.p = now.p[row] || "–";
      for (const [name, text] of Object.entries(cells)) {
        const cell = Object.assign(document.createElement("td"), {textContent: text, title: text});
        cell.dataset.name = name;
        line.append(cell);
      }
      name.ariaExpanded = "false";
      name.addEventListener("click", () => {
        name.ariaExpanded = String(line.classList.toggle("open"));
      });
      line.dataset.row = row;
      line.role = "row";
      head.role = "rowheader";
      for (const cell of line.cells) cell.role ||= "cell";
      mark(line, row);
      return line;
    });
    $("list").querySelector("tbody").replaceChildren(...rows);
    const found = count(order.length, "image");
    $("place").textContent = order.length ?
      `${(start + 1).toLocaleString("en")}–${(start + rows.length).toLocaleString("en")} of ${found}` : "no image matches";
    $("back").disabled = !start;
    $("next").disabled = start + PAGE >= order.length;
  }

  // --- controls -----------------------------------------------------------------------------

  function set(value) {
    threshold = value === null || data.complete ? value : now.steps[stepOf(value)];
    update();
  }

  function choose(index) {
    now = detectors[index];
    threshold = now.threshold;
    if (!data.complete && threshold !== null) threshold = now.threshold = now.steps[stepOf(threshold)];
    for (const name of ["most", "least"]) {
      const strip = $(`${name}-strip`);
      if (!strip) continue;
      $("pool").append(...strip.children);
      strip.append(...now[name].map(row => figures.get(row)));
      [...strip.children].forEach((figure, k) => { figure.tabIndex = k ? -1 : 0; });
    }
    for (const name of ["most", "least"]) for (const row of now[name]) {
      const figure = figures.get(row), caption = figure.querySelector("figcaption");
      caption.querySelector("b").textContent = short(now.scores[row]);
      caption.querySelector("i")?.remove();
      caption.querySelector("small")?.remove();
      if (now.p?.[row]) caption.querySelector("b").after(" ", Object.assign(document.createElement("i"), {textContent: `p ${now.p[row]}`}));
      if (now.why[row]) caption.append(Object.assign(document.createElement("small"), {textContent: now.why[row]}));
    }
    $("calibrated").hidden = !now.expected.length;
    $("expected").textContent = `if all were in distribution (${now.calibrated})`;
    $("tallest").textContent = `images (at most ${Math.max(...now.bins).toLocaleString("en")} in a bar)`;
    $("p-head").hidden = !now.p;
    $("slider").min = 0;
    $("slider").max = range()[2];
    draw();
    update();
    filter();
  }

  for (const element of document.querySelectorAll(".controls,#histogram,#slider,#legend,#list")) element.hidden = false;
  $("detector")?.addEventListener("change", event => choose(+event.target.value));
  $("slider").addEventListener("input", event => {
    const [low, high, last] = range(), at = +event.target.value;
    set(data.complete ? low + (high - low) * at / last : now.steps[at]);
  });
  $("number").addEventListener("input", event => {
    if (event.target.value !== "" && Number.isFinite(event.target.valueAsNumber)) set(event.target.valueAsNumber);
  });
  $("number").addEventListener("blur", update);
  $("reset").addEventListener("click", () => set(now.threshold));
  $("search").addEventListener("input", filter);
  $("which").addEventListener("change", filter);
  $("back").addEventListener("click", () => { start -= PAGE; list(); });
  $("next").addEventListener("click", () => { start += PAGE; list(); });
  for (const button of document.querySelectorAll("#list thead button")) {
    button.addEventListener("click", () => {
      down = button.dataset.by === by ? !down : button.dataset.by === "score";
      by = button.dataset.by;
      for (const head of document.querySelectorAll("#list thead th")) head.removeAttribute("aria-sort");
      button.parentElement.setAttribute("aria-sort", down ? "descending" : "ascending");
      filter();
    });
  }
  new ResizeObserver(() => {
    if (Math.abs($("histogram").clientWidth - width) > 1 && $("histogram").clientWidth) { draw(); moveLine(); }
  }).observe($("histogram"));
  choose(0);
})();
