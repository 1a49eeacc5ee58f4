"""The report's style sheet: one column, system fonts, colours of the reader's light or dark setting."""

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2430; --soft: #5c6675; --rule: #dfe3e8;
  --card: #f5f7f9;
  --accent: #3b7dd8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e3e7ec; --soft: #98a2b0; --rule:
  #2d343d;
  --card: #1c2229; --accent: #6fa5ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color:
  var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p, figcaption, .soft { color: var(--soft); font-size: .9rem; margin: .25rem 0; }
figure { margin: 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; color: var(--ink); }
figure svg text { font-family: inherit !important; }
.key { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin:
  1.25rem 0; }
.key div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.key b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.key span { color: var(--soft); font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem;
  margin-top: .75rem; }
.samples article { background: var(--card); border-radius: .5rem; padding: .7rem; font-size: .9rem; }
.samples img { width: 100%; height: 9rem; object-fit: contain; background: #ffffff; border-radius: .3rem; }
.samples dl { margin: .4rem 0 0; }
.samples dt { color: var(--soft); font-size: .75rem; }
.samples dd { margin: 0 0 .3rem; overflow-wrap: anywhere; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border-radius: .5rem; padding: 1rem; overflow-x: auto; font-size: .8rem; }
@media print { body { max-width: none; } figure svg { min-width: 0; } }
"""
