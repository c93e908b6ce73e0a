"use strict";
for (const chart of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(chart.nextElementSibling.textContent);
  Plotly.newPlot(chart, data, layout, { displayModeBar: false, responsive: true });
}
for (const series of document.querySelectorAll(".series")) {
  const slider = series.querySelector("input"), output = series.querySelector("output");
  const pictures = [...series.querySelectorAll("img")];
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
    output.textContent = slider.ariaValueText = pictures[Number(slider.value)].dataset.label;
  };
  series.querySelector("label").hidden = false;
  slider.value = String(pictures.length - 1); // a browser may have kept another from the last visit
  slider.addEventListener("input", show);
  show();
}
