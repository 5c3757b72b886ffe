// The last minute of the server: three small charts.

const [WIDTH, HEIGHT] = [60, 30];

/** Show a response of /v1/live; `degrees` are the offered degrees. */
export function showLive(live, degrees) {
  const peak = Math.max(0, ...live.history.map((point) => point.load ?? 0));
  chart("load", points(live.history, "load"), peak * 1.15, {
    value: `${number(live.arrivals_per_s)} images/s`,
    note: `at most ${number(peak)}`,
  });
  chart("turns", points(live.history, "degree"), degrees.at(-1) ?? 0, {
    value: `${live.degree}`,
    note: `of ${degrees.at(-1) ?? 0}`,
    steps: true,
  });
  const slowest = Math.max(live.slo_ms ?? 0, ...live.history.map((point) => point.p99_ms ?? 0));
  chart("latency", points(live.history, "p99_ms"), slowest * 1.15, {
    value: live.p99_ms == null ? "–" : `${number(live.p99_ms)} ms`,
    note: live.slo_ms == null ? "" : `limit ${number(live.slo_ms)} ms`,
    limit: live.slo_ms,
  });
  const refused = Object.values(live.refused).reduce((sum, count) => sum + count, 0);
  document.getElementById("totals").textContent =
    `${live.answered} answered, ${refused} refused, ${live.queued} waiting`;
}

/** Format a number briefly. */
export function number(value) {
  return value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(value < 10 ? 2 : 3)));
}

function points(history, field) {
  return history.map((point) => [WIDTH + point.t, point[field] ?? null]);
}

function chart(id, values, top, { value, note, steps = false, limit = null }) {
  const figure = document.getElementById(id);
  const title = figure.querySelector("span").textContent;
  const y = (at) => (HEIGHT - 1 - (at / (top || 1)) * (HEIGHT - 2)).toFixed(2);
  const runs = [];
  let run = null;
  for (const [x, at] of values) {
    if (at === null) run = null;
    else if (run) run.push([x, at]);
    else runs.push((run = [[x, at]]));
  }
  const line = (run) =>
    run.map(([x, at], i) => {
      if (i === 0) return `M${x.toFixed(2)} ${y(at)}`;
      return steps ? `H${x.toFixed(2)}V${y(at)}` : `L${x.toFixed(2)} ${y(at)}`;
    }).join("");
  const draw = (kind, d) => figure.querySelector(`.${kind}`)?.setAttribute("d", d);
  draw("line", runs.map(line).join(""));
  draw("area", runs.map((run) =>
    `${line(run)}V${HEIGHT}H${run[0][0].toFixed(2)}Z`).join(""));
  draw("limit", limit === null ? "" : `M0 ${y(limit)}H${WIDTH}`);
  figure.querySelector("output").textContent = value;
  figure.querySelector("svg").setAttribute("aria-label",
    `${title} over the last minute: now ${value}${note && `, ${note}`}`);
  figure.dataset.points = values.length;
}
