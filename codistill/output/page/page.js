"use strict";
// Figures are plotly's; this shows and filters rollouts and switches between light and dark.
// Texts of a run reach the page through textContent alone, so no text can become a tag or a script.
const data = JSON.parse(document.getElementById("data").textContent);
const plots = [...document.querySelectorAll(".plot")];
const root = document.documentElement;
const AT_ONCE = 50; // rows that are in the table at first, and that "Show more" adds

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

// ---- light and dark ----------------------------------------------------------------------------

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  document.getElementById("theme").textContent = isDark() ? "Light mode" : "Dark mode";
}

document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();

// ---- figures -----------------------------------------------------------------------------------

for (const plot of plots) {
  const figure = data.figures[plot.dataset.figure];
  const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
  Plotly.newPlot(plot, figure.data, figure.layout, options);
}

for (const chip of document.querySelectorAll(".chip")) {
  const indices = (plot) => plot.data.flatMap((trace, n) => (trace.legendgroup === chip.dataset.name ? [n] : []));
  chip.hidden = !plots.some((plot) => indices(plot).length);
  chip.addEventListener("click", () => {
    const isShown = chip.getAttribute("aria-pressed") === "false";
    chip.setAttribute("aria-pressed", isShown);
    for (const plot of plots) {
      if (indices(plot).length) Plotly.restyle(plot, { visible: isShown }, indices(plot));
    }
  });
}

// ---- rollouts: filters and table ---------------------------------------------------------------

const form = document.getElementById("filters");
const body = document.querySelector("#table tbody");
const more = document.getElementById("more");
const orders = {
  high: (a, b) => b.reward - a.reward,
  low: (a, b) => a.reward - b.reward,
  long: (a, b) => b.length - a.length,
};
let found = [];

function logRatio(row, n) {
  const [large, small] = [row.large?.[n], row.small?.[n]];
  return typeof large === "number" && typeof small === "number" ? large - small : null;
}

function meanLogRatio(row) {
  const ratios = (row.texts ?? []).map((_, n) => logRatio(row, n)).filter((ratio) => ratio !== null);
  return ratios.length ? ratios.reduce((sum, ratio) => sum + ratio) / ratios.length : null;
}

function matches(row, wanted) {
  const text = wanted.text.toLowerCase();
  return (
    (!wanted.run || row.run === wanted.run) &&
    (!wanted.step || String(row.step) === wanted.step) &&
    (!wanted.right || String(row.right) === wanted.right) &&
    (!wanted.kept || String(row.kept) === wanted.kept) &&
    (wanted.lowest === "" || row.reward >= Number(wanted.lowest)) &&
    (wanted.highest === "" || row.reward <= Number(wanted.highest)) &&
    (!text || [row.prompt, row.answer, row.completion].some((part) => part.toLowerCase().includes(text)))
  );
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  found = data.rollouts.filter((row) => matches(row, wanted));
  if (wanted.sort) found.sort(orders[wanted.sort]);
  body.replaceChildren();
  document.getElementById("found").textContent = `${found.length} of ${data.rollouts.length} rollouts`;
  addRows();
}

function addRows() {
  const from = body.querySelectorAll("tr:not(.detail)").length;
  for (const row of found.slice(from, from + AT_ONCE)) body.append(tableRow(row));
  more.hidden = from + AT_ONCE >= found.length;
}

function tableRow(row) {
  const line = element("tr");
  const opener = element("button", row.prompt.trim() || "(empty)");
  opener.type = "button";
  opener.setAttribute("aria-expanded", "false");
  opener.addEventListener("click", () => toggle(line, opener, row));
  const prompt = element("td");
  prompt.append(opener);
  line.append(
    prompt,
    element("td", row.run),
    element("td", row.step, "number"),
    element("td", row.completion.slice(0, 200), "cut"),
    element("td", row.right ? "✓ right" : "✗ wrong", row.right ? "right" : "wrong"),
    element("td", number(row.reward), "number"),
    element("td", row.length, "number"),
    element("td", number(meanLogRatio(row)), "number"),
    element("td", row.kept ? "kept" : "dropped"),
  );
  return line;
}

