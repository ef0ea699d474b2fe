"""The project's documents as HTML pages. Alerts link to the runbook, which must be readable when the store is down."""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape

from markdown_it import MarkdownIt
from markdown_it.token import Token

from savings_exporter.shipped import shipped

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - savings-exporter</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 48rem; padding: 0 1rem; overflow-wrap: break-word; }}
pre, table {{ overflow-x: auto; }}
pre {{ background: #8882; padding: .5rem 1rem; }}
table {{ border-collapse: collapse; display: block; }}
th, td {{ border: 1px solid #8886; padding: .25rem .5rem; text-align: left; vertical-align: top; }}
:target {{ background: #fc06; }}
</style>
</head>
<body>
<nav><a href="..">savings-exporter</a> &middot; {pages}</nav>
{content}
</body>
</html>
"""
_NAME = re.compile(r"[a-z]+")
# A link from one document to another, as it is written for a reader of the repository.
_DOCUMENT_LINK = re.compile(r"([a-z]+)\.md(#.*)?")


def names() -> list[str]:
    """The documents that there are, by the last part of their address."""
    return sorted(path.stem for path in shipped("docs").glob("*.md"))


@lru_cache(maxsize=32)
def render(name: str) -> str | None:
    """The page of a document; None if there is no such document."""
    path = shipped("docs") / f"{name}.md"
    if not _NAME.fullmatch(name) or not path.is_file():
        return None
    # Documents contain no HTML: a tag in them is shown as text.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(path.read_text(encoding="utf-8"))
    title = name
    for position, token in enumerate(tokens):
        if token.type == "heading_open":
            text = tokens[position + 1].content
            token.attrSet("id", _anchor(text))
            title = text if token.tag == "h1" else title
        for child in token.children or ():
            _point_to_page(child)
    content = markdown.renderer.render(tokens, markdown.options, {})
    pages = " &middot; ".join(f'<a href="{other}">{other}</a>' for other in names())
    return _PAGE.format(title=escape(title), pages=pages, content=content)


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading, which the documents' own links use."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _point_to_page(token: Token) -> None:
    """Let a link lead to the page of its document, and show a picture, which is not served, as its text."""
    if token.type == "image":
        token.type, token.tag = "text", ""
    link = token.attrGet("href")
    if isinstance(link, str) and (found := _DOCUMENT_LINK.fullmatch(link)):
        token.attrSet("href", f"{found[1]}{found[2] or ''}")
