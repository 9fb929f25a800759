"""A report with other runs next to its own: curves in colours, protocols apart, differences of the configs."""

import json
import re

import pytest
from test_report import Page, log

from walt_jax.clock import CLOCK
from walt_jax.errors import UserError
from walt_jax.evaluation.report import write_report
from walt_jax.evaluation.report_compare import COLOURS
from walt_jax.main import main

FVD = {"name": "FVD", "unit": "", "count": 2048, "detector_sha256": "a" * 64}


def run(folder, loss, metrics, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 0, "data": {"fps": 8, "frames": 17}, **config}))
    (folder / "metrics.jsonl").write_text(
        log("tokenizer", range(1, 30), loss=lambda step: loss / step, psnr_db=float, step_seconds=float)
        + log("denoiser", range(1, 20), loss=lambda step: loss / step)
    )
    (folder / "evaluate.json").write_text(json.dumps({"metrics": metrics}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three runs, two of one name; the last has measured by another protocol."""

    def psnr(value, lowest):
        return {"name": "PSNR", "unit": "dB", "value": value, "protocol": f"8 clips; lowest {lowest}, highest 40"}

    first = [psnr(30.5, 20), {**FVD, "value": 100.0, "protocol": "tf1"}]
    second = [psnr(31.5, 25), {**FVD, "value": 90.0, "protocol": "tf1"}]
    third = [{**FVD, "value": 80.0, "protocol": "stylegan_v"}]
    found = [
        run(tmp_path / "a" / "demo", 2.0, first),
        run(tmp_path / "b" / "demo", 3.0, second, seed=7),
        run(tmp_path / "third", 4.0, third, extra={"knob": "<b>"}),
    ]
    rows = [
        {"time": 0.0, "what": "start"},
        {"time": 9.0, "what": "steps", "stage": "tokenizer", "first": 1, "last": 29},
    ]
    (found[0] / CLOCK).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def section(runs):
    return Page(write_report(runs[0], runs[1:])).section("Comparison")


def test_runs_are_told_apart(runs):
    found = section(runs)
    assert re.findall(r"</i>(.*?)</span>", found.split("</div>")[0]) == [
        "a/demo",
        "b/demo",
        f"{runs[2].parent.name}/third",
    ]
    assert "100.0%" in found.split("<h3>Time</h3>")[1]
    for colour in COLOURS[:3]:
        assert found.count(f"stroke: {colour}") >= 4  # faint and smooth, in the losses of two stages
    assert found.count("<b>loss</b>") == 2 and "<b>psnr db</b>" in found.split("<details>")[0]
    assert "<b>step seconds</b>" in found.split("<details>")[1]


def test_protocols_are_never_mixed(runs):
    found = section(runs)
    rows = re.findall(r'<tr><td class="metric">(.*?)</td>(.*?)</tr>', found)
    cells = [(name, re.findall(r'class="number">(.*?)</td>', row), row) for name, row in rows]
    assert [(name, values) for name, values, _ in cells] == [
        ("PSNR", ["30.5 dB", "31.5 dB", "–"]),
        ("FVD", ["100", "90", "–"]),
        ("FVD", ["–", "–", "80"]),
    ]
    assert "another protocol" in cells[2][2] and "another protocol" not in cells[1][2]
    for change in ({"count": 10}, {"detector_sha256": "b" * 64}, {"unit": "x"}):
        metrics = [{**FVD, "value": 80.0, "protocol": "tf1", **change}]
        (runs[2] / "evaluate.json").write_text(json.dumps({"metrics": metrics}))
        assert "another protocol" in section(runs)


def test_only_differences_of_the_configs_are_listed(runs):
    found = section(runs).split("<h3>Configuration</h3>")[1]
    assert re.findall(r'<td class="knob"><code>(.*?)</code>', found) == ["seed", "extra.knob"]
    assert "&lt;b&gt;" in found and "<b>" not in found and "data.fps" not in found


def test_a_stage_that_a_run_lacks_is_one_row(runs):
    stage = {"steps": 9, "optimizer": {f"knob{number}": number for number in range(12)}}
    for path, stages in zip(runs, ({"tokenizer": stage}, {"tokenizer": stage}, {}), strict=True):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "stages": {"denoiser": {"steps": 5}, **stages}}))
    found = section(runs).split("<h3>Configuration</h3>")[1]
    rows = re.findall(r'<td class="knob"><code>(.*?)</code></td>(.*?)</tr>', found)
    assert [name for name, _ in rows] == ["seed", "stages.tokenizer", "extra.knob"]
    assert re.findall(r'class="number">(.*?)</td>', rows[1][1]) == ["13 knobs", "13 knobs", "–"]


def test_the_mode_writes_one_file_and_its_mistakes_are_sentences(runs, tmp_path, capsys):
    page = runs[0] / "report.html"
    assert main([f"--workdir={runs[0]}", "--mode=report", *(f"--compare={path}" for path in runs[1:])]) == 0
    assert capsys.readouterr().out.strip() == f"wrote {page}"
    source = page.read_text()
    assert "://" not in source and 'id="comparison"' in source
    assert main([f"--workdir={runs[0]}", "--mode=report"]) == 0 and 'id="comparison"' not in page.read_text()
    (tmp_path / "empty").mkdir()
    for flags, says in (
        (["--mode=report", f"--compare={tmp_path / 'empty'}"], "holds no run"),
        (["--mode=report", f"--compare={runs[0]}"], "named twice"),
        (["--mode=evaluate", f"--compare={runs[1]}"], "--compare is for --mode=report"),
    ):
        assert main([f"--workdir={runs[0]}", *flags]) == 1
        assert says in capsys.readouterr().err
    assert main([f"--workdir={tmp_path / 'nothing'}", "--mode=report"]) == 1
    with pytest.raises(UserError, match="too many"):
        write_report(runs[0], [run(tmp_path / f"run{n}", 1.0, []) for n in range(8)])
