// Draws the charts of the report from the JSON in the page. All text is inserted as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const DASHES = ["none", "7 3", "2 2", "9 3 2 3"];
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye", "cross", "times"];
  const SHARE = new Map(data.quantiles.map((one) => [one.name, one.share]));
  const SIGNS = { pass: "✓", fail: "✗", inconclusive: "?" };
  const NATS = "KL divergence (nats)";
  const colour = (one) => `var(--colour-${one.colour})`;
  const dash = (one) => DASHES[one.dash];
  const brief = (value) => (value === null ? "∞" : d3.format(".4~g")(value).replace("−", "-"));
  const percent = (share) => d3.format(share < 0.001 ? ".2~%" : share < 0.01 ? ".2~%" : ".1~%")(share);
  const positive = (value) => value !== null && value > 0;

  /** A log scale over the values, with ticks at powers of ten, and between them if there are few powers. */
  function log(label, values, room, tickFormat = nats) {
    const [least, most] = d3.extent(values.filter(positive));
    if (least === undefined) return { label, tickFormat };
    const [low, high] = least === most ? [least / 2, most * 2] : [least, most];
    const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
    const each = Math.ceil(powers.length / Math.max(2, room));
    const steps = powers.length > 3 ? [1] : [1, 2, 5];
    const ticks = powers.filter((power) => power % each === 0).flatMap((power) => steps.map((step) => Number(`${step}e${power}`)));
    return { type: "log", label, domain: [low, high], grid: true, tickFormat, ticks: ticks.filter((tick) => tick >= low && tick <= high) };
  }

  /** Formats nats as people write them. */
  function nats(value) {
    return value >= 0.001 && value < 10000 ? String(value) : value.toExponential(0);
  }

  /** Draws a chart with the settings that all charts share. */
  function plot(width, title, options) {
    return Plot.plot({
      width,
      marginLeft: 52,
      marginBottom: 38,
      style: { fontSize: "12px", background: "transparent", color: "var(--ink)" },
      ariaLabel: title,
      ...options,
    });
  }

  /** Space for names on the left, and an axis that truncates names that do not fit. */
  function names(list, width) {
    const longest = Math.max(...list.map((name) => name.length));
    const room = Math.min(longest * 7.2 + 16, width * 0.32);
    return {
      room,
      axis: (options) => Plot.axisY({ label: null, tickSize: 0, textOverflow: "ellipsis", lineWidth: room / 12, ...options }),
    };
  }

  function histogram(width, title) {
    const marks = data.candidates.flatMap((one) => {
      const points = bins(one);
      return [
        Plot.areaY(points, { x: "x", y: "share", curve: "step-after", fill: colour(one), fillOpacity: 0.1 }),
        Plot.lineY(points, { x: "x", y: "share", curve: "step-after", stroke: colour(one), strokeWidth: 2, strokeDasharray: dash(one) }),
      ];
    });
    const tips = data.candidates.flatMap((one) =>
      one.histogram.map(([lower, upper, count]) => ({
        x: Math.sqrt(lower * upper),
        y: count / one.positions,
        text: `${one.short}\n${brief(lower)} to ${brief(upper)} nats\n${count} positions, ${percent(count / one.positions)}`,
      })),
    );
    return plot(width, title, {
      height: 280,
      x: log(NATS, data.candidates.flatMap((one) => one.histogram.flatMap(([lower, upper]) => [lower, upper])), width / 70),
      y: { label: "Share of positions", grid: true, tickFormat: ".0%", nice: true, ticks: 5 },
      marks: [Plot.ruleY([0]), ...marks, tip(tips)],
    });
  }

  /** Corner points of a histogram's steps, with zeros for empty bins. */
  function bins(one) {
    const points = [];
    let end = null;
    for (const [lower, upper, count] of one.histogram) {
      if (end === null || lower > end * 1.01) {
        if (end !== null) points.push({ x: end, share: 0 });
        else points.push({ x: lower, share: 0 });
      }
      points.push({ x: lower, share: count / one.positions });
      end = upper;
    }
    if (end !== null) points.push({ x: end, share: 0 });
    return points;
  }

  function survival(width, title) {
    const curves = data.candidates.map((one) => ({
      one,
      points: one.survival.filter(([kl]) => positive(kl)).map(([kl, share]) => ({ kl, share, one })),
    }));
    const crosses = data.limits
      .filter((limit) => limit.quantile && SHARE.get(limit.quantile) < 1)
      .flatMap((limit) =>
        [...new Set(limit.rows.map((row) => row.bound))].filter(positive).map((bound) => ({
          kl: bound,
          share: 1 - SHARE.get(limit.quantile),
          text: `${limit.label} ≤ ${brief(bound)}`,
        })),
      );
    return plot(width, title, {
      height: 300,
      x: log(NATS, [...curves.flatMap(({ points }) => points.map((point) => point.kl)), ...crosses.map((cross) => cross.kl)], width / 70),
      y: log("Share of positions with at least this KL", [1, ...curves.flatMap(({ points }) => points.map((point) => point.share))], 6, percent),
      marks: [
        ...curves.map(({ one, points }) =>
          Plot.line(points, { x: "kl", y: "share", stroke: colour(one), strokeWidth: 2, strokeDasharray: dash(one) }),
        ),
        Plot.dot(crosses, { x: "kl", y: "share", symbol: "times", r: 6, stroke: "var(--fail)", strokeWidth: 2.5 }),
        Plot.text(crosses, { x: "kl", y: "share", text: "text", dx: 9, textAnchor: "start", fill: "var(--fail)", stroke: "var(--paper)", strokeWidth: 4 }),
        tip(
          curves.flatMap(({ one, points }) =>
            points.map(({ kl, share }) => ({ x: kl, y: share, text: `${one.short}\n${percent(share)} of the positions\nhave at least ${brief(kl)} nats` })),
          ),
        ),
      ],
    });
  }

  function quantiles(width, title) {
    const order = [...SHARE.keys()];
    const label = (name) => ({ median: "median", p999: "P99.9", max: "max" })[name] ?? name.toUpperCase();
    const rows = data.candidates.flatMap((one, rank) =>
      order.filter((name) => positive(one.quantiles[name])).map((name) => ({
        one,
        name,
        rank,
        value: one.quantiles[name],
        low: one.intervals[name]?.low ?? null,
        high: one.intervals[name]?.high ?? null,
      })),
    );
    const bounds = data.limits
      .filter((limit) => limit.quantile)
      .flatMap((limit) => [...new Set(limit.rows.map((row) => row.bound))].filter(positive).map((bound) => ({ name: limit.quantile, bound })));
    const step = Math.max(10, 34 / Math.max(2, data.candidates.length));
    return plot(width, title, {
      height: order.length * (step * data.candidates.length + 14) + 56,
      marginLeft: 56,
      x: log(NATS, [...rows.flatMap((row) => [row.value, row.low, row.high]), ...bounds.map((one) => one.bound)], width / 70),
      fy: { domain: order, label: null, padding: 0 },
      y: { domain: d3.range(data.candidates.length), axis: null, padding: 0.6 },
      facet: { marginLeft: 56 },
      marks: [
        Plot.axisFy({ anchor: "left", tickFormat: label, label: null, dx: -6, fill: "currentColor" }),
        Plot.frame({ anchor: "bottom", stroke: "var(--line)" }),
        Plot.ruleX(bounds, { fy: "name", x: "bound", stroke: "var(--fail)", strokeWidth: 2.5 }),
        Plot.text(bounds, { fy: "name", x: "bound", text: (one) => `limit ${brief(one.bound)}`, frameAnchor: "top", textAnchor: "start", dx: 5, fill: "var(--fail)", stroke: "var(--paper)", strokeWidth: 4 }),
        ...data.candidates.flatMap((one, rank) => {
          const own = rows.filter((row) => row.one === one);
          return [
            Plot.ruleY(own.filter((row) => positive(row.low) && positive(row.high)), { fy: "name", y: "rank", x1: "low", x2: "high", stroke: colour(one), strokeWidth: 1.5 }),
            Plot.dot(own, { fy: "name", y: "rank", x: "value", r: 4.5, symbol: SYMBOLS[one.colour], fill: colour(one) }),
          ];
        }),
        tip(rows.map((row) => ({ fy: row.name, x: row.value, y: row.rank, text: `${row.one.short}\n${label(row.name)} ${brief(row.value)} nats` })), true),
      ],
    });
  }

  function text(width, title) {
    const shorts = data.candidates.map((one) => one.short);
    const points = data.candidates.flatMap((one) =>
      one.text.map(([start, stop, mean, max]) => ({ one, short: one.short, x: (start + stop) / 2, start, stop, mean, max })),
    );
    return plot(width, title, {
      height: data.candidates.length * 120 + 50,
      x: { label: "Token of the text", grid: false, nice: false, tickFormat: "~s" },
      y: log(NATS, points.flatMap((point) => [point.mean, point.max * 4]), 4),
      fy: { domain: shorts, label: null, axis: null, padding: 0.12 },
      marks: [
        ...data.candidates.flatMap((one) => {
          const own = points.filter((point) => point.one === one);
          return [
            Plot.line(own.filter((point) => positive(point.max)), { fy: "short", x: "x", y: "max", stroke: colour(one), strokeOpacity: 0.35, strokeWidth: 1 }),
            Plot.line(own.filter((point) => positive(point.mean)), { fy: "short", x: "x", y: "mean", stroke: colour(one), strokeWidth: 1.8 }),
          ];
        }),
        Plot.ruleY(data.candidates.filter((one) => positive(one.mean)), { fy: "short", y: "mean", stroke: "var(--ink)", strokeDasharray: "4 4", strokeOpacity: 0.7 }),
        Plot.text(data.candidates, { fy: "short", text: (one) => `${one.short}, mean ${brief(one.mean)}`, frameAnchor: "top-left", dx: 4, dy: -2, fontWeight: 600, stroke: "var(--paper)", strokeWidth: 4, fill: "var(--ink)" }),
        tip(
          points.filter((point) => positive(point.mean)).map((point) => ({
            fy: point.short,
            x: point.x,
            y: point.mean,
            text: `${point.short}\ntokens ${point.start} to ${point.stop}\nmean ${brief(point.mean)}, max ${brief(point.max)} nats`,
          })),
          true,
        ),
      ],
    });
  }

  function gap(width, title) {
    const shown = data.candidates.filter((one) => one.gap?.length);
    const points = shown.flatMap((one) => one.gap.map(([position, candidate, reference]) => ({ one, short: one.short, position, candidate, reference })));
    const sides = ["reference", "candidate"];
    return plot(width, title, {
      height: shown.length * 120 + 50,
      x: { label: "Position in the window", grid: false, nice: false, tickFormat: "~s" },
      y: log(NATS, points.flatMap((point) => [point.candidate, point.reference]), 4),
      fy: { domain: shown.map((one) => one.short), label: null, axis: null, padding: 0.12 },
      marks: [
        ...shown.flatMap((one) =>
          sides.map((side) =>
            Plot.line(points.filter((point) => point.one === one && positive(point[side])), {
              fy: "short",
              x: "position",
              y: side,
              stroke: side === "reference" ? "var(--ink)" : colour(one),
              strokeDasharray: side === "reference" ? "4 4" : null,
              strokeWidth: side === "reference" ? 1 : 1.8,
            }),
          ),
        ),
        Plot.text(shown, { fy: "short", text: "short", frameAnchor: "top-left", dx: 4, dy: -2, fontWeight: 600, stroke: "var(--paper)", strokeWidth: 4, fill: "var(--ink)" }),
        tip(
          points.filter((point) => positive(point.candidate)).map((point) => ({
            fy: point.short,
            x: point.position,
            y: point.candidate,
            text: `${point.short}\nfrom position ${point.position}\n${brief(point.candidate)} nats, reference ${brief(point.reference)}`,
          })),
          true,
        ),
      ],
    });
  }

  function windows(width, title) {
    const cells = data.candidates.flatMap((one) => one.windows.map((window, index) => ({ one, index, mean: window && window[0], max: window && window[1] })));
    const drawn = cells.filter((cell) => positive(cell.mean));
    const { room, axis } = names(data.candidates.map((one) => one.short), width);
    const [least, most] = d3.extent(drawn, (cell) => cell.mean);
    const heat = least < most ? d3.scaleLog([least, most], [6, 100]) : () => 50;
    const options = {
      height: data.candidates.length * 30 + 46,
      marginLeft: room,
      x: { label: "Window", ticks: d3.ticks(0, d3.max(cells, (cell) => cell.index), Math.max(2, width / 90)).filter(Number.isInteger) },
      y: { domain: data.candidates.map((one) => one.short), type: "band", padding: 0.12, label: null, axis: null },
      color: { type: "identity" },
      marks: [
        axis({}),
        Plot.rect(drawn, { x1: (cell) => cell.index - 0.5, x2: (cell) => cell.index + 0.5, y: (cell) => cell.one.short, fill: (cell) => `color-mix(in oklab, var(--accent) ${heat(cell.mean).toFixed(1)}%, var(--panel))`, insetLeft: 0.3, insetRight: 0.3 }),
        tip(
          drawn.map((cell) => ({ x: cell.index, y: cell.one.short, text: `${cell.one.short}, window ${cell.index}\nmean ${brief(cell.mean)}, max ${brief(cell.max)} nats` })),
        ),
      ],
    };
    const box = document.createElement("div");
    const ramp = document.createElement("p");
    ramp.className = "ramp";
    const [low, strip, high] = ["span", "i", "span"].map((name) => ramp.appendChild(document.createElement(name)));
    low.textContent = least === undefined ? "" : `${brief(least)} nats`;
    high.textContent = least === undefined ? "" : `${brief(most)} nats (log scale)`;
    strip.setAttribute("aria-hidden", "true");
    box.append(ramp, plot(width, title, options));
    return box;
  }

  function limits(width, title) {
    const box = document.createElement("div");
    box.className = data.limits.length > 1 ? "grid" : "";
    const columns = data.limits.length > 1 ? Math.max(1, Math.floor((width + 40) / (352 + 40))) : 1;
    const own = (width - 40 * (Math.min(columns, data.limits.length) - 1)) / Math.min(columns, data.limits.length);
    for (const limit of data.limits) box.append(oneLimit(Math.floor(own), title, limit));
    return box;
  }

  function oneLimit(width, title, limit) {
    const rows = limit.rows.map((row, rank) => ({ ...row, rank })).filter((row) => row.value !== null);
    const ends = rows.flatMap((row) => [row.value, row.bound, row.low, row.high]).filter((value) => value !== null);
    const [least, most] = d3.extent(ends);
    const wide = limit.unit === "nats" && least > 0 && most / least > 20;
    const pad = (most - least || most || 1) * 0.15;
    const domain = wide ? [least / 1.6, most * 1.6] : [limit.unit === "nats" && least >= 0 ? 0 : least - pad, most + pad];
    const bounds = d3.groups(rows, (row) => row.bound).map(([bound]) => bound);
    const { room, axis } = names(limit.rows.map((row) => row.short), width);
    const fails = limit.upper ? { x1: "bound", x2: domain[1] } : { x1: domain[0], x2: "bound" };
    const box = document.createElement("div");
    const heading = document.createElement("h4");
    heading.textContent = `${limit.label}${limit.unit ? ` (${limit.unit})` : ""}`;
    box.append(heading);
    box.append(
      plot(width, `${title}: ${limit.label}`, {
        height: rows.length * 30 + 58,
        marginLeft: room,
        marginTop: 24,
        marginRight: 98,
        x: wide ? { ...log(null, domain, width / 70), domain } : { grid: true, label: null, ticks: Math.max(3, width / 110), domain },
        y: { type: "band", domain: limit.rows.map((_, rank) => rank), padding: 0.2, axis: null },
        marks: [
          Plot.rect(rows, { ...fails, y: "rank", fill: "var(--fail)", fillOpacity: 0.1, insetTop: -3, insetBottom: -3 }),
          axis({ tickFormat: (rank) => limit.rows[rank].short }),
          ...(bounds.length === 1
            ? [Plot.ruleX(bounds, { stroke: "var(--fail)", strokeWidth: 2 })]
            : [Plot.tickX(rows, { x: "bound", y: "rank", stroke: "var(--fail)", strokeWidth: 2 })]),
          Plot.text(bounds, { x: (bound) => bound, text: (bound) => `limit ${brief(bound)}`, frameAnchor: "top", dy: -16, fill: "var(--fail)", fontWeight: 600 }),
          Plot.ruleY(rows.filter((row) => row.low !== null && row.high !== null), { y: "rank", x1: "low", x2: "high", stroke: (row) => colour(row), strokeWidth: 2, marker: "tick" }),
          Plot.dot(rows, { x: "value", y: "rank", r: 5, symbol: (row) => SYMBOLS[row.colour], fill: (row) => colour(row) }),
          Plot.text(rows, { y: "rank", text: (row) => `${brief(row.value)} ${SIGNS[row.state]}`, frameAnchor: "right", dx: 88, fill: "var(--ink)", fontVariant: "tabular-nums" }),
        ],
        symbol: { type: "identity" },
        color: { type: "identity" },
      }),
    );
    return box;
  }

  /** Quality against speed: a point for each candidate and concurrency, and the front of those that nothing beats. */
  function speed(width, title) {
    const points = data.speed.map((point) => ({
      ...point,
      x: point.tps,
      y: point.kl,
      text: `${point.short}\nconcurrency ${point.concurrency}\n${brief(point.tps)} output tokens/s\nmean KLD ${brief(point.kl)} nats`,
    }));
    const fronts = d3.group(points, (point) => point.concurrency);
    const front = [...fronts.values()].flatMap((group) => group.filter((point) => point.front).sort((a, b) => a.x - b.x));
    return plot(width, title, {
      height: 320,
      marginRight: 40,
      x: { label: "Output tokens/s", grid: true, nice: true, zero: true, ticks: Math.max(3, width / 110) },
      y: { ...log("Mean KLD (nats)", points.map((point) => point.y), 5), nice: true },
      marks: [
        Plot.line(front, { x: "x", y: "y", z: "concurrency", stroke: "var(--quiet)", strokeDasharray: "3 3" }),
        Plot.dot(points, { x: "x", y: "y", r: 5, symbol: (point) => SYMBOLS[point.colour], fill: (point) => colour(point), fillOpacity: (point) => (point.front ? 1 : 0.45) }),
        Plot.text(points, { x: "x", y: "y", text: (point) => `C=${point.concurrency}`, dy: -12, fill: "var(--quiet)" }),
        tip(points),
      ],
      symbol: { type: "identity" },
      color: { type: "identity" },
      opacity: { type: "identity" },
    });
  }

  /** The tooltip at the pointer; all of its numbers are also in a table. */
  function tip(points, facets = false) {
    return Plot.tip(points, Plot.pointer({ x: "x", y: "y", ...(facets ? { fy: "fy" } : {}), title: "text", fontSize: 12, fill: "var(--panel)", stroke: "var(--line)" }));
  }

  const charts = { limits, histogram, survival, quantiles, text, gap, windows, speed };

  function draw(place) {
    const width = Math.floor(place.clientWidth);
    if (width < 50 || place.dataset.width === String(width)) return;
    place.dataset.width = String(width);
    place.replaceChildren(charts[place.dataset.chart](width, place.dataset.title));
  }

  for (const path of document.querySelectorAll(".swatch path")) {
    const symbol = SYMBOLS[Number(path.dataset.symbol)];
    path.setAttribute("d", d3.symbol(d3[`symbol${symbol[0].toUpperCase()}${symbol.slice(1)}`], 34)());
  }
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => requestAnimationFrame(() => draw(entry.target))));
  for (const place of document.querySelectorAll("[data-chart]")) {
    if (place.dataset.chart === "limits" && !data.limits.length) continue;
    draw(place);
    observer.observe(place);
  }
})();
