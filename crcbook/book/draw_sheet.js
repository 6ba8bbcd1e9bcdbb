// The sheet of the page "Draw a digit": 28 x 28 pixels, what draws on them, and how they are shown.
const CrcSheet = (() => {
  "use strict";
  const SIDE = 28, PIXELS = SIDE * SIDE;
  const PEN = 1.1, RUBBER = 2; // radii in pixels; their edges are a pixel wide, as in MNIST
  const KEPT = 60; // strokes to undo
  const CENTRE = 700; // ms after the last stroke: the next one may be a part of the same digit

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // Paint 28 x 28 pixels: `colour` gives red, green, blue and opacity of a value.
  function paint(canvas, values, colour) {
    [canvas.width, canvas.height] = [SIDE, SIDE];
    const image = new ImageData(SIDE, SIDE);
    values.forEach((value, i) => image.data.set(colour(value), 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  // White ink on black, as MNIST has it; a style sheet turns it round on a light page.
  const ink = (value) => [255, 255, 255].map((white) => white * clamp(value, 0, 1)).concat(255);

  // 784 numbers in [0, 1], and what they were before.
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

    // MNIST puts a digit's centre of mass into the middle. Move by whole pixels and lose no ink;
    // returns whether anything moved.
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

  // Pen, eraser, keys and MNIST's digits, all of which change the sheet: `changed` is called then,
  // and `say` with what a screen reader should read.
  class Editor {
    constructor(root, { changed, say }) {
      this.find = (name) => root.querySelector(`.crc-draw-${name}`);
      Object.assign(this, { changed, say, rubber: false, lowered: false, row: 0 });
      this.sheet = new Sheet();
      this.canvas = this.find("sheet");
      this.cursor = [SIDE / 2, SIDE / 2];
      this.digits = Uint8Array.from(atob(root.dataset.digits), (letter) => letter.charCodeAt(0));
      this.listenToTools();
      this.listenToPointer();
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      this.fillRow();
    }

    // Show a digit as an example, which gives way to the first stroke.
    example(label, row) {
      this.sheet.ink = Float64Array.from(this.digit(label, row));
      this.isExample = true;
    }

    // One of MNIST's digits, as torchvision's ToTensor reads it: float32 numbers.
    digit(label, row) {
      const start = (10 * label + row) * PIXELS;
      return Array.from(this.digits.subarray(start, start + PIXELS), (v) => Math.fround(v / 255));
    }

    listenToTools() {
      const click = (name, action) => this.find(name).addEventListener("click", action);
      click("pen", () => this.take(false));
      click("rubber", () => this.take(true));
      click("undo", () => this.edit(() => this.sheet.undo()));
      click("clear", () => this.edit(() => this.sheet.replace(new Float64Array(PIXELS))));
      click("others", () => {
        this.row = (this.row + 1) % 10;
        this.fillRow();
      });
    }

    take(rubber) {
      this.rubber = rubber;
      this.find("pen").setAttribute("aria-pressed", !rubber);
      this.find("rubber").setAttribute("aria-pressed", rubber);
    }

    edit(action) {
      clearTimeout(this.centring);
      this.isExample = false;
      action();
      this.changed();
    }

    listenToPointer() {
      let from = null; // where the pen is, while it is down
      this.canvas.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        this.canvas.setPointerCapture(event.pointerId);
        this.begin();
        from = this.place(event);
        this.stroke(from, from);
      });
      this.canvas.addEventListener("pointermove", (event) => {
        if (!from) return;
        const between = event.getCoalescedEvents?.() ?? [];
        for (const each of between.length ? between : [event])
          this.stroke(from, (from = this.place(each)));
      });
      for (const name of ["pointerup", "pointercancel"])
        this.canvas.addEventListener(name, () => {
          if (from) this.end();
          from = null;
        });
    }

    // Where a pointer is, in pixels; a pixel's middle has whole numbers.
    place(event) {
      const box = this.canvas.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
      return [x * SIDE - 0.5, y * SIDE - 0.5];
    }

    begin() {
      clearTimeout(this.centring);
      this.sheet.remember();
      if (this.isExample) this.sheet.ink = new Float64Array(PIXELS);
      this.isExample = false;
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
      const way = ways[event.key];
      if (!way && event.key !== " ") return;
      event.preventDefault();
      if (way) this.step(way);
      else this.lower(!this.lowered);
      const [column, row] = this.cursor.map((value) => value + 1);
      this.say(`Pen ${this.lowered ? "down" : "up"}, column ${column}, row ${row}.`);
      this.drawCursor();
    }

    step(way) {
      const from = this.cursor;
      this.cursor = from.map((value, axis) => clamp(value + way[axis], 0, SIDE - 1));
      if (this.lowered) this.stroke(from, this.cursor);
    }

    lower(lowered) {
      this.lowered = lowered;
      if (!lowered) return this.end();
      this.begin();
      this.stroke(this.cursor, this.cursor);
    }

    drawCursor() {
      const spot = this.find("cursor");
      [spot.style.left, spot.style.top] = this.cursor.map((value) => `${(100 * value) / SIDE}%`);
      spot.classList.toggle("crc-draw-lowered", this.lowered);
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

    show() {
      paint(this.canvas, this.sheet.ink, ink);
      this.find("hint").hidden = this.sheet.ink.some((value) => value > 0);
    }
  }

  return { Editor, paint, ink };
})();
