// Puts what the server sends where it belongs. Whatever is a sentence or a number was written by the server.
import { echarts } from "/static/echarts/index.js";

const main = document.getElementById("main");
const lost = document.getElementById("lost");
const answer = document.getElementById("answer");
const dark = matchMedia("(prefers-color-scheme: dark)");
const csrf = document.querySelector('meta[name="csrf"]').content; // of operators
const field = document.getElementById("filter");
const shown = new Map(); // canvas → {option, chart}
let stream, tail = "";

function follow() {
  stream?.close();
  stream = new EventSource(main.dataset.stream);
  stream.onmessage = (message) => {
    lost.hidden = true;
    const { html = {}, panels = {} } = JSON.parse(message.data);
    for (const [part, text] of Object.entries(html)) replace(part, text);
    for (const [id, panel] of Object.entries(panels)) place(id, panel);
    main.dataset.shown = "yes";
  };
  stream.onopen = () => { lost.hidden = true; };
  stream.onerror = () => {
    lost.hidden = false;
    if (stream.readyState === EventSource.CLOSED) setTimeout(follow, 2000);
  };
}

// Nobody sees a page in the background, and whoever comes back is sent everything anew.
document.addEventListener("visibilitychange", () => {
  if (!main.dataset.stream) return;
  if (document.hidden) stream?.close();
  else follow();
});

function replace(part, text) {
  if (part === "log") {
    tail = text;
    if (field.value.trim()) return search();
  }
  const here = main.querySelector(`[data-part="${part}"]`);
  if (!here) return;
  const open = [...here.querySelectorAll("details")].map((details) => details.open);
  const focused = here.contains(document.activeElement) && document.activeElement.dataset.action;
  const scrolled = here.scrollTop;
  here.innerHTML = text;
  here.querySelectorAll("details").forEach((details, at) => { details.open = open[at] ?? false; });
  if (focused) here.querySelector(`[data-action="${focused}"]`)?.focus();
  here.scrollTop = scrolled;
  if (part === "controls" && !csrf) here.querySelectorAll("button").forEach((button) => { button.disabled = true; });
}

function place(id, panel) {
  const section = main.querySelector(`[data-section="${panel.section}"]`);
  if (!section) return;
  let figure = document.getElementById(`panel-${id}`);
  if (!figure) {
    figure = section.appendChild(document.createElement("figure"));
    figure.id = `panel-${id}`;
    figure.innerHTML = '<figcaption><h3></h3><span></span></figcaption><p></p><div class="canvas" role="img"></div><div class="note"></div>';
    watcher.observe(figure.querySelector(".canvas"));
  }
  figure.querySelector("h3").textContent = panel.title;
  figure.querySelector("figcaption span").textContent = panel.unit ?? "";
  figure.querySelector(".note").textContent = panel.note ?? "";
  const words = figure.querySelector("p"), canvas = figure.querySelector(".canvas");
  words.textContent = panel.reason ?? "";
  words.hidden = panel.option !== undefined;
  canvas.hidden = !words.hidden;
  canvas.setAttribute("aria-label", panel.summary ?? "");
  if (!panel.option) return;
  const known = shown.get(canvas) ?? {};
  shown.set(canvas, { ...known, option: panel.option });
  if (known.visible) queue(canvas);
}

// Charts that nobody sees are not drawn.
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const known = shown.get(target) ?? {};
    shown.set(target, { ...known, visible: isIntersecting });
    if (isIntersecting && known.option) queue(target);
  }
}, { rootMargin: "150px" });

// One chart a frame: between two of them the page answers.
const waiting = new Set();
function queue(canvas) {
  if (!waiting.size) requestAnimationFrame(drawNext);
  waiting.add(canvas);
}

function drawNext() {
  const [canvas] = waiting;
  if (shown.get(canvas).visible) draw(canvas);
  waiting.delete(canvas);
  if (waiting.size) requestAnimationFrame(drawNext);
}

function draw(canvas) {
  const known = shown.get(canvas);
  if (!canvas.clientWidth) return;
  known.chart ??= echarts.init(canvas);
  if (known.chart.getWidth() !== canvas.clientWidth) known.chart.resize();
  known.chart.setOption(dressed(known.option, canvas.clientWidth), { replaceMerge: ["series"] });
}

