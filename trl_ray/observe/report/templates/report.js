for (const svg of document.querySelectorAll("svg[data-plot]")) {
  const plot = JSON.parse(svg.dataset.plot), figure = svg.parentElement, cursor = svg.querySelector(".cursor");
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip"; tip.setAttribute("role", "status");
  let index = plot.at.length - 1;
  const hide = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
  const show = (at) => {
    index = Math.max(0, Math.min(plot.at.length - 1, at));
    const x = plot.at[index], box = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    const head = document.createElement("b"); head.textContent = "step " + plot.steps[index];
    tip.replaceChildren(head);
    for (const series of plot.series) {
      if (!series.text[index]) continue;
      const [row, key, name] = ["div", "i", "span"].map((tag) => document.createElement(tag));
      key.className = "key c" + series.color; name.textContent = series.name + "  " + series.text[index];
      row.append(key, name); tip.append(row);
    }
    const left = box.left - outer.left + x / svg.viewBox.baseVal.width * box.width;
    const flip = left > outer.width / 2;
    tip.style.left = flip ? "auto" : left + 12 + "px";
    tip.style.right = flip ? outer.width - left + 12 + "px" : "auto";
    tip.style.top = box.top - outer.top + 8 + "px";
    tip.style.visibility = cursor.style.visibility = "visible";
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let best = 0;
    plot.at.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(plot.at[best] - x)) best = i; });
    show(best);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { event.preventDefault(); show(index + move); } else if (event.key === "Escape") hide();
  });
}
