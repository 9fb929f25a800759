"""The skeleton and the style sheet of `report.html`; `report` fills it."""

import string

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fff; --raised: #f6f7f8; --ink: #1c1f23; --quiet: #656c76; --line: #dfe2e6;
  --accent: #2563a8; --good: #1a7340; --bad: #b3261e; --bad-paper: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --raised: #1d2024; --ink: #e4e6e9; --quiet: #969ea9; --line: #30353b;
    --accent: #7db1ee; --good: #6cc78d; --bad: #ff8a80; --bad-paper: #3a1d1c;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 75rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 3.5rem 0 1rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 2rem 0 .6rem; font-size: 1rem; }
h3 small { margin-left: .5rem; color: var(--quiet); font-size: inherit; font-weight: 400; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin-top: .4rem; }
code, pre { font: .87em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.absent { color: var(--quiet); font-style: italic; }
.note { color: var(--quiet); font-size: .87rem; }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }

dl { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 0; }
dl div { flex: 0 1 auto; min-width: 9rem; padding: .6rem 1rem .7rem; border-radius: 8px; background: var(--raised); }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.6rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--quiet); font-size: .85rem; font-weight: 500; white-space: nowrap; }
td.metric { min-width: min(14rem, 28vw); }
td .good, td .bad { white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.protocol { min-width: 18rem; color: var(--quiet); font-size: .92em; }

.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(12.5rem, 23%), 1fr)); gap: 1rem 1.25rem; }
.curves figure { margin: 0; min-width: 0; }
.curves figcaption { display: flex; justify-content: space-between; font-size: .85rem; white-space: nowrap; }
.curves figcaption b { font-weight: 500; overflow: hidden; text-overflow: ellipsis; }
.curves figcaption span { margin-left: .6rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.curves svg { display: block; width: 100%; height: auto; }
.curves svg text { font-family: inherit !important; }
@media (min-width: 30rem) { .curves .large { grid-column: span 2; grid-row: span 2; } }

.clips { display: flex; flex-wrap: wrap; gap: 8px; }
.clips figure { margin: 0; padding: 4px; border-radius: 8px; background: var(--raised); max-width: 100%; }
.clips video, .clips img { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #000; }
.clips .tiny { image-rendering: pixelated; }
.clips figcaption { margin: .3rem 2px 2px; font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; }
.clips .prompt { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5; overflow: hidden; }
.clips .aside { display: block; color: var(--quiet); }
.clips .wrong { background: var(--bad-paper); box-shadow: inset 0 0 0 2px var(--bad); }
.steps { flex-direction: column; }
.steps figure { width: fit-content; }
.clips .missing { padding: .5rem; min-height: 6rem; border: 1px dashed var(--line); color: var(--quiet);
  font-size: .78rem; overflow-wrap: anywhere; }

.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; }
.legend i, .run i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px;
  vertical-align: -.05rem; }
h4 { margin: 1.2rem 0 .4rem; font-size: .92rem; font-weight: 600; }
td code { overflow-wrap: anywhere; }

.clock i { display: inline-block; height: 1rem; }
.clock .keys { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-bottom: .5rem; font-size: .85rem; }
.clock .keys i { width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 2px; }
.clock .bar { display: flex; align-items: center; margin: 2px 0; }
.clock .bar b { flex: 0 0 2.2rem; color: var(--quiet); font-size: .8rem; font-weight: 500; }
.clock .bar span { flex: 1; display: flex; border-radius: 3px; overflow: hidden; }

details { margin-top: 1rem; }
summary { width: fit-content; color: var(--accent); cursor: pointer; }
.sheet { display: block; max-width: 100%; margin-top: .6rem; border: 1px solid var(--line); border-radius: 4px; }
pre { overflow-x: auto; padding: 1rem 1.2rem; border-radius: 8px; background: var(--raised); }
footer { margin-top: 3.5rem; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<nav>$links</nav>
$facts
</header>
$sections
<footer class="note">$footer</footer>
</body>
</html>
""")
