"""The gallery's tables fit together; what is there is kept."""

import json

from distill_cli.commands import COMMANDS
from distill_cli.recipes import find, read
from docs import gallery


def test_every_panel_has_a_run_and_every_run_a_recipe():
    runs = {panel.run for section in gallery.SECTIONS for panel in section.panels}
    assert runs <= gallery.RUNS.keys()
    assert {read(find(recipe))["command"] for recipe in gallery.RUNS.values()} <= {*COMMANDS}
    assert {*gallery.TEACHERS} == {run for run, recipe in gallery.RUNS.items() if "teacher" in read(find(recipe))}
    names = [name for section in gallery.SECTIONS for name in section.drawn]
    assert len(names) == len({*names})
    for section in gallery.SECTIONS:
        titles = [panel.title for panel in section.panels]
        assert len(titles) == len({*titles})
        for _, *shown in section.drawn.values():
            assert {*shown} <= {*titles}


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    """With all numbers and pictures nothing is trained, and the page holds every number."""
    numbers = {s.title: {p.title: 0.1 + k / 1000 for k, p in enumerate(s.panels)} for s in gallery.SECTIONS}
    for name in (name for section in gallery.SECTIONS for name in section.drawn):
        (tmp_path / name).touch()
    monkeypatch.setattr(gallery, "PICTURES", tmp_path)
    monkeypatch.setattr(gallery, "command", None)
    for section in gallery.SECTIONS:
        gallery.made(section, tmp_path / "runs", json.loads(json.dumps(numbers)))
    page = gallery.page(numbers)
    assert max(map(len, page.splitlines())) <= 140
    for own in numbers.values():
        assert all(f"| {title} | {number:.3f} |" in page for title, number in own.items())
