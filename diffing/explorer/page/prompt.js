// A prompt and its tokens: coloured by KL or by latents; a token's latents and what both models expect after it.

import { $, get, h, number, percent, problem, tag } from "./dom.js";
import { address, go, state } from "./state.js";

const FIRST = 8;  // latents of a token before the others are asked for
let read = { key: "", tokens: [] };
let table = null;
let rowOf = new Map();

let shown = "";

export function useTable(columns, name) {
  [table, shown] = [columns, name];
  rowOf = new Map(columns.number.map((latent, row) => [latent, row]));
  const { word, bars } = columns.form, option = (value) => $("colour").querySelector(`[value=${value}]`);
  option("strongest").textContent = `strongest ${word}`;
  option("latent").textContent = `one ${word}`;
  option("specific").hidden = !bars.includes("differs") || columns.form.tag !== "verdict";
}

export const form = () => table.form;
export const showing = () => shown;
export const row = (latent) => { const at = rowOf.get(latent); return { label: table.label[at], tag: table.tag[at] }; };
export const rowFor = (latent) => rowOf.get(latent);
export const plainPrompt = () => (state.plain ? state.chat[0]?.content ?? "" : state.chat);
const keyOf = () => JSON.stringify([shown, state.chat, state.plain]);

// ------------------------------------------------------------------------------------------------------ composer

function messageFields(message) {
  const role = h("select", { "aria-label": "role" }, ...["user", "assistant", "system"].map((word) => h("option", {}, word)));
  role.value = message.role;
  const text = h("textarea", { value: message.content, rows: 2, placeholder: "Say something", "aria-label": "message" });
  const remove = h("button", { type: "button", title: "Remove this message" }, "×");
  const item = h("li", {}, ...(state.plain ? [text] : [role, text, remove]));
  remove.onclick = () => { if ($("messages").children.length > 1) item.remove(); };
  return item;
}

function composed() {
  return [...$("messages").children].map((item) => ({
    role: item.querySelector("select")?.value ?? "user", content: item.querySelector("textarea").value,
  }));
}

function fillComposer() {
  const chat = state.chat.length ? state.chat : [{ role: "user", content: "" }];
  $("messages").classList.toggle("plain", state.plain);
  $("messages").replaceChildren(...(state.plain ? chat.slice(0, 1) : chat).map(messageFields));
  $("plain").checked = state.plain;
  $("add-message").hidden = state.plain;
}

// ------------------------------------------------------------------------------------------------------ tokens

const isSpecific = (latent) => table.tag[rowOf.get(latent)] === "tuned-specific";

// Strength of each token from 0 to 1, and what 1 is.
function shades() {
  const dark = (latent) => table.form.darkest * (table.unit[rowOf.get(latent)] || 1);
  const share = (token, i) => Math.abs(token.activations[i]) / dark(token.latents[i]);
  const darkest = `${table.form.darkest === 1 ? "" : `${table.form.darkest} × `}${table.form.unit}`;
  const largest = (token, wanted) => Math.max(0, ...token.latents.map((latent, i) => (wanted(latent) ? share(token, i) : 0)));
  if (state.colour === "kl") {
    const top = Math.max(1e-9, ...read.tokens.map((token) => token.kl));
    return [read.tokens.map((token) => token.kl / top), `darkest: ${number(top)} nats, KL(tuned ‖ base) of what follows the token`];
  }
  if (state.colour === "latent") {
    const words = state.shade === null ? "give its number" : `darkest: ${darkest}, ${number(dark(state.shade))}`;
    return [read.tokens.map((token) => largest(token, (latent) => latent === state.shade)), words];
  }
  const wanted = state.colour === "specific" ? isSpecific : () => true;
  return [read.tokens.map((token) => largest(token, wanted)), `darkest: a ${table.form.word} at ${darkest}`];
}

function showTokens() {
  const [strengths, legend] = shades();
  const shade = state.colour === "kl" ? "var(--kl)" : "var(--hot)";
  const spans = read.tokens.map((token, i) => h("span", {
    role: "option", tabIndex: i === (state.token ?? 0) ? 0 : -1, data: { token: i }, class: token.is_scored ? "" : "unread",
    "aria-selected": String(i === state.token), vars: { "--shade": shade, "--a": (0.75 * Math.min(1, strengths[i])).toFixed(3) },
    title: `KL ${number(token.kl)} nats · ${token.latents.length} ${table.form.word}s`,
  }, token.text || "·", token.text.includes("↵") ? "\n" : null));
  $("tokens").replaceChildren(...spans);
  $("legend").textContent = read.tokens.length ? legend : "";
  $("colour").value = state.colour;
  $("colour-number").hidden = state.colour !== "latent";
  if (document.activeElement !== $("colour-latent")) $("colour-latent").value = state.shade ?? "";
}

function contextOf(row) {
  if (table.name[row]) return table.name[row];
  return table.text[row].length ? table.text[row].join("") : `mostly in ${table.values.main_context?.[row] ?? table.tag[row]}`;
}

const BARS = "Length of what it writes in each model, and of the difference; units of what it is added to";

