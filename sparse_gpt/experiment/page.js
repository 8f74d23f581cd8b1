// Tables sort by a click on a column's head: by data-key where there is one, else by text.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.key;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x !== undefined && y !== undefined) return (x - y) * (down ? -1 : 1);
        if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
        const order = a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        return order * (down ? -1 : 1);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
