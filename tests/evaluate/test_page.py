"""The page of an evaluation: what it says, that it needs nothing from outside, and that a browser draws it."""

import base64
import io
import json
import math
import re
import subprocess
from html import escape, unescape

import numpy as np
import pytest
from PIL import Image

from distill_cli.evaluate import charts, page
from distill_cli.evaluate.report import SAMPLED, markdown
from tests.test_watch import CHROMIUM, Reader

COLUMNS = {"FID": ("fid", ".2f"), "never heard of": ("unheard", ".4f"), "always lacking": ("lacking", ".1f")}


def row(model, calls=None, rate=None, **scores):
    return {"model": model, "images": 50, "network_evaluations": calls, "images_per_second": rate, "lacking": None, **scores}


ROWS = [
    row("a <b>student@4", 4, 50.0, fid=8.0, unheard=0.3),
    row("a <b>student@1", 1, 200.0, fid=12.0, unheard=0.1),
    row("runs/another", 35, 5.0, fid=2.0, unheard=math.nan),
    row("samples.npz", fid=4.0, unheard=0.4),
]
REPORT = {
    "reference": "all pictures \x1b[31m", "seed": 7, "columns": COLUMNS, "rows": ROWS,
    "warnings": ["too <few>"], "versions": {"torch": "2.6"},
}  # fmt: skip
SETTINGS = {"model": ["a", "b"], "num": 50, "prompts": None}


def pictures(size, count=3):
    return np.random.default_rng(size).integers(0, 256, (count, size, size, 3), np.uint8)


def made(report=REPORT, shown=(("first", pictures(16)), ("second", pictures(9))), captions=(), worst=()):
    return page.page("a <i>folder", report, SAMPLED, SETTINGS, shown, captions, worst)


def test_the_table_is_that_of_the_markdown():
    head, _, *lines = markdown(SAMPLED | COLUMNS, ROWS)
    html = made()
    table = html[html.index('<table class="numbers">') : html.index("</table>")]
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", table)]
    assert cells == [[text.strip().replace("<b>", "&lt;b&gt;") for text in line.strip("|").split("|")] for line in (head, *lines)]


def test_it_says_what_the_report_says():
    text = Reader(made()).text
    for said in ("reference" + "all pictures \\x1b[31m", "seed7", "torch2.6", "modela, b", "num50", "promptsnone", "too <few>."):
        assert said in text


def test_names_are_escaped_and_nothing_comes_from_outside():
    html = made(captions=["<u>prompt", "b", "c"], worst=[("<s>", pictures(8), ["<em>", "", ""])])
    assert not re.search(r"<(b|i|u|s|em|few|script|link|a)[ >]|url\(|@import", html)
    assert "\x1b" not in html
    addresses = [value for _, attributes in Reader(html).tags for key, value in attributes.items() if key in ("src", "href", "srcset")]
    assert len(addresses) == 9
    assert all(address.startswith("data:image/png;base64,") for address in addresses)