function firing(token, i, longest) {
  const latent = token.latents[i], row = rowOf.get(latent), value = token.activations[i];
  const bars = table.form.bars.flatMap((name, bar) => {
    const length = token.lengths[i][bar];
    return [h("span", {}, name), h("div", { class: "bar", vars: { "--c": `var(--${name})`, "--w": (length / longest).toFixed(4) } }), h("span", {}, number(length, 2))];
  });
  const share = value / (table.unit[row] || value);
  return h("li", {},
    h("div", { class: "row" },
      h("a", { href: address({ view: "latent", latent }) }, `${table.form.word} ${latent}`), tag(table.tag[row]),
      h("span", { class: "dim", title: `activation, and as a share of ${table.form.unit}` }, `${number(value)} (${percent(share)})`),
      h("button", { type: "button", title: `Colour the prompt by this ${table.form.word}`, onclick: () => go({ colour: "latent", shade: latent }) }, "colour")),
    table.label[row] ? h("span", { class: "context" }, table.label[row]) : null, h("span", { class: "context" }, contextOf(row)),
    h("div", { class: "bars", title: BARS }, ...bars));
}

const guesses = (model, listed) => h("div", {}, h("h3", {}, `${model} expects`),
  h("ol", {}, ...listed.map(([text, p]) => h("li", {}, h("code", {}, text), h("span", {}, percent(p))))));

function showToken() {
  const token = read.tokens[state.token];
  if (token === undefined) {
    $("token").replaceChildren(h("p", { class: "dim" }, read.tokens.length ? `Click a token: its ${table.form.word}s, and what the models expect after it.` : "Write a prompt and read it: each token is then coloured by how far the two models differ there."));
    return;
  }
  const longest = Math.max(1e-9, ...token.lengths.flat()), { word, models, bars } = table.form;
  const list = h("ul", { class: "firing" });
  const more = h("button", { type: "button" }, `All ${token.latents.length} ${word}s`);
  const fill = (n) => { list.replaceChildren(...token.latents.slice(0, n).map((_, i) => firing(token, i, longest))); more.hidden = n >= token.latents.length; };
  more.onclick = () => fill(token.latents.length);
  fill(FIRST);
  const fired = `${token.latents.length} ${word}s ${table.form.tag.startsWith("important") ? "are needed" : "fire"}, those first that write most${bars.includes("differs") ? " differently in the two models" : ""}; in brackets the share of ${table.form.unit}`;
  $("token").replaceChildren(
    h("h3", {}, `Token ${state.token} `, h("code", {}, token.text)),
    h("p", { class: "dim" }, `KL of what follows: ${number(token.kl)} nats. ${token.is_scored ? fired : "The models read this token, the dictionary does not"}.`),
    h("div", { class: "guesses" }, ...models.map((model) => guesses(model, token.expects[model]))), list, more);
}

async function readPrompt() {
  const key = keyOf();
  read = { key, tokens: [] };
  $("tokens").replaceChildren();
  if (!state.chat.some((message) => message.content)) return;
  $("reading").textContent = "reading …";
  const started = performance.now();
  try {
    const { tokens } = await get("api/tokens", { prompt: plainPrompt(), is_plain: state.plain, show: shown });
    if (keyOf() !== key) return;
    read = { key, tokens };
    problem(null);
    $("reading").textContent = `${tokens.length} tokens in ${((performance.now() - started) / 1000).toFixed(2)} s`;
  } catch (error) {
    $("reading").textContent = "";
    problem(error);
  }
}

export async function showPrompt() {
  if (read.key !== keyOf()) {
    fillComposer();
    await readPrompt();
  }
  showTokens();
  showToken();
}

function select(token) {
  if (!read.tokens.length) return;
  go({ token: Math.max(0, Math.min(read.tokens.length - 1, token)) }, true);
  $("tokens").querySelector("[aria-selected=true]")?.focus();
}

export function startPrompt() {
  fillComposer();
  const submit = () => go({ chat: composed(), plain: $("plain").checked, token: null, answers: false });
  $("composer").onsubmit = (event) => { event.preventDefault(); submit(); };
  $("composer").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(); };
  $("add-message").onclick = () => {
    const last = composed().at(-1)?.role;
    $("messages").append(messageFields({ role: last === "user" ? "assistant" : "user", content: "" }));
    $("messages").lastElementChild.querySelector("textarea").focus();
  };
  $("plain").onchange = () => go({ chat: composed(), plain: $("plain").checked, token: null });
  $("colour").onchange = () => go({ colour: $("colour").value });
  $("colour-latent").onchange = () => { if (rowOf.has($("colour-latent").valueAsNumber)) go({ shade: $("colour-latent").valueAsNumber }); };
  $("tokens").onclick = (event) => { const at = event.target.closest("[data-token]"); if (at) select(Number(at.dataset.token)); };
  $("tokens").onkeydown = (event) => {
    const at = state.token ?? -1, last = read.tokens.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, Enter: Math.max(0, at), " ": Math.max(0, at) }[event.key];
    if (to !== undefined) { event.preventDefault(); select(to); }
  };
}
