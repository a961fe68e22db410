"""The style sheet of the report: light and dark, wide and narrow, screen and paper; no font or file from elsewhere."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2026; --soft: #59616c; --rule: #d9dde3; --box: #f5f6f8;
    --a: #1a5fb4; --b: #b4460a; --c: #26703a; --d: #7b3fa0; --faint: #9aa3ae; --good: 26, 112, 58; --bad: 190, 60, 30; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e7eb; --soft: #a2abb6; --rule: #363c45;
  --box: #1e2228;
    --a: #7ab2ff; --b: #ff9e5e; --c: #7fd096; --d: #cf9df0; --faint: #6b7480; --good: 90, 190, 120; --bad: 240, 110, 80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 64rem; background: var(--page); color: var(--ink);
    font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem;
    padding-top: .75rem; border-top: 1px solid var(--rule); } h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; max-width: 46rem; } .note, caption, figcaption, .soft { color: var(--soft); } .note { font-size:
  .9rem; }
a { color: var(--a); } nav { font-size: .9rem; margin: 1.25rem 0 0; } nav a { margin-right: 1rem; display:
  inline-block; }
.answer { background: var(--box); border-radius: .5rem; padding: 1rem 1.25rem; margin: 1.25rem 0; }
.answer .score { font-size: 2.75rem; font-weight: 650; line-height: 1.1; } .answer p { margin: .25rem 0; }
.bars { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr max-content; gap: .35rem .75rem;
    align-items: center; margin: .75rem 0; } .bars svg { width: 100%; height: 1.1rem; display: block; }
.bars .n { text-align: right; } .bar { fill: var(--faint); } .bar.own { fill: var(--a); } .track { fill: var(--rule);
  opacity: .5; }
.range { stroke: var(--ink); stroke-width: 2; vector-effect: non-scaling-stroke; }
.wide { overflow-x: auto; max-width: 100%; margin: .75rem 0; } table { border-collapse: collapse; font-size: .92rem;
  min-width: min(24rem, 100%); }
caption { text-align: left; padding-bottom: .3rem; font-size: .9rem; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule);
    overflow-wrap: break-word; } thead th { color: var(--soft); font-weight: 500; } tbody th { font-weight: 500;
  max-width: 20rem; }
.bars > div { display: contents; }
.n { text-align: right; font-variant-numeric: tabular-nums; } td.n { white-space: nowrap; }
.matrix td { text-align: center; padding: .4rem .6rem;
  min-width: 3.2rem;
    font-variant-numeric: tabular-nums; border: 1px solid var(--page); } .matrix thead th { max-width: 9rem;
  padding-left: .6rem; }
.matrix td { padding: 0; } .matrix tbody th { min-width: 3.2rem; }
  .matrix td span { display: block; padding: .4rem .6rem; }
.good { background: rgba(var(--good), var(--strength)); } .bad { background: rgba(var(--bad), var(--strength)); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.25rem; }
.mistakes.seen { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .25rem 1.25rem; }
.mistakes img { display: block; max-width: 100%; height: auto; border-radius: .25rem; background: var(--box); }
.mistakes figure { margin: .1rem 0; } audio { height: 2rem; max-width: 100%; display: block; }
figure { margin: .5rem 0; max-width: 34rem; } figcaption { font-size: .9rem; } svg.chart { width: 100%; height: auto;
  display: block; }
svg text { fill: var(--soft); font-size: 13px; font-family: inherit; } .grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2.25; stroke: var(--a); } .line.b { stroke: var(--b); stroke-dasharray: 7 4; }
.line.c { stroke: var(--c); stroke-dasharray: 2 3; }
.line.d { stroke: var(--d); stroke-dasharray: 9 3 2 3; }
.line.faint { stroke: var(--faint); stroke-width: 1.25; stroke-dasharray: 3 3; }
.line.raw { stroke: var(--faint); stroke-width: 1; opacity: .7; } .line.thin { stroke-width: 1.5; }
.dot { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); }
.dot.d { fill: var(--d); } .dot.many { fill-opacity: .45; }
mark { color: inherit; background: none; border-bottom: 2px solid; padding: 0 .1em; border-radius: 2px; }
mark.hit { border-color: var(--c); background: rgba(var(--good), .14); }
mark.missed { border-bottom-style: dashed; border-color: var(--b); }
mark.extra { border-bottom-style: double; border-bottom-width: 3px; border-color: rgb(var(--bad));
    background: rgba(var(--bad), .14); }
mark sub { font-size: .7em; color: var(--soft); margin-left: .25em; }
dl.sides { grid-template-columns: minmax(4rem, max-content) 1fr; margin: .1rem 0; } dl.sides .text { margin: 0; }
line.best { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 2 3; } text.best { fill: var(--c); }
.keys { list-style: none; margin: 0; padding: 0; font-size: .85rem; display: flex; flex-wrap: wrap; gap: 0 1rem; }
.key { width: 22px; height: 10px; margin-right: .35rem; display: inline-block; }
.mistakes { list-style: none; padding: 0; margin: .75rem 0; } .mistakes > li { border-left: 3px solid var(--rule);
  padding: .1rem 0 .1rem .9rem;
    margin: 0 0 1rem; break-inside: avoid; } .mistakes > li.suspect { border-color: var(--b); }
.text { white-space: pre-wrap; margin: .1rem 0; } .verdict { font-size: .9rem; color: var(--soft); } .verdict b {
  color: var(--ink); font-weight: 600; }
.tag { color: var(--b); font-weight: 600; } summary { cursor: pointer; } .long > summary { max-width: 46rem; } .more {
  color: var(--a); }
.long[open] > summary > span:first-child { display: none; }
pre { background: var(--box); padding: .75rem 1rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.45; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; } pre code { user-select: all; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: .5rem 0; } dt { color:
  var(--soft); } dd { margin: 0; }
ul.found { padding-left: 1.2rem; margin: .4rem 0; }
@media (max-width: 34rem) { body { padding: 1rem .9rem 3rem; } .answer { padding: .9rem; } .bars { display: block; }
  .bars > div { display: grid; grid-template-columns: 1fr max-content; margin-bottom: .5rem; }
  .bars svg { grid-column: 1 / -1; grid-row: 2; }
  dl { grid-template-columns: 1fr; gap: 0;
  } dd { margin-bottom: .5rem; }
    svg text { font-size: 15px; } pre { font-size: .8rem; } }
@media print { :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --rule: #ccc;
  --box: #f4f4f4;
  --a: #1a5fb4;
    --b: #b4460a; --c: #26703a; --d: #7b3fa0; --faint: #888; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display:
  none; }
    h2, h3, figcaption { break-after: avoid; } figure, table, pre { break-inside: avoid; } pre { white-space:
  pre-wrap; }
    .charts { grid-template-columns: 1fr 1fr; gap: .5rem; }
    * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
