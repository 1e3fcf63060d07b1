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
    figure.querySelector(".shown").textContent = variant.note;
    const numbers = figure.querySelector(".numbers");
    numbers.innerHTML = variant.numbers;
    numbers.querySelectorAll("table").forEach(equipTable);
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

  for (const figure of document.querySelectorAll("figure[id]")) {
    const select = figure.querySelector("select");
    select?.addEventListener("change", () => choose(figure, select.selectedIndex));
    figure.querySelector(".save")?.addEventListener("click", () => save(figure));
    figure.querySelectorAll(".numbers table").forEach(equipTable);
  }

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
