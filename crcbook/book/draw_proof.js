// What the page "Draw a digit" computes: certified radii, adversaries and attacks of a network with
// one hidden layer, y = W2 softplus(W1 x + b1) + b2. Nothing here touches the page.
//
// A *margin* f is the label's output minus that of another class, the target. It bends down by at
// most k, a number that Python proved. So at any point c a parabola that touches f there lies below
// f everywhere, and seen from the picture x0 it reads
//
//     f(x0 + d) >= q - s.d - k|d|^2 / 2,   q = f(c) + g.(x0 - c) - k|x0 - c|^2 / 2,
//                                          s = k(x0 - c) - g,         g the gradient of f at c.
//
// It is positive while |d| < 2q / (|s| + sqrt(|s|^2 + 2kq)): a certified radius (the book's chapter
// on the Hessian-eigenvalue theorem; in Python, crcbook/proof/quadratic.py). Any c is proof enough,
// so `search` may look for a good one as it likes.
//
// Numbers are IEEE float64, and what rounding may take from q and s is bounded and subtracted, as
// in crcbook/proof/rounding.py. The one assumption is about Math.exp and Math.log1p, which the
// language does not require to be correctly rounded: see `FUNCTIONS`.
const CrcProof = (() => {
  "use strict";

  const UNIT = 2 ** -53; // the relative error of one sum or product
  const gamma = (terms) => (terms * UNIT) / (1 - terms * UNIT); // of a sum of so many of them
  // Bounds are themselves computed in float64: a few dozen positive terms each, whose errors, and
  // those of norms of 784 entries, are far below this.
  const OUTWARD = 1 + 2 ** -36;
  const TINY = 1e-290, TINY_NORM = 1e-140; // more than underflow can take

  // The relative error that Math.exp and Math.log1p may make: 16 units in the last place. The
  // browsers' own claim is less than 1. An activation applies both and rounds its sum, so it errs
  // by at most ROUNDING, relative to the sizes that `errors` multiplies it with.
  const FUNCTIONS = 2 ** -48;
  const ROUNDING = 2 * FUNCTIONS + 2 ** -50;

  const dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  };
  const norm = (a) => Math.sqrt(dot(a, a));
  const minus = (a, b) => a.map((value, i) => value - b[i]);
  // a + t b
  const along = (a, t, b) => a.map((value, i) => value + t * b[i]);

  const STEPS = 40, GAIN = 1e-7, PATIENCE = 4; // of a search; a smaller relative gain is none
  const SETTLED = 1e-6; // of the distance: what is left to gain is of the order of its square
  const BISECTIONS = 40;
  const REACHES = [1, 1.001, 1.03, 1.3, 2, 4]; // how far beyond a point to look for the boundary

  // Anderson's acceleration of a fixed-point iteration, with a memory of two changes: as
  // crcbook/acceleration.py. Without it the walk below may cycle where a margin bends strongly.
  class Acceleration {
    constructor() {
      this.changes = [];
    }

    step(point, move) {
      if (this.move) {
        const change = minus(move, this.move);
        this.changes = [[along(change, 1, minus(point, this.point)), change], ...this.changes];
        this.changes.length = Math.min(this.changes.length, 2);
      }
      [this.point, this.move] = [point, move];
      let step = move;
      this.shares().forEach((share, i) => {
        if (Number.isFinite(share)) step = along(step, -share, this.changes[i][0]);
      });
      return step;
    }

    // The combination of the last changes that would leave the least of an affine map's move.
    shares() {
      if (!this.changes.length) return [];
      const [[, newest], [, older] = []] = this.changes;
      const first = dot(newest, this.move) / dot(newest, newest);
      if (!older) return [first];
      const second = dot(older, this.move) / dot(older, older);
      const cross = dot(newest, older);
      const [over, under] = [cross / dot(newest, newest), cross / dot(older, older)];
      const rest = 1 - over * under;
      if (!(rest > 1e-4)) return [first, 0]; // all but parallel: the older one tells nothing
      return [(first - over * second) / rest, (second - under * first) / rest];
    }
  }

  class Prover {
    // `data` is what Python's network_script wrote: the weights and the constants of the proofs.
    constructor(data) {
      const { inputs, width, classes } = data;
      Object.assign(this, data);
      const bytes = Uint8Array.from(atob(data.weights), (letter) => letter.charCodeAt(0));
      let start = 0;
      const take = (count) => new Float32Array(bytes.buffer, 4 * start, (start += count) && count);
      this.first = Float64Array.from(take(width * inputs)); // W1, a row a hidden unit
      this.firstBias = Float64Array.from(take(width));
      this.last = Float64Array.from(take(classes * width)); // W2, a row a class
      this.lastBias = Float64Array.from(take(classes));
      this.biasNorm = norm(this.firstBias);
    }

    // --- The network ---------------------------------------------------------------------------

    // W1 x + b1. Four rows at a time, so that each entry of x is read once for four.
    preactivations(x) {
      const { first, inputs, width } = this, z = Float64Array.from(this.firstBias);
      for (let row = 0; row < width; row += 4) {
        const one = row * inputs, two = one + inputs, three = two + inputs, four = three + inputs;
        let a = 0, b = 0, c = 0, d = 0;
        for (let i = 0; i < inputs; i++) {
          a += first[one + i] * x[i];
          b += first[two + i] * x[i];
          c += first[three + i] * x[i];
          d += first[four + i] * x[i];
        }
        z[row] += a;
        z[row + 1] += b;
        z[row + 2] += c;
        z[row + 3] += d;
      }
      return z;
    }

    // softplus(z) and its slope from one exponential, which never overflows.
    activations(z) {
      const value = new Float64Array(z.length), slope = new Float64Array(z.length);
      for (let i = 0; i < z.length; i++) {
        const power = Math.exp(-Math.abs(z[i]));
        value[i] = Math.max(z[i], 0) + Math.log1p(power);
        slope[i] = (z[i] < 0 ? power : 1) / (1 + power);
      }
      return { value, slope };
    }

    // The ten outputs, from the hidden units' values.
    outputs(value) {
      const row = (label) => this.last.subarray(label * this.width, (label + 1) * this.width);
      return Array.from(this.lastBias, (bias, label) => bias + dot(row(label), value));
    }

    logits(x) {
      return this.outputs(this.activations(this.preactivations(x)).value);
    }

    // The last layer's row of the label minus that of the target.
    row(label, target) {
      const { last, width } = this, row = new Float64Array(width);
      for (let i = 0; i < width; i++) row[i] = last[label * width + i] - last[target * width + i];
      return row;
    }

    // W1' (row * slope), the gradient of a margin. Four rows at a time again.
    gradient(row, slope) {
      const { first, inputs, width } = this, gradient = new Float64Array(inputs);
      const units = row.map((value, unit) => value * slope[unit]);
      for (let unit = 0; unit < width; unit += 4) {
        const one = unit * inputs, two = one + inputs, three = two + inputs, four = three + inputs;
        const a = units[unit], b = units[unit + 1], c = units[unit + 2], d = units[unit + 3];
        for (let i = 0; i < inputs; i++)
          gradient[i] +=
            a * first[one + i] + b * first[two + i] + c * first[three + i] + d * first[four + i];
      }
      return gradient;
    }

    offset(label, target) {
      return this.lastBias[label] - this.lastBias[target];
    }

    // A margin from preactivations: all that it costs to follow a straight line.
    marginAt(z, { label, target }) {
      return dot(this.row(label, target), this.activations(z).value) + this.offset(label, target);
    }

    // A margin and its gradient at a point c.
    evaluate(c, { label, target }) {
      const { value, slope } = this.activations(this.preactivations(c));
      const row = this.row(label, target);
      const margin = dot(row, value) + this.offset(label, target);
      return { margin, gradient: this.gradient(row, slope) };
    }

    // --- Proofs --------------------------------------------------------------------------------

    // How far a computed margin and its gradient (an l2 norm) can be from the truth, at a point of
    // a given length: crcbook/proof/rounding.py, for one hidden layer. The length of a vector and a
    // bound of its error are carried through the layer, and the gradient's back.
    errors({ label, target }, length) {
      const { spectralNorm, frobeniusNorm, maxSlope, maxBend, inputs, width } = this;
      const weights = this.rowNorm[label][target];
      const input = length + TINY_NORM;
      const zError = gamma(inputs + 2) * (frobeniusNorm * input + this.biasNorm);
      const size =
        maxSlope * (spectralNorm * input + this.biasNorm) + Math.sqrt(width) * Math.LN2;
      const error = maxSlope * (1 + ROUNDING) * zError + ROUNDING * size;
      const offset = Math.abs(this.offset(label, target));
      const sums = gamma(width + 4) * (weights * (size + error) + 2 * offset);
      const rowError = 2 * UNIT * weights;
      const unitError = maxSlope * rowError +
        (weights + rowError) * (maxBend * zError + 2 * ROUNDING * maxSlope);
      const back = gamma(width + 2) * frobeniusNorm * (maxSlope * weights + unitError);
      return {
        value: (weights * error + sums) * OUTWARD + TINY,
        gradient: (spectralNorm * unitError + back) * OUTWARD + TINY,
        // torch.nn.Softplus is the identity above 20: how far its margin can be from this one.
        deviation: this.deviation[label][target],
      };
    }

    // The certified radius that the parabola at c proves, rounded down; 0 where it proves nothing.
    radius(x0, pair, c, { margin, gradient }) {
      const k = this.curvature[pair.label][pair.target];
      const away = minus(x0, c);
      const distance = norm(away) + TINY_NORM, steepness = norm(gradient);
      const errors = this.errors(pair, norm(c));
      const terms = gamma(this.inputs + 8);
      const size = Math.abs(margin) + steepness * distance + k * distance ** 2;
      const lost =
        errors.value + errors.gradient * distance + terms * size + errors.deviation;
      const q = margin + dot(gradient, away) - (k / 2) * distance ** 2 - lost * OUTWARD - TINY;
      if (!(q > 0)) return 0;
      const direction = minus(away.map((value) => k * value), gradient);
      const slope = norm(direction) * (1 + gamma(this.inputs + 4)) + TINY_NORM +
        (errors.gradient + terms * (steepness + k * distance)) * OUTWARD;
      return (2 * q) / (slope + Math.sqrt(slope ** 2 + 2 * k * q)) / OUTWARD;
    }

    // Whether a point is proved not to have the label: its margin is at most 0, errors included.
    isAdversarial(point, pair) {
      const { value, deviation } = this.errors(pair, norm(point));
      return this.marginAt(this.preactivations(point), pair) + (value + deviation) * OUTWARD <= 0;
    }

    // --- Searches: they propose points, and prove nothing ---------------------------------------

    // Repeat c -> x0 - eta g(c), which leads straight down the margin as it looks from c. How far,
    // `eta`, is what the two walks below differ in; `visit` sees each point, and may end the walk.
    walk(x0, pair, start, steps, eta, visit) {
      const acceleration = new Acceleration();
      let c = start;
      for (let step = 0; step < steps; step++) {
        const found = this.evaluate(c, pair);
        if (visit(c, found) === false) return;
        const move = minus(along(x0, -eta(c, found), found.gradient), c);
        const left = norm(move);
        if (!Number.isFinite(left) || left <= SETTLED * norm(minus(x0, c))) return;
        c = along(c, 1, acceleration.step(c, move));
      }
    }

    // The eta at which the margin, taken for linear, reaches 0.
    toBoundary(x0, c, { margin, gradient }) {
      const linear = margin + dot(gradient, minus(x0, c));
      return Math.max(0, linear / dot(gradient, gradient));
    }

    // Look for the c whose parabola proves the largest radius: towards the boundary, but never
    // with a step beyond 1/k, where the dual ends (crcbook/stages/search.py). The search is over
    // where it gains nothing more, or once the radius passes `until`: a class further away than
    // another is done.
    search(x0, pair, { start = x0, steps = STEPS, gain = GAIN, until = Infinity } = {}) {
      const most = 1 / this.curvature[pair.label][pair.target];
      let best = { radius: -1, point: x0 }, stalled = 0;
      const eta = (c, found) => Math.min(most, this.toBoundary(x0, c, found));
      this.walk(x0, pair, start, steps, eta, (c, found) => {
        const radius = this.radius(x0, pair, c, found);
        stalled = radius - best.radius > gain * radius ? 0 : stalled + 1;
        if (radius > best.radius) best = { radius, point: c };
        return stalled < PATIENCE && radius <= until;
      });
      return best;
    }

    // Look for the nearest point of another class: the same walk, with no limit. Null where none is
    // proved to be one.
    adversary(x0, pair, start = x0, steps = 12) {
      let nearest = null, last = start, shortest = Infinity;
      const eta = (c, found) => this.toBoundary(x0, c, found);
      this.walk(x0, pair, start, steps, eta, (c, { margin }) => {
        const distance = norm(minus(c, x0));
        if (margin <= 0 && distance < shortest) [nearest, shortest] = [c, distance];
        last = c;
      });
      return this.retreat(x0, pair, nearest ?? last);
    }

    // Where the way from x0 to a point, or beyond it, leaves the label: by bisection. Along a line
    // the preactivations are linear, so W1 is needed at its ends alone.
    retreat(x0, pair, point) {
      const from = this.preactivations(x0), way = minus(this.preactivations(point), from);
      const { value, deviation } = this.errors(pair, norm(x0) + 4 * norm(minus(point, x0)));
      const beyond = (t) => this.marginAt(along(from, t, way), pair) <= -2 * (value + deviation);
      let outer = REACHES.find(beyond), inner = 0;
      if (outer === undefined) return null;
      for (let turn = 0; turn < BISECTIONS; turn++) {
        const middle = (inner + outer) / 2;
        if (beyond(middle)) outer = middle;
        else inner = middle;
      }
      const found = along(x0, outer, minus(point, x0));
      if (!this.isAdversarial(found, pair)) return null;
      return { point: found, distance: norm(minus(found, x0)) * OUTWARD };
    }

    // Look for the smallest margin in a ball. Each step goes to the point of the sphere where the
    // margin looks smallest from here, or half as far once that stops helping.
    attack(x0, pair, radius, start = x0, steps = 5) {
      let worst = { margin: Infinity, point: x0 };
      const inside = (point) => {
        const away = minus(point, x0), scale = (radius * (1 - 1e-14)) / norm(away);
        return scale < 1 ? along(x0, scale, away) : point;
      };
      let c = inside(start), damping = 1;
      for (let step = 0; step < steps; step++) {
        const { margin, gradient } = this.evaluate(c, pair);
        if (margin < worst.margin) worst = { margin, point: c };
        else damping /= 2;
        const goal = along(x0, -radius / norm(gradient), gradient);
        c = inside(along(c, damping, minus(goal, c)));
      }
      const margin = this.marginAt(this.preactivations(c), pair);
      return margin < worst.margin ? { margin, point: c } : worst;
    }

    // The network's answer at x0, and what the parabolas at c = x0 prove against each other class.
    look(x0) {
      const { value, slope } = this.activations(this.preactivations(x0));
      const logits = this.outputs(value);
      const label = logits.indexOf(Math.max(...logits));
      const rows = [];
      for (let target = 0; target < this.classes; target++) {
        if (target === label) continue;
        const pair = { label, target }, row = this.row(label, target);
        const margin = dot(row, value) + this.offset(label, target);
        const radius = this.radius(x0, pair, x0, { margin, gradient: this.gradient(row, slope) });
        rows.push({ ...pair, radius, point: x0, searched: false });
      }
      return { x0, label, logits, rows };
    }

    // Raise the radii of `look` until the smallest is one that was searched for: then it is the
    // radius against every class. `options(row)` are the search's; `ready()` may end it earlier,
    // with a radius that is smaller and no less proved.
    raise(view, options = () => ({}), ready = () => false) {
      let least = Infinity;
      for (let row = weakest(view.rows); !row.searched && !ready(); row = weakest(view.rows)) {
        const found = this.search(view.x0, row, { until: least, ...options(row) });
        if (found.radius > row.radius) Object.assign(row, found);
        row.searched = true;
        least = Math.min(least, row.radius);
      }
      return weakest(view.rows).radius;
    }
  }

  // The radius against every class is the smallest of the rows'.
  const weakest = (rows) => rows.reduce((a, b) => (b.radius < a.radius ? b : a));

  return { Prover, weakest, norm, minus, along, FUNCTIONS, ROUNDING };
})();
