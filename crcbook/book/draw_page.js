// The page "Draw a digit": what is computed when, and how it is shown. The sheet is in
// draw_sheet.js, and every number comes from draw_proof.js.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const EXAMPLE = [4, 0]; // shown first: a class, and which of its digits
  const FRAME = 70; // ms that a search may take while one draws
  const QUICK = { steps: 6, gain: 1e-3 }; // of such a search
  const PAUSE = 150; // ms after the last stroke: the full search begins
  const STRIKES = 3; // classes that the attacker tries, the nearest first
  const LARGEST = 5; // the distance at the end of the axis
  const CHART = { left: 30, right: 54, top: 22, row: 19, bar: 11, bottom: 4, slider: 24 };

  const { norm, minus, along, weakest } = CrcProof;
  const { Editor, paint, ink } = CrcSheet;
  // A promised radius is only ever rounded down, a distance that an attack needs only ever up.
  const down = (value) => (Math.floor(value * 1000) / 1000).toFixed(3);
  const up = (value) => (Math.ceil(value * 1000) / 1000).toFixed(3);
  // What an attacker adds is orange, what is taken away blue; a third of full ink shows fully.
  const change = (value) =>
    (value > 0 ? [213, 94, 0] : [0, 114, 178]).concat(255 * Math.min(1, 3 * Math.abs(value)));

  // --- What is known of one picture ------------------------------------------------------------

  // The view of a picture: the network's answer and a row for each other class, with its certified
  // radius and, once it was looked for, its nearest adversary.
  class Answer {
    // The quick answer. Where the last picture had the same label, searches begin where its ended.
    constructor(prover, x0, last) {
      const began = performance.now();
      this.prover = prover;
      this.view = prover.look(x0);
      const start = ({ target }) => {
        const same = last?.view.label === this.view.label;
        const row = same && last.view.rows.find((each) => each.target === target);
        return row ? along(x0, 1, minus(row.point, last.view.x0)) : x0;
      };
      const late = () => performance.now() - began > FRAME;
      prover.raise(this.view, (row) => ({ ...QUICK, start: start(row) }), late);
      this.took = performance.now() - began;
    }

    get radius() {
      return weakest(this.view.rows).radius;
    }

    // The nearest adversary of any class that is known, or a place infinitely far away.
    get nearest() {
      const known = this.view.rows.map((row) => row.adversary).filter(Boolean);
      return known.reduce((a, b) => (b.distance < a.distance ? b : a), { distance: Infinity });
    }

    // What the full answer takes, in portions of some 50 ms: all radii, then all adversaries.
    *complete() {
      const { view, prover } = this;
      const rows = () => [...view.rows].sort((a, b) => a.radius - b.radius);
      for (const row of rows()) {
        const found = prover.search(view.x0, row, { start: row.point });
        if (found.radius > row.radius) Object.assign(row, found);
        yield;
      }
      for (const row of rows()) {
        row.adversary = prover.adversary(view.x0, row, row.point);
        yield;
      }
    }

    // Spend a budget: the smallest margin that attacks towards a few classes find in the ball. An
    // adversary that is known and affordable is an attack like any other.
    strike(budget) {
      const { view, prover } = this;
      const reach = (row) => row.adversary?.distance ?? 2 * row.radius;
      const rows = [...view.rows].sort((a, b) => reach(a) - reach(b)).slice(0, STRIKES);
      const attacks = rows.map((row) => {
        const [start, steps] = row.adversary ? [row.adversary.point, 3] : [row.point, 5];
        return { row, ...prover.attack(view.x0, row, budget, start, steps) };
      });
      let { row, point } = attacks.reduce((a, b) => (b.margin < a.margin ? b : a));
      let broken = prover.isAdversarial(point, row);
      const known = rows.find((each) => reach(each) <= budget && each.adversary);
      if (broken) this.keepNearest(row, prover.retreat(view.x0, row, point));
      else if (known) [row, point, broken] = [known, known.adversary.point, true];
      const logits = prover.logits(point);
      const [label, margin] =
        [logits.indexOf(Math.max(...logits)), logits[view.label] - logits[row.target]];
      return { target: row.target, point, broken, label, margin };
    }

    keepNearest(row, adversary) {
      if (adversary?.distance < (row.adversary?.distance ?? Infinity)) row.adversary = adversary;
    }
  }

  // --- The chart -------------------------------------------------------------------------------

  // A row a class: the bar ends at its certified radius, the cross is its nearest adversary found,
  // and what lies between is open. The lines are the radius against all classes, and the budget.
  class Chart {
    constructor(svg) {
      this.svg = svg;
      this.bottom = CHART.top + 10 * CHART.row + CHART.bottom;
      svg.style.height = `${this.bottom}px`;
    }

    x(distance) {
      const width = this.svg.clientWidth - CHART.left - CHART.right;
      return CHART.left + (width * Math.min(distance, LARGEST)) / LARGEST;
    }

    y(label) {
      return CHART.top + (label + 0.5) * CHART.row;
    }

    add(name, kind, attributes) {
      const node = document.createElementNS(SVG, name);
      node.setAttribute("class", `crc-draw-${kind}`);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      return this.svg.appendChild(node);
    }

    text(kind, x, y, words, anchor = "middle") {
      this.add("text", kind, { x, y, "text-anchor": anchor }).textContent = words;
    }

    line(kind, distance, top, bottom) {
      this.add("path", kind, { d: `M${this.x(distance)} ${top}V${bottom}` });
    }

    draw(answer, budget) {
      this.svg.replaceChildren();
      if (this.svg.clientWidth <= CHART.left + CHART.right) return;
      const label = answer?.view.label;
      for (let tick = 0; tick <= LARGEST; tick++) {
        this.line("grid", tick, CHART.top, this.bottom);
        this.text("tick", this.x(tick), this.bottom + CHART.slider + 13, tick);
      }
      for (let row = 0; row < 10; row++)
        this.text(row === label ? "own" : "digit", CHART.left - 12, this.y(row) + 5, row);
      if (answer) this.drawAnswer(answer);
      this.line("spend", budget, CHART.top - 4, this.bottom + CHART.slider / 2);
      if (answer)
        this.text("note", this.x(0) + 8, this.y(label) + 5, "the network's answer", "start");
    }

    drawAnswer({ view, radius }) {
      this.add("rect", "zone", { x: this.x(0), y: CHART.top, width: this.x(radius) - this.x(0),
        height: this.bottom - CHART.top });
      for (const row of view.rows) this.drawRow(row);
      this.line("line", radius, CHART.top - 4, this.bottom);
      this.text("limit", this.x(radius), CHART.top - 8, "certified");
    }

    drawRow({ target, radius, adversary }) {
      const middle = this.y(target), height = CHART.bar;
      const bar = (kind, from, to) => this.add("rect", kind, { x: this.x(from),
        y: middle - height / 2, width: Math.max(0, this.x(to) - this.x(from)), height });
      bar("bar", 0, radius);
      if (adversary) bar("open", radius, adversary.distance);
      if (adversary?.distance <= LARGEST)
        this.add("path", "cross",
          { d: `M${this.x(adversary.distance)} ${middle}m-4 -4l8 8m0 -8l-8 8` });
      this.text("value", this.svg.clientWidth - 4, middle + 5, down(radius), "end");
    }
  }

  // --- The page --------------------------------------------------------------------------------

  class Page {
    constructor(root) {
      this.root = root;
      this.find = (name) => root.querySelector(`.crc-draw-${name}`);
      this.chart = new Chart(this.find("plot"));
      this.slider = this.find("budget");
      this.editor = new Editor(root,
        { changed: () => this.changed(), say: (text) => this.say(text) });
      this.editor.example(...EXAMPLE);
      this.editor.show();
      this.slider.addEventListener("input", () => this.spend());
      const jump = (name, budget) => this.find(name).addEventListener("click", () => {
        this.slider.value = budget();
        this.spend();
      });
      // The slider has steps of 1/100: stay inside the proof, or reach the adversary.
      jump("edge", () => Math.floor(100 * this.answer.radius) / 100);
      jump("break", () => Math.ceil(100 * this.answer.nearest.distance) / 100);
      new ResizeObserver(() => this.chart.draw(this.answer, this.budget)).observe(this.chart.svg);
      this.spend();
      this.load();
    }

    async load() {
      const note = this.find("loading");
      try {
        this.prover = new CrcProof.Prover(await loadNetwork(this.root, note));
      } catch (error) {
        note.textContent =
          `The network's weights could not be loaded (${error.message}): nothing is certified.`;
        return;
      }
      note.hidden = true;
      this.changed();
    }

    // The picture is another one: an answer with the next frame, the full one once the pen rests.
    changed() {
      this.editor.show();
      if (!this.prover) return;
      this.root.dataset.state = "drawing";
      clearTimeout(this.settling);
      this.frame ??= requestAnimationFrame(() => {
        this.frame = null;
        this.answer = new Answer(this.prover, this.editor.sheet.ink.slice(), this.answer);
        this.result = null;
        this.show();
        this.settling = setTimeout(() => this.settle(this.answer.complete()), PAUSE);
      });
    }

    settle(portions) {
      const { done } = portions.next();
      if (done) this.result = this.answer.strike(this.budget);
      this.show();
      if (!done) {
        this.settling = setTimeout(() => this.settle(portions));
        return;
      }
      this.root.dataset.state = "settled";
      this.say(`${this.find("summary").textContent} ${this.find("verdict").textContent}`);
    }

    // The budget is another one: what it buys is seen with the next frame.
    spend() {
      this.budget = Number(this.slider.value);
      this.result = null;
      this.slider.setAttribute("aria-valuetext", this.budget.toFixed(2));
      this.find("spent").textContent = this.budget.toFixed(2);
      this.chart.draw(this.answer, this.budget);
      this.striking ??= requestAnimationFrame(() => {
        this.striking = null;
        if (!this.answer) return;
        this.result = this.answer.strike(this.budget);
        this.show();
      });
    }

    show() {
      const { view, radius, nearest } = this.answer;
      this.find("class").textContent = view.label;
      this.find("radius").textContent = down(radius);
      this.find("summary").textContent = this.summary();
      this.find("edge").disabled = !(radius > 0);
      this.find("break").disabled = !(nearest.distance < LARGEST);
      this.chart.draw(this.answer, this.budget);
      this.showAttack();
    }

    summary() {
      const { view, radius, nearest } = this.answer;
      if (!(radius > 0)) return "Two digits tie here, so that nothing is certified.";
      const found = Number.isFinite(nearest.distance)
        ? ` The nearest one we found that is not lies ${up(nearest.distance)} away.` : "";
      return `Every picture closer than ${down(radius)} is read as ${view.label} too: that is ` +
        `proved.${found}`;
    }

    showAttack() {
      const { view } = this.answer, point = this.result?.point ?? view.x0;
      paint(this.find("before"), view.x0, ink);
      paint(this.find("change"), minus(point, view.x0), change);
      paint(this.find("after"), point, ink);
      this.find("read").textContent = this.result ? `read as ${this.result.label}` : "…";
      this.find("verdict").dataset.kind = this.kind();
      this.find("verdict").textContent = this.verdict();
    }

    // "safe": proved; "broken": an adversary is there; "open": neither.
    kind() {
      if (this.budget <= this.answer.radius) return "safe";
      return this.result?.broken ? "broken" : "open";
    }

    verdict() {
      const { result, answer: { view } } = this, length = this.budget.toFixed(2);
      if (this.kind() === "safe")
        return `It fails. No attack with a budget of ${length} can turn this ${view.label}: that ` +
          "is proved, whatever the attack." + (result ? ` Ours left it ahead of ${result.target} ` +
          `by ${result.margin.toFixed(2)}.` : "");
      if (!result) return "…";
      const away = up(norm(minus(result.point, view.x0)));
      if (result.broken)
        return `It succeeds: this picture, ${away} away, is read as ${result.label}.`;
      return `It failed, but nothing is proved: ${length} lies beyond the certified radius, and ` +
        "another attack might succeed.";
    }

    say(text) {
      this.find("status").textContent = text;
    }
  }

  // --- The weights -----------------------------------------------------------------------------

  // 4 MB that only this page needs. A page on disk may load them by a script alone, which tells
  // nothing of its progress and takes an instant; from a server they are read piece by piece.
  async function loadNetwork(root, note) {
    const address = (document.documentElement.dataset.content_root ?? "./") + root.dataset.network;
    const bar = note.querySelector("progress");
    const served = location.protocol.startsWith("http");
    const progress = (loaded) => (bar.value = loaded / Number(root.dataset.bytes));
    const source = served ? await download(address, progress) : address;
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.onload = resolve;
      script.onerror = () => reject(new Error("there is no such file"));
      script.src = source;
      document.head.appendChild(script);
    });
    return window.crcDrawNetwork;
  }

  async function download(address, progress) {
    const response = await fetch(address);
    if (!response.ok) throw new Error(`status ${response.status}`);
    const reader = response.body.getReader(), pieces = [];
    for (let loaded = 0; ;) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      progress((loaded += value.length));
    }
    return URL.createObjectURL(new Blob(pieces, { type: "text/javascript" }));
  }

  for (const root of document.querySelectorAll(".crc-draw:not([data-state])")) {
    root.dataset.state = "loading";
    root.page = new Page(root);
  }
})();
