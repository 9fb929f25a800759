"""The main job on a folder of videos of different kinds, sizes and lengths."""

import csv
import json

import commands
import numpy as np
import pytest

from walt_jax.data.drawn import COMBINATIONS, draw
from walt_jax.data.media import write_video

SMALL = [
    "--config=configs/walt_clips.py",
    "--config.data.frames=5",
    "--config.data.height=16",
    "--config.data.width=32",
    "--config.tokenizer.base_channels=8",
    "--config.tokenizer.norm_groups=4",
    "--config.denoiser.dim=32",
    "--config.denoiser.heads=2",
    "--config.denoiser.layers=2",
    "--config.denoiser.windows=((1, None, None), (None, 1, 2))",
    "--config.stages.tokenizer.steps=3",
    "--config.stages.denoiser.steps=3",
    "--config.stages.denoiser.cached_clips=8",
    "--config.sampling.steps=2",
    "--config.evaluation.clips=3",
]


@pytest.mark.parametrize("captioned", [True, False])
def test_a_folder_of_clips(captioned, tmp_path, cache):
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index, name in enumerate(["a.mp4", "b.gif", "c.MP4", "d.mp4", "e.gif", "f.mp4"]):
        combination = COMBINATIONS[11 * index]
        clip = draw(combination, rng, frames=8 + 5 * index, size=40 + 14 * index)
        write_video(folder / name, clip[:, : 30 + 10 * index], fps=(8, 10, 25)[index % 3])
        rows.append({"file_name": name, "caption": combination.caption, "source": "drawn"})
    if captioned:
        with (folder / "metadata.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)

    flags = [*SMALL, f"--config.data.source={folder}", f"--workdir={tmp_path / 'run'}"]
    (folder / "notes.xyz").write_text("")
    code, out, err = commands.run(*flags, cache=cache)
    assert code == 0, err
    assert "6 clips kept, 1 files skipped\n  1 skipped: no video or image by its name: .xyz" in out
    files = json.loads((tmp_path / "run" / "files.json").read_text())
    assert len(files["files_kept"]) == 6 and files["training"]["would_train"]
    evaluation = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    metric = evaluation["metrics"][0]
    assert metric["name"] == "reconstruction_psnr_db" and str(folder) in metric["protocol"]
    samples = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())
    captions = {row["caption"] for row in rows} if captioned else {""}
    assert samples and {row["prompt"] for row in samples} <= captions
    assert (tmp_path / "run" / "reconstructions.png").exists()
