// The explorer looks up what crcbook.radius_field computed. The point snaps to the grid, and every
// number shown is the one certified at that grid point: nothing is interpolated.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 42, right: 8, top: 8, bottom: 40 };
  const SHAPES = [
    (x, y) => `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0`,
    (x, y) => `M${x - 3} ${y - 3}h6v6h-6z`,
    (x, y) => `M${x - 4} ${y + 3}h8l-4 -7z`,
    (x, y) => `M${x - 4} ${y}l4 -4l4 4l-4 4z`,
  ];

  // What tells the balls of a point's certificates apart; the first is the chosen one's.
  const DASHES = ["none", "7 4", "2 4", "10 3 2 3", "1 7"];

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  // A promised radius is only ever rounded down, a distance that an attack needs only ever up.
  const down = (value) =>
    value === Infinity ? "∞" : (Math.floor(value * 1000) / 1000).toFixed(3);
  const up = (value) => (Math.ceil(value * 1000) / 1000).toFixed(3);

  // A root, so that the small radii, which matter most, can be told apart.
  const opacity = (part) => 0.06 + 0.84 * Math.sqrt(Math.min(1, part));

  function element(parent, name, attributes) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return parent.appendChild(node);
  }

  function unpack(field, arrays) {
    return {
      ...field,
      radius: floats(arrays[field.radius]),
      distance: floats(arrays[field.distance]),
      nearest: floats(arrays[field.nearest]),
      predicted: bytes(arrays[field.predicted]),
      exact: bytes(arrays[field.exact]),
      boundary: JSON.parse(arrays[field.boundary]),
    };
  }

  // The steps of an axis: 1, 2 or 5 times a power of ten, about `count` of them.
  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const first = Math.ceil(low / step);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => {
      const value = (first + index) * step;
      return [value, value.toFixed(decimals).replace("-", "−")];
    });
  }

  class Explorer {
    constructor(root) {
      this.root = root;
      this.data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
      this.unpacked = new Map();
      [{ key: this.key, place: [this.column, this.row] }] = this.data.views;
      this.choose();
      this.svg = root.querySelector("svg");
      this.sliders = [...root.querySelectorAll("input")];
      this.listen();
      this.fillKey();
      new ResizeObserver(() => this.draw()).observe(root.querySelector(".crc-plot"));
      this.draw();
    }

    listen() {
      this.sliders.forEach((slider, axis) => {
        slider.max = (axis ? this.data.ys : this.data.xs).length - 1;
        slider.addEventListener("input", () =>
          axis ? this.move(this.column, +slider.value) : this.move(+slider.value, this.row));
      });
      for (const event of ["pointerdown", "pointermove"])
        this.svg.addEventListener(event, (pointer) => this.follow(pointer));
      const selects = [...this.root.querySelectorAll("select")];
      selects.forEach((select, choice) => {
        const names = [...new Set(this.data.fields.map((field) => field.key[choice]))];
        names.forEach((name) => select.add(new Option(name)));
        select.parentElement.hidden = names.length < 2;
        select.value = this.key[choice];
        select.addEventListener("change", () => {
          this.key = selects.map((each) => each.value);
          this.choose();
          this.draw();
        });
      });
      this.root.querySelectorAll(".crc-views button").forEach((button, index) =>
        button.addEventListener("click", () => {
          [this.column, this.row] = this.data.views[index].place;
          this.key = this.data.views[index].key;
          selects.forEach((select, choice) => { select.value = this.key[choice]; });
          this.choose();
          this.draw();
        }));
    }

    // The fields that are shown, unpacked when they are first needed: the chosen one, its rivals.
    choose() {
      const kept = this.key.slice(0, -1);
      const shown = this.data.fields.filter(({ key }) => kept.every((name, i) => name === key[i]));
      for (const field of shown)
        if (!this.unpacked.has(field)) this.unpacked.set(field, unpack(field, this.data.arrays));
      const fields = shown.map((field) => this.unpacked.get(field));
      const chosen = fields.findIndex(({ key }) => key.at(-1) === this.key.at(-1));
      [this.field] = fields.splice(chosen, 1);
      this.rivals = fields;
    }

    follow(pointer) {
      const box = this.svg.getBoundingClientRect();
      const { xs, ys } = this.data;
      const x = this.scale.invertX(pointer.clientX - box.left);
      const y = this.scale.invertY(pointer.clientY - box.top);
      const snap = (grid, value) => Math.round((value - grid[0]) / (grid[1] - grid[0]));
      this.move(clamp(snap(xs, x), 0, xs.length - 1), clamp(snap(ys, y), 0, ys.length - 1));
    }

    move(column, row) {
      [this.column, this.row] = [column, row];
      this.drawPoint();
      this.write();
    }

    // One pixel is one grid point; its opacity is its radius. The browser smooths the picture only.
    heatmap() {
      const { xs, ys, colours, largest } = this.data;
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [xs.length, ys.length];
      const context = canvas.getContext("2d");
      const image = context.createImageData(xs.length, ys.length);
      this.field.radius.forEach((radius, index) => {
        const row = ys.length - 1 - Math.floor(index / xs.length);
        const pixel = 4 * (row * xs.length + (index % xs.length));
        image.data.set(colours[this.field.predicted[index]], pixel);
        image.data[pixel + 3] = 255 * opacity(radius / largest);
      });
      context.putImageData(image, 0, 0);
      return canvas.toDataURL();
    }

    // Equal scales on both axes, so that a ball is a circle; half a grid step around the grid.
    setScale() {
      const { xs, ys } = this.data;
      const step = xs[1] - xs[0];
      const [left, bottom] = [xs[0] - step / 2, ys[0] - (ys[1] - ys[0]) / 2];
      const width = Math.max(this.svg.clientWidth - MARGIN.left - MARGIN.right, 50);
      const unit = width / (xs.length * step);
      const height = unit * ys.length * (ys[1] - ys[0]);
      this.scale = {
        unit, width, height,
        x: (value) => MARGIN.left + (value - left) * unit,
        y: (value) => MARGIN.top + height - (value - bottom) * unit,
        invertX: (pixel) => left + (pixel - MARGIN.left) / unit,
        invertY: (pixel) => bottom + (MARGIN.top + height - pixel) / unit,
      };
      this.svg.style.height = `${height + MARGIN.top + MARGIN.bottom}px`;
    }

    draw() {
      this.setScale();
      const { width, height } = this.scale;
      const area = { x: MARGIN.left, y: MARGIN.top, width, height };
      this.svg.replaceChildren();
      // A nested svg clips what leaves the plot.
      const inner = element(this.svg, "svg", area);
      inner.setAttribute("viewBox", `${area.x} ${area.y} ${width} ${height}`);
      inner.style.width = `${width}px`;
      element(inner, "image", { ...area, href: this.heatmap(), preserveAspectRatio: "none" });
      this.drawLines(inner, this.field.contours, 0.8, 0.3);
      this.drawLines(inner, this.field.boundary, 2, 1);
      this.drawData(inner);
      this.moving = element(inner, "g", {});
      element(this.svg, "rect", { ...area, fill: "none", stroke: "currentColor", "stroke-opacity": 0.5 });
      this.drawAxes();
      this.drawPoint();
      this.write();
    }

    drawLines(parent, lines, width, opacity) {
      const { x, y } = this.scale;
      const path = lines.map((line) =>
        "M" + line.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L")).join("");
      element(parent, "path", { d: path, fill: "none", stroke: "currentColor",
        "stroke-width": width, "stroke-opacity": opacity });
    }

    drawData(parent) {
      const { points, labels, colours } = this.data;
      points.forEach(([a, b], index) => {
        element(parent, "path", { d: SHAPES[labels[index] % 4](this.scale.x(a), this.scale.y(b)),
          fill: `rgb(${colours[labels[index]]})`, stroke: "currentColor", "stroke-width": 0.8 });
      });
    }

    drawAxes() {
      const { xs, ys } = this.data;
      const { x, y, width, height } = this.scale;
      const bottom = MARGIN.top + height;
      for (const [value, text] of ticks(xs[0], xs.at(-1), width / 60))
        element(this.svg, "text", { x: x(value), y: bottom + 16, "text-anchor": "middle" })
          .textContent = text;
      for (const [value, text] of ticks(ys[0], ys.at(-1), height / 60))
        element(this.svg, "text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" })
          .textContent = text;
      element(this.svg, "text", { x: MARGIN.left + width / 2, y: bottom + 34,
        "text-anchor": "middle" }).textContent = "x₁";
      element(this.svg, "text", { "text-anchor": "middle",
        transform: `translate(11 ${MARGIN.top + height / 2}) rotate(-90)` }).textContent = "x₂";
    }

    drawPoint() {
      const index = this.row * this.data.xs.length + this.column;
      const { x, y, unit } = this.scale;
      const centre = [x(this.data.xs[this.column]), y(this.data.ys[this.row])];
      const radius = Math.min(this.field.radius[index] * unit, 1e5);
      const end = [x(this.field.nearest[2 * index]), y(this.field.nearest[2 * index + 1])];
      const line = { stroke: "currentColor", "stroke-width": 2 };
      this.moving.replaceChildren();
      this.rivals.forEach((rival, number) => {
        element(this.moving, "circle", { class: "crc-rival", cx: centre[0], cy: centre[1],
          r: Math.min(rival.radius[index] * unit, 1e5), fill: "none", ...line,
          "stroke-dasharray": DASHES[(number + 1) % DASHES.length] });
      });
      element(this.moving, "circle", { class: "crc-ball", cx: centre[0], cy: centre[1], r: radius,
        fill: "currentColor", "fill-opacity": 0.12, ...line });
      if (end.every(Number.isFinite)) {
        element(this.moving, "path", { d: `M${centre}L${end}`, "stroke-dasharray": "4 3", ...line });
        element(this.moving, "path", { class: "crc-nearest", ...line, "stroke-width": 2.5,
          d: `M${end}m-5 -5l10 10m0 -10l-10 10` });
      }
      element(this.moving, "circle", { cx: centre[0], cy: centre[1], r: 4, fill: "currentColor" });
    }

    write() {
      const index = this.row * this.data.xs.length + this.column;
      const place = [this.data.xs[this.column], this.data.ys[this.row]];
      const outputs = this.root.querySelectorAll("output");
      this.sliders.forEach((slider, axis) => {
        const text = place[axis].toFixed(2).replace(/^-(0\.00)$/, "$1").replace("-", "−");
        slider.value = axis ? this.row : this.column;
        slider.setAttribute("aria-valuetext", text);
        outputs[axis].textContent = text;
      });
      const radius = this.field.radius[index];
      outputs[2].textContent = down(radius);
      this.root.querySelector(".crc-verdict").textContent = this.verdict(index, radius);
      this.writeRivals(index);
    }

    writeRivals(index) {
      const list = this.root.querySelector(".crc-rivals");
      list.replaceChildren();
      this.rivals.forEach((rival, number) => {
        const item = list.appendChild(document.createElement("li"));
        const sample = element(item, "svg", { viewBox: "0 0 36 10", "aria-hidden": true });
        element(sample, "path", { d: "M0 5H36", stroke: "currentColor", "stroke-width": 2,
          "stroke-dasharray": DASHES[(number + 1) % DASHES.length] });
        item.append(`${rival.key.at(-1)} ${down(rival.radius[index])}`);
      });
    }

    verdict(index, radius) {
      const distance = this.field.distance[index];
      const name = this.data.classes[this.field.predicted[index]];
      if (!this.field.all) {
        const broken = distance < radius ? ` The cross breaks it, ${up(distance)} away.` : "";
        return `Predicted ${name}. Certified against the runner-up only: ` +
          `a third class may be nearer.${broken}`;
      }
      if (radius === Infinity) return `Predicted ${name}, and so is every point of the plane.`;
      const promise = `Predicted ${name}, and so is every point of the ball.`;
      if (this.field.exact[index])
        return `${promise} It cannot grow: the cross on its edge is not. The radius is exact.`;
      if (Number.isNaN(distance)) return `${promise} No adversarial point was found.`;
      const exact = this.rivals.find((rival) => rival.all && rival.exact[index]);
      const truth = exact ? "that is the distance to the boundary" +
        ` (${exact.key.at(-1)})` : "the distance to the boundary lies between the two numbers";
      return `${promise} The cross is not, ${up(distance)} away: ${truth}.`;
    }

    fillKey() {
      const { classes, colours, largest } = this.data;
      const key = this.root.querySelector(".crc-key");
      const add = (html, text) => {
        const item = key.appendChild(document.createElement("span"));
        item.innerHTML = html;
        item.append(text);
      };
      classes.forEach((name, index) => {
        const shade = (part) => `rgb(${colours[index].join(" ")} / ${opacity(part)})`;
        const shades = [0, 0.05, 0.15, 0.3, 0.5, 0.75, 1].map((p) => `${shade(p)} ${100 * p}%`);
        add(`<i class="crc-bar" style="background:linear-gradient(90deg,${shades})"></i>`,
          `${name}, radius 0 to ${largest.toFixed(2)}`);
      });
    }
  }

  for (const root of document.querySelectorAll(".crc-explorer:not([data-ready])")) {
    root.dataset.ready = "";
    new Explorer(root);
  }
})();
