"""Text that people read: no line over 140 characters, and no link in the docs that leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [p for room in ("distill_cli", "tests", "docs", "recipes") for p in (ROOT / room).rglob("*") if p.suffix in (".md", ".py", ".yaml")]
TEXTS = sorted([ROOT / "README.md", *(p for p in TEXTS if "unchanged" not in p.parts)])  # folders kept as older versions wrote them


def test_no_line_is_over_140_characters():
    long = [f"{p.relative_to(ROOT)}:{n}" for p in TEXTS for n, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 140]
    assert not long


@pytest.mark.parametrize("page", [p for p in TEXTS if p.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_that_docs_name_are_there(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:distill_cli|tests|docs|recipes)/[a-z0-9_/.-]+\.(?:py|yaml|md))`", text)
    gone = [link for link in links if link and not (page.parent / link).exists()] + [name for name in named if not (ROOT / name).exists()]
    assert not gone