def opened(html):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/\w+;base64,([^"]*)"', html)]


def test_small_pictures_are_whole_and_large_ones_shrunk():
    small, large = pictures(16), np.full((1, 1000, 500, 3), 200, np.uint8)
    found = opened(made(shown=[("small", small)], worst=[("large", large, ["0.1: a prompt"])]))
    assert all(np.array_equal(picture, image) for picture, image in zip(found[:3], small, strict=True))
    assert found[3].size == (192, 384)
    assert np.abs(np.asarray(found[3]).astype(int) - 200).max() <= 2
    assert "0.1: a prompt" in made(worst=[("large", large, ["0.1: a prompt"])])


def test_columns_of_one_prompt_share_it():
    reader = Reader(made(captions=["a cat", "a cat", "a dog"]))
    spans = [attributes["colspan"] for attributes in reader.all("td") if "colspan" in attributes]
    assert spans == ["2", "1"]
    assert reader.text.count("a cat") == 1


def test_what_there_is_not_is_left_out():
    text = Reader(made(REPORT | {"warnings": [], "rows": [ROWS[3]]}, shown=[])).text
    assert "No chart: no model was sampled here" in text
    for part in ("Warnings", "Pictures", "worst"):
        assert part not in text


def drawn(key, axis):
    return charts.chart("FID", key, ".2f", axis, ROWS, ["a <b>student", "runs/another", "samples.npz"])


def test_marks_are_where_the_numbers_say():
    """Evaluations 1, 4, 35 on a logarithmic axis, FID 2 to 12 on a linear one, each with 6% of room at both ends."""
    found, width, height = drawn("fid", "network evaluations"), charts.RIGHT - charts.LEFT, charts.BOTTOM - charts.TOP
    assert found.logarithmic == (True, False)
    part = {
        (mark.curve, mark.x and round((mark.x - charts.LEFT) / width, 6), round((charts.BOTTOM - mark.y) / height, 6))
        for mark in found.marks
    }
    across = [round((0.06 + math.log(calls, 35)) / 1.12, 6) for calls in (1, 4, 35)]
    up = {value: round((0.06 + (value - 2) / 10) / 1.12, 6) for value in (2, 4, 8, 12)}
    assert part == {(0, across[0], up[12]), (0, across[1], up[8]), (1, across[2], up[2]), (2, None, up[4])}
    ((curve, line),) = found.lines  # the student's two, from few evaluations to many
    assert curve == 0
    assert line == sorted(line)
    assert [text for _, text in found.across] == ["1", "2", "5", "10", "20"]
    assert [text for _, text in found.up] == ["5", "10"]
    assert found.marks[0].text == "a <b>student@4: FID 8.00, 4 network evaluations"


def test_time_is_the_rate_turned_round():
    found = drawn("fid", "seconds an image")
    assert [mark.text for mark in found.marks][:2] == [
        "a <b>student@4: FID 8.00, 0.02 seconds an image", "a <b>student@1: FID 12.00, 0.005 seconds an image",
    ]  # fmt: skip
    assert {text for _, text in found.across} >= {"0.01", "0.1"}


def test_values_that_are_none_are_not_drawn():
    assert len(drawn("unheard", "network evaluations").marks) == 3
    assert drawn("lacking", "network evaluations") is None


@pytest.mark.parametrize(
    "values", [[1e99, -1e99], [0, 0], [1e-99, 1.0], [1, 1 + 1e-15], [1e15, 1e15 + 0.125], [3], [1e-99, 1e99], [-1, 1e9]]
)
def test_an_axis_of_any_numbers(values):
    axis = charts.Axis(values, 10, 110, 4)
    assert all(10 <= axis.at(value) <= 110 for value in values)
    assert 1 <= len(axis.ticks) <= 7
    assert all(9.9 <= place <= 110.1 for place, _ in axis.ticks)


PROBE = """<script>
const broken = [];
addEventListener("securitypolicyviolation", event => broken.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const boxes = [...document.querySelectorAll("svg rect")].map(mark => mark.getBBox());
  const texts = [...document.querySelectorAll("svg")].map(svg => [...svg.querySelectorAll("text")].map(text => text.getBBox()));
  const cross = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
  frameElement.dataset.found = JSON.stringify({
    broken, asked: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    marks: boxes.map(box => [box.x + box.width / 2, box.y + box.height / 2]),
    overlaps: texts.map(all => all.some((a, i) => all.some((b, j) => i < j && cross(a, b)))),
    outside: texts.flat().filter(box => box.x < 0 || box.x + box.width > WIDE).length,
    images: [...document.images].map(image => [image.naturalWidth, image.width]),
    page: [document.documentElement.scrollWidth, innerWidth],
  });
}, 100));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_page(tmp_path):
    """On a desk and on a phone: marks, labels and pictures are in their places, nothing is asked for, the page does not scroll sideways."""
    shown = [("first", pictures(16, 40)), ("second " * 9, pictures(16, 40))]
    html = made(shown=shown, worst=[("large", pictures(300), ["prompt " * 9] * 3)])
    probed = html.replace("style-src", "script-src 'unsafe-inline'; style-src").replace(
        "<title>", PROBE.replace("WIDE", str(charts.WIDE)) + "<title>", 1
    )
    frames = [f'<iframe srcdoc="{escape(probed)}" style="border: 0; width: {width}px; height: 900px"></iframe>' for width in (1280, 390)]
    (tmp_path / "page.html").write_text(f"<!doctype html>{''.join(frames)}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars", "--virtual-time-budget=1000", "--dump-dom"]
    dom = subprocess.run([CHROMIUM, *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120).stdout
    desk, phone = (json.loads(unescape(found)) for found in re.findall(r'data-found="([^"]*)"', dom))
    assert desk.pop("page") == [1280, 1280]
    assert phone.pop("page") == [390, 390]
    assert desk == phone
    assert desk["broken"] == []
    assert desk["asked"] == 0
    titles = ["network evaluations", "seconds an image"]
    wanted = [[mark.x, mark.y] for key in ("fid", "unheard") for axis in titles for mark in drawn(key, axis).marks if mark.x is not None]
    assert np.allclose(desk["marks"], wanted, atol=0.06)
    assert desk["overlaps"] == [False] * 4
    assert desk["outside"] == 0
    assert desk["images"] == [[16, 64]] * 80 + [[300, 192]] * 3
