"use strict";
(() => {
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const shown = (value) =>
    Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  const live = document.getElementById("live");

  // Position of the entry of a rising list that is nearest to x.
  const nearest = (list, x) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] <= x) low = middle; else high = middle;
    }
    return x - list[low] <= list[high] - x ? low : high;
  };
  const clamp = (value, most) => Math.min(Math.max(value, 0), most);

  // What of a chart the pointer and the keys move over. Both kinds have num, the positions from left to right;
  // find(x, y), what lies nearest to a place given in shares of the plotting area; and show(marks), which marks
  // the present place and returns it in words.

  const lines = (figure, data) => {
    const epochs = [...new Set(data.curves.flatMap((curve) => curve.epochs))].sort((a, b) => a - b);
    const values = [...figure.querySelectorAll(".legend .value")];
    const right = (x) => `${(100 * (x - data.x[0])) / (data.x[1] - data.x[0])}%`;
    const down = (y) => `${100 - (100 * ((data.log ? Math.log10(y) : y) - data.y[0])) / (data.y[1] - data.y[0])}%`;
    return {
      num: epochs.length,
      rows: 1,
      find: (x) => [nearest(epochs, data.x[0] + x * (data.x[1] - data.x[0])), 0],
      show: (marks, column) => {
        const epoch = epochs[column];
        marks.append(svg("line", { class: "cross", x1: right(epoch), x2: right(epoch), y2: "100%" }));
        const steps = new Set();
        const words = data.curves.map((curve, number) => {
          const i = nearest(curve.epochs, epoch);
          const dot = { class: `dot s${number % 8}`, cx: right(curve.epochs[i]), cy: down(curve.values[i]), r: 4 };
          marks.append(svg("circle", dot));
          const elsewhere = curve.epochs[i] === epoch ? "" : ` (epoch ${shown(curve.epochs[i])})`;
          if (!elsewhere) steps.add(curve.steps[i]);
          values[number].textContent = shown(curve.values[i]) + elsewhere;
          return `${curve.name} ${shown(curve.values[i])}${elsewhere}`;
        });
        return [`Epoch ${shown(epoch)}, step ${[...steps].join(", ")}`, words.join(", ")];
      },
      clear: () => values.forEach((value) => { value.textContent = ""; }),
    };
  };

  const heat = (figure, data) => {
    const num = data.columns.length, rows = data.layers.length;
    return {
      num,
      rows,
      find: (x, y) => [clamp(Math.floor(x * num), num - 1), clamp(Math.floor(y * rows), rows - 1)],
      show: (marks, column, row) => {
        const box = { x: `${(100 * column) / num}%`, y: `${(100 * row) / rows}%` };
        marks.append(svg("rect", { class: "cell", ...box, width: `${100 / num}%`, height: `${100 / rows}%` }));
        const i = data.columns[column], value = data.values[row][i];
        const where = `Epoch ${shown(data.epochs[i])}, step ${data.steps[i]}, ${data.layers[row]}`;
        return [`${where}: ${value === null ? "no value" : shown(value)}`, ""];
      },
      clear: () => {},
    };
  };

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const chart = (figure.dataset.chart === "heat" ? heat : lines)(figure, data);
    const plot = figure.querySelector(".plot"), marks = figure.querySelector(".marks");
    const area = figure.querySelector(".pointer"), at = figure.querySelector(".at");
    let column = chart.num - 1, row = 0;
    const show = () => {
      marks.replaceChildren();
      const [place, words] = chart.show(marks, column, row);
      at.textContent = place;
      return words ? `${place}: ${words}` : place;
    };
    const clear = () => {
      marks.replaceChildren();
      at.textContent = "";
      chart.clear();
    };
    plot.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      [column, row] = chart.find(...place.map((share) => clamp(share, 1)));
      show();
    });
    plot.addEventListener("pointerleave", () => { if (document.activeElement !== plot) clear(); });
    plot.addEventListener("focus", show);
    plot.addEventListener("blur", clear);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], Home: [-chart.num, 0], End: [chart.num, 0] }[event.key]
        ?? (chart.rows > 1 ? { ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] : undefined);
      if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      column = clamp(column + move[0], chart.num - 1);
      row = clamp(row + move[1], chart.rows - 1);
      live.textContent = show();
    });
  }

  for (const series of document.querySelectorAll(".series")) {
    const slider = series.querySelector("input"), output = series.querySelector("output");
    const pictures = [...series.querySelectorAll("img")];
    const show = () => {
      const chosen = Number(slider.value);
      pictures.forEach((picture, i) => { picture.hidden = i !== chosen; });
      output.textContent = pictures[chosen].dataset.label;
      slider.setAttribute("aria-valuetext", pictures[chosen].dataset.label);
    };
    series.querySelector(".slider").hidden = false;
    slider.value = String(pictures.length - 1); // a browser may have kept another from the last visit
    slider.addEventListener("input", show);
    show();
  }

  // On paper nothing can be opened.
  const opened = [];
  const open = () => {
    for (const element of document.querySelectorAll("details:not([open])")) {
      element.open = true;
      opened.push(element);
    }
  };
  const close = () => { for (const element of opened.splice(0)) element.open = false; };
  addEventListener("beforeprint", open);
  addEventListener("afterprint", close);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? open() : close()));
})();
