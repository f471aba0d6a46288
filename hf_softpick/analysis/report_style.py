"""The look of the comparison page, light and dark. A string, so that the wheel needs no data files."""

# Colours after Okabe and Ito, darkened or lightened until lines stand out from the page by 3:1 and more.
CSS = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1f24; --soft: #555d68; --line: #d5d9e0; --panel: #f5f6f8;
  --heat: #0b3d91; --bar: #6b7380; --bad: #b3261e; --good: #11663b; --flag: #fff4d6; --flagline: #b07d00;
  --c0: #0060a8; --c1: #b84a00; --c2: #00795a; --c3: #a03c78; --c4: #6b5a00; --c5: #4a4fb5; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --text: #e4e7ec; --soft: #a5adb9; --line: #3a414c;
  --panel: #1d2229; --heat: #7fb4ff; --bar: #98a2b0; --bad: #ff8f87; --good: #71d39b; --flag: #33290f;
  --flagline: #d8a93a; --c0: #63b3f5; --c1: #ff9b54; --c2: #45d0a5; --c3: #f095cb; --c4: #e0ca4e; --c5: #a9adff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 4px; color: var(--soft); }
a { color: var(--c0); }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 12px 0; padding: 0;
  font-size: .9rem; }
nav a { display: inline-block; padding: 4px 0; }
.lead { font-size: 1.1rem; margin: 8px 0 16px; max-width: 70ch; }
.flag { background: var(--flag); border-left: 4px solid var(--flagline); padding: 8px 12px; margin: 8px 0; }
.scroll { overflow-x: auto; margin: 12px 0; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 4px; font-size: .85rem; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; max-width: 22rem; }
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; }
tbody th { font-weight: 400; color: var(--soft); min-width: 7.5rem; }
tbody th.indent { padding-left: 1em; }
td.better { font-weight: 700; }
td.better::after { content: "\\00a0\\25C2"; color: var(--good); }
.claims { font-size: .9rem; }
.claims tbody th { font-weight: 600; color: var(--text); min-width: 7rem; }
.claims td.wide { min-width: 9.5rem; } .claims thead th { white-space: normal; }
.verdict { font-weight: 700; white-space: nowrap; }
.reproduced { color: var(--good); } .not-reproduced { color: var(--bad); } .not-measured { color: var(--soft); }
.reproduced::before { content: "\\2713\\00a0"; } .not-reproduced::before { content: "\\2717\\00a0"; }
.not-measured::before { content: "\\2013\\00a0"; }
figure { margin: 16px 0; }
figcaption { color: var(--soft); font-size: .85rem; margin-bottom: 8px; }
.drawings { display: flex; flex-wrap: wrap; gap: 20px 28px; align-items: flex-start; }
.drawings > div { max-width: 100%; min-width: 0; }
.drawings .wide { flex: 1 1 400px; max-width: 500px; }
svg { display: block; color: var(--text); font-family: inherit; }
svg.chart { width: 100%; height: auto; } svg.map { max-width: 100%; height: auto; }
svg.mark { display: inline-block; vertical-align: middle; margin-right: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 0 0 6px; padding: 0;
  font-size: .85rem; }
.tick { font-size: 11px; fill: var(--soft); } .axis { font-size: 11.5px; fill: var(--text); }
.grid { stroke: var(--line); fill: none; } .frame { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .line.second { stroke-width: 1; opacity: .6; }
.dot { stroke-width: 1.5; } .hover { fill-opacity: 0; stroke: none; } .hover:hover { fill-opacity: 1; }
.dot.hollow { fill: var(--page); }
.heat { fill: var(--heat); stroke: var(--line); stroke-width: .5; }
.bad { fill: var(--bad); } .bar { fill: var(--bar); }
.c0 { --run: var(--c0); } .c1 { --run: var(--c1); } .c2 { --run: var(--c2); }
.c3 { --run: var(--c3); } .c4 { --run: var(--c4); } .c5 { --run: var(--c5); }
.line, .dot { stroke: var(--run); } .dot:not(.hollow), .hover { fill: var(--run); }
code, pre { font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background: var(--panel); padding: 8px 12px; overflow-x: auto; margin: 8px 0; max-width: 100%;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--c0); padding: 4px 0; font-size: .9rem; }
footer { color: var(--soft); font-size: .85rem; padding-top: 24px; padding-bottom: 32px; }
@media (max-width: 480px) { body { font-size: 15px; } h1 { font-size: 1.35rem; }
  main, header, footer { padding: 0 12px; } }
@media (max-width: 720px) {
  .claims, .claims tbody, .claims tr, .claims th, .claims td, .claims caption { display: block; max-width: none; }
  .claims thead { display: none; } .claims tr { padding: 8px 0; border-bottom: 2px solid var(--line); }
  .claims tbody th, .claims td { border: 0; padding: 2px 0; min-width: 0; }
  .claims td:not(.verdict)::before { content: attr(data-label) ": "; color: var(--soft); }
}
@media print { .scroll { overflow: visible; } nav { display: none; } }
"""
