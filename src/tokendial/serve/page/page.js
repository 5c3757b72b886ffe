// The web page: the prediction of an image at the chosen degree beside degree 0, and the load.

import { countPatches, decodeImage, paintMask, paintTokens, patchSums, tokenAt } from "./drawing.js";
import { number, showLive } from "./live.js";

const $ = (id) => document.getElementById(id);
const main = document.querySelector("main");
const sides = ["reduced", "full"].map((name) => ({
  name,
  figure: document.querySelector(`figure.${name}`),
  article: document.querySelector(`article.${name}`),
}));

let key = sessionStorage.getItem("key");
let models = [];
let degrees = []; // degrees of the model: {degree, gmacs, ms, accuracy}
let live = null;
let image = null; // the chosen image: a file or blob
let photo = null; // the decoded image, or null if this browser cannot decode it
let answers = new Map(); // answers for this image and model, by degree
let shown = {}; // the answers on the two sides
let asking = null;
let timer = null;

// Requests

async function api(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response, body;
  try {
    response = await fetch(path, { ...options, headers });
    body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (!response) throw new Error("The server cannot be reached.");
  }
  if (response.ok && body) return body;
  if (response.status === 401) $("key").hidden = false;
  throw new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
}

function showError(error) {
  if (error?.name === "AbortError") return;
  $("error").textContent = error?.message ?? "";
  $("error").hidden = !error;
}

async function start() {
  try {
    ({ models } = await api("v1/models"));
    $("model").replaceChildren(...models.map((each) => new Option(each.name, each.name)));
    $("model").value = models.find((each) => each.default).name;
    $("key").hidden = true;
    showError(null);
    await chooseModel();
  } catch (error) {
    showError(error);
  }
}

const model = () => models.find((each) => each.name === $("model").value);

async function chooseModel() {
  answers = new Map();
  $("revision").textContent = model().revision;
  const answer = await api(`v1/degrees?model=${encodeURIComponent(model().name)}`);
  degrees = answer.degrees;
  $("dial").max = degrees.length - 1;
  setDial($("auto").checked ? answer.degree : degree());
  await predict();
}

// The dial

const degree = () => degrees[$("dial").value]?.degree ?? 0;

function setDial(wanted) {
  const index = degrees.findIndex((each) => each.degree === wanted);
  if (index >= 0) $("dial").value = index;
  showOffer();
}

function showOffer() {
  const now = degrees[$("dial").value], unreduced = degrees[0];
  if (!now) return;
  $("degree").textContent = now.degree;
  $("dial").setAttribute("aria-valuetext", `degree ${now.degree}`);
  fillList($("offer"), [
    ["Cost", share(now.gmacs / unreduced.gmacs)],
    ["One image", `${number(now.ms)} ms`],
    ...(now.accuracy === null ? [] : [["Accuracy", share(now.accuracy, 1)]]),
  ]);
}

$("dial").addEventListener("input", () => {
  $("auto").checked = false;
  showOffer();
  predictSoon();
});
$("auto").addEventListener("change", () => {
  if ($("auto").checked && live) setDial(live.degree);
  predictSoon();
});
$("model").addEventListener("change", () => chooseModel().catch(showError));

function predictSoon() {
  clearTimeout(timer);
  timer = setTimeout(predict, 150);
}

// The prediction of one image

function chooseImage(file) {
  if (!file) return;
  image = file;
  answers = new Map();
  photo = createImageBitmap(file).catch(() => null);
  predict();
}

async function predict() {
  asking?.abort();
  if (!image || !degrees.length) return;
  asking = new AbortController();
  const { signal } = asking;
  $("result").ariaBusy = "true";
  try {
    const reduced = await answerAt($("auto").checked ? "auto" : degree(), signal);
    const full = await answerAt(0, signal);
    if (signal.aborted) return;
    shown = { reduced, full };
    showAnswers();
    showError(null);
  } catch (error) {
    showError(error);
  } finally {
    if (!signal.aborted) $("result").ariaBusy = "false";
  }
}