function dressed(option, width) {
  const [ink, quiet, line, card] = ["--ink", "--quiet", "--line", "--card"].map((name) => getComputedStyle(document.body).getPropertyValue(name).trim());
  const axis = (own) => ({
    axisLine: { lineStyle: { color: quiet } }, axisLabel: { color: quiet, hideOverlap: true }, splitLine: { lineStyle: { color: line } },
    nameTextStyle: { color: quiet }, ...own,
  });
  const heat = option.visualMap !== undefined;
  const legend = heat ? 0 : legendRows(option.legend, width);
  const viridis = ["#fde725", "#5ec962", "#21918c", "#3b528b", "#440154"];
  return {
    animation: false,
    textStyle: { color: ink, fontFamily: "system-ui, sans-serif" },
    grid: { left: 8, right: heat ? 56 : 16, top: 16 + 20 * Math.min(legend, 3), bottom: 30, containLabel: true },
    tooltip: { trigger: heat ? "item" : "axis", renderMode: "richText", backgroundColor: card, borderColor: line, textStyle: { color: ink, fontSize: 12 } },
    ...(heat
      ? { visualMap: { ...option.visualMap, calculable: false, orient: "vertical", right: 0, top: "center", itemHeight: 110, itemWidth: 10,
          text: [`${Number(option.visualMap.max.toPrecision(2))} %`, "0 %"],
          inRange: { color: dark.matches ? [...viridis].reverse() : viridis }, textStyle: { color: quiet } } }
      : { legend: { ...option.legend, type: legend > 3 ? "scroll" : "plain", itemWidth: 14, itemGap: 8, show: legend > 0, top: 0, textStyle: { color: ink, fontSize: 11 } } }),
    xAxis: axis({ ...option.xAxis, nameLocation: "middle", nameGap: 26, axisLabel: { color: quiet, hideOverlap: true } }),
    yAxis: axis({ ...option.yAxis, name: "", axisLabel: { color: quiet, hideOverlap: true, interval: heat ? 3 : undefined } }),
    series: heat ? option.series.map((series) => ({ ...series, data: cells(series.data), progressive: 300, progressiveThreshold: 300, emphasis: { disabled: true } })) : option.series,
  };
}

// Rows that the names of the lines take, by a guess at the width of letters; 0 without a legend.
function legendRows({ data, show = data.length > 1 }, width) {
  let rows = 1, place = 0;
  for (const item of data.map((name) => 28 + 6 * name.length)) {
    if (place && place + item > width) { rows += 1; place = 0; }
    place += item;
  }
  return show ? rows : 0;
}

// [round, bin, share] of what is not 0.
function cells(columns) {
  return columns.flatMap((column, x) => column.flatMap((share, y) => (share ? [[x, y, share]] : [])));
}

function redraw() {
  for (const [canvas, { chart, visible }] of shown) if (chart && visible) queue(canvas);
}
dark.addEventListener("change", redraw);
addEventListener("resize", redraw);

async function command(button) {
  const action = button.dataset.action;
  const warnings = {
    abort: "Abort for good? The round under way is dropped, and the run cannot go on.",
    stop: "Stop after this round?",
  };
  if (warnings[action] && !confirm(warnings[action])) return;
  const expected = Number(button.closest("[data-expected]").dataset.expected);
  try {
    const response = await fetch(`/command/${main.dataset.run}`, {
      method: "POST", headers: { "content-type": "application/json", "x-csrf": csrf }, body: JSON.stringify({ action, expected }),
    });
    const { error } = await response.json();
    answer.textContent = error ?? `Asked to ${action}; the run answers between two rounds.`;
  } catch {
    answer.textContent = "The dashboard's server does not answer: nothing was asked for.";
  }
}
main.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) command(button);
});

// The whole log is searched where it is; the page holds its tail.
async function search() {
  const text = field.value, here = main.querySelector('[data-part="log"]');
  let found = tail;
  try {
    if (text.trim()) {
      const response = await fetch(`/log/${main.dataset.run}?${new URLSearchParams({ with: text })}`);
      if (!response.ok) return; // what is wrong stands at the top
      found = await response.text();
    }
  } catch { return; } // a lost server says so by its stream
  if (field.value === text) here.innerHTML = found;
}
let typed;
field?.addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(search, 200); });

if (main.dataset.stream) follow();
