for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const numbers = rows.every(row => row.cells[column].dataset.value !== undefined);
      const was = head.getAttribute("aria-sort");
      const up = was ? was === "descending" : !numbers;
      const order = (a, b) => numbers
        ? a.cells[column].dataset.value - b.cells[column].dataset.value
        : a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      rows.sort((a, b) => up ? order(a, b) : order(b, a));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}
