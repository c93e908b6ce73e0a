"""What mkdocs.yml adds to the pages of this folder: README.md as the first of them, notebooks, tables of settings.

A line `<!-- settings: pretrain -->` is replaced by that command's settings, `<!-- commands -->` by all other commands.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fcmae.cli import COMMANDS
from fcmae.options.help import Setting, described
from fcmae.tables import table

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {"docker/README.md": "docker.md", "LICENSE": "license.txt"}
RUNS = ("pretrain", "finetune", "segment")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and those that notebooks make."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=moved((ROOT / name).read_text())))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = as_markdown(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables in the place of their marks, and links to where pages are."""
    for path, uri in PAGES.items():
        markdown = markdown.replace(f"](../{path}", f"]({uri}")
    markdown = re.sub(r"(\]\([\w/]+)\.ipynb\)", r"\1.md)", markdown)
    for name in RUNS:
        markdown = markdown.replace(f"<!-- settings: {name} -->", of_settings(described(COMMANDS[name][0])))
    return markdown.replace("<!-- commands -->", "\n".join(commands())) if "<!-- commands -->" in markdown else markdown


def moved(text: str) -> str:
    """A page of the repository's root, with its links as they are from docs/."""
    text = re.sub(r"(\]\()docs/", r"\1", text)
    for path, uri in PAGES.items():
        text = text.replace(f"]({path}", f"]({uri}")
    return text


def commands() -> Iterator[str]:
    """What each command is for, how it is called and its settings: but those of runs, which have a page."""
    for name, (settings, _) in COMMANDS.items():
        first, *rest = (settings.__doc__ or "").split("\n\n")
        example = next(line for line in rest[-1].splitlines() if "Example: " in line).partition("Example: ")[2]
        yield f"## {name}\n\n{first}\n\n```bash\n{example}\n```\n"
        yield from (" ".join(text.split()) + "\n" for text in rest[:-1])
        rows = described(settings)
        if name in RUNS:
            yield f"Its settings are on [their page](settings.md#{name}).\n"
        elif name == "bench":
            known = {row.key for row in described(COMMANDS["pretrain"][0])}
            yield "The settings of [`pretrain`](settings.md#pretrain), and:\n"
            yield of_settings([row for row in rows if row.key not in known])
        elif rows:
            yield of_settings(rows)


def of_settings(rows: list[Setting]) -> str:
    """Settings as a table."""
    cells = [(row.key, row.kind, row.default, row.description.replace("|", r"\|")) for row in rows]
    lines = [[*(f"`{value}`" if value else "" for value in values), words] for *values, words in cells]
    return table(["setting", "value", "default", "what it is"], lines, left=4) + "\n"


def as_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and its pictures by name: cells, and what they print and draw."""
    parts = [f"*This page is the notebook `docs/notebooks/{path.name}`, as it was last run.*"]
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above draws]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", pictures
