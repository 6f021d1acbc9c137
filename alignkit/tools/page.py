"""Write HTML pages of one style, each a single file that needs no other."""

from __future__ import annotations

from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h1, h2, h3, p { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
tr.found td:first-child { font-weight: 600; color: #b33c00; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem;
      border-radius: 4px; margin: .3rem 0; }
.cut::after { content: " ✂ cut"; color: #b33c00; font-size: .8em; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 1rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { table { display: block; overflow-x: auto; }
         .columns { grid-auto-flow: row; } }
summary { cursor: pointer; } img { width: 100%; } .quiet { color: #666; }
"""


def write_page(title: str, body: str) -> str:
    """Return the HTML of a page.

    Args:
        title: Plain text.
        body: HTML.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{body}</body></html>
"""
