// What a page does by itself: it follows the server, draws charts, asks before it acts, and remembers light or dark.
// Without it every page can be read, and every action works.
"use strict";

const root = document.documentElement;
const body = document.body;
const byId = (id) => document.getElementById(id);

// Where the navigation is one long line, the page that one is on must be in sight.
const entry = document.querySelector(".side [aria-current]");
const line = entry?.closest("nav");
if (line && line.scrollWidth > line.clientWidth) line.scrollLeft = entry.offsetLeft - line.clientWidth / 3;

// What has to be moved sideways to be seen can be, by keyboard alone.
function reach() {
  document.querySelectorAll("#live, .scroll, .overview :is(.first, .last)").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
}
addEventListener("resize", reach);
reach();

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
  // The computed value of a custom property is what was written; a property of an element is a colour.
  const probe = document.createElement("i");
  probe.style.color = number ? `var(--series-${number})` : "var(--muted)";
  body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function shown(value) {
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
        { ...axis, size: 46, values: (_, ticks) => ticks.map(shown) },
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
    entry.textContent = `${one.label} ${shown(one.values[at])}`;
    return entry;
  }));
  const last = data.series.map((one) => `${one.label} ${shown(one.values[data.t.length - 1])}`).join(", ");
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

// --- following the server --------------------------------------------------------------------------------------

const state = byId("state");
const pauseButton = byId("pause");
const place = byId("live");
let held = null; // what came while it could not be shown
let paused = false;
let source = null;
let doubt = 0; // timers: until it is told that there is no connection, until another is tried
let again = 0;
let lost = false;
let problemd = false;

function tell(kind, text) {
  if (!state) return;
  if (state.dataset.state !== kind) state.dataset.state = kind;
  if (state.textContent !== text) state.textContent = text;
}

function inUse() {
  // Somebody selects text there, or is about to press a button: nothing may move under the hand.
  const selection = getSelection();
  const selecting = selection && !selection.isCollapsed && place.contains(selection.anchorNode);
  return selecting || place.querySelector(":active") || byId("question").open;
}

function put(html) {
  if (paused || inUse()) {
    held = html;
    return;
  }
  held = null;
  const open = [...place.querySelectorAll("details[open][id]")].map((one) => one.id);
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  const mark = focused && (focused.id ? `#${CSS.escape(focused.id)}` : focused.href ? `a[href="${CSS.escape(focused.getAttribute("href"))}"]` : null);
  const scroll = [place.scrollLeft, place.scrollTop];
  htmx.swap(place, html, { swapStyle: "innerHTML" });
  open.forEach((id) => { const one = byId(id); if (one) one.open = true; });
  if (mark && !place.contains(document.activeElement)) place.querySelector(mark)?.focus({ preventScroll: true });
  reach();
  [place.scrollLeft, place.scrollTop] = scroll;
}

function problem(text) {
  const note = byId("problem");
  note.hidden = !text;
  if (note.textContent !== text) note.textContent = text;
  problemd = Boolean(text);
  tellState();
}

function tellState() {
  const open = source?.readyState === EventSource.OPEN;
  if (paused) tell("paused", "paused");
  else if (lost && !open) tell("problem", "no connection");
  else if (problemd) tell("problem", "not up to date");
  else if (open) tell("live", "live");
  else if (source) tell("waiting", "connecting");
}

function leave() {
  clearTimeout(doubt);
  clearTimeout(again);
  source?.close();
}

function follow() {
  leave();
  source = new EventSource(body.dataset.live);
  // A new stream begins with what is wrong, if anything is.
  source.addEventListener("open", () => { clearTimeout(doubt); lost = false; problem(""); });
  source.addEventListener("fragment", (event) => put(event.data));
  source.addEventListener("charts", (event) => {
    if (paused) return;
    chartData = JSON.parse(event.data);
    drawAll();
  });
  source.addEventListener("problem", (event) => problem(event.data));
  source.addEventListener("gone", () => location.reload());
  source.addEventListener("error", () => {
    // Streams end now and then, and begin again at once: that is nothing to tell.
    clearTimeout(doubt);
    doubt = setTimeout(() => { lost = true; tellState(); }, 3000);
    // A browser does not try again where it was refused.
    if (source.readyState === EventSource.CLOSED) again = setTimeout(follow, 5000);
  });
}

if (body.dataset.live && place) {
  tell("waiting", "connecting");
  pauseButton.hidden = false;
  pauseButton.addEventListener("click", () => {
    paused = !paused;
    pauseButton.setAttribute("aria-pressed", String(paused));
    pauseButton.textContent = paused ? "Go on" : "Pause";
    if (!paused) {
      if (held !== null) put(held);
      if (source?.readyState === EventSource.CLOSED) follow();
    }
    tellState();
  });
  // A tab that nobody sees costs nobody anything.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { leave(); tell("waiting", "not followed"); }
    else { follow(); tellState(); }
  });
  setInterval(() => { if (held !== null && !paused) put(held); }, 500);
  if (!document.hidden) follow();
}

// --- asking ----------------------------------------------------------------------------------------------------

const question = byId("question");

// After it has settled: until then, htmx itself may still move the focus.
body.addEventListener("htmx:afterSettle", (event) => {
  if (event.detail.target !== question || question.open) return;
  question.showModal();
  question.querySelector("[autofocus]")?.focus();
});
body.addEventListener("htmx:responseError", (event) => {
  if (event.detail.xhr.status === 401) location.reload();
  else problem(event.detail.xhr.responseText.slice(0, 300));
});
body.addEventListener("htmx:sendError", () => problem("the dashboard does not answer"));
question.addEventListener("click", (event) => {
  if (event.target.closest("[data-close]")) {
    event.preventDefault();
    question.close();
  }
});

// --- choosing several ------------------------------------------------------------------------------------------

const bulk = document.querySelector("[data-bulk]");
if (bulk) {
  const every = bulk.querySelector("[data-every]");
  const boxes = () => [...bulk.querySelectorAll("tbody input[type=checkbox]")];
  const count = () => {
    const chosen = boxes().filter((box) => box.checked).length;
    bulk.querySelector("[data-count]").textContent = chosen ? `${chosen} chosen` : "None chosen";
    bulk.querySelectorAll("[data-chosen]").forEach((button) => { button.disabled = !chosen; });
    every.checked = chosen > 0 && chosen === boxes().length;
    every.indeterminate = chosen > 0 && !every.checked;
  };
  every.hidden = false;
  every.addEventListener("change", () => { boxes().forEach((box) => { box.checked = every.checked; }); count(); });
  bulk.addEventListener("change", count);
  count();
}
