"use strict";
// Figures: drawn once, and again in the other colours when the reader's theme changes.
const drawn = (async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (byte) => byte.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const plotly = document.createElement("script");
  plotly.textContent = await new Response(unpacked).text();
  document.head.append(plotly);
  const specs = JSON.parse(document.getElementById("figures").textContent);
  // Named buttons only: among the defaults is one that sends the figure's data to a server.
  const buttons = [["zoom2d", "pan2d", "resetScale2d"]];
  const config = { displaylogo: false, responsive: true, showSendToCloud: false, showTips: false, modeBarButtons: buttons };
  function draw() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    for (const element of document.querySelectorAll("[data-figure]")) {
      const { data, layout } = structuredClone(specs[element.dataset.figure]);
      layout.font = { color: read("--dim"), family: getComputedStyle(document.body).fontFamily, size: 12 };
      layout.hoverlabel = { bgcolor: read("--card"), bordercolor: read("--line"), font: { color: read("--ink") } };
      layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: read("--faint"), activecolor: read("--ink") };
      // Curves and histograms are read as they stand; only the scatter of latents is worth a zoom.
      Plotly.react(element, data, layout, { ...config, displayModeBar: element.dataset.figure === "nu" ? "hover" : false });
    }
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();

// Table: sort by a heading, filter by text and verdict, follow a row to its examples.
(() => {
  const table = document.getElementById("table");
  if (table === null) return;
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const filter = document.getElementById("filter"), verdict = document.getElementById("verdict");
  const examples = (row) => document.getElementById(`latent-${row.id.slice(4)}`)?.textContent ?? "";
  const words = rows.map((row) => `${row.textContent} ${examples(row)}`.toLowerCase());

  function key(row, column, kind) {
    const text = row.cells[column].textContent.trim();
    if (text === "–" || text === "") return null;
    if (kind === "text") return text.toLowerCase();
    const value = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(value) ? null : value;
  }

  function sort(column) {
    const head = heads[column];
    const descending = head.getAttribute("aria-sort") === "ascending";
    const sign = descending ? -1 : 1;
    const keyed = rows.map((row) => [key(row, column, head.dataset.kind), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return a < b ? -sign : a > b ? sign : 0;
    });
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...keyed.map(([, row]) => row));
  }

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    let n = 0;
    const isNumber = /^\d+$/.test(wanted);
    rows.forEach((row, i) => {
      const fits = isNumber ? row.id === `row-${wanted}` : words[i].includes(wanted);
      row.hidden = !fits || (verdict.value !== "" && row.dataset.verdict !== verdict.value);
      n += row.hidden ? 0 : 1;
    });
    document.getElementById("shown").textContent =
      n === rows.length ? `${n.toLocaleString("en")} rows` : `${n.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
  }

  function open() {
    const target = document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
    }
  }

  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(column)));
  filter.addEventListener("input", show);
  verdict.addEventListener("change", show);
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr.link");
    if (!row || !getSelection().isCollapsed) return;
    if (!event.target.closest("a")) location.hash = `latent-${row.id.slice(4)}`;
    open(); // the hash may be the old one, so that no event follows
  });
  drawn.then(() => document.getElementById("figure-nu").on("plotly_click", ({ points }) => {
    const number = /^latent (\d+)/.exec(points[0].text ?? "");
    if (number) location.hash = document.getElementById(`latent-${number[1]}`) ? `latent-${number[1]}` : `row-${number[1]}`;
  }));
  addEventListener("hashchange", open);
  open();
})();
