// Draws the figures in the reader's colour scheme, those near the window first and the others in idle time,
// so that a page that is printed without having been scrolled holds all of them; swaps their variants.
(() => {
  "use strict";
  const dark = JSON.parse(document.getElementById("dark-colours").textContent);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true };
  const current = new Map(); // figure element -> its chosen variant: { figure, alt, note }
  const drawn = new Set();
  let printing = false;

  const unpack = async (script) => {
    if (script.type === "application/json") return JSON.parse(script.textContent);
    const bytes = Uint8Array.from(atob(script.textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  // Figures are stored with light colours; texts are left alone, only keys that hold colours are changed.
  const recolour = (value, key = "") => {
    if (typeof value === "string") return /color/i.test(key) ? dark[value] ?? value : value;
    if (Array.isArray(value)) return value.map((item) => recolour(item, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, recolour(item, name)]));
  };

  const draw = (figure) => {
    const plot = figure.querySelector(".plot");
    const stored = structuredClone(current.get(figure).figure);
    const { data, layout } = scheme.matches && !printing ? recolour(stored) : stored;
    // On a narrow page the legend has one entry a line: give it the height the plot would lose.
    if (layout.showlegend && plot.clientWidth < 560) {
      layout.height += 19 * data.filter((trace) => trace.showlegend !== false).length;
    }
    plot.style.minHeight = `${layout.height}px`;
    drawn.add(figure);
    return Plotly.react(plot, data, layout, config);
  };

  const show = (figure, index, variant) => {
    current.set(figure, variant);
    figure.querySelector(".plot").setAttribute("aria-label", variant.alt);
    figure.querySelector(".shown").textContent = variant.note;
    const numbers = figure.querySelector(".numbers");
    numbers.replaceChildren(figure.querySelectorAll("template")[index].content.cloneNode(true));
    numbers.querySelectorAll("table").forEach(equipTable);
  };

  const choose = async (figure) => {
    const select = figure.querySelector("select");
    const index = select.selectedIndex;
    const variant = await unpack(figure.querySelectorAll("script[data-variant]")[index]);
    if (index !== select.selectedIndex) return; // chosen anew meanwhile
    show(figure, index, variant);
    draw(figure);
  };

  const save = async (figure) => {
    const { width, height } = figure.querySelector(".plot").getBoundingClientRect();
    await Plotly.downloadImage(await draw(figure), { format: "svg", filename: figure.id, width, height });
  };

  const figures = [...document.querySelectorAll("figure[id]")];
  const near = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !drawn.has(target)) draw(target);
      }
    },
    { rootMargin: "800px" },
  );
  const whenIdle = window.requestIdleCallback ?? ((next) => setTimeout(next, 20));
  const drawOthers = () => {
    const next = figures.find((figure) => !drawn.has(figure));
    if (!next) return near.disconnect();
    draw(next);
    whenIdle(drawOthers, { timeout: 500 });
  };

  // The first variant is not packed, so it is there before the page has loaded: a page that is printed by a
  // command, as soon as it has loaded, draws it then.
  for (const figure of figures) {
    show(figure, 0, JSON.parse(figure.querySelector("script[data-variant]").textContent));
    near.observe(figure);
    figure.querySelector("select")?.addEventListener("change", () => choose(figure));
    figure.querySelector(".save").addEventListener("click", () => save(figure));
  }
  window.addEventListener("load", () => whenIdle(drawOthers));

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

  scheme.addEventListener("change", () => drawn.forEach(draw));
  for (const [name, starts] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => {
      printing = starts;
      [...current.keys()].forEach(draw);
    });
  }
})();
