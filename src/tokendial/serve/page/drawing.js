// Draws an answer: the tokens of a layer, or a mask over its image.

const DROPPED = "#282828";
const TINT = [255, 40, 40];

/** Decode an image that the server sent as base64. */
export async function decodeImage(base64) {
  const image = new Image();
  image.src = `data:image/png;base64,${base64}`;
  await image.decode();
  return image;
}

/** Sums of red, green and blue, and the number of pixels, in each patch of what the model saw. */
export function patchSums(picture, { rows, columns, width, height }) {
  const { data } = pixelsOf(picture, width, height);
  const sums = new Float64Array(rows * columns * 4);
  for (let y = 0; y < height; y++) {
    const row = Math.floor((y * rows) / height) * columns;
    for (let x = 0; x < width; x++) {
      const patch = 4 * (row + Math.floor((x * columns) / width));
      const at = 4 * (y * width + x);
      for (let channel = 0; channel < 3; channel++) sums[patch + channel] += data[at + channel];
      sums[patch + 3] += 1;
    }
  }
  return sums;
}

/** Count the patches that a layer kept, merged and dropped. */
export function countPatches(origin) {
  const held = new Map();
  for (const token of origin) held.set(token, (held.get(token) ?? 0) + 1);
  const gone = held.get(-1) ?? 0;
  held.delete(-1);
  const sizes = [...held.values()];
  const alone = sizes.filter((size) => size === 1).length;
  return { gone, alone, tokens: sizes.length, merged: origin.length - gone - alone };
}

/**
 * Fill each token's patches with their mean colour, draw borders between tokens, darken what was
 * dropped. A patch that is a token by itself keeps its pixels. `marked` is a token to point out.
 */
export function paintTokens(canvas, shown, layer, marked = null) {
  const { view, picture, sums } = shown;
  const { rows, columns } = view;
  const { origin } = view.layers[layer - 1];
  const dot = window.devicePixelRatio;
  const width = (canvas.width = Math.round(canvas.clientWidth * dot));
  const height = (canvas.height = Math.round((width * view.height) / view.width));
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);

  const totals = new Map();
  origin.forEach((token, patch) => {
    const total = totals.get(token) ?? [0, 0, 0, 0, 0];
    for (let part = 0; part < 4; part++) total[part] += sums[4 * patch + part];
    total[4] += 1;
    totals.set(token, total);
  });
  const x = (column) => Math.round((column * width) / columns);
  const y = (row) => Math.round((row * height) / rows);
  const fill = (patch, colour) => {
    const row = Math.floor(patch / columns), column = patch % columns;
    context.fillStyle = colour;
    context.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
  };
  origin.forEach((token, patch) => {
    const [red, green, blue, pixels, patches] = totals.get(token);
    if (token < 0) fill(patch, DROPPED);
    else if (patches > 1) fill(patch, `rgb(${red / pixels} ${green / pixels} ${blue / pixels})`);
  });

  context.beginPath();
  origin.forEach((token, patch) => {
    const row = Math.floor(patch / columns), column = patch % columns;
    if (column + 1 < columns && origin[patch + 1] !== token) {
      context.moveTo(x(column + 1), y(row));
      context.lineTo(x(column + 1), y(row + 1));
    }
    if (row + 1 < rows && origin[patch + columns] !== token) {
      context.moveTo(x(column), y(row + 1));
      context.lineTo(x(column + 1), y(row + 1));
    }
  });
  context.strokeStyle = "#fff";
  context.lineWidth = dot;
  context.stroke();
  if (marked !== null && marked >= 0) {
    origin.forEach((token, patch) => token === marked && fill(patch, "rgb(255 176 0 / 75%)"));
  }
}

/** Return the token at a position of a canvas that `paintTokens` has drawn. */
export function tokenAt(canvas, event, view, layer) {
  const box = canvas.getBoundingClientRect();
  const part = (at, from, size, count) =>
    Math.min(count - 1, Math.max(0, Math.floor(((at - from) / size) * count)));
  const row = part(event.clientY, box.top, box.height, view.rows);
  const column = part(event.clientX, box.left, box.width, view.columns);
  return view.layers[layer - 1].origin[row * view.columns + column];
}

/** Draw a mask over its image: grey levels as a tint, classes in the colours of their palette. */
export function paintMask(canvas, picture, mask, binary) {
  const shrink = Math.min(1, 960 / mask.naturalWidth);
  const width = (canvas.width = Math.max(1, Math.round(mask.naturalWidth * shrink)));
  const height = (canvas.height = Math.max(1, Math.round(mask.naturalHeight * shrink)));
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  const over = pixelsOf(mask, width, height);
  for (let at = 0; at < over.data.length; at += 4) {
    const colour = over.data.subarray(at, at + 3);
    const level = binary ? colour[0] / 255 : Number(Math.max(...colour) > 0);
    if (binary) colour.set(TINT);
    over.data[at + 3] = 153 * level;
  }
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(over, 0, 0);
  context.drawImage(layer, 0, 0);
}

function pixelsOf(image, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}
