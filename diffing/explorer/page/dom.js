// Elements, numbers and requests. Texts of models and documents go into the page as text nodes only.

export const $ = (id) => document.getElementById(id);

// An element with properties and children; a string becomes a text node.
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "vars") for (const [key, entry] of Object.entries(value)) element.style.setProperty(key, entry);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "class") element.className = value;
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(digits)).toString();
}

export const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;

const VERDICTS = ["tuned-specific", "base-specific", "rotated", "shrunk", "decoupled", "shared", "undetermined", "dead"];

// A verdict in its colour, or where something fires mostly.
export function tag(word) {
  return h("span", { class: VERDICTS.includes(word) ? `verdict ${word}` : "verdict" }, word);
}

const GONE = "The server does not answer. Is diffing explore still running?";

async function asked(path, body, signal) {
  const request = body === undefined ? { signal } : { signal, method: "POST", body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(GONE);
  }
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `error ${response.status}`);
  return response;
}

export async function get(path, body) {
  return (await asked(path, body)).json();
}

// Calls `piece` with each piece of an answer as it comes.
export async function stream(path, body, signal, piece) {
  const reader = (await asked(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(GONE);
    }
    if (part.done) throw new Error("The answer broke off.");
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const said = JSON.parse(event.slice("data: ".length));
      if (said.error !== undefined) throw new Error(said.error);
      if (said.end) return;
      piece(said.piece);
    }
  }
}

// One line where everybody sees it; null takes it away.
export function problem(error) {
  $("problem").hidden = error === null;
  $("problem").textContent = error === null ? "" : error.message;
}
