"""Raw video into a data set of scenes: cut, filtered, re-captioned, in ArrayRecord shards that TFDS reads.

    pip install -e ".[prepare]"
    python -m walt_jax.main --mode=prepare --config=configs/prepare.py --config.prepare.source=FOLDER --workdir=OUT

FOLDER may be a text file with a path or URI a line; both may be remote (`gs://`). A stopped run goes on with the same
command. What was kept, what was dropped and why is in OUT/prepare.json.

65 videos of 14 minutes: 65 scenes (763 s) kept, shrunk with --config.prepare.short_side=128, in 5 minutes on two CPU
cores with other work on them.

On other machines, name Beam's runner and its flags, for example

    --config.prepare.runner=DataflowRunner --config.prepare.runner_options="('--project=P', '--region=R')"
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The knobs."""
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
