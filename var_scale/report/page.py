"""A Markdown page as one self-contained HTML page: pictures and style sheet inside."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("style.css")


def html_page(markdown: str, folder: Path) -> str:
    """Render Markdown, whose pictures are PNG files linked relative to `folder`. HTML within the
    text is escaped."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def picture(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        data = base64.b64encode((folder / token.attrs["src"]).read_bytes()).decode()
        alt = html.escape(token.content, quote=True)
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'

    # A table wider than the page scrolls by itself.
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    parser.add_render_rule("image", picture)
    title = html.escape(markdown.partition("\n")[0].removeprefix("# "))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>\n{STYLE.read_text()}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body>\n{parser.render(markdown)}</body></html>\n"
    )
