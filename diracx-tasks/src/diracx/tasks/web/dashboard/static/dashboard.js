// Live updates, charts, confirmation dialogs, light and dark theme. All pages and actions work without it.
"use strict";

const root = document.documentElement;
const body = document.body;
const byId = (id) => document.getElementById(id);

// Scroll a one-line navigation to the current page.
const entry = document.querySelector(".side [aria-current]");
const line = entry?.closest("nav");
if (line && line.scrollWidth > line.clientWidth) line.scrollLeft = entry.offsetLeft - line.clientWidth / 3;

// Make scrollable boxes focusable, so that they can be scrolled by keyboard.
function makeFocusable() {
  document.querySelectorAll("#live, .scroll, .overview :is(.first, .last)").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
}
addEventListener("resize", makeFocusable);
makeFocusable();

// --- light and dark --------------------------------------------------------------------------------------------

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const themeButton = byId("theme");
if (themeButton) {
  const label = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    const year = 365 * 86400;
    document.cookie = `tasks-dashboard-theme=${root.dataset.theme}; path=${body.dataset.root}; max-age=${year}; samesite=strict`;
    label();
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { label(); drawAll(); });
  label();
}

// --- charts ----------------------------------------------------------------------------------------------------

const plots = new Map();
let chartData = {};

function colour(number) {
  // The computed value of a custom property is not a colour; that of `color` is.
  const probe = document.createElement("i");
  probe.style.color = number ? `var(--series-${number})` : "var(--muted)";
  body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function format(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1e6 ? `${+(value / 1e6).toPrecision(3)} M`
    : Math.abs(value) >= 1e4 ? `${+(value / 1e3).toPrecision(3)} k` : `${+value.toPrecision(4)}`;
}

function drawOne(figure) {
  const data = chartData[figure.dataset.chart];
  const place = figure.querySelector(".plot");
  if (!data || !place || typeof uPlot === "undefined") return;
  const columns = [data.t, ...data.series.map((one) => one.values)];
  const names = data.series.map((one) => one.label).join("|");
  const known = plots.get(figure);
  if (known && known.names === names && known.dark === isDark()) {
    known.plot.setData(columns);
  } else {
    if (known) known.plot.destroy();
    const grid = getComputedStyle(root).getPropertyValue("color-scheme") && isDark() ? "#2a2f37" : "#e2e3e1";
    const axis = { stroke: colour(0), grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const plot = new uPlot({
      width: place.clientWidth,
      height: place.clientHeight,
      cursor: { y: false, points: { size: 6 } },
      legend: { show: false },
      scales: { y: { range: (_, low, high) => [0, Math.max(high || 0, 1) * 1.08] } },
      axes: [
        { ...axis, space: 70, size: 26, gap: 4, values: [[3600, "{HH}:{mm}", null, null, null, null, null, null, 1],
          [60, "{HH}:{mm}", null, null, null, null, null, null, 1], [1, "{HH}:{mm}:{ss}", null, null, null, null, null, null, 1]] },
        { ...axis, size: 46, values: (_, ticks) => ticks.map(format) },
      ],
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1e3), "UTC"),
      series: [{}, ...data.series.map((one, index) => ({
        label: one.label, stroke: colour(one.colour ?? index + 1), width: 1.5, points: { show: false }, spanGaps: false,
        paths: figure.dataset.kind === "steps" ? uPlot.paths.stepped({ align: 1 }) : undefined,
      }))],
      hooks: { setCursor: [(drawn) => legend(figure, drawn.cursor.idx)] },
    }, columns, place);
    plots.set(figure, { plot, names, dark: isDark() });
  }
  legend(figure, null);
}

function legend(figure, index) {
  const data = chartData[figure.dataset.chart];
  const place = figure.querySelector(".legend");
  const at = index === null || index === undefined ? data.t.length - 1 : index;
  place.replaceChildren(...data.series.map((one, number) => {
    const entry = document.createElement("span");
    entry.className = `s${one.colour ?? number + 1}`;
    entry.textContent = `${one.label} ${format(one.values[at])}`;
    return entry;
  }));
  const last = data.series.map((one) => `${one.label} ${format(one.values[data.t.length - 1])}`).join(", ");
  const plot = figure.querySelector(".plot");
  plot.setAttribute("aria-label", `${figure.querySelector("b").textContent}, ${figure.dataset.unit}; latest: ${last}`);
}

function drawAll() {
  document.querySelectorAll("figure.chart").forEach(drawOne);
}

const holder = document.querySelector("[data-charts]");
if (holder && holder.dataset.charts) {
  chartData = JSON.parse(holder.dataset.charts);
  drawAll();
  new ResizeObserver(() => plots.forEach(({ plot }, figure) => {
    const place = figure.querySelector(".plot");
    if (place.clientWidth && plot.width !== place.clientWidth) plot.setSize({ width: place.clientWidth, height: place.clientHeight });
  })).observe(holder);
}

// --- live updates ----------------------------------------------------------------------------------------------

const state = byId("state");
const pauseButton = byId("pause");
const place = byId("live");
let pending = null; // update that could not be applied yet
let paused = false;
let source = null;
let lostTimer = 0; // until "no connection" is shown
let retryTimer = 0;
let silenceTimer = 0; // since the last event: a connection can be lost without an error
let lost = false;
let hasProblem = false;

