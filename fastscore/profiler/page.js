"use strict";
document.documentElement.classList.add("js");

// columns: a button in a heading sorts by the numbers in data-v, or by words
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const words = head.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = words;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.classList.contains("n")
        ? head.getAttribute("aria-sort") !== "descending"
        : head.getAttribute("aria-sort") === "ascending";
      const value = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
      };
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a), y = value(b);
        const order = typeof x === "number" ? x - y : x.localeCompare(y);
        return down ? -order : order;
      });
      body.append(...rows);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}

// the timeline: wider or narrower about the middle of what is in view
for (const figure of document.querySelectorAll("figure.zooms")) {
  const view = figure.querySelector(".view"), inner = figure.querySelector(".inner");
  const said = figure.querySelector("output");
  let scale = 1;
  const zoom = (to) => {
    const middle = (view.scrollLeft + view.clientWidth / 2) / inner.clientWidth;
    scale = Math.min(64, Math.max(1, to));
    inner.style.width = `${100 * scale}%`;
    inner.classList.toggle("close", scale >= 8);
    view.scrollLeft = middle * inner.clientWidth - view.clientWidth / 2;
    said.textContent = scale === 1 ? "whole" : `${scale} times`;
  };
  const acts = { in: () => zoom(scale * 2), out: () => zoom(scale / 2), whole: () => zoom(1) };
  for (const button of figure.querySelectorAll("button")) {
    button.addEventListener("click", acts[button.value]);
  }
  view.addEventListener("keydown", (event) => {
    const act = { "+": "in", "=": "in", "-": "out", "0": "whole" }[event.key];
    if (act && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      acts[act]();
    }
  });
}

// a box is a stop of the tab key only where there is something to scroll to
const boxes = [...document.querySelectorAll(".box")];
const stops = () => boxes.forEach((box) => {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  else box.removeAttribute("tabindex");
});
window.addEventListener("resize", stops);
stops();

// on paper nothing can be opened
const folded = [...document.querySelectorAll("details:not([open])")];
window.addEventListener("beforeprint", () => folded.forEach((d) => { d.open = true; }));
window.addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
