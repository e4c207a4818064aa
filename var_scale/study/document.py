"""A document of headings, paragraphs, tables and pictures, rendered as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.55 system-ui, sans-serif; color: #1b2733; max-width: 66rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #dde3e8; padding-bottom: .3rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .55rem; text-align: right; border-bottom: 1px solid #e6eaee; white-space: nowrap; }
th { background: #f5f7f9; font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
td.long { white-space: normal; min-width: min(12rem, 30vw); }
img { max-width: 100%; height: auto; }
figure { margin: 1.2rem 0; }
figcaption { font-size: .86rem; color: #51606e; }
code { background: #f1f4f6; padding: 0 .25rem; }
@media (prefers-color-scheme: dark) {
  body { background: #14181c; color: #dbe2e8; }
  h2, th, td { border-color: #333c45; }
  th, code { background: #222931; }
  figcaption { color: #9aa7b2; }
  img { background: #fff; }
  a { color: #8fbcff; }
}
"""

NUMERIC = re.compile(r"^(n/a|none|[-+±]?\d[\d.,e+-]*( %)?( \S{1,3}( \d+ \S{1,3})?)?( to .*| or more.*)?)?$")
"""a number with a unit, an interval, a duration"""


@dataclass
class Document:
    """Blocks in order; text may hold `code` and **bold**."""

    title: str
    blocks: list[tuple[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.blocks.append(("heading", text))

    def paragraph(self, text: str) -> None:
        self.blocks.append(("paragraph", text))

    def bullets(self, items: Sequence[str]) -> None:
        self.blocks.append(("bullets", list(items)))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.blocks.append(("table", (list(head), [[str(cell) for cell in row] for row in rows])))

    def picture(self, path: Path, caption: str) -> None:
        self.blocks.append(("picture", (Path(path), caption)))

    def markdown(self, folder: Path) -> str:
        """Markdown; pictures are linked relative to `folder`."""
        parts = [f"# {self.title}"]
        for kind, block in self.blocks:
            match kind, block:
                case "heading", str(text):
                    parts.append(f"## {text}")
                case "paragraph", str(text):
                    parts.append(text)
                case "bullets", list(items):
                    parts.append("\n".join(f"- {item}" for item in items))
                case "table", (head, rows):
                    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
                    parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
                case "picture", (path, caption):
                    parts.append(f"![{caption}]({Path(os.path.relpath(path, folder)).as_posix()})\n\n*{caption}*")
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """One HTML page with its pictures inside."""
        parts = []
        for kind, block in self.blocks:
            match kind, block:
                case "heading", str(text):
                    parts.append(f"<h2>{_inline(text)}</h2>")
                case "paragraph", str(text):
                    parts.append(f"<p>{_inline(text)}</p>")
                case "bullets", list(items):
                    parts.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")
                case "table", (head, rows):
                    words = [any(not NUMERIC.match(row[k]) for row in rows) for k in range(len(head))]
                    top = "".join(f"<th{' class=text' * words[k]}>{_inline(cell)}</th>" for k, cell in enumerate(head))
                    body = "".join("<tr>" + "".join(_cell(cell, words[k]) for k, cell in enumerate(row)) + "</tr>" for row in rows)
                    parts.append(f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')
                case "picture", (path, caption):
                    data, alt = base64.b64encode(path.read_bytes()).decode(), html.escape(caption, quote=True)
                    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
                    parts.append(f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>")
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{PAGE_STYLE}</style>'
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n<h1>{title}</h1>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _cell(cell: str, text: bool) -> str:
    """A column of words stands left, its long texts wrap; numbers stand right."""
    kind = " class='text long'" if text and len(cell) > 28 and " " in cell else " class=text" if text else ""
    return f"<td{kind}>{_inline(cell)}</td>"
