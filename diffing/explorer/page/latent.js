// The page of one latent: why it has its verdict, where it fires, what it writes, what it causes.

import { $, get, h, number, percent, problem, svg, tag } from "./dom.js";
import { address, go, state } from "./state.js";
import { neighbour } from "./latents.js";
import { form, row, showing } from "./prompt.js";

const BOUNDS = { min_active: "alive from", base_only: "base-only to", base_leaning: "base side to", tuned_leaning: "tuned side from",
  tuned_only: "tuned-only from", rotated_cosine: "rotated below", nu_error: "specific below", nu_reconstruction: "specific below", partner_correlation: "decoupled from" };
const DIRECTIONS = { base_to_tuned: "base into tuned", tuned_to_base: "tuned into base" };
const pages = new Map();

const heading = (text, ...parts) => (parts.length ? [h("h3", {}, text), ...parts] : []);
const rows = (entries) => h("table", {}, ...entries.map((cells) => h("tr", {}, ...cells.map((cell, i) => h(i ? "td" : "th", { class: i === 1 ? "value" : "" }, cell)))));
const plusMinus = (value, stderr) => number(value) + (stderr === null || stderr === undefined ? "" : ` ± ${number(stderr, 2)}`);

function example(shown, top) {
  const spans = shown.tokens.map((token, i) => h("span", {
    class: i === shown.peak ? "peak" : "", title: shown.value === undefined ? "" : number(shown.values[i]), vars: { "--a": (shown.values[i] > 0 ? Math.max(0.05, 0.75 * shown.values[i] / top) : 0).toFixed(3) },
  }, token));
  const source = [shown.group, shown.document === undefined ? null : `document ${shown.document}, token ${shown.position}`, shown.value === undefined ? null : `activation ${number(shown.value)}`].filter(Boolean).join(" · ");
  return h("div", { class: "example tokens" }, ...spans, h("span", { class: "dim" }, source));
}

