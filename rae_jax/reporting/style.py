"""The style sheet of the report."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --panel: #f3f4f3; --rule: #dfe1e0; --ink: #1b1f23;
  --muted: #656c73; --accent: #24608f; --accent-soft: #24608f2b;
  --warn: #8a5a00; --warn-soft: #fdf3dc;
  --c1: #24608f; --c2: #c2622a; --c3: #3a8a67; --c4: #8462ad;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto,
    "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas,
    "Liberation Mono", "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #131619; --panel: #1b1f23; --rule: #30363c; --ink: #e5e8ea;
  --muted: #9aa3ab; --accent: #7db4e0; --accent-soft: #7db4e038;
  --warn: #e9c070; --warn-soft: #2d2617;
  --c1: #6fabdd; --c2: #e6935c; --c3: #6cc19a; --c4: #b89be0;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 var(--sans); font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 32px; }
h1, h2, h3, p, figure, table, ol, dl { margin: 0; padding: 0; }
h1 { font-size: 2.5rem; line-height: 1.12; letter-spacing: -.025em;
  font-weight: 680; text-wrap: balance; }
h2 { font-size: 1.5rem; line-height: 1.25; letter-spacing: -.015em; font-weight: 640; }
h3 { font-size: .95rem; font-weight: 620; }
p { max-width: 70ch; text-wrap: pretty; }
a { color: var(--accent); text-underline-offset: 3px;
  text-decoration-thickness: 1px; }
code { font-family: var(--mono); font-size: .9em; overflow-wrap: anywhere; }
header { padding-top: 72px; }
.kicker { color: var(--muted); font-size: .875rem; margin-bottom: 12px; }
.lead { font-size: 1.1875rem; line-height: 1.55; margin-top: 20px; max-width: 64ch; }
.plain { margin-top: 14px; color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 22px; margin-top: 40px;
  padding: 14px 0; border-block: 1px solid var(--rule); font-size: .875rem; }
nav a { text-decoration: none; color: var(--muted); }
nav a:hover { color: var(--accent); }
section { padding-top: 76px; scroll-margin-top: -40px; }
section > h2 + p { margin-top: 10px; }
section > p + p { margin-top: 12px; }
.body { margin-top: 28px; }
.note { color: var(--muted); font-size: .9rem; line-height: 1.55; margin-top: 16px; }
.missing { margin-top: 16px; padding: 12px 16px; border-radius: 8px; max-width: none;
  background: var(--warn-soft); color: var(--warn); font-size: .9rem; }
.notice { margin-top: 32px; }

.key { display: grid; grid-template-columns: repeat(6, 1fr); margin-top: 44px; }
.key > div { padding: 2px 20px; border-left: 1px solid var(--rule); }
.key > div:first-child { padding-left: 0; border-left: 0; }
.key > div:last-child { padding-right: 0; }
.key dt { color: var(--muted); font-size: .8125rem; line-height: 1.35; }
.key dd { margin: 4px 0 0; font-size: 1.75rem; font-weight: 640; line-height: 1.25;
  letter-spacing: -.02em; white-space: nowrap; }
.key .unit { font-size: .95rem; font-weight: 500; letter-spacing: 0;
  color: var(--muted); }
.key .more { margin-top: 4px; font-size: .8125rem; line-height: 1.4;
  font-weight: 400; letter-spacing: 0; color: var(--muted); white-space: normal; }

.chain { list-style: none; display: grid; grid-template-columns: repeat(5, 1fr);
  gap: 12px; margin-top: 44px; counter-reset: chain; }
.chain li { background: var(--panel); border-radius: 10px; padding: 16px 16px 18px;
  font-size: .85rem; line-height: 1.45; color: var(--muted);
  counter-increment: chain; }
.chain li::before { content: counter(chain); color: var(--accent); font-weight: 640; }
.chain b { display: block; margin: 2px 0 4px; color: var(--ink); font-size: .95rem;
  font-weight: 620; }

.tiles { display: grid; gap: 3px; --n: 9;
  grid-template-columns: repeat(var(--n), 1fr); }
.tiles img { display: block; width: 100%; height: auto;
  border-radius: 2px; }
img { image-rendering: pixelated; }
@media (max-resolution: 1.4dppx) { img { image-rendering: auto; } }
.whole { max-width: 100%; border-radius: 6px; }
.samples { display: grid; gap: 18px 30px; align-items: center;
  grid-template-columns: minmax(92px, max-content)
    repeat(var(--groups), minmax(0, 320px)); }
.samples .head { font-size: .875rem; font-weight: 620; align-self: end;
  padding-bottom: 8px; border-bottom: 1px solid var(--rule); }
.samples .tiles { --n: 4; }
.samples .tiles::before { display: none; content: attr(data-label);
  grid-column: 1 / -1; color: var(--muted); font-size: .75rem; line-height: 1.3;
  padding-top: 6px; }
.rowed { display: grid; gap: 0 30px;
  grid-template-columns: minmax(92px, max-content) 1fr; }
.rowed ol { list-style: none; display: grid; align-items: center; color: var(--muted);
  grid-auto-rows: 1fr; font-size: .875rem; }
.stacks { display: grid; gap: 6px; --n: 10;
  grid-template-columns: repeat(var(--n), 1fr); }
.stacks div { display: grid; gap: 6px; }
.stacks img { display: block; width: 100%; height: auto; border-radius: 2px; }
.axis { display: flex; justify-content: space-between; align-items: center; gap: 16px;
  color: var(--muted); font-size: .875rem; margin-bottom: 12px; }
.axis i { flex: 1; height: 1px; background: var(--rule); position: relative; }
.axis i::after { content: ""; position: absolute; right: 0; top: -3.5px; width: 7px;
  height: 7px; border: solid var(--muted); border-width: 1px 1px 0 0;
  transform: rotate(45deg); }
.strip .tiles { gap: 6px; }
.sheet { margin-top: 48px; }
.sheet > h3 + p { margin-top: 8px; }
.sheet > .body { margin-top: 18px; }
.strip .tiles + .tiles { margin-top: 6px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: .8125rem; }
th, td { padding: 10px 20px 10px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
td small { display: block; color: var(--muted); font-size: .8438rem; line-height: 1.4; }
td.bar { width: 38%; vertical-align: middle; }
td.bar span { display: block; height: 10px; min-width: 2px; border-radius: 2px;
  background: var(--accent-soft); }
tr.strong td { font-weight: 620; } tr.strong small { font-weight: 400; }
tr.strong td.bar span { background: var(--accent); }

.charts { display: grid; gap: 36px 40px; grid-template-columns: repeat(2, 1fr); }
.charts.three { grid-template-columns: repeat(3, 1fr); }
.curves > h3 { margin: 44px 0 18px; }
.curves > h3:first-child { margin-top: 0; }
.chart figcaption { font-size: .9rem; font-weight: 620; margin-bottom: 8px;
  line-height: 1.4; }
.chart figcaption small { display: block; font-weight: 400; font-size: .8125rem;
  color: var(--muted); }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.legend { margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; }

details { border-bottom: 1px solid var(--rule); }
details:first-of-type { border-top: 1px solid var(--rule); }
summary { padding: 13px 0; cursor: pointer; font-weight: 560; }
summary small { color: var(--muted); font-weight: 400; margin-left: 8px; }
summary::marker { color: var(--muted); }
.config { margin: 2px 0 22px; columns: 2; column-gap: 48px; }
.config div { display: flex; justify-content: space-between; gap: 20px;
  break-inside: avoid; padding: 3px 0; font: .8125rem/1.5 var(--mono);
  border-bottom: 1px dotted var(--rule); }
.config dt { color: var(--muted); overflow-wrap: anywhere; }
.config dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
pre { margin: 20px 0 0; padding: 16px 18px; border-radius: 8px; overflow-x: auto;
  background: var(--panel); font: .9rem/1.5 var(--mono); }
.facts { display: flex; flex-wrap: wrap; gap: 16px 48px; margin-top: 24px; }
.facts dt { color: var(--muted); font-size: .8125rem; }
.facts dd { margin: 0; }
footer { padding-top: 72px; padding-bottom: 72px; }

@media (max-width: 1000px) {
  .key { grid-template-columns: repeat(3, 1fr); row-gap: 28px; }
  .key > div:nth-child(3n + 1) { padding-left: 0; border-left: 0; }
  .chain { grid-template-columns: repeat(2, 1fr); }
  .charts.three { grid-template-columns: repeat(2, 1fr); }
}
@media (max-width: 720px) {
  main, header, footer { padding-left: 18px; padding-right: 18px; }
  header { padding-top: 40px; }
  h1 { font-size: 1.875rem; }
  .lead { font-size: 1.0625rem; }
  section { padding-top: 56px; }
  .key { grid-template-columns: repeat(2, 1fr); }
  .key > div:nth-child(n) { padding: 2px 14px; border-left: 1px solid var(--rule); }
  .key > div:nth-child(odd) { padding-left: 0; border-left: 0; }
  .chain, .charts, .charts.three { grid-template-columns: 1fr; }
  .chain { gap: 8px; }
  .chain li { padding: 10px 14px 12px; }
  .chain li::before { float: left; margin: 1px 10px 0 0; }
  .samples { grid-template-columns: 1fr; gap: 0; }
  .samples .head { display: none; }
  .samples h3 { margin-top: 22px; }
  .samples .tiles { --n: 8; gap: 2px; }
  .samples .tiles::before { display: block; }
  .strip .tiles { gap: 2px; }
  .rowed { grid-template-columns: 1fr; gap: 12px; }
  .rowed ol { display: block; }
  .rowed li { display: inline; }
  .rowed li:first-child::before { content: "From above: "; }
  .rowed li + li::before { content: "· "; }
  .stacks { --n: 5; gap: 14px 6px; }
  .stacks div { gap: 2px; }
  .bar { display: none; }
  td.n:nth-last-child(2), th.n:nth-last-child(2) { padding-right: 0; }
  th, td { padding-right: 12px; }
  .config { columns: 1; }
}
@media print {
  :root { --paper: #fff; }
  body { font-size: 10.5pt; }
  main, header, footer { max-width: none; padding: 0; }
  header { padding-top: 0; }
  .key, .chain { margin-top: 24pt; }
  nav { display: none; }
  section { padding-top: 32pt; }
  h2, h2 + p, .curves > h3 { break-after: avoid; }
  #samples { break-before: page; padding-top: 0; }
  .chain { grid-template-columns: repeat(5, 1fr); gap: 6px; }
  .chain li { padding: 10px; font-size: 8.5pt; }
  .charts.three { grid-template-columns: repeat(3, 1fr); gap: 24px; }
  .samples { gap: 10px 18px; }
  p, figure, table, .samples > *, .key, .chain, .tiles, .stacks div {
    break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
