// What the page shows is in its address, after the #, so that every view can be copied and opened again.

const DEFAULTS = {
  view: "prompt", show: "", latent: null, chat: [], plain: false, token: null, colour: "kl", shade: null, changes: [],
  amplify: 0, model: "", length: 64, answers: false, sort: "", verdict: "", find: "",
};

export let state = { ...DEFAULTS };
let render = () => {};

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const isKind = (value, like) => Array.isArray(value) === Array.isArray(like) && typeof value === typeof like;

function read(hash) {
  const next = structuredClone(DEFAULTS);
  for (const [name, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!Object.hasOwn(DEFAULTS, name)) continue;
    let value = text;
    try { value = JSON.parse(text); } catch { /* words stand without quotes */ }
    const like = DEFAULTS[name] ?? 0;
    if (typeof like === "string") next[name] = text;
    else if (isKind(value, like)) next[name] = value;
  }
  const isMessage = (m) => m && typeof m.role === "string" && typeof m.content === "string";
  next.chat = next.chat.filter(isMessage);
  next.changes = next.changes.filter((c) => c && ["steer", "ablate", "exchange"].includes(c.do));
  return next;
}

// The address of a state that differs from the present one by `patch`.
export function address(patch = {}) {
  const next = { ...state, ...patch }, words = new URLSearchParams();
  for (const [name, value] of Object.entries(next)) {
    if (!same(value, DEFAULTS[name])) words.set(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  return `#${words}`;
}

// Changes the state; `quietly` leaves no step for the back button.
export function go(patch, quietly = false) {
  const next = address(patch);
  if (next !== location.hash) history[quietly ? "replaceState" : "pushState"](null, "", next);
  state = read(next);
  render();
}

export function start(shown) {
  render = shown;
  const follow = () => { state = read(location.hash); render(); };
  addEventListener("popstate", follow);
  follow();
}
