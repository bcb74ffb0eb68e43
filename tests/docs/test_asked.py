"""What a program in docs is asked for."""

import sys
from pathlib import Path

import pytest

import docs.guidance_kinds
from docs.asked import asked


@pytest.mark.parametrize(
    ("argv", "default", "folder"),
    [([], "", "runs/guidance-kinds"), ([], "runs/two-modes", "runs/two-modes"), (["x/y"], "", "x/y")],
)
def test_the_folder_is_that_of_the_command_line(argv, default, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", docs.guidance_kinds)
    monkeypatch.setattr(sys, "argv", ["", *argv])
    assert asked(default) == Path(folder)


def test_help_says_what_the_program_does_and_does_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", docs.guidance_kinds)
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit) as end:
        asked()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m docs.guidance_kinds [-h] [folder]\n\nFidelity bought with diversity")
    assert "default runs/guidance-kinds" in said
