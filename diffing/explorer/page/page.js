// Opens the view that the address names.

import { showAnswers, startAnswers } from "./answers.js";
import { $, get, h, problem } from "./dom.js";
import { showLatent, step } from "./latent.js";
import { showLatents, startLatents, useListing } from "./latents.js";
import { form, showPrompt, startPrompt, useTable } from "./prompt.js";
import { address, go, start, state } from "./state.js";

const VIEWS = { prompt: () => { showPrompt(); showAnswers(); }, latents: showLatents, latent: showLatent };

const tables = new Map();
let run = null;
let used = "";

const wanted = () => (run.kinds.some(({ name }) => name === state.show) ? state.show : run.kinds[0].name);

// Fetches what is to be looked at, and shows it if it still is.
async function open(name) {
  $("loading").textContent = "opening …";
  try {
    if (!tables.has(name)) tables.set(name, await get(`api/table?show=${encodeURIComponent(name)}`));
    if (wanted() !== name) return;
    const isFirst = used === "";
    used = name;
    useTable(tables.get(name), name);
    useListing(tables.get(name));
    const { headline, form: { word } } = tables.get(name);
    $("headline").textContent = headline;
    $("to-latents").textContent = `${word[0].toUpperCase()}${word.slice(1)}s`;
    render();
    if (isFirst && state.view === "prompt" && !state.chat.length) document.querySelector("#messages textarea")?.focus();
  } catch (error) {
    problem(error);
  } finally {
    $("loading").textContent = "";
  }
}

function render() {
  $("show").value = wanted();
  if (wanted() !== used) { open(wanted()); return; }
  const view = state.view in VIEWS ? state.view : "prompt";
  for (const name of Object.keys(VIEWS)) $(name).hidden = name !== view;
  $("to-prompt").href = address({ view: "prompt" });
  $("to-latents").href = address({ view: "latents" });
  for (const [id, isHere] of [["to-prompt", view === "prompt"], ["to-latents", view !== "prompt"]]) {
    if (isHere) $(id).setAttribute("aria-current", "page");
    else $(id).removeAttribute("aria-current");
  }
  $("headline").hidden = view !== "prompt";
  document.title = view === "latent" ? `${form().word} ${state.latent} · diffing explore` : "diffing explore";
  VIEWS[view]();
}

// Another kind has other numbers, so what was chosen by number is forgotten.
function switchTo(show) {
  const forgotten = { latent: null, token: null, shade: null, changes: [], model: "", answers: false, sort: "", verdict: "", find: "", colour: "kl" };
  go({ ...forgotten, show: show === run.kinds[0].name ? "" : show, view: state.view === "latent" ? "latents" : state.view });
}

async function copy() {
  try {
    await navigator.clipboard.writeText(location.href);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Copy it from the address bar";
  }
  setTimeout(() => { $("copy").textContent = "Copy address"; }, 2000);
}

function keys(event) {
  if (event.key === "Escape" && state.view !== "prompt") go({ view: "prompt" });
  const isTyping = event.target.closest?.("input, textarea, select") !== null;
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); go({ view: "latents" }); $("find").focus(); }
  if (state.view === "latent" && event.key === "j") step(1);
  if (state.view === "latent" && event.key === "k") step(-1);
}

try {
  run = await get("api/run");
  $("show").append(...run.kinds.map(({ name, title }) => h("option", { value: name }, title)));
  $("show").closest("label").hidden = run.kinds.length < 2;
  $("show").onchange = () => switchTo($("show").value);
  startLatents();
  startPrompt();
  startAnswers();
  $("copy").onclick = copy;
  if (!run.has_template) $("plain").closest("label").hidden = true;
  addEventListener("keydown", keys);
  start(render);
} catch (error) {
  problem(error);
}
