// timm's transform for evaluation, with Pillow's own arithmetic, because a canvas resamples otherwise, and in every
// browser in its own way.

const BITS = 22; // Pillow's fixed point

const FILTERS = {
  bilinear: [1, x => Math.max(1 - x, 0)],
  bicubic: [2, x => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((x - 5) * x + 8) * x * -0.5 + 2 : 0)],
};

// The first input and the weights of each of `size` outputs along an axis of `length`.
function weigh(length, size, [support, filter]) {
  const scale = length / size;
  const stretch = Math.max(scale, 1); // the filter grows with the step when shrinking: antialias
  return Array.from({length: size}, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support * stretch + 0.5), length);
    const distance = j => Math.abs((first + j - centre + 0.5) / stretch);
    const weights = Array.from({length: last - first}, (_, j) => filter(distance(j)));
    const sum = weights.reduce((a, b) => a + b);
    return [first, weights.map(w => Math.trunc((w / sum) * 2 ** BITS + Math.sign(w) / 2))];
  });
}

// Resize the rows of RGBA `pixels` to `size` and transpose, so that a second call does the columns and turns it back.
function resizeRows(pixels, width, height, size, filter) {
  const out = new Uint8ClampedArray(4 * size * height).fill(255);
  weigh(width, size, filter).forEach(([first, weights], x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (BITS - 1); // rounds
        let at = 4 * (y * width + first) + c;
        for (let j = 0; j < weights.length; j++, at += 4) sum += weights[j] * pixels[at];
        out[4 * (x * height + y) + c] = Math.floor(sum / 2 ** BITS);
      }
    }
  });
  return out;
}

// Python rounds halves to even.
const halve = n => (n >> 1) + (n & (n >> 1) & 1);

// An ImageData in; out come the network's input as (3, size, size) and the same as an ImageData to show.
export function transform({data, width, height}, {input_size, mean, std, crop_pct, interpolation}) {
  const size = input_size[1];
  const shortest = Math.min(width, height);
  const [w, h] = [width, height].map(n => Math.trunc((Math.floor(size / crop_pct) * n) / shortest));
  const filter = FILTERS[interpolation];
  const resized = resizeRows(resizeRows(data, width, height, w, filter), height, w, h, filter);
  const [left, top] = [halve(w - size), halve(h - size)];
  const seen = new ImageData(size, size);
  const input = new Float32Array(3 * size * size);
  for (let y = 0; y < size; y++) {
    const row = resized.subarray(4 * ((top + y) * w + left), 4 * ((top + y) * w + left + size));
    seen.data.set(row, 4 * y * size);
    for (let x = 0; x < size; x++) {
      for (let c = 0; c < 3; c++) input[(c * size + y) * size + x] = (row[4 * x + c] / 255 - mean[c]) / std[c];
    }
  }
  return {input, seen};
}
