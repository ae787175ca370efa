"""Documentation pages: links and file names are valid, long pages have a table of contents."""

import re
from functools import cache

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*/README.md")])
PLANNED = set()  # pages that may be linked before they exist
FOLDERS = "benchmarks brisk config docs examples notebooks tests".split()
SUFFIXES = "py md json yaml sbatch ipynb txt toml".split()
TWO_SCREENS = 110  # lines
README_LINES = 200


def prose(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(page):
    """Targets of the relative links and pictures of a page."""
    found = re.findall(r"\]\(([^()\s]+)\)|src=\"([^\"]+)\"", prose(page))
    found = [target or source for target, source in found]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def named_files():
    """Names of all files of the repository that a page may mention without their folder."""
    folders = [ROOT, *(ROOT / folder for folder in (*FOLDERS, "data"))]
    return {path.name for folder in folders[1:] for path in folder.rglob("*")} | {
        path.name for path in ROOT.iterdir()
    }


def is_file_of_ours(code):
    """Whether inline code is the path of a file or folder that is part of the repository."""
    if not re.fullmatch(r"[\w./-]+", code) or code.startswith(("/", ".")):
        return False
    first, suffix = code.split("/")[0], code.rsplit(".", 1)[-1]
    if "/" in code and (first in FOLDERS or first == "data"):
        return suffix in SUFFIXES or first in FOLDERS
    return "/" not in code and suffix in ("py", "md", "sbatch", "ipynb")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if str(file.relative_to(ROOT)) in PLANNED and not file.exists():
            continue
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if is_file_of_ours(code):
            exists = (ROOT / code).exists() or ("/" not in code and code in named_files())
            assert exists, f"{page.name} names {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_prose_fits_into_100_columns(page):
    if "data" in page.parts or page.name == "CHANGELOG.md":
        return
    for line in prose(page).splitlines():
        assert len(line) <= 100 or line.startswith("|"), f"{page.name}: {line}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_long_pages_begin_with_contents(page):
    text = page.read_text(encoding="utf-8")
    if len(text.splitlines()) > TWO_SCREENS:
        headings = re.findall(r"^## (.+)$", prose(page), flags=re.M)
        start = text.split("\n## ")[0]
        assert all(f"- [{heading}](#" in start for heading in headings), page.name


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 60_000, picture.name
