// Draws each figure when it comes near, in the reader's colour scheme, and swaps views.
(() => {
  "use strict";
  const dark = JSON.parse(document.getElementById("dark-colours").textContent);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true };
  let printing = false;
  const drawn = new Set();

  // Figures are stored with light colours; texts are left alone, only keys that hold colours are changed.
  const recolour = (value, key = "") => {
    if (typeof value === "string") return /color/i.test(key) ? dark[value] ?? value : value;
    if (Array.isArray(value)) return value.map((item) => recolour(item, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, recolour(item, name)]));
  };

  const show = (figure) => {
    const select = figure.querySelector("select");
    const index = select ? select.selectedIndex : 0;
    const variant = JSON.parse(figure.querySelectorAll("script[data-variant]")[index].textContent);
    const plot = figure.querySelector(".plot");
    const inDark = scheme.matches && !printing;
    const { data, layout } = inDark ? recolour(variant.figure) : variant.figure;
    // On a narrow page the legend has one entry a line: give it the height the plot would lose.
    if (layout.showlegend && plot.clientWidth < 560) {
      layout.height += 19 * data.filter((trace) => trace.showlegend !== false).length;
    }
    plot.setAttribute("aria-label", variant.alt);
    figure.querySelector(".shown").textContent = variant.note;
    figure.querySelector(".numbers").replaceChildren(
      figure.querySelectorAll("template")[index].content.cloneNode(true),
    );
    plot.style.minHeight = `${layout.height}px`;
    drawn.add(figure);
    return Plotly.react(plot, data, layout, config);
  };

  const figures = [...document.querySelectorAll("figure[id]")];
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      near.unobserve(entry.target);
      show(entry.target);
    }),
    { rootMargin: "800px" },
  );
  for (const figure of figures) {
    near.observe(figure);
    figure.querySelector("select")?.addEventListener("change", () => show(figure));
    figure.querySelector("button").addEventListener("click", async () => {
      const plot = await show(figure);
      const { width, height } = plot.getBoundingClientRect();
      Plotly.downloadImage(plot, { format: "svg", filename: figure.id, width, height });
    });
  }
  scheme.addEventListener("change", () => drawn.forEach(show));
  window.addEventListener("beforeprint", () => {
    printing = true;
    figures.forEach(show);
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    figures.forEach(show);
  });
})();
