for (const head of document.querySelectorAll("th[data-sort]")) {
  // Not a <button>: browsers do not paint those where a printed page repeats the head of a table.
  const button = document.createElement("span");
  button.tabIndex = 0;
  button.setAttribute("role", "button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); button.click(); } });
  button.addEventListener("click", () => {
    const table = head.closest("table"), up = head.getAttribute("aria-sort") === "descending" || !(head.hasAttribute("aria-sort") || head.classList.contains("n"));
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const cell = row.cells[head.cellIndex], text = (cell.dataset.value ?? cell.textContent).trim();
      return text === "–" || text === "nan" || text === "" ? null : isNaN(text) ? text : Number(text);
    };
    const rows = [...table.tBodies[0].rows].map(row => [value(row), row]);
    rows.sort(([a], [b]) => a === null ? (b === null ? 0 : 1) : b === null ? -1 : (typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b)) : a - b) * (up ? 1 : -1));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  });
}
const folds = [...document.querySelectorAll("details")];
for (const button of document.querySelectorAll("[data-folds]")) {
  button.hidden = false;
  button.addEventListener("click", () => { for (const fold of folds) fold.open = button.dataset.folds === "open"; });
}
const reveal = () => { for (let part = document.getElementById(location.hash.slice(1)); part; part = part.parentElement) if (part.localName === "details") part.open = true; };
addEventListener("hashchange", reveal);
reveal();
let folded = [];
addEventListener("beforeprint", () => { folded = folds.filter(fold => !fold.open); for (const fold of folded) fold.open = true; });
addEventListener("afterprint", () => { for (const fold of folded) fold.open = false; });