function bars(values, label, ends) {
  const [width, height, foot] = [560, 130, 18], top = Math.max(...values, 1e-12), step = width / values.length;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height + foot}`, role: "img", "aria-label": label });
  values.forEach((value, i) => {
    const tall = value > 0 ? Math.max(1, (height - 14) * value / top) : 0;
    const bar = svg("rect", { x: (i * step + 1).toFixed(1), y: (height - tall).toFixed(1), width: Math.max(1, step - 2).toFixed(1), height: tall.toFixed(1) });
    bar.append(svg("title", {}, ends.titles[i]));
    picture.append(bar);
  });
  picture.append(svg("text", { x: 0, y: height + 13 }, ends.first), svg("text", { x: width, y: height + 13, "text-anchor": "end" }, ends.last), svg("text", { x: 0, y: 10 }, ends.top));
  return picture;
}

function histogram({ counts, edges, n_active: active, n_tokens: all }) {
  const titles = counts.map((count, i) => `${number(edges[i])} to ${number(edges[i + 1])}: ${number(count)} tokens`);
  const picture = bars(counts, "Histogram of activations", { titles, first: "0", last: `activation ${number(edges.at(-1))}`, top: `${number(Math.max(...counts))} tokens` });
  return [picture, h("p", { class: "dim" }, `Above 0 on ${number(active)} of the first ${number(all)} tokens of the cache.`)];
}

function places(listed) {
  const names = listed.map(([name]) => name.replace("template_-", "").replace("template_other", "other template").replaceAll("_", " "));
  const titles = listed.map(([name, share]) => `${name}: ${percent(share)}`);
  const shares = listed.map(([, share]) => share);
  const top = shares.indexOf(Math.max(...shares));
  const picture = bars(shares, "Where around a response it fires", { titles, first: "8 tokens before a response", last: "other text", top: `${percent(shares[top])} at ${names[top]}` });
  return [picture, h("p", { class: "dim" }, "Share of its activation: template tokens before a response, other template, response tokens 1 to 9, later ones, everything else.")];
}

function why(entries) {
  return rows(entries.filter((entry) => entry.value !== null && entry.value !== undefined).map((entry) => [
    entry.name, plusMinus(entry.value, entry.stderr), Object.entries(entry.bounds).map(([name, bound]) => `${BOUNDS[name]} ${bound}`).join(", ")]));
}

function relatives(values) {
  const listed = [];
  const link = (latent) => h("a", { href: address({ latent }) }, `latent ${latent}`);
  if (Number.isInteger(values.twin)) listed.push(["twin", link(values.twin), `cosine ${number(values.twin_cosine)}, fires elsewhere by ${number(values.twin_divergence)}`]);
  if (Number.isInteger(values.partner)) listed.push(["partner", link(values.partner), `fires with it, correlation ${number(values.partner_correlation)}`]);
  return listed.length ? rows(listed) : h("p", { class: "dim" }, "No twin and no partner.");
}

function causes(sets) {
  if (!sets.length) return h("p", { class: "dim" }, "In no set of diffing causal. Run: diffing causal RUN --latents \"[this one]\"");
  return rows(sets.map((set) => [DIRECTIONS[set.direction], `${set.set} (${set.n_latents} latents)`, `${percent(set.value)} of the KL closed${set.low === null ? "" : ` (${percent(set.low)} to ${percent(set.high)})`}`]));
}

function predictors(listed) {
  const said = listed.filter((entry) => entry.beats_null).map((entry) => [entry.kind, entry.value, `balanced accuracy ${number(entry.balanced_accuracy)}`]);
  return said.length ? heading("What tells where it fires", rows(said)) : [];
}

const lens = (tokens) => h("p", {}, ...tokens.flatMap((token) => [h("code", {}, token), " "]));

const LENS = { raised: "Tokens that it makes likelier where it is needed", lowered: "Tokens that it makes less likely" };
const ACTIONS = { steer: "Steer with it", ablate: "Ablate it", exchange: "Take it from the other model" };

function tools(latent) {
  const change = (what) => go({ view: "prompt", changes: [...state.changes.filter((c) => c.latent !== latent), { latent, do: what, strength: 1 }] });
  const button = (text, onclick) => h("button", { type: "button", onclick }, text);
  return h("div", { class: "controls" },
    button("‹ previous", () => step(-1)), button("next ›", () => step(1)),
    button("Colour the prompt by it", () => go({ view: "prompt", colour: "latent", shade: latent })),
    ...form().actions.map((what) => button(ACTIONS[what], () => change(what))));
}

// What decides the verdict of a crosscoder's latent, and what it causes; nothing of other kinds.
function judged(found) {
  if (!found.verdict) return [];
  const { values } = found;
  const norms = [["in the base model", number(values.decoder_norm_base)], ["in the tuned model", number(values.decoder_norm_tuned)], ["relative (0 base only, 1 tuned only)", number(values.relative_decoder_norm)], ["cosine of the two decoders", number(values.decoder_cosine)]];
  return [
    ...heading(`Why ${found.verdict.word}`, h("p", {}, found.verdict.meaning), h("div", { class: "scroll" }, why(found.why)),
      found.beyond_null.length ? h("p", {}, `Stands out where ${found.beyond_null.join(", ")} has next to none.`) : null),
    ...heading("Norms of its decoders", rows(norms)),
    ...predictors(found.predictors),
    ...heading("Twins and partners", relatives(values)),
    ...heading("What exchanging it causes", h("div", { class: "scroll" }, causes(found.sets))),
  ];
}

function lenses(found) {
  const title = (name) => LENS[name] ?? (found.verdict ? `Tokens that its ${name} decoder writes for` : `Tokens that it writes for, by the head of the ${name} model`);
  return Object.entries(found.lens).flatMap(([name, tokens]) => heading(title(name), lens(tokens)));
}

function page(found) {
  const { values } = found, at = row(found.latent), { word } = form();
  const top = Math.max(1e-9, ...found.examples.map((shown) => Math.max(...shown.values)));
  const listed = rows(Object.entries(values).filter(([, value]) => value !== null).map(([name, value]) => [name, typeof value === "number" ? number(value, 4) : String(value)]));
  const active = `${(values.rank ?? null) === null ? "" : `Rank ${number(values.rank)}. `}Active on ${number(values.n_active)} tokens, most of it in: ${values.main_context ?? "–"}.`;
  const where = found.verdict ? active : `${at.label ? `${at.label}, ` : ""}${form().tag} ${at.tag}.`;
  const histograms = found.histogram ? [["Activations", found.histogram]] : Object.entries(found.histograms ?? {}).map(([name, of]) => [`Activations in the ${name} model`, of]);
  return [
    h("h2", {}, `${word[0].toUpperCase()}${word.slice(1)} ${found.latent} `, tag(at.tag), found.name ? ` ${found.name}` : ""),
    h("p", { class: "dim" }, where),
    tools(found.latent),
    h("div", { class: "two" },
      h("div", {},
        ...heading("Where it fires", ...(found.examples.length ? found.examples.map((shown) => example(shown, top)) : [h("p", { class: "dim" }, "Nowhere in what was looked at.")])),
        ...histograms.flatMap(([title, of]) => heading(title, ...histogram(of))),
        ...(found.places?.length ? heading("Around a response", ...places(found.places)) : [])),
      h("div", {},
        ...judged(found), ...lenses(found),
        ...(found.verdict ? [h("details", {}, h("summary", {}, "All its values"), h("div", { class: "scroll" }, listed))] : heading("Its values", h("div", { class: "scroll" }, listed))))),
  ];
}

export function step(by) {
  const latent = neighbour(state.latent, by);
  if (latent !== null) go({ latent });
}

export async function showLatent() {
  const latent = state.latent;
  if (latent === null) { go({ view: "latents" }, true); return; }
  try {
    const path = `api/latent/${encodeURIComponent(latent)}?show=${encodeURIComponent(showing())}`;
    if (!pages.has(path)) {
      $("latent").replaceChildren(h("p", { class: "dim", role: "status" }, `looking up ${form().word} ${latent} …`));
      pages.set(path, await get(path));
    }
    if (state.latent !== latent || state.view !== "latent") return;
    problem(null);
    $("latent").replaceChildren(...page(pages.get(path)));
  } catch (error) {
    if (state.latent === latent) { $("latent").replaceChildren(); problem(error); }
  }
}
