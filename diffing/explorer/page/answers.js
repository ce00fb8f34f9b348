// Answers side by side: base, tuned, and one of them with latents changed or the difference amplified.

import { $, h, problem, stream } from "./dom.js";
import { address, go, state } from "./state.js";
import { form, plainPrompt, rowFor, showing } from "./prompt.js";

const WORDS = { steer: "steered", ablate: "ablated", exchange: "as the other model has it" };
const COLOURS = { base: "var(--base)", tuned: "var(--tuned)", adapted: "var(--adapted)" };
let running = null;
let answered = "";

function setChange(i, patch) {
  const changes = structuredClone(state.changes);
  Object.assign(changes[i], patch);
  go({ changes }, true);
}

function changeFields(change, i) {
  const latent = h("input", { type: "number", min: 0, value: change.latent ?? "", "aria-label": form().word, data: { field: `latent${i}` } });
  latent.onchange = () => { if (rowFor(latent.valueAsNumber) !== undefined) setChange(i, { latent: latent.valueAsNumber }); };
  const what = h("select", { "aria-label": "what is done to it" }, ...form().actions.map((value) => h("option", { value }, WORDS[value])));
  what.value = change.do;
  what.onchange = () => setChange(i, { do: what.value });
  const strength = h("input", { type: "range", min: -4, max: 8, step: 0.25, value: change.strength ?? 1, "aria-label": "strength", data: { field: `strength${i}` } });
  const shown = h("output", {}, `× ${change.strength ?? 1}`);
  strength.oninput = () => { shown.textContent = `× ${strength.value}`; };
  strength.onchange = () => setChange(i, { strength: strength.valueAsNumber });
  const remove = h("button", { type: "button", title: "Take this change away" }, "×");
  remove.onclick = () => go({ changes: state.changes.toSpliced(i, 1) }, true);
  return h("div", { class: "change" }, h("label", {}, `${form().word} `, latent), what, ...(change.do === "steer" ? [strength, shown] : []),
    change.latent === null ? null : h("a", { href: address({ view: "latent", latent: change.latent }) }, "page"), remove);
}

const model = () => (form().models.includes(state.model) ? state.model : form().models.at(-1));

export function showChanges() {
  const focused = document.activeElement?.dataset.field;
  $("changes").replaceChildren(...state.changes.map(changeFields));
  if (focused) document.querySelector(`[data-field=${focused}]`)?.focus();
  $("amplify").value = state.amplify;
  $("amplify-value").textContent = `× ${state.amplify}`;
  $("model").replaceChildren(...form().models.map((name) => h("option", {}, name)));
  $("model").value = model();
  $("add-change").textContent = `Change a ${form().word}`;
  if (document.activeElement !== $("length")) $("length").value = state.length;
}

// What the third column asks for, and its heading; null where nothing is changed.
function changed() {
  const asked = { model: model(), amplify: state.amplify, steer: {}, ablate: [], exchange: [] };
  const words = [];
  for (const { latent, do: what, strength } of state.changes) {
    if (latent === null) continue;
    if (what === "steer") asked.steer[latent] = strength ?? 1;
    else asked[what].push(latent);
    words.push(`${form().word} ${latent} ${WORDS[what]}${what === "steer" ? ` × ${strength ?? 1}` : ""}`);
  }
  if (state.amplify) words.push(`amplified × ${state.amplify}`);
  return words.length ? { asked, title: `${model()}, ${words.join(", ")}` } : null;
}

async function column(title, colour, asked, signal) {
  const text = h("pre"), note = h("p", { class: "dim", role: "status" }, "waiting …");
  const card = h("article", { class: "running", vars: { "--c": colour } }, h("h3", {}, title), text, note);
  $("answers").append(card);
  const body = { prompt: plainPrompt(), is_plain: state.plain, show: showing(), max_new_tokens: state.length, ...asked };
  const started = performance.now();
  try {
    await stream("api/answer", body, signal, (piece) => { text.append(piece); note.textContent = ""; });
    note.textContent = `${text.textContent === "" ? "(an empty answer) " : ""}${((performance.now() - started) / 1000).toFixed(2)} s`;
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  card.classList.remove("running");
}

const wanted = () => JSON.stringify([showing(), state.chat, state.plain, state.changes, state.amplify, state.model, state.length]);

async function run() {
  running?.abort();
  const own = new AbortController();
  running = own;
  answered = wanted();
  problem(null);
  $("answers").replaceChildren();
  $("stop").disabled = false;
  const third = changed();
  const columns = form().models.map((name) => column(name, COLOURS[name], { model: name }, own.signal));
  if (third !== null) columns.push(column(third.title, "rgb(var(--kl))", third.asked, own.signal));
  await Promise.all(columns);
  if (running === own) $("stop").disabled = true;
}

// An address that was copied with answers has them again.
export function showAnswers() {
  showChanges();
  if (!state.answers) {
    running?.abort();
    answered = "";
    $("answers").replaceChildren();
  } else if (answered === "") run();
}

export function startAnswers() {
  $("answer").onclick = () => {
    if (!state.chat.some((message) => message.content)) { problem(new Error("Read a prompt first.")); return; }
    answered = "";
    go({ answers: true }, state.answers);
  };
  $("stop").onclick = () => running?.abort();
  $("add-change").onclick = () => go({ changes: [...state.changes, { latent: state.latent, do: form().actions[0], strength: 1 }] }, true);
  $("amplify").oninput = () => { $("amplify-value").textContent = `× ${$("amplify").value}`; };
  $("amplify").onchange = () => go({ amplify: $("amplify").valueAsNumber }, true);
  $("model").onchange = () => go({ model: $("model").value }, true);
  $("length").onchange = () => { if ($("length").valueAsNumber >= 1) go({ length: $("length").valueAsNumber }, true); };
}