function toggle(line, opener, row) {
  const isOpen = opener.getAttribute("aria-expanded") === "true";
  opener.setAttribute("aria-expanded", !isOpen);
  if (isOpen) line.nextElementSibling.remove();
  else line.after(detail(row));
}

function detail(row) {
  const line = element("tr", undefined, "detail");
  const cell = element("td");
  cell.colSpan = 9;
  const facts = Object.entries(row.terms).map(([name, value]) => `${name} ${number(value)}`);
  if (row.truncated) facts.push("truncated");
  cell.append(
    element("h4", "Prompt"), element("p", row.prompt, "text"),
    element("h4", "Completion"), row.texts ? tokens(row) : element("p", row.completion, "text"),
    element("h4", "Expected answer"), element("p", row.answer, "text"),
    element("h4", "Numbers"), element("p", facts.join(", ")),
  );
  line.append(cell);
  return line;
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", addRows);

for (const key of ["run", "step"]) {
  for (const value of new Set(data.rollouts.map((row) => row[key]))) form.elements[key].append(element("option", value));
}

// ---- tokens ------------------------------------------------------------------------------------

const tooltip = document.getElementById("numbers");
const hasRatios = data.rollouts.some((row) => meanLogRatio(row) !== null);
document.getElementById("scale").hidden = !hasRatios;
document.getElementById("limit").textContent = `full colour from ${data.limit} nats on (${Number(Math.exp(data.limit).toPrecision(2))} times as likely)`;

// A token with a line break in it would have no place to point at.
function visible(text) {
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

function tokens(row) {
  const box = element("p", undefined, "tokens");
  box.tabIndex = 0;
  box.setAttribute("aria-label", "Completion; arrow keys go through its tokens");
  row.texts.forEach((text, n) => {
    const token = element("span", visible(text), n < row.hint ? "hint" : "");
    const ratio = logRatio(row, n);
    if (ratio !== null) {
      token.classList.add(ratio > 0 ? "larger" : "smaller");
      token.style.setProperty("--share", `${Math.round(100 * Math.min(1, Math.abs(ratio) / data.limit))}%`);
    }
    box.append(token);
  });
  const show = (n) => {
    box.querySelector(".active")?.classList.remove("active");
    box.children[n].classList.add("active");
    showNumbers(box.children[n], row, n);
  };
  const hide = () => {
    box.querySelector(".active")?.classList.remove("active");
    tooltip.hidden = true;
  };
  box.addEventListener("mouseover", (event) => event.target !== box && show([...box.children].indexOf(event.target)));
  box.addEventListener("mouseleave", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    const now = [...box.children].indexOf(box.querySelector(".active"));
    const next = Math.max(0, Math.min(row.texts.length - 1, now + move));
    box.children[next].scrollIntoView({ block: "nearest" });
    show(next);
  });
  return box;
}

function showNumbers(token, row, n) {
  const ratio = logRatio(row, n);
  const lines = [
    ["token", `${JSON.stringify(row.texts[n])}${row.ids ? `, id ${row.ids[n]}` : ""}`],
    ["place", `${n + 1} of ${row.texts.length}${n < row.hint ? ", hint" : ""}`],
    ["log π_θ (large)", number(row.large?.[n], 4)],
    ["log π_φ (small)", number(row.small?.[n], 4)],
    ["log π_θ/π_φ", number(ratio, 4)],
    ["ratio", ratio === null ? "–" : Math.exp(ratio).toPrecision(4)],
  ];
  if (row.engine) lines.push(["log π (engine)", number(row.engine[n], 4)]);
  const table = element("table");
  for (const [name, value] of lines) {
    const line = element("tr");
    line.append(element("th", name), element("td", value));
    table.append(line);
  }
  tooltip.replaceChildren(table);
  tooltip.hidden = false;
  const at = token.getBoundingClientRect();
  const below = at.bottom + 8 + tooltip.offsetHeight < innerHeight;
  tooltip.style.top = `${below ? at.bottom + 8 : Math.max(4, at.top - 8 - tooltip.offsetHeight)}px`;
  tooltip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - tooltip.offsetWidth - 8))}px`;
}

filter();
body.querySelector("button")?.click();
