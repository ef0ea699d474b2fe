"""The project's documents as HTML pages. Alerts link to the runbook, which must be readable when the store is down."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html import escape
from http import HTTPStatus
from operator import itemgetter

from markdown_it import MarkdownIt
from markdown_it.token import Token
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from savings_exporter.service.paths import DOCUMENTS_PATH, ICON_PATH
from savings_exporter.shipped import shipped

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - savings-exporter</title>
<link rel="icon" href="..{icon}">
<link rel="stylesheet" href="style.css">
</head>
<body>
<nav aria-label="Documents"><a href="..">savings-exporter</a> &middot; <a href=".">documents</a> &middot;
<a href="runbook">runbook</a></nav>
<main>
{content}
</main>
</body>
</html>
"""
_STYLE = """:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 48rem; padding: 0 1rem; overflow-wrap: break-word; }
table { overflow-x: auto; }
pre { background: #8882; padding: .5rem 1rem; white-space: pre-wrap; }
table { border-collapse: collapse; display: block; }
th, td { border: 1px solid #8886; padding: .25rem .5rem; text-align: left; vertical-align: top; }
:is(th, td).right { text-align: right; }
img { max-width: 100%; }
:target { background: #fc06; }
"""
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; frame-ancestors 'none'"}
_INDEX = ""
# The other files that documents link to, by their types.
_TYPES = {".svg": "image/svg+xml", ".png": "image/png", ".py": "text/plain"}
# A link from one document to another, as it is written for a reader of the repository.
_DOCUMENT_LINK = re.compile(r"([a-z]+)\.md(#.*)?")
# Documents contain no HTML: a tag in them is shown as text.
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


class Documents:
    """All documents and their pictures, read once: the package may be replaced while the service runs.

    A page is rendered when it is first asked for, in a thread of its own: the threads that other requests use may all
    wait for the store.
    """

    def __init__(self) -> None:
        folder = shipped("docs")
        self._sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
        self._others = {
            path.relative_to(folder).as_posix(): (path.read_bytes(), _TYPES[path.suffix])
            for path in folder.rglob("*")
            if path.suffix in _TYPES
        } | {"style.css": (_STYLE.encode(), "text/css")}
        self._pages: dict[str, str] = {}
        self._renderer = ThreadPoolExecutor(1, "documents")

    def routes(self) -> list[Route]:
        """The routes of all pages; they need neither the store nor the disk."""
        return [Route(f"{DOCUMENTS_PATH}{{name:path}}", self._answer)]

    async def _answer(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name in self._others:
            content, media_type = self._others[name]
            return Response(content, headers=_HEADERS, media_type=media_type)
        if name != _INDEX and name not in self._sources:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        page = await asyncio.get_running_loop().run_in_executor(self._renderer, self._page, name)
        return HTMLResponse(page, headers=_HEADERS)

    def _page(self, name: str) -> str:
        if name not in self._pages:
            title, content = _rendered(self._sources[name]) if name != _INDEX else ("Documents", self._index())
            self._pages[name] = _PAGE.format(title=escape(title), content=content, icon=ICON_PATH)
        return self._pages[name]

    def _index(self) -> str:
        titles = {name: _title(_MARKDOWN.parse(text)) for name, text in self._sources.items()}
        links = "\n".join(
            f'<li><a href="{name}">{escape(title)}</a></li>'
            for name, title in sorted(titles.items(), key=itemgetter(1))
        )
        return f"<h1>Documents</h1>\n<ul>\n{links}\n</ul>"


def _rendered(text: str) -> tuple[str, str]:
    """The title and the HTML of a document."""
    tokens = _MARKDOWN.parse(text)
    same: Counter[str] = Counter()
    for position, token in enumerate(tokens):
        if token.type == "heading_open":
            anchor = _anchor(tokens[position + 1].content)
            token.attrSet("id", f"{anchor}-{same[anchor]}" if same[anchor] else anchor)
            same[anchor] += 1
        if alignment := token.attrs.pop("style", None):  # of a table's column; the policy allows no inline styles
            token.attrSet("class", str(alignment).rpartition(":")[2])
        for child in token.children or ():
            _point_to_page(child)
    content: str = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    return _title(tokens), content


def _title(tokens: list[Token]) -> str:
    """The first heading."""
    return next(tokens[position + 1].content for position, token in enumerate(tokens) if token.type == "heading_open")


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading, which the documents' own links use."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _point_to_page(token: Token) -> None:
    """Let a link lead to the page of its document."""
    link = token.attrGet("href")
    if isinstance(link, str) and (found := _DOCUMENT_LINK.fullmatch(link)):
        token.attrSet("href", f"{found[1]}{found[2] or ''}")
