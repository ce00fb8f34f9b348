// The list of latents. Only the rows in sight are in the page, however many there are.

import { $, h, number, verdict } from "./dom.js";
import { address, go, state } from "./state.js";

const HEIGHT = 52;
const SORTS = {
  rank: ["rank", 1], latent: ["number", 1], relative_decoder_norm: ["relative norm", -1], decoder_cosine: ["decoder cosine", 1],
  nu_error: ["nu_error", 1], nu_reconstruction: ["nu_reconstruction", 1], n_active: ["tokens it fires on", -1], max_activation: ["largest activation", -1],
};
let table = null;
let words = [];
let rows = [];
let at = 0;
let shown = "";

const kept = () => JSON.stringify([state.sort, state.verdict, state.find]);

function select() {
  const find = state.find.trim().toLowerCase(), [key, sign] = [state.sort, SORTS[state.sort]?.[1] ?? 1];
  const column = table[key in SORTS ? key : "rank"];
  rows = table.latent.map((_, row) => row).filter((row) => state.verdict === "" || table.verdict[row] === state.verdict);
  if (/^\d+$/.test(find)) rows = rows.filter((row) => table.latent[row] === Number(find));
  else if (find) rows = rows.filter((row) => words[row].includes(find));
  const missing = (value) => value === null || value === undefined;
  rows.sort((a, b) => missing(column[a]) - missing(column[b]) || sign * (column[a] - column[b]) || a - b);
  at = 0;
  $("count").textContent = `${number(rows.length)} of ${number(table.latent.length)} latents`;
}

const cell = (name, value) => h("span", { class: "number" }, h("small", {}, name), number(value));

function item(place) {
  const row = rows[place], latent = table.latent[row], [before, peak, after] = table.text[row];
  const where = table.name[row] ? [table.name[row]] : peak === undefined ? [table.main_context[row] ?? ""] : [before.slice(-40), h("mark", {}, peak), after];
  return h("a", {
    class: place === at ? "item at" : "item", href: address({ view: "latent", latent }), vars: { top: `${place * HEIGHT}px` }, tabIndex: -1,
    role: "listitem", "aria-posinset": place + 1, "aria-setsize": rows.length,
  }, h("span", { class: "rank dim" }, table.rank[row] === null ? "–" : `#${table.rank[row]}`), h("b", {}, String(latent)), verdict(table.verdict[row]),
  h("span", { class: "where" }, ...where), cell("rel. norm", table.relative_decoder_norm[row]), cell("cosine", table.decoder_cosine[row]),
  cell("nu_error", table.nu_error[row]), cell("tokens", table.n_active[row]));
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
  $("sort").value = state.sort;
  $("verdict").value = state.verdict;
  if (document.activeElement !== $("find")) $("find").value = state.find;
  draw();
}

// The latent `step` places further in the list as it is sorted and filtered.
export function neighbour(latent, step) {
  if (shown !== kept()) { shown = kept(); select(); }
  const place = rows.findIndex((row) => table.latent[row] === latent);
  const row = rows[place < 0 ? 0 : place + step];
  return row === undefined ? null : table.latent[row];
}

export function startLatents(columns, verdicts) {
  table = columns;
  words = table.latent.map((latent, row) => [latent, table.name[row] ?? "", ...table.text[row], table.main_context[row] ?? ""].join(" ").toLowerCase());
  $("sort").append(...Object.entries(SORTS).map(([value, [word]]) => h("option", { value }, word)));
  $("verdict").append(...Object.entries(verdicts).filter(([, n]) => n).map(([word, n]) => h("option", { value: word }, `${word} (${number(n)})`)));
  $("list").append(h("div", { class: "spacer" }));
  $("list").onscroll = draw;
  $("list").onkeydown = (event) => {
    const page = Math.floor($("list").clientHeight / HEIGHT);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: rows.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); move(to); }
    if (event.key === "Enter" && rows.length) go({ view: "latent", latent: table.latent[rows[at]] });
  };
  addEventListener("resize", () => { if (state.view === "latents") draw(); });
  $("find").oninput = () => go({ find: $("find").value }, true);
  $("find").onkeydown = (event) => { if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); $("list").focus(); } };
  $("sort").onchange = () => go({ sort: $("sort").value }, true);
  $("verdict").onchange = () => go({ verdict: $("verdict").value }, true);
}
