// Opens the view that the address names.

import { showAnswers, startAnswers } from "./answers.js";
import { $, get, problem } from "./dom.js";
import { showLatent, step } from "./latent.js";
import { showLatents, startLatents } from "./latents.js";
import { showPrompt, startPrompt, useTable } from "./prompt.js";
import { address, go, start, state } from "./state.js";

const VIEWS = { prompt: () => { showPrompt(); showAnswers(); }, latents: showLatents, latent: showLatent };

function render() {
  const view = state.view in VIEWS ? state.view : "prompt";
  for (const name of Object.keys(VIEWS)) $(name).hidden = name !== view;
  $("to-prompt").href = address({ view: "prompt" });
  $("to-latents").href = address({ view: "latents" });
  for (const [id, isHere] of [["to-prompt", view === "prompt"], ["to-latents", view !== "prompt"]]) {
    if (isHere) $(id).setAttribute("aria-current", "page");
    else $(id).removeAttribute("aria-current");
  }
  $("headline").hidden = view !== "prompt";
  document.title = view === "latent" ? `latent ${state.latent} · diffing explore` : "diffing explore";
  VIEWS[view]();
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
  const [run, table] = await Promise.all([get("api/run"), get("api/table")]);
  $("headline").textContent = run.headline;
  useTable(table);
  startLatents(table, run.verdicts);
  startPrompt();
  startAnswers();
  $("copy").onclick = copy;
  if (!run.has_template) $("plain").closest("label").hidden = true;
  addEventListener("keydown", keys);
  start(render);
} catch (error) {
  problem(error);
}