function setState(kind, text) {
  if (!state) return;
  if (state.dataset.state !== kind) state.dataset.state = kind;
  if (state.textContent !== text) state.textContent = text;
}

function isInUse() {
  // The user selects text, presses a button or confirms an action.
  const selection = getSelection();
  const selecting = selection && !selection.isCollapsed && place.contains(selection.anchorNode);
  return selecting || place.querySelector(":active") || byId("question").open;
}

function update(html) {
  if (paused || isInUse()) {
    pending = html;
    return;
  }
  pending = null;
  const open = [...place.querySelectorAll("details[open][id]")].map((one) => one.id);
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  const mark = focused && (focused.id ? `#${CSS.escape(focused.id)}` : focused.href ? `a[href="${CSS.escape(focused.getAttribute("href"))}"]` : null);
  const scroll = [place.scrollLeft, place.scrollTop];
  htmx.swap(place, html, { swapStyle: "innerHTML" });
  open.forEach((id) => { const one = byId(id); if (one) one.open = true; });
  if (mark && !place.contains(document.activeElement)) place.querySelector(mark)?.focus({ preventScroll: true });
  makeFocusable();
  [place.scrollLeft, place.scrollTop] = scroll;
}

function showProblem(text) {
  const note = byId("problem");
  note.hidden = !text;
  if (note.textContent !== text) note.textContent = text;
  hasProblem = Boolean(text);
  showState();
}

function showState() {
  const open = source?.readyState === EventSource.OPEN;
  if (paused) setState("paused", "paused");
  else if (lost && !open) setState("problem", "no connection");
  else if (hasProblem) setState("problem", "not up to date");
  else if (open) setState("live", "live");
  else if (source) setState("waiting", "connecting");
}

function disconnect() {
  clearTimeout(lostTimer);
  clearTimeout(retryTimer);
  clearTimeout(silenceTimer);
  source?.close();
}

function expectEvents() {
  clearTimeout(silenceTimer);
  silenceTimer = setTimeout(() => { lost = true; connect(); showState(); }, 40000); // keep-alive events: every 15 s
}

function connect() {
  disconnect();
  expectEvents();
  source = new EventSource(body.dataset.live);
  // A new stream begins with the current problem, if any.
  source.addEventListener("open", () => { clearTimeout(lostTimer); lost = false; showProblem(""); });
  source.addEventListener("fragment", (event) => update(event.data));
  source.addEventListener("charts", (event) => {
    if (paused) return;
    chartData = JSON.parse(event.data);
    drawAll();
  });
  for (const name of ["open", "fragment", "charts", "problem", "alive"]) source.addEventListener(name, expectEvents);
  source.addEventListener("problem", (event) => showProblem(event.data));
  source.addEventListener("gone", () => location.reload());
  source.addEventListener("error", () => {
    // The server limits the duration of streams; the browser reconnects, except after a refusal.
    clearTimeout(lostTimer);
    lostTimer = setTimeout(() => { lost = true; showState(); }, 3000);
    if (source.readyState === EventSource.CLOSED) retryTimer = setTimeout(connect, 5000);
  });
}

if (body.dataset.live && place) {
  setState("waiting", "connecting");
  pauseButton.hidden = false;
  pauseButton.addEventListener("click", () => {
    paused = !paused;
    pauseButton.setAttribute("aria-pressed", String(paused));
    pauseButton.textContent = paused ? "Resume" : "Pause";
    if (!paused) {
      if (pending !== null) update(pending);
      if (source?.readyState === EventSource.CLOSED) connect();
    }
    showState();
  });
  // Hidden tabs do not load the server.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { disconnect(); setState("waiting", "not updated"); }
    else { connect(); showState(); }
  });
  setInterval(() => { if (pending !== null && !paused) update(pending); }, 500);
  if (!document.hidden) connect();
}

// --- confirmation ----------------------------------------------------------------------------------------------

const question = byId("question");

// After htmx has settled: before that, it may still move the focus.
body.addEventListener("htmx:afterSettle", (event) => {
  if (event.detail.target !== question || question.open) return;
  question.showModal();
  question.querySelector("[autofocus]")?.focus();
});
body.addEventListener("htmx:responseError", (event) => {
  if (event.detail.xhr.status === 401) location.reload();
  else showProblem(event.detail.xhr.responseText.slice(0, 300));
});
body.addEventListener("htmx:sendError", () => showProblem("the dashboard does not respond"));
question.addEventListener("click", (event) => {
  if (event.target.closest("[data-close]")) {
    event.preventDefault();
    question.close();
  }
});

// --- selection of several --------------------------------------------------------------------------------------

const bulk = document.querySelector("[data-bulk]");
if (bulk) {
  const every = bulk.querySelector("[data-every]");
  const boxes = () => [...bulk.querySelectorAll("tbody input[type=checkbox]")];
  const count = () => {
    const selected = boxes().filter((box) => box.checked).length;
    bulk.querySelector("[data-count]").textContent = selected ? `${selected} selected` : "None selected";
    bulk.querySelectorAll("[data-chosen]").forEach((button) => { button.disabled = !selected; });
    every.checked = selected > 0 && selected === boxes().length;
    every.indeterminate = selected > 0 && !every.checked;
  };
  every.hidden = false;
  every.addEventListener("change", () => { boxes().forEach((box) => { box.checked = every.checked; }); count(); });
  bulk.addEventListener("change", count);
  count();
}
