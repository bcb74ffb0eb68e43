"""The page of a run: what it says, that it holds what it shows, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from distill_cli import watch
from distill_cli.errors import DistillError, UsageError
from distill_cli.methods.dmd.config import DMDConfig
from distill_cli.recipes import dump
from distill_cli.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path):
    """A run of 1,000 steps that has come to 300: a spike, a value that is no number, a torn line."""
    run = Run.create(tmp_path / "a <b>run", dump(DMDConfig(steps=1000, batch_size=8)), "dmd")
    for step in range(1, 301):
        loss = 50.0 if step == 137 else 1 / step
        run.log(
            {"step": step, "images": 8 * step, "student_loss": loss, "fake_loss": None if step == 5 else 0.5, "spikes": int(step > 136)}
        )
    with open(run.speed, "w") as handle:
        handle.write(json.dumps({"step": 300, "time": 1.7e9, "images_per_second": 20.0}) + "\n")
    with open(run.metrics, "a") as handle:
        handle.write('{"step": 301, "student')
    for step in range(10, 301, 10):
        Image.new("RGB", (40, 20), (step % 256, 0, 0)).save(run.samples / f"{step:06d}.png")
    (run.samples / "zz.png").write_bytes(b"no grid of ours")
    return run


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_what_the_page_says(run):
    html, done = watch.page(run)
    reader = Reader(html)
    assert not done
    assert "300 of 1,000" in reader.text
    assert "20.0 images a second" in reader.text
    assert f"{700 * 8 / 20 / 3600:.2f} hours" in reader.text
    assert "loss spikes1 so far" in reader.text
    assert "student_loss: 0.003333 at step 300, logarithmic" in reader.text
    assert "fake_loss: 0.5 at step 300" in reader.text
    pictures = reader.all("img")
    assert [a["alt"] for a in pictures] == [f"step {s}" for s in (10, 50, 80, 120, 150, 190, 230, 260, 300)]
    assert len(reader.all("polyline")) == 4  # two losses, spikes, throughput


LOOK = {"health_saturation": 1.5, "health_frechet": 0.4}
STRONG = "the student's pictures are over-saturated: their colours are {} times as strong as the teacher's. Lower <lr>"


def looked_at(run):
    """Two looks; the newest warning has been there since the first of them, an older one is gone."""
    run.forget_after(300)
    for step, saturation, warnings in ((310, 1.25, [STRONG.format(1.25), "gone: by now"]), (320, 1.5, [STRONG.format("1.50")])):
        run.log({"step": step, "images": 8 * step, "student_loss": 0.1, **LOOK, "health_saturation": saturation, "warnings": warnings})


def test_looks_stand_beside_the_losses_with_their_warnings(run):
    assert "Warnings" not in Reader(watch.page(run)[0]).text
    looked_at(run)
    reader = Reader(watch.page(run)[0])
    assert f"since step 310: {STRONG.format('1.50')}" in reader.text
    assert "gone" not in reader.text
    assert "health_saturation: 1.5 at step 320" in reader.text
    (teacher,) = [line for line in reader.all("line") if line["class"] == "teacher"]  # the distance has none
    high, low = 1.5 + 0.025, 1.0 - 0.025  # 5% of air around the teacher's 1 and the student's 1.5
    assert float(teacher["y1"]) == pytest.approx((watch.HIGH - watch.BOTTOM - 8) * (high - 1) / (high - low) + 8, abs=0.06)


def test_warnings_of_a_foreign_file_are_only_text(run):
    run.log({"step": 330, "student_loss": 1, "warnings": [7, None, "<b>: x"]})
    run.log({"step": 340, "student_loss": 1, "warnings": "none"})
    assert "<b>" not in watch.page(run)[0]


def test_the_page_needs_nothing_from_outside(run):
    html, _ = watch.page(run)
    addresses = [value for _, attributes in Reader(html).tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "<script" not in html
    assert "url(" not in html


def test_names_are_escaped(run):
    html, _ = watch.page(run)
    assert "a &lt;b&gt;run" in html
    assert "<b>" not in html


def test_a_spike_survives_thinning():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    thin = watch.thinned(points)
    assert len(thin) <= 410
    assert (54_321, 9.0) in thin
    assert thin == sorted(thin)


@pytest.mark.parametrize(
    ("low", "high", "wanted"), [(0.0, 1.0, [0, 0.5, 1.0]), (0.03, 0.19, [0.05, 0.1, 0.15]), (-7, 45, [0, 20, 40]), (2.0, 2.0, [2.0])]
)
def test_ticks(low, high, wanted):
    assert watch.ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("made", ["comparison.png", "vae"])
def test_a_live_page_loads_itself_again_until_the_run_is_done(made, run):
    assert '<meta http-equiv="refresh" content="7">' in watch.page(run, 7)[0]
    run.forget_after(300)
    run.log({"step": 1000, "images": 8000, "student_loss": 0.1})
    assert not watch.page(run, 7)[1]  # its pictures are not made yet
    if made == "vae":
        (run.folder / made).mkdir()
    else:
        Image.new("RGB", (40, 20)).save(run.folder / made)
    html, done = watch.page(run, 7)
    assert done
    assert "refresh" not in html


def test_a_run_that_has_logged_nothing(tmp_path):
    run = Run.create(tmp_path / "new", dump(DMDConfig()), "dmd")
    assert "Nothing is logged yet" in watch.page(run)[0]
    with pytest.raises(UsageError, match="no run: it has no recipe.yaml"):
        watch.write(tmp_path)
    run.recipe.write_text("a: [")
    with pytest.raises(DistillError, match="not readable as YAML"):
        watch.page(run)


def test_follow_writes_until_the_run_is_done(run, distill, monkeypatch):
    def end(seconds):
        run.forget_after(300)
        run.log({"step": 1000, "images": 8000, "student_loss": 0.1})
        Image.new("RGB", (40, 20)).save(run.folder / "comparison.png")

    monkeypatch.setattr("time.sleep", end)
    found = distill("watch", run.folder, "--follow", "--every", 3, "--json")
    assert found.json == {"page": str(run.folder / "report.html"), "done": True}
    assert "1,000 of 1,000" in (run.folder / "report.html").read_text()


STRANGE = [
    '{"step": 301, "student_loss": NaN, "fake_loss": Infinity}',
    '{"step": 302, "student_loss": "0.1", "fake_loss": [1], "spikes": {"a": 1}, "<b>": 1}',
    '{"step": 303, "student_loss": true, "fake_loss": null}',
    f'{{"step": 304, "student_loss": {"9" * 400}, "fake_loss": 1e308}}',
    '{"step": 305, "student_loss": -1e308, "fake_loss": 5e-324, "\\ud800": 1}',
    '{"step": -5, "student_loss": 1}',
    f'{{"step": {"9" * 400}, "student_loss": 1}}',
    f'{{"step": {"9" * 5000}, "student_loss": 1}}',
    '{"step": "306", "student_loss": 1}',
    '{"step": true, "student_loss": 1}',
    '{"step": NaN}',
    '{"step": [1]}',
    "[1, 2]",
    "7",
    "null",
    "[" * 9000,
    "\\0\\0",
    '{"step": 2, "student_loss": 0.5}',
]


def test_malformed_numbers_are_left_out(run):
    """Not one of them is in the way of the page, or of the numbers beside it."""
    for strange in STRANGE:
        with open(run.metrics, "ab") as handle:
            handle.write(b"\n" + strange.encode() + b"\n\xff\xfe\n")
        reader = Reader(watch.page(run)[0])
        assert len(reader.all("polyline")) >= 4
    assert "student_loss: 0.5 at step 2" in reader.text
    html = watch.write(run.folder)[0].read_text()
    for number in re.findall(r'points="([^"]*)"', html):
        assert all(0 <= float(x) <= watch.WIDE for x in re.findall(r"([^ ,]+),", number))
    assert not re.search(r'(?:points|x1|y1|x|y|cx|cy)="[^"]*(?:nan|inf)', html)
    assert "<b>" not in html


@pytest.mark.parametrize("value", ['"fast"', "NaN", "Infinity", "-3", "0", "true", "[1]", "null", "1e308", "9" * 400, "1e-320"])
@pytest.mark.parametrize("key", ["images_per_second", "time", "step"])
def test_a_speed_that_is_no_number(key, value, run):
    line = {"step": 300, "time": 1.7e9, "images_per_second": 20.0, key: "X"}
    run.speed.write_text("text\n" + json.dumps(line).replace('"X"', value) + "\n")
    assert "300 of 1,000" in Reader(watch.page(run)[0]).text


@pytest.mark.parametrize("value", ["many", "[1]", "-5", "1.5", ".nan", ".inf", "true", "null", "9" * 400, "1e400", "2001-01-01", "{a: 1}"])
@pytest.mark.parametrize("key", ["steps", "batch_size", "command"])
def test_a_recipe_of_strange_types(key, value, run):
    run.recipe.write_text(f"{key}: {value}\n")
    assert "step300" in Reader(watch.page(run)[0]).text


@pytest.mark.parametrize(
    "content", [b"steps: " + b"9" * 5000, b"a: 2001-99-99", b"\xff\xfe\x00", b"? [a]\n: 1", b"[" * 3000, b"a: [", b"\x00"]
)
def test_a_recipe_that_is_none(content, run):
    run.recipe.write_bytes(content)
    try:
        watch.page(run)
    except DistillError as error:
        assert error.message == f"{run.recipe}: not readable as YAML"  # noqa: PT017 - some are read as they stand


@pytest.mark.parametrize(
    "values", [[5e-324, 1e-320], [1e99, -1e99], [0, 0], [1e-99, 1.0], [1, 1 + 1e-15], [-1e99, -1e99 + 1e84], [1e15, 1e15 + 0.125]]
)
def test_a_chart_of_any_numbers(values):
    points = watch.series([{"step": k, "a": value} for k, value in enumerate(values)])["a"]
    assert "<polyline" in watch.chart("a", points)


def test_pictures_that_are_none(run):
    for path in sorted(run.samples.glob("0*.png"))[:-1]:
        path.unlink()
    (run.samples / "000010.png").write_bytes(b"")
    (run.samples / "000020.png").mkdir()
    (run.folder / "comparison.png").write_bytes(b"half a pict")
    html = watch.page(run)[0]
    assert len(Reader(html).all("img")) == 3
    assert "step 20: is a directory" in html


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_page(run, tmp_path):
    """Headless Chromium without a network: the lines are where the numbers say, the pictures are decoded, the warnings are seen."""
    looked_at(run)
    path, _ = watch.write(run.folder, tmp_path / "page.html")
    probe = """<script>addEventListener("load", () => {
      const boxes = [...document.querySelectorAll("polyline")].map(line => line.getBBox());
      const images = [...document.images].map(image => image.naturalWidth);
      const teacher = document.querySelector("line.teacher").getBBox(), warning = document.querySelector(".warnings li");
      document.body.dataset.found = JSON.stringify({boxes: boxes.map(b => [b.width, b.height]), images,
        teacher: [teacher.width, teacher.height], warning: warning.getBoundingClientRect().height});
    });</script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    flags += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1800", "--virtual-time-budget=3000"]
    dom = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r'data-found="([^"]*)"', dom).group(1).replace("&quot;", '"'))
    assert found["images"] == [40] * 9
    loss = found["boxes"][0]
    assert loss[0] == pytest.approx(watch.WIDE - watch.LEFT - 8, abs=1)  # from the first step to the last
    assert loss[1] == pytest.approx((watch.HIGH - watch.BOTTOM - 8) / 1.1, abs=1)  # 5% of air above and below
    assert found["teacher"] == [pytest.approx(watch.WIDE - watch.LEFT - 8, abs=1), 0]
    assert found["warning"] > 10
