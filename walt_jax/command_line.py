"""The command line's flags, and the config whose knobs they set."""

import ast
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from walt_jax.config_file import with_config_path
from walt_jax.errors import UserError

MAX_SEED = 2**31 - 1
MAX_STEPS = 1000  # of a sampler
KNOB = "--config."
FORMATS = ["safetensors", "orbax", "diffusers", "stablehlo"]


def parse(argv: list[str], modes: Sequence[str]) -> flags.FlagValues:
    """Reads the flags. Knobs that the config file leaves at their defaults can be set too.

    Raises:
        UserError: if one is unknown or its value is wrong.
    """
    argv = [with_config_path(argument) for argument in argv]
    others = [argument for argument in argv if not argument.startswith(KNOB)]
    if others == argv:
        return _parsed(argv, modes)
    knobs = [argument for argument in argv if argument.startswith(KNOB)]
    values = _parsed(others, modes)
    if values.config is None:
        values.config = _of_run(values.workdir, knobs[0])
    else:
        knobs = [argument for argument in knobs if _is_missing(argument, values.config)]
        values = _parsed([argument for argument in argv if argument not in knobs], modes)
    for argument in knobs:
        _set(values.config, argument)
    return values


def _of_run(workdir: str | None, knob: str) -> ConfigDict:
    """The config of the workdir's run; `knob` is an argument that sets one.

    Raises:
        UserError: if there is none.
    """
    from walt_jax.workdir import folder_of, read_config

    found = read_config(folder_of(workdir)) if workdir else None
    if found is None:
        raise UserError(
            f"{knob} sets a knob of a config, and --config is missing; name the file, --config=configs/walt_demo.py, "
            "or the folder of a run, --workdir=DIR, to change a knob of its own config."
        )
    found.pop("mesh", None)  # the devices here may be others than those that trained the run
    return ConfigDict(found, type_safe=False)


def _set(config: ConfigDict, argument: str) -> None:
    """Sets a knob, which the config may lack, by the argument that names it.

    Raises:
        UserError: if it has no value, or is in something that is no group of knobs.
    """
    name, equals, text = argument.removeprefix(KNOB).partition("=")
    *groups, knob = name.split(".")
    stages = config.get("stages", {})
    if groups[:1] == ["stages"] and stages and groups[1:] and groups[1] not in stages:
        raise UserError(f"{argument} names no stage of the config; its stages are {', '.join(stages)}.")
    if not equals:
        raise UserError(f"{argument} has no value; give it one, as in --config.data.fps=8.")
    with config.unlocked():
        group: Any = config
        for name in groups:
            if group.get(name) is None:
                group[name] = ConfigDict()
            group = group[name]
            if not isinstance(group, ConfigDict):
                raise UserError(f"{argument}: {name} is a knob, not a group of them.")
        try:
            group[knob] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            group[knob] = text


def _is_missing(argument: str, config: ConfigDict) -> bool:
    """Whether an argument sets a knob that the config lacks, in a group that it has or lacks."""
    name, equals, _ = argument.removeprefix(KNOB).partition("=")
    if not argument.startswith(KNOB) or not equals:
        return False
    group: Any = config
    for part in name.split("."):
        if not isinstance(group, ConfigDict):
            return False
        if part not in group:
            return True
        group = group[part]
    return False


