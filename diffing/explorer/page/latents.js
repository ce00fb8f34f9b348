// The list of latents. Only the rows in sight are in the page, however many there are.

import { $, h, number, tag } from "./dom.js";
import { address, go, state } from "./state.js";

const HEIGHT = 52;
let table = null;
let sorts = {};
let words = [];
let rows = [];
let at = 0;
let shown = "";

const sorted = () => (Object.hasOwn(sorts, state.sort) ? state.sort : Object.keys(sorts)[0]);
const columnOf = (name) => (name === "number" ? table.number : table.values[name]);
const kept = () => JSON.stringify([state.sort, state.verdict, state.find]);

function select() {
  const find = state.find.trim().toLowerCase(), sign = sorts[sorted()][1];
  const column = columnOf(sorted());
  rows = table.number.map((_, row) => row).filter((row) => state.verdict === "" || table.tag[row] === state.verdict);
  if (/^\d+$/.test(find)) rows = rows.filter((row) => table.number[row] === Number(find));
  else if (find) rows = rows.filter((row) => words[row].includes(find));
  const missing = (value) => value === null || value === undefined;
  rows.sort((a, b) => missing(column[a]) - missing(column[b]) || sign * (column[a] - column[b]) || a - b);
  at = 0;
  $("count").textContent = `${number(rows.length)} of ${number(table.number.length)} ${table.form.word}s`;
}

function rankOf(row) {
  const rank = table.values.rank ? table.values.rank[row] : row + 1;
  return rank === null ? "–" : `#${rank}`;
}

const cell = (title, value) => h("span", { class: "number" }, h("small", {}, title), number(value));

function item(place) {
  const row = rows[place], latent = table.number[row], [before, peak, after] = table.text[row];
  const where = table.name[row] ? [table.name[row]] : peak === undefined ? [table.values.main_context?.[row] ?? ""] : [before.slice(-40), h("mark", {}, peak), after];
  return h("a", {
    class: place === at ? "item at" : "item", href: address({ view: "latent", latent }), vars: { top: `${place * HEIGHT}px` }, tabIndex: -1,
    role: "listitem", "aria-posinset": place + 1, "aria-setsize": rows.length,
  }, h("span", { class: "rank dim" }, rankOf(row)), h("b", {}, String(latent)), tag(table.tag[row]),
  h("span", { class: "where" }, table.label[row] ? h("small", {}, table.label[row]) : null, ...where),
  ...Object.entries(table.form.cells).filter(([name]) => table.values[name]).map(([name, title]) => cell(title, table.values[name][row])));
}

function draw() {
  const list = $("list"), spacer = list.firstElementChild;
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 8), last = Math.min(rows.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 8);
  spacer.style.height = `${rows.length * HEIGHT}px`;
  spacer.replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, i) => item(first + i)));
}

function move(to) {
  at = Math.max(0, Math.min(rows.length - 1, to));
  const list = $("list");
  if (at * HEIGHT < list.scrollTop) list.scrollTop = at * HEIGHT;
  if ((at + 1) * HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * HEIGHT - list.clientHeight;
  draw();
}

export function showLatents() {
  if (shown !== kept()) {
    shown = kept();
    select();
    $("list").scrollTop = 0;
  }
  $("sort").value = sorted();
  $("verdict").value = state.verdict;
  if (document.activeElement !== $("find")) $("find").value = state.find;
  draw();
}

// The latent `step` places further in the list as it is sorted and filtered.
export function neighbour(latent, step) {
  if (shown !== kept()) { shown = kept(); select(); }
  const place = rows.findIndex((row) => table.number[row] === latent);
  const row = rows[place < 0 ? 0 : place + step];
  return row === undefined ? null : table.number[row];
}

export function useListing(columns) {
  [table, shown, at] = [columns, "", 0];
  words = table.number.map((n, row) => [n, table.label[row], table.name[row] ?? "", table.tag[row], ...table.text[row], table.values.main_context?.[row] ?? ""].join(" ").toLowerCase());
  sorts = Object.fromEntries(Object.entries(table.form.sorts).filter(([name]) => columnOf(name)));
  $("sort").replaceChildren(...Object.entries(sorts).map(([value, [word]]) => h("option", { value }, word)));
  $("tag").textContent = table.form.tag;
  $("verdict").replaceChildren(h("option", { value: "" }, "all"), ...Object.entries(table.tags).map(([word, n]) => h("option", { value: word }, `${word} (${number(n)})`)));
}

export function startLatents() {
  $("list").append(h("div", { class: "spacer" }));
  $("list").onscroll = draw;
  $("list").onkeydown = (event) => {
    const page = Math.floor($("list").clientHeight / HEIGHT);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: rows.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); move(to); }
    if (event.key === "Enter" && rows.length) go({ view: "latent", latent: table.number[rows[at]] });
  };
  addEventListener("resize", () => { if (state.view === "latents") draw(); });
  $("find").oninput = () => go({ find: $("find").value }, true);
  $("find").onkeydown = (event) => { if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); $("list").focus(); } };
  $("sort").onchange = () => go({ sort: $("sort").value }, true);
  $("verdict").onchange = () => go({ verdict: $("verdict").value }, true);
}