async function answerAt(wanted, signal) {
  const known = answers;
  const there = known.get(wanted === "auto" ? live?.degree : wanted);
  if (there) return there;
  const query = new URLSearchParams({ model: model().name, degree: wanted });
  const view = await api(`v1/tokens?${query}`, {
    method: "POST",
    body: image,
    headers: { "Content-Type": image.type || "application/octet-stream" },
    signal,
  });
  // After a reload of weights, answers of the old ones cannot be compared with new ones.
  const others = known.values().next().value;
  if (others && others.view.revision !== view.revision) known.clear();
  const picture = await decodeImage(view.image);
  const answer = { view, picture, sums: patchSums(picture, view) };
  if (view.prediction.mask) answer.mask = await decodeImage(view.prediction.mask);
  known.set(view.degree, answer);
  return answer;
}

function showAnswers() {
  const { view } = shown.reduced, depth = view.layers.length;
  const first = $("result").hidden || Number($("layer").max) !== depth;
  delete main.dataset.empty;
  document.querySelector(".drop strong").textContent = "Choose another image";
  $("result").hidden = false;
  $("revision").textContent = view.revision;
  $("layer").max = depth;
  if (first) $("layer").value = depth;
  if ($("auto").checked) setDial(view.degree);
  showBars();
  showLayer();
  for (const side of sides) showPrediction(side, shown[side.name]);
  $("said").textContent = `Degree ${view.degree}: ${inWords(view.prediction)}, at ${share(costOf(view))} of the cost of degree 0.`;
}

function inWords({ classes, share: part, embedding }) {
  if (embedding) return `similarity to degree 0 ${likeDegree0(embedding)}`;
  return classes ? `${classes[0].name}, ${share(classes[0].probability)}` : `mask on ${share(part)}`;
}

/** The cosine similarity of an embedding to the one at degree 0. */
function likeDegree0(embedding) {
  const full = shown.full.view.prediction.embedding;
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  return (dot(embedding, full) / Math.sqrt(dot(embedding, embedding) * dot(full, full))).toFixed(4);
}

const costOf = (view) => view.gmacs / shown.full.view.gmacs;

function showPrediction({ figure, article }, { view, picture, mask }) {
  const { prediction } = view;
  for (const title of [figure.querySelector("figcaption"), article.querySelector("h3")]) {
    title.textContent = `Degree ${view.degree}`;
  }
  article.querySelector(".mask").hidden = !mask;
  if (mask) showMask(article.querySelector(".mask"), picture, mask, prediction.share);
  article.querySelector(".classes").replaceChildren(...(prediction.classes ?? []).map(classLine));
  fillList(article.querySelector("dl"), [
    ["Latency", `${number(prediction.compute_ms)} ms`, `+ ${number(prediction.queue_ms)} queue`],
    ["Cost", `${Number(view.gmacs.toPrecision(3))} GMACs`, share(costOf(view))],
    ...(prediction.embedding ? [["Similarity to degree 0", likeDegree0(prediction.embedding)]] : []),
  ]);
}

async function showMask(box, picture, mask, part) {
  const canvas = box.querySelector("canvas");
  const words = `Inside: ${share(part, 1)} of the image`;
  paintMask(canvas, (await photo) ?? picture, mask, model().classes.length <= 1);
  canvas.ariaLabel = words;
  box.querySelector("p").textContent = words;
}

function classLine({ name, probability }) {
  const line = document.createElement("li");
  const parts = ["span", "span", "i"].map((tag) => document.createElement(tag));
  parts[0].textContent = parts[0].title = name;
  parts[1].textContent = share(probability);
  parts[2].style.setProperty("--share", `${100 * probability}%`);
  line.append(...parts);
  return line;
}

function fillList(list, rows) {
  list.replaceChildren(...rows.map(([name, value, note]) => {
    const row = document.createElement("div");
    const [term, definition, small] = ["dt", "dd", "small"].map((tag) => document.createElement(tag));
    term.textContent = name;
    definition.textContent = value;
    small.textContent = note ? ` ${note}` : "";
    definition.append(small);
    row.append(term, definition);
    return row;
  }));
}

