# SPDX-License-Identifier: Apache-2.0
"""All pages of the documentation site as Markdown: handwritten pages with their fills, and generated pages.

On a separate line, `<!-- fill: NAME -->` becomes a table of `scripts/docs/tables.py`, and
`<!-- include: FILE#HEADING -->` the section of that name of another document of the repository. Links to files of the
repository become links to their pages, or plain text where a file has no page.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Mapping

from scripts.docs import methods, results, tables
from scripts.docs.tables import ROOT

# Documents of the repository that have a page, by section of the navigation.
HOME = {"README.md": "index.md"}
PROJECT = {
    "CONTRIBUTING.md": ("Contributing", "project/contributing.md"),
    "vtprune/refvlm/README.md": ("The built-in models", "project/refvlm.md"),
    "kernels/README.md": ("Kernels", "project/kernels.md"),
    "benchmarks/README.md": ("Benchmarks", "project/benchmarks.md"),
    "CHANGELOG.md": ("Changes", "project/changelog.md"),
}
# First lines of the page of all methods.
METHODS = """# Methods

Pass one by name, `vtprune.patch(model, ratio=0.25, method="divprune")`, or as an instance with options,
`method=vtprune.methods.IWP(layer=2)`. [Choosing a method and a ratio](/choosing.md) says where to begin;
`vtprune compare` runs them side by side on pictures of yours. A method of your own is
[a class with one function](/extend/method.md)."""
NOTEBOOK = "examples/notebook.ipynb"
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.S | re.M)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def examples() -> list[str]:
    """The example scripts, by path in the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("[0-9]*.py"))


def places() -> dict[str, str]:
    """Paths of files outside `docs/` that have a page, to the path of the page."""
    known = dict(HOME)
    known |= {path: place for path, (_, place) in PROJECT.items() if (ROOT / path).exists()}
    known |= {"examples/README.md": "examples/index.md", NOTEBOOK: "notebook.md"}
    return known | {path: path.removesuffix(".py") + ".md" for path in examples()}


def written() -> dict[str, str]:
    """Source file to page, for files in `docs/`."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    return {path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix() for path in found}


def made() -> dict[str, str]:
    """Page to Markdown, for pages that are not in `docs/`."""
    pages = {}
    for path, place in places().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            text = _script(path, text)
        elif path == NOTEBOOK:
            text = notebook(text)
        pages[place] = complete(text, path, place)
    parts = [
        f"## {title}\n\n{methods.ABOUT[title]}\n\n{tables.methods(names)}" for title, names in methods.groups().items()
    ]
    text = "\n\n".join([METHODS, *parts])
    pages["methods/index.md"] = complete(f"{text}\n", "docs/methods/index.md")
    for title in results.sections()[1]:
        place = results.place(title)
        pages[place] = complete(results.page(title), results.SOURCE, place)
    for name in methods.names():
        place = f"methods/{name}.md"
        pages[place] = complete(methods.page(name), f"docs/{place}")
    return pages


def everything() -> dict[str, str]:
    """Page to complete Markdown, for the whole site."""
    return {place: own(path) for path, place in written().items()} | made()


def own(path: str) -> str:
    """The complete page of a document in `docs/`; for the results, a summary."""
    text = results.summary() if path == results.SOURCE else (ROOT / path).read_text(encoding="utf-8")
    return complete(text, path)


def navigation() -> dict[str, list[dict[str, str]]]:
    """Sections of the navigation to their generated pages."""
    return {
        "Methods": [
            {title: [{name: f"methods/{name}.md"} for name in names]} for title, names in methods.groups().items()
        ],
        "Numbers": [{title: results.place(title)} for title in results.sections()[1]],
        "Examples": [{path.split("/")[-1]: places()[path]} for path in examples()],
        "Project": [{title: place} for path, (title, place) in PROJECT.items() if (ROOT / path).exists()],
    }


def complete(text: str, source: str, place: str | None = None) -> str:
    """Fills in tables and sections, and turns links into links between pages.

    Args:
        text: Markdown of the document.
        source: Its path in the repository, the base of relative links; the base of `/x.md` is `docs/`.
        place: Path of its page; by default that of a file in `docs/`.

    Raises:
        ValueError: A table or a section of that name does not exist.
    """
    place = place or source.removeprefix("docs/")
    text = re.sub(r"^<!-- fill: ([\w-]+) -->$", lambda match: _fill(match[1]), text, flags=re.M)
    known = places()
    text = relink(text, source, place, known)

    def include(match: re.Match[str]) -> str:
        return relink(section(match[1], match[2]), match[1], place, known)

    return re.sub(r"^<!-- include: ([\w./-]+)#([^>]+?) -->$", include, text, flags=re.M)


def section(path: str, heading: str) -> str:
    """The text under a second-level heading of a document of the repository, without the heading."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        if title.strip() == heading:
            return body.strip()
    raise ValueError(f"{path} has no section {heading!r}")


def relink(text: str, source: str, place: str, known: Mapping[str, str]) -> str:
    """Links between files of the repository become links between pages; see `complete`."""

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        absolute = f"docs{path}" if path.startswith("/") else posixpath.join(posixpath.dirname(source), path)
        file = posixpath.normpath(absolute)
        page = known.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if page is not None:
            return f"{mark}[{words}]({posixpath.relpath(page, posixpath.dirname(place) or '.')}{hash_}{anchor})"
        # A file without a page: only its name is shown.
        return (
            (words if words.startswith("`") else f"`{words}`")
            if os.path.exists(ROOT / file) or file in PROJECT
            else match[0]
        )

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def _fill(name: str) -> str:
    if name not in tables.FILLS:
        raise ValueError(f"there is no table {name!r}; there are: {', '.join(tables.FILLS)}")
    return tables.FILLS[name]()


def notebook(text: str) -> str:
    """The page of a notebook, with its stored outputs."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data:
                png = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output of the cell above" src="data:image/png;base64,{png}">')
            else:
                printed = "".join(out.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + f"\n\nThe file is `{NOTEBOOK}` in the repository.\n"


def _script(path: str, text: str) -> str:
    """The page of an example: its docstring as text, and its source."""
    name = path.split("/")[-1]
    return f"# {name}\n\n```bash\npython {path}\n```\n\n```python\n{text}```\n"
