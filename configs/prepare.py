"""Makes a data set of scenes from raw video: cut, filtered, captioned, in ArrayRecord shards that TFDS reads.

    pip install -e ".[prepare]"
    python -m walt_jax.main --mode=prepare --config=configs/prepare.py --config.prepare.source=FOLDER --workdir=OUT

FOLDER may also be a text file with one path or URI per line; both may be remote (`gs://`). To resume a stopped run,
start the same command again. OUT/prepare.json lists what was kept, what was dropped and why.

Measured on two CPU cores with other work running: 65 videos, 14 minutes in all, give 65 scenes (763 s) with
--config.prepare.short_side=128 in 5 minutes.

To run on other machines, set Beam's runner and its flags, for example

    --config.prepare.runner=DataflowRunner --config.prepare.runner_options="('--project=P', '--region=R')"
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Knobs of `PrepareConfig` with their defaults."""
    prepare = ConfigDict(
        {
            "source": "",
            "cut_threshold": 3.0,
            "min_seconds": 2.0,
            "max_seconds": 20.0,
            "min_short_side": 64,
            "min_motion": 0.0,
            "max_motion": placeholder(float),
            "max_static_fraction": 0.9,
            "max_border_fraction": 0.2,
            "fps": placeholder(float),
            "short_side": placeholder(int),
            "captioner": "",
            "caption_command": "",
            "caption_frames": 8,
            "shard_bytes": 2**28,
            "runner": "DirectRunner",
            "runner_options": (),
        }
    )
    return ConfigDict({"prepare": prepare})