const share = (part, digits = 0) => `${(100 * part).toFixed(digits)} %`;

// The tokens of each layer

function showBars() {
  const { layers } = shown.reduced.view;
  const most = shown.full.view.layers[0].tokens;
  $("bars").parentElement.style.setProperty("--layers", layers.length);
  $("bars").replaceChildren(...layers.map(({ layer, tokens }) => {
    const bar = document.createElement("div");
    bar.append(document.createElement("i"));
    bar.dataset.layer = layer;
    bar.dataset.tokens = tokens;
    bar.title = `Layer ${layer}: ${tokens} tokens`;
    bar.style.setProperty("--share", `${(100 * tokens) / most}%`);
    return bar;
  }));
}

function showLayer() {
  const layer = Number($("layer").value), { layers } = shown.reduced.view;
  const text = `after layer ${layer} of ${layers.length}`;
  $("layer-name").textContent = text;
  $("layer").setAttribute("aria-valuetext", `${text}: ${layers[layer - 1].tokens} tokens`);
  for (const bar of $("bars").children) bar.toggleAttribute("data-here", Number(bar.dataset.layer) === layer);
  for (const { name, figure } of sides) {
    const { tokens, origin } = shown[name].view.layers[layer - 1];
    const { gone, alone, merged, tokens: held } = countPatches(origin);
    const canvas = figure.querySelector("canvas"), count = figure.querySelector(".count");
    const parts = [`${alone} patches alone`];
    if (merged) parts.push(`${merged} merged into ${held - alone}`);
    if (gone) parts.push(`${gone} dropped or skipped`);
    const strong = document.createElement("strong");
    strong.textContent = `${tokens} tokens`;
    count.replaceChildren(strong, ` ${parts.join(", ")}`);
    canvas.ariaLabel = `Degree ${shown[name].view.degree}, ${text}: ${tokens} tokens, ${parts.join(", ")}`;
    paintTokens(canvas, shown[name], layer);
  }
}

$("layer").addEventListener("input", showLayer);
$("bars").addEventListener("click", (event) => {
  const bar = event.target.closest("[data-layer]");
  if (!bar) return;
  $("layer").value = bar.dataset.layer;
  showLayer();
});
new ResizeObserver(() => shown.reduced && showLayer()).observe($("result"));
for (const { name, figure } of sides) {
  const canvas = figure.querySelector("canvas");
  const layer = () => Number($("layer").value);
  canvas.addEventListener("pointermove", (event) => {
    const token = tokenAt(canvas, event, shown[name].view, layer());
    paintTokens(canvas, shown[name], layer(), token);
  });
  canvas.addEventListener("pointerleave", () => paintTokens(canvas, shown[name], layer()));
}

// Choosing an image: file dialog, drag and drop, clipboard

$("file").addEventListener("change", () => {
  chooseImage($("file").files[0]);
  $("file").value = ""; // the same file can be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  main.dataset.over = "";
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) delete main.dataset.over; // the pointer left the window
});
addEventListener("drop", (event) => {
  event.preventDefault();
  delete main.dataset.over;
  chooseImage(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => chooseImage(event.clipboardData.files[0]));

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-field").value;
  sessionStorage.setItem("key", key);
  start();
});

// The live panel

async function poll() {
  if (document.hidden) return;
  try {
    const before = live?.degree;
    live = await api("v1/live", { signal: AbortSignal.timeout(5000) });
    $("state").dataset.is = "up";
    $("state").textContent = `Serving at degree ${live.degree}`;
    showLive(live, degrees.map((each) => each.degree));
    if (!models.length) await start();
    if ($("auto").checked && before !== undefined && live.degree !== before) {
      setDial(live.degree);
      predictSoon();
    }
  } catch {
    $("state").dataset.is = "down";
    $("state").textContent = $("key").hidden ? "Not reachable" : "Needs a key";
  }
}

async function watch() {
  await poll();
  setTimeout(watch, 1000);
}

await start();
watch();
