"""Pages of the site that are made when it is built: every setting, and the texts that lie at the top of the repository.

MkDocs calls the functions. A page that is made has no file in ``docs/``, so that nothing is said twice.
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from wsiflow.run import config as settings

ROOT = Path(__file__).parents[2]
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "training/README.md": "training.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository, and the pages that they become."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_PICTURES = {".png", ".svg"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in MOVED}
    made = {MOVED[name]: _with_links(text, Path(name).parent) for name, text in texts.items()}
    for name, text in {**made, "settings.md": settings_page()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn links of pages to files of the repository into links of the site."""
    return _with_links(markdown, Path("docs")) if page.file.generated_by is None else markdown


def _with_links(text: str, folder: Path) -> str:
    """Return a text of a folder of the repository with the links of the site; other files are named and not linked."""

    def link(match: re.Match[str]) -> str:
        shown, target, anchor = match[1], match[2], match[3] or ""
        if ":" in target:
            return match[0]
        path = (ROOT / folder / target).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
        if name in MOVED:
            return f"[{shown}]({MOVED[name]}{anchor})"
        if name.startswith("docs/") and path.is_file():
            return f"[{shown}]({name.removeprefix('docs/')}{anchor})"
        return f"{shown} (`{name}`)"

    return _LINK.sub(link, text)


def settings_page() -> str:
    """Return the page of every key: its meaning, and its value under each choice of its group."""
    groups = _groups()
    lines = [
        "# Every setting",
        "",
        "`wsiflow run key=value` sets a key, `group=choice` all keys of a file of `conf/`. This page is made from",
        "those files and from the forms that check them; `wsiflow run --help` shows the same for your choices.",
        "",
        "| group | choices |",
        "|---|---|",
        *(f"| `{name}` | {', '.join(f'`{choice}`' for choice in choices)} |" for name, choices in groups.items()),
        "",
        "## A run",
        "",
    ]
    whole: dict[str, Any] = yaml.safe_load(_conf("config.yaml"))
    for key, about in settings.descriptions().items():
        section, _, rest = key.partition(".")
        if key not in settings.known_keys():
            lines += ["", f"{'###' if rest else '##'} {key}", "", _escaped(about), ""]
            continue
        values = _values(section, rest, groups.get(section, {}), whole)
        lines.append(f"- **`{key}`**{values}: {_escaped(about)}")
    return "\n".join(lines) + "\n"


def _groups() -> dict[str, dict[str, Any]]:
    """Return the values of every choice of every group of ``conf/``."""
    folder = resources.files("wsiflow.conf")
    found: dict[str, dict[str, Any]] = {}
    for group in sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("_")):
        names = sorted(each.name for each in (folder / group).iterdir() if each.name.endswith(".yaml"))
        found[group] = {name.removesuffix(".yaml"): yaml.safe_load(_conf(f"{group}/{name}")) or {} for name in names}
    return found


def _conf(name: str) -> str:
    return resources.files("wsiflow.conf").joinpath(*name.split("/")).read_text(encoding="utf-8")


def _values(section: str, rest: str, choices: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return the values of a key: one where all choices agree, else each with its choices."""
    if not rest:
        return f" = `{_typed(whole[section])}`" if section in whole else ""
    sources = choices or {"": whole.get(section, {})}
    by_value: dict[str, list[str]] = {}
    for name, values in sources.items():
        for part in rest.split("."):
            values = values.get(part, _ABSENT) if isinstance(values, dict) else _ABSENT
        if values is not _ABSENT:
            by_value.setdefault(_typed(values), []).append(name)
    if len(by_value) == 1:
        return f" = `{next(iter(by_value))}`"
    each = "; ".join(f"`{value}` ({', '.join(names)})" for value, names in by_value.items())
    return f" = {each}" if each else ""


_ABSENT = object()


def _typed(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