def defined(argv: list[str], modes: Sequence[str]) -> flags.FlagValues:
    """All flags, at their defaults; `argv` names the config file, whose knobs are flags too."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_enum("mode", "train", list(modes), "what to do", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "sample: a caption; repeatable", flag_values=values)
    flags.DEFINE_string("prompts", None, "sample: a file with a caption a line", flag_values=values)
    flags.DEFINE_integer(
        "seed", 0, "sample: of the first video of each prompt", flag_values=values, lower_bound=0, upper_bound=MAX_SEED
    )
    flags.DEFINE_integer("num_samples", 1, "sample: videos a prompt", flag_values=values, lower_bound=1)
    flags.DEFINE_string("negative_prompt", None, "sample: what guidance leads away from", flag_values=values)
    flags.DEFINE_string("video", None, "reconstruct, sample: the clip to read; sample: it is given", flag_values=values)
    flags.DEFINE_string("image", None, "sample: the first frame", flag_values=values)
    flags.DEFINE_string("last_image", None, "sample: the last frame", flag_values=values)
    flags.DEFINE_multi_string(
        "condition",
        [],
        "sample: FILE[@FRAME[:STRENGTH]], a picture or clip that is given from a frame on, negative from the end; a "
        "strength below 1 is followed part of the way; repeatable",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mask", None, "sample: a picture or clip, white where the video is made anew", flag_values=values
    )
    flags.DEFINE_float(
        "motion",
        0.0,
        "sample: strength, 0 to 1, with which frames between given pictures or clips follow the motion from one to the "
        "other, which is found by block matching; 0 is none",
        flag_values=values,
    )
    flags.DEFINE_string(
        "schedule",
        None,
        "sample: which frames of a long video come from which, of a model trained on frames with gaps: autoreg, "
        "long-range, hierarchy-2, adaptive-autoreg, adaptive-hierarchy-2 …",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "extend", None, ["forward", "backward", "loop"], "sample: how --video goes on", flag_values=values
    )
    frames = "sample: frames of the video; evaluate: of each of --videos, the first ones, 16 by default"
    flags.DEFINE_integer("num_frames", None, frames, flag_values=values, lower_bound=1)
    for name in ("height", "width"):
        flags.DEFINE_integer(name, None, "sample: pixels of the video", flag_values=values, lower_bound=1)
    flags.DEFINE_list(
        "cascade", [], "sample: workdirs of super-resolution runs that upscale the videos, in order", flag_values=values
    )
    flags.DEFINE_multi_string(
        "lora",
        [],
        "sample, export: PATH[:WEIGHT], a LoRA that changes the model: a file in PEFT's layout or the workdir of the "
        "run that trained it; the weight is 1 by default; repeatable",
        flag_values=values,
    )
    flags.DEFINE_bool("int8", False, "sample: with the layers' weights in 8 bits, see docs/lora.md", flag_values=values)
    flags.DEFINE_float("fps", None, "sample: frames a second of the files", flag_values=values, lower_bound=0.01)
    flags.DEFINE_integer(
        "steps", None, "sample: sampling steps", flag_values=values, lower_bound=1, upper_bound=MAX_STEPS
    )
    flags.DEFINE_float("guidance", None, "sample: the scale of guidance; 1 is none", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "serve: where to listen", flag_values=values)
    flags.DEFINE_integer("port", 8000, "serve: where to listen", flag_values=values, lower_bound=0, upper_bound=65535)
    flags.DEFINE_string(
        "token",
        None,
        "serve: what clients have to know; without one, where others than this machine's can reach the server, one is "
        "made and printed",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "no_metadata",
        False,
        "sample, serve: prompts, seeds and settings are in no file's tags, and no file beside a video names them",
        flag_values=values,
    )
    flags.DEFINE_string(
        "c2pa_key",
        None,
        "sample, serve: a private key in PEM, which signs each video's C2PA manifest; with --c2pa_certificate",
        flag_values=values,
    )
    flags.DEFINE_string(
        "c2pa_certificate", None, "sample, serve: the key's chain of certificates in PEM", flag_values=values
    )
    flags.DEFINE_multi_string(
        "compare", [], "report: the workdir of another run, shown next to this one; repeatable", flag_values=values
    )
    flags.DEFINE_string("videos", None, "evaluate: folder of videos of any origin to measure", flag_values=values)
    flags.DEFINE_string(
        "reference", None, "evaluate: folder of real videos, for --videos or --protocol", flag_values=values
    )
    flags.DEFINE_multi_string(
        "protocol",
        [],
        "evaluate: how --videos are compared with --reference: fvd_tf1, fvd_stylegan_v, fvd_common, and for images "
        "fid_tf1, fid_pytorch, fid_clean; jedi; of a run: ucf101_walt, k600_walt, imagenet_50k, rfvd_ucf; repeatable",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "weights",
        [],
        "evaluate: weights of a metric's network, NETWORK=FILE, such as i3d=i3d_pretrained_400.pt, also inception=, "
        "lpips_alex=, lpips_vgg=, and clip=FOLDER, c3d=FOLDER, vjepa=FOLDER; repeatable",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out",
        None,
        "sample: folder for the videos; evaluate: of --videos, folder for evaluate.json; reconstruct: the .mp4 to "
        "write; encode: folder of the data set; export: folder, or for DiT and Latte .safetensors, to write",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        "safetensors",
        FORMATS,
        "export: what --out=FOLDER holds; a --out=FILE.safetensors has the published layout of DiT or Latte",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "clips",
        0,
        "encode: how many clips, windows drawn anew each epoch; 0: each once",
        flag_values=values,
        lower_bound=0,
    )
    flags.DEFINE_string(
        "stage", None, "encode: the stage whose clips are encoded; the last by default", flag_values=values
    )
    flags.DEFINE_string(
        "topology",
        None,
        "plan: hardware to plan for, which need not be there, such as v5e:4x4, v5p:4x4x8, '2x v5e:16x16' or h100:8; "
        "compiled for TPUs, and for GPUs where JAX's plugin for CUDA is installed, else analysed",
        flag_values=values,
    )
    flags.DEFINE_float(
        "price_per_chip_hour",
        None,
        "plan: of the topology's chips, to state what a million clips cost",
        flag_values=values,
        lower_bound=0.0,
    )
    flags.DEFINE_bool(
        "auto_mesh",
        False,
        "train: takes the mesh that --mode=plan ranks first for the devices here, instead of config.mesh",
        flag_values=values,
    )
    flags.DEFINE_string(
        "profile_steps",
        None,
        "train: trace these steps of each stage, such as 10:15, into the workdir's profile/, for TensorBoard; counted "
        "from the first step that the command does",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "of several processes: HOST:PORT of process 0; on Cloud TPU, GKE and Slurm they find each other without",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "how many processes there are", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", flag_values=values, lower_bound=0)
    flags.DEFINE_bool("gif", False, "sample: also write each video as a GIF", flag_values=values)
    return values


def _parsed(argv: list[str], modes: Sequence[str]) -> flags.FlagValues:
    values = defined(argv, modes)
    try:
        rest = values([sys.argv[0], *argv])
        if values.config is not None:
            values.config.to_dict()  # a file that could not be loaded says so when it is first read
    except Exception as error:  # a config file is a program, so it can raise anything
        raise UserError(_flag_sentence(error)) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags look like --name=value.")
    return values


def _flag_sentence(error: Exception) -> str:
    """An error of absl, ml_collections or a config file in one line."""
    text = " ".join(str(error).split())
    if "Traceback" in text:  # of a config file, which absl has put into its message
        return f"The config can't be loaded: {str(error).strip().splitlines()[-1].strip()}"
    if isinstance(error, flags.Error):
        return text
    if isinstance(error, AttributeError | KeyError):  # a knob that the file lacks, and no value
        return f"The config has no knob {text}; set one as in --config.data.fps=8."
    reason = text.rsplit("Failed loading config file", 1)[-1].rsplit("]:", 1)[-1].strip()
    return f"The config can't be loaded: {type(error).__name__}: {reason}"
