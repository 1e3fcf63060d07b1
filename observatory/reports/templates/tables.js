// The address: #PLACE?model=..&sort.TABLE=COLUMN.ORDER holds what is chosen and how tables are sorted.
const address = (() => {
  "use strict";
  const read = () => {
    const [place, query] = location.hash.slice(1).split("?");
    return { place, kept: query === undefined ? null : new URLSearchParams(query) };
  };
  let { place, kept } = read();
  kept ??= new URLSearchParams();
  const write = () => {
    const query = kept.toString();
    history.replaceState(null, "", `#${place}${query && `?${query}`}`);
  };
  const set = (name, value) => {
    if (value) kept.set(name, value);
    else kept.delete(name);
    write();
  };
  return {
    get: (name) => kept.get(name) ?? "",
    set,
    sort: (table, order) => set(`sort.${table}`, order),
    sorted: (table) => kept.get(`sort.${table}`),
    // Links of the page name a place alone: what was chosen stays.
    follow: () => {
      const next = read();
      place = next.place;
      kept = next.kept ?? kept;
      write();
      return document.getElementById(place);
    },
    place: () => document.getElementById(place),
  };
})();

// Tables: a click on a heading sorts the rows; a table can be copied, or saved as CSV, with all its columns.
const equipTable = (() => {
  "use strict";
  const MISSING = ["n/a", "–", ""];
  const SCALE = { "µs": 1e-6, ms: 1e-3, "µJ": 1e-6, mJ: 1e-3, kJ: 1e3, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };

  // The value of a cell, and its smaller second line.
  const contents = (cell) => {
    const detail = cell.querySelector("small")?.textContent ?? "";
    const whole = cell.textContent.trim();
    const value = whole.slice(0, whole.length - detail.length).trim();
    return { value: value.replaceAll("\u202f", "").replaceAll("\u2212", "-"), detail: detail.trim() };
  };

  // The number that a cell begins with, whatever unit it is written in; null where there is none.
  const numberIn = (cell) => {
    const match = /^([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([^\s\d]*)/i.exec(contents(cell).value);
    return match ? Number(match[1]) * (SCALE[match[2]] ?? 1) : null;
  };

  // A cell as text; one that a spreadsheet would take for a formula gets an apostrophe.
  const textOf = (cell) => {
    const { value, detail } = contents(cell);
    const text = detail ? `${value} (${detail.replaceAll(/\s*\n\s*/g, "; ")})` : value;
    return /^[=+@\t-]/.test(text) && numberIn(cell) === null && !MISSING.includes(text) ? `'${text}` : text;
  };
  const rowsOf = (table, separator, quoted) =>
    [...table.rows].map((row) => [...row.cells].map((cell) => quoted(textOf(cell))).join(separator)).join("\r\n");
  const asTsv = (table) => rowsOf(table, "\t", (text) => text.replaceAll(/\s+/g, " "));
  const asCsv = (table) => rowsOf(table, ",", (text) => `"${text.replaceAll('"', '""')}"`);

  // First the order that is asked for most (the largest number, the first word), then its reverse, then the
  // order of the page. Cells without a number come last.
  const sort = (table, column, original, wanted) => {
    const heads = [...table.tHead.rows[0].cells];
    const cells = original.map((row) => row.cells[column]);
    const numeric = cells.every((cell) => numberIn(cell) !== null || MISSING.includes(contents(cell).value));
    const orders = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = wanted ?? orders[orders.indexOf(heads[column].getAttribute("aria-sort")) + 1];
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    if (order) heads[column].setAttribute("aria-sort", order);
    const sign = order === "descending" ? -1 : 1;
    const compare = (one, other) => {
      if (!numeric) {
        return sign * contents(one).value.localeCompare(contents(other).value, "en", { numeric: true });
      }
      const [first, second] = [numberIn(one), numberIn(other)];
      if (first === null || second === null) return (first === null) - (second === null);
      return sign * (first - second);
    };
    const rows = [...original];
    if (order) rows.sort((one, other) => compare(one.cells[column], other.cells[column]));
    table.tBodies[0].append(...rows);
    return order;
  };

  const button = (...content) => {
    const made = document.createElement("button");
    made.type = "button";
    made.append(...content);
    return made;
  };

  // Tables are named after the section or figure they stand in, so that an address can hold how they are sorted.
  const nameOf = (table) => {
    const place = table.closest("figure[id], section[id]");
    return `${place.id}.${[...place.querySelectorAll("table")].indexOf(table)}`;
  };

  return (table) => {
    const name = nameOf(table);
    const original = [...table.tBodies[0].rows];
    const caption = table.caption.textContent.trim();
    const save = document.createElement("a");
    const link = () => (save.href = `data:text/csv;charset=utf-8,${encodeURIComponent(asCsv(table))}`);
    link();
    save.textContent = "Save as CSV";
    save.setAttribute("aria-label", `Save as CSV: ${caption}`);
    save.download = `${caption.replaceAll(/[^\p{L}\d]+/gu, "-").slice(0, 80)}.csv`;
    for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
      if (original.length < 2) break;
      const sorter = button(...head.childNodes);
      sorter.addEventListener("click", () => {
        const order = sort(table, column, original);
        link();
        address.sort(name, order && `${column}.${order}`);
      });
      head.append(sorter);
    }
    const [column, order] = (address.sorted(name) ?? "").split(".");
    if (original.length > 1 && table.tHead.rows[0].cells[column] && ["ascending", "descending"].includes(order)) {
      sort(table, Number(column), original, order);
      link();
    }
    const copy = button("Copy");
    copy.setAttribute("aria-label", `Copy: ${caption}`);
    const tools = document.createElement("p");
    const outcome = document.createElement("span");
    tools.className = "tools";
    outcome.setAttribute("role", "status");
    copy.addEventListener("click", async () => {
      outcome.textContent = await navigator.clipboard.writeText(asTsv(table)).then(
        () => "Copied",
        () => "This browser does not allow it here: save the CSV",
      );
      setTimeout(() => outcome.replaceChildren(), 4000);
    });
    tools.append(copy, save, outcome);
    if (table.querySelector(".folded")) {
      const heads = table.tHead.rows[0].cells.length;
      const all = button(`Show all ${heads} columns`);
      all.setAttribute("aria-pressed", "false");
      all.addEventListener("click", () => {
        const shown = table.classList.toggle("all");
        all.setAttribute("aria-pressed", String(shown));
      });
      tools.prepend(all);
    }
    table.parentElement.after(tools);
  };
})();

document.querySelectorAll("main table").forEach((table) => {
  if (!table.closest(".numbers")) equipTable(table);
});
