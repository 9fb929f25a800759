"""The report shows what is there, says what isn't, keeps its marks honest, and needs nothing beside itself."""

import html.parser
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from walt_jax.data.media import write_video
from walt_jax.evaluation import rate_distortion, report
from walt_jax.evaluation.report import write_report
from walt_jax.evaluation.report_curves import curve

HOSTILE = "<script>alert('x')</script> & \"more\""

METRICS = [
    {"name": "PSNR", "value": 33.7, "unit": "dB", "target": 30, "protocol": "64 clips & 17 frames"},
    {"name": "FVD", "value": 31.0, "target": "<= 25", "protocol": "256 clips against themselves"},
    {"name": "just under", "value": 0.99998, "target": 0.99999, "protocol": "not rounded before it is compared"},
    {"name": "share", "value": 0.9921, "unit": "fraction", "target": 0.95, "protocol": "of 126 samples"},
    {"name": "parameters", "value": 4731904, "protocol": "without the text encoder"},
]


class Page(html.parser.HTMLParser):
    """What the tests ask of a page: its tags with their attributes, and its text."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.source, self.tags, self.text = path.read_text("utf-8"), [], ""
        self._stack = []
        self.feed(self.source)
        assert not self._stack, f"left open: {self._stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._stack.pop() == tag

    def handle_data(self, data):
        if self._stack and self._stack[-1] != "style":
            self.text += data + "\n"

    def all(self, tag, **attributes):
        wanted = attributes.items()
        return [found for name, found in self.tags if name == tag and all(found.get(k) == v for k, v in wanted)]

    @property
    def sources(self):
        return [attributes["src"] for _, attributes in self.tags if "src" in attributes]

    def section(self, name):
        return re.search(rf'<h2 id="{name.lower()}">.*?(?=<h2|<footer)', self.source, re.DOTALL)[0]


def clip(size=32, value=200):
    frames = np.zeros((5, size, size, 3), np.uint8)
    for t in range(5):
        frames[t, 4:12, 2 * t : 2 * t + 8] = value
    return frames


def log(stage, steps, **values):
    return "".join(
        json.dumps({"stage": stage, "step": step, **{key: value(step) for key, value in values.items()}}) + "\n"
        for step in steps
    )


@pytest.fixture
def workdir(tmp_path):
    """A finished run, small."""
    folder = tmp_path / "a run"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "samples" / "contact_sheet.png")
    Image.new("RGB", (40, 60)).save(folder / "reconstructions.png")
    (folder / "config.json").write_text(json.dumps({"seed": 7, "data": {"folder": HOSTILE}}))
    loss = {"loss": lambda step: 2.0 / step, "psnr_db": lambda step: 20 + step / 100}
    (folder / "metrics.jsonl").write_text(
        log("tokenizer", range(1, 201), **loss, elapsed_seconds=lambda step: 0.5 * step)
        + log("denoiser", range(1, 401), **loss, elapsed_seconds=lambda step: 100 + step)
    )
    write_video(folder / "samples" / "0.mp4", clip(), 8)
    write_video(folder / "samples" / "1.gif", clip(), 8)
    write_video(folder / "samples" / "2.mp4", clip(256), 8)
    prompts = ["a red square moving right", HOSTILE, "large"]
    files = ["0.mp4", "1.gif", "2.mp4"]
    samples = [{"file": f, "prompt": p, "seed": i} for i, (f, p) in enumerate(zip(files, prompts, strict=True))]
    judged = [
        judgement(folder, 0, "a red square moving right", False, ("red", "square", "right"), (True, True, True)),
        judgement(folder, 1, "a blue square moving up", False, ("blue", "circle", None), (True, False, False)),
        judgement(folder, 2, "a green circle moving up", True, (None, None, None), (False, False, False)),
    ]
    (folder / "evaluate.json").write_text(json.dumps({"metrics": METRICS, "prompts": judged}))
    samples += [{"file": f"judged{i}.mp4", "prompt": judged[i]["prompt"], "seed": i} for i in range(3)]
    (folder / "samples" / "samples.json").write_text(json.dumps(samples))
    return folder


def judgement(folder, i, prompt, held_out, seen, right):
    write_video(folder / "samples" / f"judged{i}.mp4", clip(value=80 * i + 40), 8)
    names = ("colour", "shape", "direction")
    seen, right = dict(zip(names, seen, strict=True)), dict(zip(names, right, strict=True))
    return {"prompt": prompt, "held_out": held_out, "file": f"samples/judged{i}.mp4", "seed": i, **seen, "right": right}


def test_every_part_is_on_the_page(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = Page(path)
    assert page.all("h2") == [
        {"id": name} for name in ("evaluation", "samples", "reconstructions", "training", "configuration")
    ]
    assert not page.all("p", **{"class": "absent"}), "something is said to be missing"
    assert "a run" in page.text
    assert len(page.all("video")) == 2 + 3 and len(page.all("img", alt="")) == 1
    assert all({"autoplay", "loop", "muted", "playsinline"} <= video.keys() for video in page.all("video"))
    assert len(page.all("img", **{"class": "sheet"})) == 2
    assert '"seed": 7' in page.text


def test_text_from_files_stays_text(workdir):
    page = Page(write_report(workdir))
    assert not page.all("script")
    assert page.text.count("<script>alert('x')</script>") == 2, "in the prompt and in the configuration"
    assert page.all("span", title=HOSTILE)


def test_metrics_stand_beside_their_protocols_and_targets(workdir):
    page = Page(write_report(workdir))
    rows = dict(re.findall(r'<tr><td class="metric">(.*?)</td>(.*?)</tr>', page.source))
    assert list(rows) == ["PSNR", "FVD", "just under", "share", "parameters"]
    assert all(html.escape(metric["protocol"]) in rows[metric["name"]] for metric in METRICS)
    assert "33.7 dB" in rows["PSNR"] and "≥ 30" in rows["PSNR"] and "✓ met" in rows["PSNR"]
    assert "≤ 25" in rows["FVD"] and "✗ missed" in rows["FVD"]
    assert "✗ missed" in rows["just under"]
    assert "99.21 %" in rows["share"] and "≥ 95 %" in rows["share"] and "✓ met" in rows["share"]
    assert "4,731,904" in rows["parameters"] and "met" not in rows["parameters"]
    assert "Targets met\n2 of 4\n" in page.text


def test_wrong_prompts_are_marked_and_held_out_ones_apart(workdir):
    evaluation = Page(write_report(workdir)).section("Evaluation")
    held_out, trained = evaluation.split("<h3>Held-out combinations")[1].split("<h3>Trained combinations")
    assert "0 of 1 right" in held_out and "1 of 2 right" in trained
    right, wrong = re.findall(r"<figure.*?</figure>", trained)[:2]
    assert "✗" not in right and 'class="wrong"' not in right and "seed 0" in right
    assert wrong.startswith('<figure class="wrong"') and "seed 1" in wrong
    assert 'saw blue, <span class="bad">circle</span>, <span class="bad">no direction</span>' in wrong
    assert "nothing clear" in held_out
    scores = re.findall(r"<td>(\w.*? combinations)</td>(.*?)</tr>", evaluation)
    assert {name: re.findall(r"\d of \d", row) for name, row in scores} == {
        "Held-out combinations": ["0 of 1"] * 4,
        "Trained combinations": ["2 of 2", "1 of 2", "1 of 2", "1 of 2"],
    }


def test_judged_clips_are_not_shown_again(workdir):
    page = Page(write_report(workdir))
    assert page.section("Evaluation").count("a blue square moving up</span>") == 1
    assert "a blue square moving up</span>" not in page.section("Samples")


def test_tiny_clips_grow_by_a_whole_factor_and_large_ones_do_not(workdir):
    gallery = Page(write_report(workdir)).section("Samples")
    sizes = re.findall(r'width="(\d+)" height="(\d+)"( class="tiny")?', gallery)
    assert sizes == [("128", "128", ' class="tiny"')] * 2 + [("256", "256", "")]


def test_videos_of_steps_play_in_their_order_and_not_all_of_them(workdir):
    assert 'id="progress"' not in Page(write_report(workdir)).source
    for stage, what, steps in (("denoiser", HOSTILE, range(10, 310, 10)), ("tokenizer", "clips", (9, 100))):
        folder = workdir / "previews" / stage
        folder.mkdir(parents=True)
        folder.with_name(f"{stage}.json").write_text(json.dumps({"what": what, "captions": ["a", "<b>"]}))
        for step in steps:
            write_video(folder / f"{step}.mp4", clip(16), 8)
    found = Page(write_report(workdir)).section("Progress")
    assert re.findall("<h3>(.*?)<", found) == ["tokenizer", "denoiser"] and "a · &lt;b&gt;" in found
    shown = [int(step) for step in re.findall(r"<figcaption>step (\d+)", found)]
    assert shown[:2] == [9, 100] and len(shown) == 12
    assert shown[2] == 10 and shown[-1] == 300 and shown[2:] == sorted(shown[2:])
    assert found.count("autoplay loop") == 12 and "<script" not in found


def test_stages_have_their_rows_and_curves_in_order_of_appearance(workdir):
    page = Page(write_report(workdir))
    training = page.section("Training")
    rows = re.findall(r'<td class="stage">(.*?)</td>(.*?)</tr>', training)
    # The last 5 % of 200 lines are the steps 191 to 200, those of 400 are 381 to 400.
    finals = [np.mean(2 / np.arange(first, last + 1)) for first, last in ((191, 200), (381, 400))]
    cells = [re.findall(r">([^<]+)</td>", row) for _, row in rows]
    assert [name for name, _ in rows] == ["tokenizer", "denoiser"]
    assert cells == [["200", f"{finals[0]:.4g}", "1 min 40 s"], ["400", f"{finals[1]:.4g}", "6 min 40 s"]]
    assert training.count("<svg") == 4 and training.count("<b>loss</b>") == 2 and training.count("<b>psnr db</b>") == 2
    assert training.index("<h3>tokenizer") < training.index("<h3>denoiser")


def test_sums_of_the_clock_have_no_curves(tmp_path):
    """The section on time has them; goodput has one."""
    lines = log("tokenizer", range(1, 9), loss=float, goodput=float, clock_useful_seconds=float, elapsed_seconds=float)
    (tmp_path / "metrics.jsonl").write_text(lines)
    training = Page(write_report(tmp_path)).section("Training")
    assert re.findall("<b>(.*?)</b>", training) == ["loss", "goodput"]


@pytest.mark.parametrize("starts", [(0, 60), (0, 0)])
def test_time_adds_up_whether_or_not_the_clock_starts_anew(tmp_path, starts):
    lines = [log(stage, range(1, 61), loss=float, elapsed_seconds=lambda step, start=start: start + step)
             for stage, start in zip("ab", starts, strict=True)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = Page(write_report(tmp_path))
    assert page.text.count("1 min 00 s") == 2 and "2 min 00 s" in page.text


def test_it_is_complete_in_itself(workdir):
    page = Page(write_report(workdir))
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert "://" not in page.source and "@import" not in page.source and "url(" not in page.source.replace("url(#", "")
    links = [found["href"] for _, found in page.tags if "href" in found]
    assert all(link.startswith("#") for link in links)
    assert "complete in itself" in page.text


def test_what_does_not_fit_is_linked(workdir, monkeypatch):
    monkeypatch.setattr(report, "EMBEDDED_BYTES", 0)
    (workdir / "samples" / "0.mp4").rename(workdir / "samples" / "a #1.mp4")
    (workdir / "samples" / "samples.json").write_text(json.dumps([{"file": "a #1.mp4", "prompt": "p", "seed": 0}]))
    page = Page(write_report(workdir))
    assert "samples/a%20%231.mp4" in page.sources and "samples/judged1.mp4" in page.sources
    assert f"{len(page.sources)} files did not fit" in page.text


def test_equal_inputs_give_equal_bytes_and_nothing_else_is_left(workdir):
    before = {path.name for path in workdir.iterdir()}
    first = write_report(workdir).read_bytes()
    assert write_report(workdir).read_bytes() == first
    assert {path.name for path in workdir.iterdir()} == before | {"report.html"}


def test_an_empty_folder_has_a_report_that_says_so(tmp_path):
    text = Page(write_report(tmp_path)).text
    for name in ("config.json", "metrics.jsonl", "evaluate.json", "samples/samples.json", "reconstructions.png"):
        assert f"{name}\n isn't there yet" in text


NAMES = [
    "config.json", "metrics.jsonl", "evaluate.json", "reconstructions.png", "samples/samples.json", "samples/0.mp4",
    "samples/contact_sheet.png", "samples/judged1.mp4",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["absent", "empty", "truncated"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(workdir, name, damage):
    path = workdir / name
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) - 3 if path.suffix != ".mp4" else 40])
    page = Page(write_report(workdir))
    if not (path.suffix == ".png" and damage == "truncated"):  # a browser shows what there is of a picture
        label = path.name if path.suffix == ".mp4" else name
        assert re.search(rf"{re.escape(label)}\s+(isn't|has 1 line|holds no|can't)", page.text)
    if name != "evaluate.json":
        assert "256 clips against themselves" in page.text
    if name != "metrics.jsonl" or damage == "truncated":
        assert page.source.count("<svg") == 4


def test_a_cut_off_line_costs_only_itself(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "denoiser", "step": 401, "lo')
    page = Page(write_report(workdir))
    assert "has 1 line that can't be read" in page.text and '<td class="number">400</td>' in page.source


def test_odd_numbers_do_no_harm(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        log("one", [5], loss=float)
        + log("flat", range(50), loss=lambda _: 0.0, accuracy=lambda _: 1.0)
        + log("wild", range(50), loss=lambda step: [1.0, float("nan"), float("inf"), -1e30][step % 4])
        + log("words", range(3), note=str, done=bool, nothing=lambda _: None)
    )
    page = Page(write_report(tmp_path))
    assert re.findall(r'<td class="stage">(.*?)</td>', page.source) == ["one", "flat", "wild", "words"]
    assert page.source.count("<svg") == 4


def test_a_long_curve_stays_small():
    steps = np.arange(100_000)
    values = np.exp(-steps / 20_000) + np.random.default_rng(0).uniform(0.01, 0.02, len(steps))
    assert len(curve("loss", steps, values, large=True)) < 50_000


def test_curves_choose_their_scale():
    steps = np.arange(1, 1001)
    assert re.search(r">0\.01</text>.*>0\.1</text>", curve("loss", steps, 1 / steps**0.7, large=True), re.DOTALL)
    assert ">0.01</text>" not in curve("accuracy", steps, 1 / steps**0.7, large=True)
    steady = steps + 1000, 100 + np.sin(steps)
    assert ">0</text>" in curve("clips_per_second", *steady, large=False)
    assert ">0</text>" not in curve("accuracy", *steady, large=False)


def test_a_tokenizers_report_has_no_section_on_samples(tmp_path):
    (tmp_path / "config.json").write_text('{"denoiser": null}')
    skipped = [{"file": "a.mp4", "reason": "too short"}]
    files = {"clips_kept": 7, "clips_skipped": skipped, "training": {"warnings": ["9 of 12 files are left out"]}}
    (tmp_path / "files.json").write_text(json.dumps(files))
    page = write_report(tmp_path).read_text()
    assert 'id="samples"' not in page and "samples.json" not in page
    assert "7 clips kept, 1 files skipped" in page and "too short" in page and "9 of 12 files are left out" in page
    (tmp_path / "config.json").write_text('{"denoiser": {}}')
    assert 'id="samples"' in write_report(tmp_path).read_text()


def test_the_noise_schedule_is_drawn_and_the_sheet_of_the_data_shown(workdir):
    config = {"denoiser": {"dim": 8}, "diffusion": {"schedule": {"name": "cosine", "shift": 2.0}}}
    (workdir / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (40, 60)).save(workdir / "data.png")
    page = Page(write_report(workdir))
    assert "log SNR, by time in thousandths" in page.section("training") and "cosine" in page.section("training")
    assert page.all("img", **{"class": "sheet"})[-1]["alt"] == "data.png" and 'alt="data.png"' in page.section("data")
    config["diffusion"]["schedule"]["name"] = "of another version"
    (workdir / "config.json").write_text(json.dumps(config))
    assert "log SNR" not in write_report(workdir).read_text()


@pytest.mark.parametrize("span", [1.5, 8, 40, 3000])
def test_the_labels_of_the_rate_axis_do_not_overlap(span, monkeypatch):
    figures = []
    monkeypatch.setattr(rate_distortion, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    rate_distortion.plot([{"codec": "x", "bits_per_pixel": 0.03 * span**i, "psnr_db": 20.0 + i} for i in (0, 0.5, 1)])
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    boxes = [t.label1.get_window_extent() for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) >= 1 and all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
