// The page "Draw a digit": what one sees and touches. Every number comes from draw_proof.js; here
// they are asked for in small portions, so that the page answers while one draws, and shown.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const SIDE = 28, PIXELS = SIDE * SIDE;
  const PEN = 1.1, RUBBER = 2; // radii in pixels; their edges are a pixel wide, as in MNIST
  const FRAME = 70; // ms that the search may take while one draws
  const QUICK = { steps: 6, gain: 1e-3 }; // of such a search
  const PAUSE = 150, CENTRE = 700; // ms after the last stroke: the full search, the centring
  const KEPT = 60; // strokes to undo
  const LARGEST = 5; // the distance at the end of the axis
  const CHART = { left: 30, right: 54, top: 22, row: 19, bar: 11, bottom: 4, slider: 24 };
  const SAMPLE = [4, 0]; // shown first: a class, and which of its digits
  const STRIKES = 3; // classes that an attacker tries, the nearest first

  // A promised radius is only ever rounded down, a distance that an attack needs only ever up.
  const down = (value) => (Math.floor(value * 1000) / 1000).toFixed(3);
  const up = (value) => (Math.ceil(value * 1000) / 1000).toFixed(3);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const { norm, minus, along, weakest } = CrcProof;

  function element(parent, name, attributes) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return parent.appendChild(node);
  }

  // Paint 28 x 28 pixels: `colour` gives red, green, blue and opacity of a value.
  function paint(canvas, values, colour) {
    [canvas.width, canvas.height] = [SIDE, SIDE];
    const image = new ImageData(SIDE, SIDE);
    values.forEach((value, i) => image.data.set(colour(value), 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  // White ink on black, as MNIST has it; a style sheet turns it round on a light page.
  const ink = (value) => [255, 255, 255].map((white) => white * clamp(value, 0, 1)).concat(255);
  // What an attacker adds is orange, what is taken away blue; a third of full ink shows fully.
  const change = (value) =>
    (value > 0 ? [213, 94, 0] : [0, 114, 178]).concat(255 * Math.min(1, 3 * Math.abs(value)));

  // --- The sheet: 784 numbers in [0, 1] -----------------------------------------------------------

  class Sheet {
    constructor() {
      this.ink = new Float64Array(PIXELS);
      this.past = [];
    }

    remember() {
      this.past.push(this.ink.slice());
      if (this.past.length > KEPT) this.past.shift();
    }

    undo() {
      this.ink = this.past.pop() ?? this.ink;
    }

    replace(values) {
      this.remember();
      this.ink = Float64Array.from(values);
    }

    // A line from one place to another, in pixels: full ink near it, and an edge that fades.
    line([x0, y0], [x1, y1], rubber) {
      const radius = rubber ? RUBBER : PEN, [dx, dy] = [x1 - x0, y1 - y0];
      const length = dx * dx + dy * dy || 1;
      for (let y = 0, i = 0; y < SIDE; y++)
        for (let x = 0; x < SIDE; x++, i++) {
          const t = clamp(((x - x0) * dx + (y - y0) * dy) / length, 0, 1);
          const cover = clamp(radius + 0.5 - Math.hypot(x - x0 - t * dx, y - y0 - t * dy), 0, 1);
          this.ink[i] = rubber ? Math.min(this.ink[i], 1 - cover) : Math.max(this.ink[i], cover);
        }
    }

    // MNIST puts a digit's centre of mass into the middle: move by whole pixels, lose no ink.
    // Returns whether anything moved.
    centre() {
      const total = this.ink.reduce((sum, value) => sum + value, 0);
      if (!total) return false;
      const mean = (place) => this.ink.reduce((sum, v, i) => sum + v * place(i), 0) / total;
      const column = Math.round(SIDE / 2 - mean((i) => i % SIDE));
      const row = Math.round(SIDE / 2 - mean((i) => Math.floor(i / SIDE)));
      if (!column && !row) return false;
      const moved = new Float64Array(PIXELS);
      for (let i = 0; i < PIXELS; i++) {
        const [x, y] = [(i % SIDE) + column, Math.floor(i / SIDE) + row];
        if (!this.ink[i]) continue;
        if (x < 0 || y < 0 || x >= SIDE || y >= SIDE) return false;
        moved[y * SIDE + x] = this.ink[i];
      }
      this.ink = moved;
      return true;
    }
  }

  // --- The page ----------------------------------------------------------------------------------

  class Page {
    constructor(root) {
      this.root = root;
      this.find = (name) => root.querySelector(`.crc-draw-${name}`);
      this.sheet = new Sheet();
      this.digits = Uint8Array.from(atob(root.dataset.digits), (letter) => letter.charCodeAt(0));
      this.row = 0;
      this.rubber = false;
      this.cursor = [14, 14];
      this.sample = true; // the digit shown first gives way to the first stroke
      this.slider = this.find("budget");
      this.listen();
      this.fillRow();
      this.start();
      new ResizeObserver(() => this.drawChart()).observe(this.find("plot"));
    }

    async start() {
      this.sheet.ink = Float64Array.from(this.digit(...SAMPLE));
      this.changed();
      this.setBudget();
      try {
        this.prover = new CrcProof.Prover(await loadNetwork(this.root, this.find("loading")));
      } catch (error) {
        this.find("loading").textContent =
          `The network's weights could not be loaded (${error.message}): nothing is certified.`;
        return;
      }
      this.find("loading").hidden = true;
      this.root.dataset.state = "ready";
      this.changed();
    }

    // One of MNIST's digits, as torchvision's ToTensor reads it: float32 numbers.
    digit(label, row) {
      const start = (10 * label + row) * PIXELS;
      return Array.from(this.digits.subarray(start, start + PIXELS), (v) => Math.fround(v / 255));
    }

    // --- Drawing -------------------------------------------------------------------------------

    listen() {
      this.listenToPointer();
      this.find("sheet").addEventListener("keydown", (event) => this.key(event));
      const click = (name, action) => this.find(name).addEventListener("click", action);
      click("pen", () => this.take(false));
      click("rubber", () => this.take(true));
      click("undo", () => this.edit(() => this.sheet.undo()));
      click("clear", () => this.edit(() => this.sheet.replace(new Float64Array(PIXELS))));
      click("others", () => {
        this.row = (this.row + 1) % 10;
        this.fillRow();
      });
      click("edge", () => this.setBudget(Math.floor(100 * this.radius) / 100));
      click("break", () => this.setBudget(Math.ceil(100 * this.nearest.distance) / 100));
      this.slider.addEventListener("input", () => this.setBudget());
    }

    listenToPointer() {
      const canvas = this.find("sheet");
      let from = null;
      const place = (event) => {
        const box = canvas.getBoundingClientRect();
        const scale = (value, size) => (value / size) * SIDE - 0.5;
        return [scale(event.clientX - box.left, box.width), scale(event.clientY - box.top, box.height)];
      };
      const draw = (event) => {
        for (const each of event.getCoalescedEvents?.() ?? [event]) this.stroke(from, (from = place(each)));
      };
      canvas.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        canvas.setPointerCapture(event.pointerId);
        this.begin();
        from = place(event);
        this.stroke(from, from);
      });
      canvas.addEventListener("pointermove", (event) => from && draw(event));
      for (const name of ["pointerup", "pointercancel"])
        canvas.addEventListener(name, () => {
          if (from) this.end();
          from = null;
        });
    }

    begin() {
      clearTimeout(this.centring);
      this.sheet.remember();
      if (this.sample) this.sheet.ink = new Float64Array(PIXELS);
      this.sample = false;
    }

    stroke(from, to) {
      this.sheet.line(from, to, this.rubber);
      this.changed();
    }

    end() {
      clearTimeout(this.centring);
      this.centring = setTimeout(() => {
        if (this.find("centre").checked && this.sheet.centre()) this.changed();
      }, CENTRE);
    }

    // Arrow keys move the pen; the space bar puts it down and lifts it.
    key(event) {
      const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const way = ways[event.key], from = this.cursor;
      if (way) {
        this.cursor = from.map((value, axis) => clamp(value + way[axis], 0, SIDE - 1));
        if (this.penDown) this.stroke(from, this.cursor);
      } else if (event.key === " ") {
        this.penDown = !this.penDown;
        if (this.penDown) this.begin();
        if (this.penDown) this.stroke(from, from);
        else this.end();
      } else return;
      event.preventDefault();
      this.drawCursor();
      const [column, row] = this.cursor.map((value) => value + 1);
      this.say(`Pen ${this.penDown ? "down" : "up"}, column ${column}, row ${row}.`);
    }

    take(rubber) {
      this.rubber = rubber;
      this.find("pen").setAttribute("aria-pressed", !rubber);
      this.find("rubber").setAttribute("aria-pressed", rubber);
    }

    edit(action) {
      clearTimeout(this.centring);
      this.sample = false;
      action();
      this.changed();
    }

    // The row of digits to start from: one of each class.
    fillRow() {
      const row = this.find("digits");
      row.replaceChildren();
      for (let label = 0; label < 10; label++) {
        const button = row.appendChild(document.createElement("button"));
        button.type = "button";
        button.setAttribute("aria-label", `Take MNIST's ${label}, number ${this.row + 1}`);
        const values = this.digit(label, this.row);
        const canvas = button.appendChild(document.createElement("canvas"));
        canvas.className = "crc-draw-ink";
        paint(canvas, values, ink);
        button.addEventListener("click", () => this.edit(() => this.sheet.replace(values)));
      }
    }

    // --- Computing -----------------------------------------------------------------------------

    // The picture is another one: an answer with the next frame, a better one once the pen rests.
    changed() {
      paint(this.find("sheet"), this.sheet.ink, ink);
      this.find("hint").hidden = this.sheet.ink.some((value) => value > 0);
      if (!this.prover) return;
      this.root.dataset.state = "drawing";
      clearTimeout(this.settling);
      this.frame ??= requestAnimationFrame(() => {
        this.frame = null;
        this.answer();
        this.settling = setTimeout(() => this.settle(this.tasks()), PAUSE);
      });
    }

    // The quick answer. Where the label stays, each search begins where the last one ended.
    answer() {
      const began = performance.now(), last = this.view;
      const view = this.prover.look(this.sheet.ink.slice());
      const same = last?.label === view.label;
      const start = ({ target }) => {
        const row = same && last.rows.find((each) => each.target === target);
        return row ? along(view.x0, 1, minus(row.point, last.x0)) : view.x0;
      };
      this.prover.raise(
        view,
        (row) => ({ ...QUICK, start: start(row) }),
        () => performance.now() - began > FRAME,
      );
      this.view = view;
      this.result = null;
      this.took = performance.now() - began;
      this.show();
    }

    // What the full answer takes, in portions: the radii, the nearest adversaries, the attack.
    *tasks() {
      const { view, prover } = this;
      const rows = [...view.rows].sort((a, b) => a.radius - b.radius);
      for (const row of rows) {
        const found = prover.search(view.x0, row, { start: row.point });
        if (found.radius > row.radius) Object.assign(row, found);
        yield;
      }
      for (const row of rows.sort((a, b) => a.radius - b.radius)) {
        row.adversary = prover.adversary(view.x0, row, row.point);
        yield;
      }
      this.strike();
    }

    settle(tasks) {
      const { done } = tasks.next();
      this.show();
      if (!done) this.settling = setTimeout(() => this.settle(tasks));
      else {
        this.root.dataset.state = "settled";
        this.say(`${this.find("summary").textContent} ${this.find("verdict").textContent}`);
      }
    }

    get radius() {
      return weakest(this.view.rows).radius;
    }

    // The nearest adversary of any class that is known, or a place infinitely far away.
    get nearest() {
      const known = this.view.rows.map((row) => row.adversary).filter(Boolean);
      return known.reduce((a, b) => (b.distance < a.distance ? b : a), { distance: Infinity });
    }

    // The slider's budget, spent: the smallest margin that a few attacks find in the ball.
    strike() {
      const { view, prover, budget } = this;
      if (!view || !budget) return;
      const reach = (row) => row.adversary?.distance ?? 2 * row.radius;
      const rows = [...view.rows].sort((a, b) => reach(a) - reach(b)).slice(0, STRIKES);
      const found = rows.map((row) =>
        ({ row, ...prover.attack(view.x0, row, budget, row.adversary?.point ?? row.point) }));
      let best = found.reduce((a, b) => (b.margin < a.margin ? b : a));
      let broken = prover.isAdversarial(best.point, best.row);
      const known = rows.find((row) => row.adversary?.distance <= budget);
      if (broken) this.keepNearest(best.row, prover.retreat(view.x0, best.row, best.point));
      else if (known) [best, broken] = [{ row: known, point: known.adversary.point }, true];
      const logits = prover.logits(best.point);
      this.result = { ...best, broken, budget, label: logits.indexOf(Math.max(...logits)) };
      this.result.margin = logits[view.label] - logits[best.row.target];
    }

    keepNearest(row, adversary) {
      if (adversary?.distance < (row.adversary?.distance ?? Infinity)) row.adversary = adversary;
    }

    setBudget(value) {
      if (value !== undefined) this.slider.value = value;
      this.budget = Number(this.slider.value);
      this.result = null;
      const text = this.budget.toFixed(2);
      this.slider.setAttribute("aria-valuetext", text);
      this.find("spent").textContent = text;
      this.drawChart();
      this.spending ??= requestAnimationFrame(() => {
        this.spending = null;
        if (this.prover && this.view) this.strike();
        this.show();
      });
    }

    // --- Showing -------------------------------------------------------------------------------

    show() {
      if (!this.view) return;
      const { label } = this.view;
      this.find("class").textContent = label;
      this.find("radius").textContent = down(this.radius);
      this.find("summary").textContent = this.summary();
      this.find("edge").disabled = !(this.radius > 0);
      this.find("break").disabled = !(this.nearest.distance < LARGEST);
      this.drawChart();
      this.showAttack();
    }

    summary() {
      const { view, radius, nearest } = this;
      if (!(radius > 0)) return "Two digits tie here, so that nothing is certified.";
      const found = Number.isFinite(nearest.distance)
        ? `The nearest one we found that is not lies ${up(nearest.distance)} away.` : "";
      return `Every picture closer than ${down(radius)} is read as ${view.label} too: that is proved. ` +
        found;
    }

    showAttack() {
      const { view, result } = this;
      const verdict = this.find("verdict");
      paint(this.find("before"), view.x0, ink);
      const point = result?.point ?? view.x0;
      paint(this.find("change"), minus(point, view.x0), change);
      paint(this.find("after"), point, ink);
      this.find("read").textContent = result ? `read as ${result.label}` : "…";
      verdict.dataset.kind = this.kind();
      verdict.textContent = this.verdict();
    }

    // "safe": proved; "broken": an adversary is there; "open": neither.
    kind() {
      if (this.budget <= this.radius) return "safe";
      return this.result?.broken ? "broken" : "open";
    }

    verdict() {
      const { view, result, budget } = this, length = budget.toFixed(2);
      if (this.kind() === "safe")
        return `It fails. No attack with a budget of ${length} can turn this ${view.label}: that is ` +
          "proved, whatever the attack. " + (result ? "Ours left it ahead of " +
          `${result.row.target} by ${result.margin.toFixed(2)}.` : "");
      if (!result) return "…";
      if (result.broken)
        return `It succeeds: ${up(norm(minus(result.point, view.x0)))} away, the network reads ` +
          `${result.label}.`;
      return `It failed, but nothing is proved: ${length} lies beyond the certified radius, and ` +
        "another attack might succeed.";
    }

    say(text) {
      this.find("status").textContent = text;
    }

    drawCursor() {
      const spot = this.find("cursor");
      [spot.style.left, spot.style.top] = this.cursor.map((value) => `${(100 * value) / SIDE}%`);
      spot.classList.toggle("crc-draw-lowered", Boolean(this.penDown));
    }

    // A row a class: the bar ends at its certified radius, the cross is its nearest adversary
    // found, and what lies between is open. The lines are the radius against all, and the budget.
    drawChart() {
      const svg = this.find("plot"), width = svg.clientWidth;
      svg.replaceChildren();
      if (!width) return;
      const height = CHART.top + 10 * CHART.row + CHART.bottom;
      svg.style.height = `${height}px`;
      const unit = (width - CHART.left - CHART.right) / LARGEST;
      const x = (distance) => CHART.left + unit * Math.min(distance, LARGEST);
      const y = (label) => CHART.top + (label + 0.5) * CHART.row;
      const text = (place, name, words, anchor = "middle") => Object.assign(
        element(svg, "text", { x: place[0], y: place[1], "text-anchor": anchor, class: name }),
        { textContent: words });
      for (let tick = 0; tick <= LARGEST; tick++) {
        element(svg, "path", { class: "crc-draw-grid", d: `M${x(tick)} ${CHART.top}V${height}` });
        text([x(tick), height + CHART.slider + 13], "crc-draw-tick", tick);
      }
      for (let label = 0; label < 10; label++)
        text([CHART.left - 12, y(label) + 5],
          this.view?.label === label ? "crc-draw-own" : "crc-draw-digit", label);
      if (this.view) this.drawRows(svg, x, y, text, height);
      element(svg, "path", { class: "crc-draw-spend", d: `M${x(this.budget)} ${CHART.top - 4}V${height + CHART.slider / 2}` });
      if (this.view)
        text([x(0) + 8, y(this.view.label) + 5], "crc-draw-note", "the network's answer", "start");
    }

    drawRows(svg, x, y, text, height) {
      const { view, radius } = this;
      element(svg, "rect", { class: "crc-draw-zone", x: x(0), y: CHART.top, width: x(radius) - x(0),
        height: height - CHART.top });
      for (const { target, radius: own, adversary } of view.rows) {
        const top = y(target) - CHART.bar / 2;
        const bar = (name, from, to) => element(svg, "rect", { class: name, x: x(from), y: top,
          width: Math.max(0, x(to) - x(from)), height: CHART.bar });
        if (adversary) bar("crc-draw-open", own, adversary.distance);
        bar("crc-draw-bar", 0, own);
        if (adversary && adversary.distance <= LARGEST)
          element(svg, "path", { class: "crc-draw-cross",
            d: `M${x(adversary.distance)} ${y(target)}m-4 -4l8 8m0 -8l-8 8` });
        text([svg.clientWidth - 4, y(target) + 5], "crc-draw-value", down(own), "end");
      }
      element(svg, "path", { class: "crc-draw-line", d: `M${x(radius)} ${CHART.top - 4}V${height}` });
      text([x(radius), CHART.top - 8], "crc-draw-limit", "certified");
    }
  }

  // --- The weights -------------------------------------------------------------------------------

  // 4 MB that only this page needs. A page on disk may load them by a script alone, which tells
  // nothing of its progress and takes an instant; from a server they are read piece by piece.
  async function loadNetwork(root, note) {
    const bar = note.querySelector("progress");
    const address = (document.documentElement.dataset.content_root ?? "./") + root.dataset.network;
    let source = address;
    if (location.protocol.startsWith("http")) {
      const response = await fetch(address);
      if (!response.ok) throw new Error(`status ${response.status}`);
      const pieces = [];
      let loaded = 0;
      for (const reader = response.body.getReader(); ;) {
        const { done, value } = await reader.read();
        if (done) break;
        pieces.push(value);
        bar.value = (loaded += value.length) / Number(root.dataset.bytes);
      }
      source = URL.createObjectURL(new Blob(pieces, { type: "text/javascript" }));
    }
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.onload = resolve;
      script.onerror = () => reject(new Error("no such file"));
      script.src = source;
      document.head.appendChild(script);
    });
    return window.crcDrawNetwork;
  }

  for (const root of document.querySelectorAll(".crc-draw:not([data-state])")) {
    root.dataset.state = "loading";
    root.page = new Page(root);
  }
})();
