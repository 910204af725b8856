"""The report's style sheet: system fonts, one accent, light and dark, readable on a phone."""

CSS = """
:root { color-scheme: light dark; --paper: #fcfbf9; --ink: #1b1e23; --soft: #656b75; --rule: #e6e3dd;
  --accent: #23618f; --faint: #23618f47; --warn: #b04428; }
@media (prefers-color-scheme: dark) { :root { --paper: #131519; --ink: #e8e6e2; --soft: #9ba1ab;
  --rule: #2c3037; --accent: #86b8e3; --faint: #86b8e34d; --warn: #ee8d72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
  overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: clamp(2rem, 6vw, 5rem) clamp(1.1rem, 4vw, 3rem) 4rem; }
header { margin-bottom: clamp(2.5rem, 6vw, 4rem); }
header p { margin: 0; color: var(--soft); }
h1 { margin: .2rem 0 2rem; font-size: clamp(1.8rem, 5vw, 2.7rem); line-height: 1.15; letter-spacing: -.02em;
  font-weight: 650; text-wrap: balance; }
h2 { margin: 0 0 1.2rem; font-size: 1.25rem; letter-spacing: -.01em; font-weight: 620; }
h3 { margin: 2rem 0 .6rem; font-size: 1rem; font-weight: 600; }
section { margin: 0 0 clamp(3rem, 7vw, 4.5rem); }
.note { margin: -.8rem 0 1.2rem; color: var(--soft); font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.4rem 1.8rem; margin: 0;
  padding: 1.5rem 0 0; border-top: 1px solid var(--rule); }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: .1rem 0 0; font-size: 1.3rem; line-height: 1.3; font-weight: 560; letter-spacing: -.01em; }
dd small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; letter-spacing: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 2.2rem 2.5rem; }
figure { margin: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .7rem; align-items: baseline; margin-bottom: .5rem; }
.chart .name { font-weight: 600; }
.chart .aside, .chart .warn { font-size: .8rem; color: var(--soft); }
.chart .warn { color: var(--warn); }
.chart .value { margin-left: auto; color: var(--accent); font-weight: 600; }
.curve { display: block; width: 100%; height: auto; overflow: visible; }
.curve text { fill: var(--soft); font-size: 11.5px; }
.curve path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.curve .rule { stroke: var(--rule); stroke-width: 1; }
.curve .axis { stroke: var(--soft); stroke-width: 1; stroke-linecap: butt; opacity: .7; }
.curve .raw { stroke: var(--faint); stroke-width: 1; }
.curve .line { stroke: var(--accent); stroke-width: 1.9; }
.curve .missing { stroke: var(--warn); stroke-width: 1.5; stroke-linecap: butt; }
.curve .end { fill: var(--accent); stroke: var(--paper); stroke-width: 1.5; }
.captions { columns: 22rem 2; column-gap: 3rem; margin: 0 0 1.8rem; padding-left: 2rem; font-size: .9rem; }
.captions li { break-inside: avoid; padding-left: .3rem; }
.captions li::marker { color: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.8rem; }
.pictures .wide { grid-column: 1 / -1; }
.grid img { display: block; max-width: 100%; height: auto; border-radius: 4px; background: #fff; }
.grid figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; }
.stack { display: grid; grid-template-columns: minmax(0, 1fr); gap: 2.2rem; }
.stack figcaption { order: -1; margin: 0 0 .6rem; color: var(--ink); font-weight: 600; font-size: 1rem; }
.stack figure { display: flex; flex-direction: column; align-items: flex-start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
.scores { font-size: .94rem; overflow-wrap: normal; }
.scores th, .scores td { padding: .7rem .75rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
.scores thead th { color: var(--soft); font-size: .82rem; font-weight: 500; line-height: 1.3; vertical-align: bottom; }
.scores tbody th { position: sticky; left: 0; min-width: 7.5rem; padding-left: 0; background: var(--paper);
  text-align: left; font-weight: 560; }
.scores td small { display: block; color: var(--soft); font-size: .78rem; }
.scores .main { font-weight: 650; color: var(--ink); }
.scores .main small { font-weight: 400; }
.settings { columns: 22rem 2; column-gap: 3rem; font-size: .9rem; }
.settings table { break-inside: avoid; margin-bottom: 2rem; }
.settings caption { padding-bottom: .4rem; text-align: left; font-weight: 600; font-size: 1rem; }
.settings th, .settings td { padding: .38rem 0; border-top: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
.settings th { padding-right: 1rem; color: var(--soft); font-weight: 400; }
.settings td { text-align: right; }
footer { padding-top: 1.4rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: .85rem; }
@media print { body { background: none; } section { break-inside: avoid-page; } }
"""
