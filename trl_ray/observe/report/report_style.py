"""The report's style sheet and its one small script, both inlined; the page loads nothing from anywhere."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#16191f;--soft:#5b6472;--line:#e3e6eb;--grid:#e6e9ee;
--track:#e9ebf0;--good:#137a4b;--good-bg:#dcf3e7;--bad:#b3261e;--bad-bg:#fbe4e2;--warn:#8a5a00;--warn-bg:#fcefd2;
--k0:#2f6fdf;--k1:#d9730d;--k2:#16935c;--k3:#8250c8;--k4:#c93a54;--k5:#0b8aa3;--k6:#a17c12;--k7:#6b7485;
--s0:#bcd3f7;--s1:#7ba7ee;--s2:#2f6fdf;--s3:#e0b13a;--s4:#d9730d;--s5:#c93a54}
@media (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--ink:#e8ebf0;--soft:#98a2b1;--line:#2a3039;
--grid:#232932;--track:#262c35;--good:#5fd39b;--good-bg:#123626;--bad:#ff8f86;--bad-bg:#431a18;--warn:#f0bf5a;
--warn-bg:#3d2f10;--k0:#6ea3ff;--k1:#ff9f4a;--k2:#4cc98d;--k3:#b690f5;--k4:#f47a90;--k5:#45c3da;--k6:#d8b548;--k7:#929cab;
--s0:#2b4a7a;--s1:#3f6db5;--s2:#6ea3ff;--s3:#d8b548;--s4:#ff9f4a;--s5:#f47a90}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-font-smoothing:antialiased}
main,header.top>div,nav>div{max-width:1240px;margin:0 auto;padding:0 24px}
header.top{background:var(--card);border-bottom:1px solid var(--line);padding:28px 0 22px}
h1{font-size:26px;line-height:1.25;margin:0;letter-spacing:-.015em;overflow-wrap:anywhere}
.headline{display:flex;gap:14px;align-items:center;flex-wrap:wrap}
.sub{color:var(--soft);margin:6px 0 0;overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:2;background:var(--card);border-bottom:1px solid var(--line)}
nav>div{display:flex;gap:22px;overflow-x:auto}
nav a{color:var(--soft);text-decoration:none;padding:10px 0;font-size:14px;white-space:nowrap}
nav a:hover,nav a:focus-visible{color:var(--ink);box-shadow:inset 0 -2px var(--k0)}
h2{font-size:18px;letter-spacing:-.01em;margin:38px 0 14px;scroll-margin-top:56px}
h3{font-size:15px;margin:0 0 10px}
.pill{display:inline-block;border-radius:99px;padding:2px 11px;font-size:13px;font-weight:600;white-space:nowrap}
.good{color:var(--good);background:var(--good-bg)}.bad{color:var(--bad);background:var(--bad-bg)}
.warn{color:var(--warn);background:var(--warn-bg)}.plain{color:var(--soft);background:var(--track)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(176px,1fr));gap:14px;margin:24px 0 14px}
.tile .label{color:var(--soft);font-size:13px}.tile .value{font-size:25px;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;line-height:1.3}
.tile .note{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:14px}
.chart{padding:14px 14px 12px;position:relative}
figcaption{font-weight:600;font-size:14px;margin:0 4px 6px}.unit{color:var(--soft);font-weight:400}
svg{display:block;width:100%;height:auto;overflow:visible}
svg:focus-visible{outline:2px solid var(--k0);outline-offset:3px;border-radius:4px}
.grid{stroke:var(--grid);stroke-width:1}.tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1.2;opacity:.35}.dot{fill:var(--c)}.dot.faint{opacity:.35}.bar{fill:var(--c)}
rect.waiting{fill:var(--k7);opacity:.38}.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 4;opacity:.7}
.bound{stroke:var(--bad);stroke-width:1.4;stroke-dasharray:5 4}.bound-name{fill:var(--bad);font-size:11px}
.cursor{stroke:var(--soft);stroke-width:1;visibility:hidden}.lane{fill:var(--ink);font-size:12.5px}
.c0{--c:var(--k0)}.c1{--c:var(--k1)}.c2{--c:var(--k2)}.c3{--c:var(--k3)}.c4{--c:var(--k4)}.c5{--c:var(--k5)}
.c6{--c:var(--k6)}.c7{--c:var(--k7)}.c8{--c:var(--s0)}.c9{--c:var(--s1)}.c10{--c:var(--s2)}.c11{--c:var(--s3)}
.c12{--c:var(--s4)}.c13{--c:var(--s5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:8px 4px 0;padding:0;font-size:13px;
color:var(--soft)}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}.legend .name{overflow-wrap:anywhere}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:6px}
.key.waiting{background:var(--k7);opacity:.45}
.tip{position:absolute;pointer-events:none;background:var(--ink);color:var(--page);border-radius:8px;padding:6px 10px;
font-size:12.5px;line-height:1.45;z-index:3;max-width:240px;visibility:hidden;font-variant-numeric:tabular-nums}
.equation{display:flex;flex-wrap:wrap;align-items:center;gap:6px 14px;font-size:17px;font-variant-numeric:tabular-nums}
.equation b{font-size:21px}.equation span:not(.pill){color:var(--soft);font-size:14px}
.split{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:8px 40px;margin-top:16px}
.ledger-bar{height:12px;border-radius:6px;overflow:hidden;margin-top:16px;background:var(--track)}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:500;font-size:13px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>td{border-bottom:0}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td:not(.detail){white-space:nowrap}.split td{white-space:normal}
td.detail{overflow-wrap:anywhere;font-size:13px;color:var(--soft)}
.scroll{overflow-x:auto}.scroll .timeline{min-width:760px}
.share{display:block;border-radius:5px;overflow:hidden;margin-top:6px;height:10px;width:100%;min-width:140px}.track{fill:var(--track)}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:14px;align-items:start}
.sample{border-top:1px solid var(--line);padding:12px 0 2px;margin-top:12px}
.chips{display:flex;flex-wrap:wrap;gap:5px;margin:0 0 8px}.chips .pill{font-weight:500;font-size:12px;padding:1px 9px;
max-width:100%;overflow:hidden;text-overflow:ellipsis}
.who{font-size:12px;color:var(--soft);margin:0 0 2px}
pre{margin:0 0 8px;padding:9px 12px;background:var(--page);border:1px solid var(--line);border-radius:8px;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;
max-height:260px;overflow:auto;unicode-bidi:isolate}
pre.prompt{color:var(--soft);max-height:130px}
details>summary{cursor:pointer;font-weight:600;font-size:14px}details[open]>summary{margin-bottom:12px}
h3.section{margin:20px 0 10px}.fold{margin-top:14px}
.empty{color:var(--soft);margin:0}
footer{color:var(--soft);font-size:13px;margin:40px 0 32px}
@media print{nav{display:none}.card{break-inside:avoid}pre{max-height:none}}
"""

SCRIPT = """
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
"""
