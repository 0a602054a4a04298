"""HTML pieces of the report: page, sections, tables, figures. Every text is escaped here.

Pieces are strings of finished HTML; an empty content gives an empty piece, which the others leave
out, so that a report of half a run has no empty boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from gkd_dist.charts import Series

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c2430; --soft: #5c6675; --rule: #e3e7ec; --box: #f6f8fa; --accent: #0b63b0;
  --s0: #6b7480; --s1: #e07b00; --s2: #0b63b0; --s3: #9fb8cf; --s4: #8a4fa3; --s5: #2e8b57;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14181e; --ink: #e6eaf0; --soft: #9aa5b4; --rule: #2b333e; --box: #1b2129; --accent: #6cb2f2;
  --s0: #a3adba; --s1: #f5a742; --s2: #6cb2f2; --s3: #4d6780; --s4: #c48fdc; --s5: #6cc795;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 10px; }
h2 { font-size: 18px; margin: 44px 0 14px; padding-top: 20px; border-top: 1px solid var(--rule); }
.lead { font-size: 17px; max-width: 78ch; margin: 0; }
.note { color: var(--soft); font-size: 13px; max-width: 100ch; margin: 10px 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 12px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
tr.strong td { font-weight: 650; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 36px; }
figure { margin: 0; max-width: 640px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 4px; color: var(--soft); font-size: 13px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid-line { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.l { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; stroke: var(--c); }
.p, .b { fill: var(--c); }
.key { background: var(--c); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
.facts { display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 0 0 24px; }
.facts dt, .pairs dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px 24px; margin: 0; }
.pairs dd { margin: 0; font-variant-numeric: tabular-nums; }
details { margin-top: 22px; }
summary { cursor: pointer; color: var(--accent); }
details > .grid { margin-top: 18px; }
pre { background: var(--box); border: 1px solid var(--rule); border-radius: 8px; padding: 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { details:not([open]) > * { display: block; } main { padding: 0; } }
"""


@dataclass(frozen=True)
class Cell:
    """Text of a table cell; with ``style`` a key in that colour stands before it."""

    text: str
    style: int | None = None


def document(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole page."""
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A titled section."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n" if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], strong: str | None = None) -> str:
    """A table; the row whose first cell says ``strong`` stands out."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr class="strong">{_cells(row)}</tr>' if row[0].text == strong else f"<tr>{_cells(row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table></div>'


def _cells(row: Sequence[Cell]) -> str:
    return "".join(f"<td>{'' if cell.style is None else _key(cell.style)}{escape(cell.text)}</td>" for cell in row)


def figure(title: str, series: Sequence[Series], chart: str) -> str:
    """A chart with its title and, for more than one series, a legend."""
    if not chart:
        return ""
    keys = "".join(f"<span>{_key(one.style)}{escape(one.label)}</span>" for one in series)
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="legend">{keys}</div>{chart}</figure>\n'


def _key(style: int) -> str:
    return f'<span class="key s{style}"></span>'


def grid(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    present = "".join(one for one in figures if one)
    return f'<div class="grid">\n{present}</div>' if present else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Large numbers in a row."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{shown}</dl>'


def pairs(values: Iterable[tuple[str, str]]) -> str:
    """Names with small values below them."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values)
    return f'<dl class="pairs">{shown}</dl>' if shown else ""


def note(text: str) -> str:
    """Small print."""
    return f'<p class="note">{escape(text)}</p>'


def folded_text(title: str, text: str) -> str:
    """Preformatted text behind a title to click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def folded(title: str, content: str) -> str:
    """HTML content behind a title to click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""
