// Swaps the variants of figures, says what a mark shows, saves pictures, and marks what is being read.
(() => {
  "use strict";
  const unpack = async (script) => {
    const bytes = Uint8Array.from(atob(script.textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const unpacked = new Map(); // figure element -> promise of its variants

  const choose = async (figure, index) => {
    const script = figure.querySelector("script.variants");
    if (!unpacked.has(figure)) unpacked.set(figure, unpack(script));
    figure.dataset.shown = index;
    const variant = (await unpacked.get(figure))[index];
    if (Number(figure.dataset.shown) !== index) return; // chosen anew meanwhile
    figure.querySelector(".wide").innerHTML = variant.wide;
    figure.querySelector(".small").innerHTML = variant.small;
    figure.querySelector(".plot").setAttribute("aria-label", variant.alt);
    figure.querySelector(".shown").innerHTML = variant.note;
    const numbers = figure.querySelector(".numbers");
    numbers.innerHTML = variant.numbers;
    numbers.querySelectorAll("table").forEach((table) => {
      equipTable(table);
      showRows(table, chosen());
    });
  };

  // A saved picture has the colours of the page as it is shown, and the patterns of its bars.
  const save = (figure) => {
    const shown = [...figure.querySelectorAll(".plot svg")].find((svg) => svg.getClientRects().length);
    const copy = shown.cloneNode(true);
    copy.prepend(document.querySelector(".patterns defs").cloneNode(true));
    const style = getComputedStyle(shown);
    copy.setAttribute("font-family", style.fontFamily);
    copy.setAttribute("fill", style.getPropertyValue("--ink"));
    const source = new XMLSerializer()
      .serializeToString(copy)
      .replaceAll(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([source], { type: "image/svg+xml" }));
    link.download = `${figure.id}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // One filter for the whole page: every figure shows what is chosen, and tables its rows. A figure that has
  // several pictures of it keeps a choice of its own.
  const form = document.querySelector(".filter");
  const selects = [...(form?.querySelectorAll("select") ?? [])];
  const chosen = () => new Map(selects.filter(({ value }) => value).map(({ name, value }) => [name, value]));
  const isOf = (keys, wanted) => [...wanted].every(([key, value]) => !(key in keys) || keys[key] === value);
  const figures = [...document.querySelectorAll("figure[id]")].map((figure) => ({
    figure,
    select: figure.querySelector("select"),
    variants: JSON.parse(figure.querySelector("script.keys")?.textContent ?? "[]"),
    all: [...(figure.querySelector("select")?.options ?? [])],
  }));

  // Verdicts and findings about something else are hidden; what is over all says so.
  const stated = [...document.querySelectorAll("[data-keys]")].map((item) => ({
    item,
    keys: JSON.parse(item.dataset.keys),
    scope: item.querySelector(".scope"),
  }));
  const showStated = (wanted) => {
    for (const { item, keys, scope } of stated) {
      item.hidden = !isOf(keys, wanted);
      const over = [...wanted.keys()].filter((key) => !(key in keys)).map((key) => `all ${key}s`);
      scope.textContent = over.length ? ` (${over.join(", ")})` : "";
    }
    document.querySelectorAll(".over-all").forEach((line) => (line.hidden = wanted.size === 0));
    const hidden = stated.filter(({ item }) => item.hidden).length;
    const line = document.querySelector(".hidden-count");
    if (!line) return;
    line.hidden = hidden === 0;
    line.textContent = `Hidden: ${hidden} of ${stated.length} verdicts and findings, which are not about what is chosen.`;
  };

  const showRows = (table, wanted) => {
    const heads = [...table.tHead.rows[0].cells];
    let left = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = heads.some((head, column) => {
        const cell = row.cells[column];
        const detail = cell.querySelector("small")?.textContent ?? "";
        const value = cell.textContent.slice(0, cell.textContent.length - detail.length).trim();
        const { key, detailKey } = head.dataset;
        return [[key, value], [detailKey, detail]].some(([name, held]) => wanted.has(name) && wanted.get(name) !== held);
      });
      left += !row.hidden;
    }
    table.parentElement.classList.toggle("none", left === 0);
  };

  const filter = () => {
    const wanted = chosen();
    showStated(wanted);
    for (const { figure, select, variants, all } of figures) {
      const fitting = variants.flatMap(({ keys }, index) => (isOf(keys, wanted) ? [index] : []));
      const isEmpty = variants.length > 0 && fitting.length === 0;
      figure.classList.toggle("empty", isEmpty);
      figure.querySelector(".unmatched").hidden = !isEmpty;
      if (!select || isEmpty) continue;
      const shown = Number(figure.dataset.shown ?? 0);
      const index = fitting.includes(shown) ? shown : fitting[0];
      const keysOf = (other) => JSON.stringify(variants[other].keys);
      const same = fitting.filter((other) => keysOf(other) === keysOf(index));
      select.replaceChildren(...same.map((other) => all[other]));
      select.value = all[index].value;
      select.parentElement.hidden = same.length < 2;
      if (index !== shown) choose(figure, index);
    }
    document.querySelectorAll("main table").forEach((table) => showRows(table, wanted));
  };

  for (const { figure, select, all } of figures) {
    all.forEach((option, index) => (option.value = index));
    select?.addEventListener("change", () => choose(figure, Number(select.value)));
    figure.querySelector(".save")?.addEventListener("click", () => save(figure));
    figure.querySelectorAll(".numbers table").forEach(equipTable);
  }

  const restore = () => {
    for (const select of selects) {
      const value = address.get(select.name);
      select.value = [...select.options].some((option) => option.value === value) ? value : "";
    }
    filter();
  };
  const reach = (target) => {
    if (!target) return;
    for (let each = target; each; each = each.parentElement) {
      if (each instanceof HTMLDetailsElement) each.open = true;
    }
    target.scrollIntoView();
  };
  form?.addEventListener("change", () => {
    for (const { name, value } of selects) address.set(name, value);
    filter();
  });
  form?.addEventListener("reset", () => {
    for (const { name } of selects) address.set(name, "");
    setTimeout(filter);
  });
  document.addEventListener("click", ({ target }) => {
    const link = target instanceof Element ? target.closest("a[data-where]") : null;
    if (!link) return;
    const where = JSON.parse(link.dataset.where);
    for (const { name } of selects) address.set(name, where[name] ?? "");
    restore();
    reach(document.getElementById(link.hash.slice(1)));
  });
  window.addEventListener("hashchange", () => {
    const target = address.follow();
    restore();
    reach(target);
  });
  restore();
  if (location.hash.includes("?")) window.addEventListener("load", () => reach(address.place()));

  // The title of a mark, at once and in the page's own look instead of after a second.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  document.addEventListener("pointerover", ({ target, pageX, pageY }) => {
    const mark = target instanceof SVGElement && target.closest(".plot") ? target : null;
    const title = mark?.querySelector(":scope > title");
    if (title) {
      mark.dataset.title = title.textContent;
      title.remove();
    }
    tip.textContent = mark?.dataset.title ?? "";
    tip.hidden = !tip.textContent;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(pageX + 14, room))}px`;
    tip.style.top = `${pageY + 14}px`;
  });

  // On paper all is open, also where a browser does not open what its style opens.
  const closed = new Set();
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open]):not(.many)").forEach((each) => {
      closed.add(each);
      each.open = true;
    });
  });
  window.addEventListener("afterprint", () => {
    closed.forEach((each) => (each.open = false));
    closed.clear();
  });

  // Where the contents stand above the answer they are folded.
  document.querySelector(".contents").open = matchMedia("(min-width: 62.01rem)").matches;

  // The contents mark the section that crosses a line near the top of the window.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const reading = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        const link = links.get(target.id);
        if (isIntersecting) link?.setAttribute("aria-current", "location");
        else link?.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-25% 0px -74.5% 0px" },
  );
  document.querySelectorAll("main section[id]").forEach((section) => reading.observe(section));
})();
