"""Trains and runs tokenizers and video generators.

python -m walt_jax.main --config=configs/NAME.py --workdir=DIR [--mode=train] [--config.some.knob=value]
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import textwrap
import time
from typing import Any

from absl import flags

from walt_jax import command_line, remote
from walt_jax.errors import Interrupted, UserError
from walt_jax.malloc import collect_seldom, keep_freed_memory
from walt_jax.parallel import processes
from walt_jax.training import stopping
from walt_jax.training.stopping import Stopped, stop_at_once

LONGEST_PROMPT = 10_000  # characters; text encoders read some dozens of tokens


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command, see `command_line.parse`."""
    return command_line.parse(argv, list(RUN))


def knobs_of(values: flags.FlagValues, workdir: pathlib.Path) -> dict[str, Any]:
    """The config's knobs as JSON values; without --config, those of the run in the workdir.

    Raises:
        UserError: if there is neither.
    """
    from walt_jax.config import plain
    from walt_jax.workdir import read_config

    if values.config is not None:
        return plain(values.config, "config")
    knobs = read_config(workdir)
    if knobs is None:
        raise UserError(
            f"--config is missing, and {workdir} holds no run; name the folder of a run, or a config to begin one: "
            "--config=configs/walt_demo.py."
        )
    return knobs


def open_run(values: flags.FlagValues) -> tuple[Any, dict[str, Any]]:
    """The run of the flags, and all of its knobs.

    Raises:
        UserError: if a knob is wrong.
    """
    from walt_jax.workdir import folder_of

    workdir = folder_of(values.workdir)
    knobs = knobs_of(values, workdir)
    if values.config is None:  # the devices here may be others than those that trained the run
        knobs.pop("mesh", None)

    _compile_once()

    from walt_jax.config import build
    from walt_jax.training.run import Run
    from walt_jax.training.run_config import RunConfig

    config = build(RunConfig, knobs, "config")
    return Run(config, workdir, values.lora if values.mode in CHANGED_BY_LORA else ()), _all_knobs(config)


def _compile_once() -> None:
    """Compiled programs are kept between calls; the variable is JAX's own."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "walt_jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _all_knobs(config: Any) -> dict[str, Any]:
    """The config as JSON has it, with the knobs that its file leaves at their defaults."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def knobs_before(workdir: pathlib.Path) -> dict[str, Any] | None:
    """All knobs of the run in the workdir; knobs that are newer than the run have their defaults.

    Raises:
        UserError: if they can't be read any more.
    """
    from walt_jax.config import build
    from walt_jax.training.run_config import RunConfig
    from walt_jax.workdir import read_config

    knobs = read_config(workdir)
    return None if knobs is None else _all_knobs(build(RunConfig, knobs, f"{workdir / 'config.json'}: config"))


def open_trained_run(values: flags.FlagValues) -> Any:
    """The run of the flags, checked to be the one in the workdir.

    Raises:
        UserError: if it is another, or none is there.
    """
    from walt_jax.training.run_config import only_published
    from walt_jax.workdir import check_same

    run, knobs = open_run(values)
    before = knobs_before(run.workdir)
    if before is None and only_published(run.config, run.workdir):
        return run
    if before is None:
        raise UserError(f"{run.workdir} holds no run; train one first, with --mode=train.")
    check_same(run.workdir, before, knobs)
    return run


def train(values: flags.FlagValues) -> None:
    """Runs the stages, then evaluates."""
    from walt_jax.clock import Clock
    from walt_jax.training.data_files import sentences
    from walt_jax.training.profiling import profile_steps
    from walt_jax.workdir import check_empty, check_same, claim, locked, write_atomically

    profile = profile_steps(values.profile_steps) if values.profile_steps else None
    run, knobs = open_run(values)
    if values.auto_mesh:
        run, knobs = _on_best_mesh(run)
    start = time.monotonic()
    with locked(run.workdir):
        processes.exchanged(None)  # the folder is there
        before = knobs_before(run.workdir)
        if before is None:
            check_empty(run.workdir)
        else:
            check_same(run.workdir, before, knobs)
        # Before the workdir is claimed, so that a failed command can be corrected and repeated with the same workdir.
        run.check()
        files = run.data.report_files()
        vocab = run.make_vocabulary()
        processes.exchanged(None)  # all have looked at the workdir before it is written to
        with processes.one_after_the_first():
            claim(run.workdir, knobs)
            run.text.keep(vocab)
        print(run.summary(), flush=True)
        for line in sentences(files):
            print(line, flush=True)
        write_atomically(run.workdir / "files.json", json.dumps(files, indent=1, ensure_ascii=False) + "\n")
        with Clock(run.workdir) as clock, run.on_mesh():
            run.train(profile, clock)
            clock.row("other")
            report = _evaluate(run, clock)
        print(clock.account.sentence())
    print(f"Done in {time.monotonic() - start:.0f} s; wrote {run.workdir}, look at {report} first.")


def _on_best_mesh(run: Any) -> tuple[Any, dict[str, Any]]:
    """The run on the mesh that is ranked first for the devices here, and its knobs.

    Raises:
        UserError: if these are of no known kind, or no mesh fits.
    """
    import jax

    from walt_jax.parallel.topology import attached
    from walt_jax.training.plan_search import best_mesh
    from walt_jax.training.run import Run

    config = dataclasses.replace(run.config, mesh=best_mesh(run.config, attached(jax.devices())))
    return Run(config, run.workdir), _all_knobs(config)


def evaluate(values: flags.FlagValues) -> None:
    """Measures what has been trained, or --videos."""
    from walt_jax.workdir import locked

    if values.videos:
        _evaluate_files(values)
        return
    if values.reference and not values.protocol:
        raise UserError(
            "--reference is for files; name those to measure with --videos=FOLDER, or how to measure a run with "
            "--protocol=NAME."
        )

    from walt_jax.evaluation.detector_weights import weights_of
    from walt_jax.evaluation.distances import DETECTORS
    from walt_jax.evaluation.paper_protocols import PAPER_PROTOCOLS

    for name in values.protocol:
        if name not in PAPER_PROTOCOLS:
            raise UserError(
                f"--protocol={name} is for files, named with --videos and --reference; a run is measured by "
                f"{', '.join(PAPER_PROTOCOLS)}."
            )
    weights = weights_of(values.weights)
    for name in weights:
        if name not in DETECTORS:
            raise UserError(
                f"--weights={name}=… is for files, named with --videos; a run is measured with "
                f"{' and '.join(DETECTORS)}."
            )
    run = open_trained_run(values)
    if weights:
        evaluation = dataclasses.replace(run.config.evaluation, weights={**run.config.evaluation.weights, **weights})
        run.config = dataclasses.replace(run.config, evaluation=evaluation)
    with locked(run.workdir), run.on_mesh():
        report = None if values.protocol else _evaluate(run)
        names = values.protocol or run.config.evaluation.protocols
        if names:
            report = _evaluate_by_protocols(run, names, values.reference)
    print(f"wrote {run.workdir / 'evaluate.json'} and {report}")


def _evaluate_by_protocols(run: Any, names: list[str], reference: str | None) -> pathlib.Path:
    """Measures a run as papers do, against its data or `reference`; the numbers are added to its evaluate.json."""
    from walt_jax.data.pipeline import Data
    from walt_jax.evaluation.measure_protocol import Measurement, measure_protocol, merge_into_report
    from walt_jax.evaluation.paper_protocols import PAPER_PROTOCOLS
    from walt_jax.evaluation.report import write_report

    generator = run.generator() if run.config.denoiser else None
    data, files = run.config.data, run.data.files
    if reference:
        data = dataclasses.replace(data, source=reference)
        files = Data(data)
    for name in names:
        metrics = measure_protocol(
            Measurement(
                PAPER_PROTOCOLS[name],
                run.workdir,
                run.weights_digest(),
                run.codec,
                generator.tokenizer if generator else run.tokenizer(),
                generator,
                data,
                files.source,
                run.config.evaluation,
            )
        )
        merge_into_report(run.workdir / "evaluate.json", metrics)
        for metric in metrics:
            print(f"{metric['name']:40} {metric['value']:8.4g}\n    {metric['protocol']}", flush=True)
    with processes.one_after_the_first() as first:
        return write_report(run.workdir) if first else run.workdir / "report.html"


def _evaluate_files(values: flags.FlagValues) -> None:
    """Measures the files of a folder, against those of another."""
    from walt_jax.evaluation.detector_weights import weights_of
    from walt_jax.evaluation.evaluate_files import evaluate_files, sentences
    from walt_jax.workdir import CONFIG, local, locked

    out = local(values.out or values.workdir, "evaluate --videos", "--out" if values.out else "--workdir")
    if (out / CONFIG).exists():
        raise UserError(f"{out} holds a run, whose evaluate.json stays; name another folder with --out=FOLDER.")
    _compile_once()
    reference = pathlib.Path(values.reference) if values.reference else None
    weights = weights_of(values.weights)
    with locked(out, "--out"):
        report = evaluate_files(
            pathlib.Path(values.videos), reference, out, values.protocol, weights, values.num_frames
        )
    for line in sentences(report):
        print(line)
    print(f"wrote {out / 'evaluate.json'}")


def _evaluate(run: Any, clock: Any = None) -> pathlib.Path:
    from walt_jax.evaluation.evaluate import evaluate
    from walt_jax.evaluation.report import write_report

    generator = run.generator() if run.config.denoiser else None
    tokenizer = generator.tokenizer if generator else run.tokenizer()
    data = run.config.data
    for metric in evaluate(
        run.workdir, run.codec, tokenizer, generator, run.data.unseen(), data, run.config.evaluation
    ):
        target = f" (target {metric['target']:g})" if "target" in metric else ""
        print(f"{metric['name']:26} {metric['value']:8.4g} {metric['unit']}{target}")
    if clock is not None:
        clock.row("evaluation")
    with processes.one_after_the_first() as first:
        return write_report(run.workdir) if first else run.workdir / "report.html"


def report(values: flags.FlagValues) -> None:
    """Writes report.html anew, also while a run trains; --compare=RUN shows other runs next to it."""
    from walt_jax.evaluation.report import write_report
    from walt_jax.evaluation.report_files import holds_run
    from walt_jax.workdir import folder_of

    workdir = folder_of(values.workdir)
    if not holds_run(workdir):
        raise UserError(f"{workdir} holds no run; train one first, with --mode=train.")
    print(f"wrote {write_report(workdir, [folder_of(path, '--compare') for path in values.compare])}")


def sample(values: flags.FlagValues) -> None:
    """Writes videos of prompts."""
    prompts = list(values.prompt)
    if values.prompts is not None:
        try:
            lines = pathlib.Path(values.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts={values.prompts} can't be read ({error}); give a UTF-8 text file.") from error
        prompts += [line.strip() for line in lines if line.strip()]
    for prompt in prompts:
        if len(prompt) > LONGEST_PROMPT:
            raise UserError(
                f"The prompt {prompt[:40]!r}… has {len(prompt):,} characters, and at most {LONGEST_PROMPT:,} are read; "
                "shorten it."
            )
        if not prompt.isprintable():
            raise UserError(f"The prompt {prompt!r} has unprintable characters; write it as UTF-8 text in one line.")
    if not prompts:
        raise UserError('There is nothing to sample; give --prompt="..." or --prompts=FILE with a prompt a line.')
    from walt_jax.workdir import folder_of

    sign = _signer(values)
    run = open_trained_run(values)
    out = folder_of(values.out, "--out") if values.out else run.workdir / "generated"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} can't be made ({error.strerror}); name a folder.") from error

    from walt_jax.data.media import unfinished
    from walt_jax.generation.ask_files import sample_files
    from walt_jax.staging import Staging

    stopping.WRITING.append(unfinished)
    stopping.leaves(
        f"{out} has the frames made so far, see samples.json there; a video without a frame has no file, and the same "
        "command makes all of them again"
    )
    generator = _as_asked(values, run.generator())
    if generator.low_res is not None:
        raise UserError("This run upscales clips, and a prompt has none; --mode=evaluate upscales unseen clips.")
    for warning in (*run.text.cut_captions(prompts), *run.text.unknown_words(prompts)):
        print(f"warning: {warning}", file=sys.stderr)
    seeds = [values.seed + index for _ in prompts for index in range(values.num_samples)]
    prompts = [prompt for prompt in prompts for _ in range(values.num_samples)]
    with run.on_mesh(), Staging(out) as folder:
        count = sample_files(
            generator,
            _ask(values, run.config.data.fps),
            (run.config.data.frames, run.config.data.height, run.config.data.width),
            list(zip(prompts, seeds, strict=True)),
            values.negative_prompt or "",
            folder,
            gif=values.gif,
            tags=not values.no_metadata,
            cascade=[_upscaler(path) for path in values.cascade],
            made_with=_made_with(values, run),
            made_by=None if values.no_metadata else run.made_by(),
            sign=sign,
        )
    print(f"wrote {count} videos, samples.json and contact_sheet.png to {out}")


def _signer(values: flags.FlagValues) -> Any:
    """What signs files, see `content_credentials`; None without a key.

    Raises:
        UserError: if flags are missing or exclude each other, or the key can't be used.
    """
    if values.c2pa_key is None and values.c2pa_certificate is None:
        return None
    if values.c2pa_key is None or values.c2pa_certificate is None:
        raise UserError("--c2pa_key=KEY.pem and --c2pa_certificate=CHAIN.pem are used together; name both.")
    if values.no_metadata:
        raise UserError("--no_metadata leaves out what a C2PA manifest says; leave one of the two out.")

    from walt_jax.generation.content_credentials import signer

    return signer(pathlib.Path(values.c2pa_key), pathlib.Path(values.c2pa_certificate))


def _upscaler(path: str) -> Any:
    """The super-resolution model of a workdir."""
    from walt_jax.export.load import load

    return load(path).generator


def _as_asked(values: flags.FlagValues, generator: Any) -> Any:
    """The generator with the flags' steps and guidance."""
    config = generator.config
    if values.steps is not None:
        config = dataclasses.replace(config, steps=values.steps)
    if values.guidance is not None:
        config = dataclasses.replace(config, guidance=dataclasses.replace(config.guidance, scale=values.guidance))
    generator = dataclasses.replace(generator, config=config)
    if values.schedule is not None:
        generator = generator.following(values.schedule)
    return generator.in_int8() if values.int8 else generator


def _made_with(values: flags.FlagValues, run: Any) -> dict[str, Any]:
    """What changes the weights, for the files' tags."""
    found: dict[str, Any] = {"loras": [lora.label for lora in run.loras]} if run.loras else {}
    return found | ({"int8": True} if values.int8 else {})


def _ask(values: flags.FlagValues, fps: float) -> Any:
    """What the flags give of a video."""
    from walt_jax.generation.asking import Ask, Condition

    given = [Condition.parse(text) for text in values.condition]
    if values.video:
        given.insert(0, Condition(values.video))
    if values.image:
        given.insert(0, Condition(values.image, picture=True))
    if values.last_image:
        given.append(Condition(values.last_image, -1, picture=True))
    size = values.num_frames, values.height, values.width
    return Ask(values.fps or fps, given, values.mask, values.extend, *size, values.motion)


def reconstruct(values: flags.FlagValues) -> None:
    """Encodes and decodes a video file; its frame rate and size are kept."""
    if not values.video or not values.out:
        raise UserError("Name the file to read and the one to write: --video=IN --out=OUT.mp4.")
    out = pathlib.Path(values.out)
    if out.suffix.lower() != ".mp4":
        raise UserError(f"--out={out} should be a file that ends in .mp4.")
    if out.exists() and out.samefile(values.video):
        raise UserError(f"--out={out} is the video that is read; name another file.")
    run = open_trained_run(values)

    import tqdm

    from walt_jax.data.media import write_video_stream
    from walt_jax.data.video import ClipError, frame_rate, read_frames

    tokenizer = run.tokenizer()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fps = frame_rate(values.video)
        with tqdm.tqdm(desc="reconstructing", unit="frame", dynamic_ncols=True) as progress:

            def watched(frames: Any) -> Any:
                for frame in frames:
                    yield frame
                    progress.update()

            frames = run.codec.stream(tokenizer, read_frames(values.video, fps))
            with run.on_mesh():
                count = write_video_stream(out, watched(frames), fps)
    except ClipError as error:
        raise UserError(f"--video={values.video} can't be read: {error}.") from error
    print(f"wrote {count} frames to {out}; sound is not copied")


def data(values: flags.FlagValues) -> None:
    """Reads the config's data as training would, and reports what is kept and skipped."""
    from walt_jax.data.pipeline import Data
    from walt_jax.training.data_files import sentences, verdict
    from walt_jax.training.data_report import report_data
    from walt_jax.workdir import write_atomically

    run, _ = open_run(values)
    run.workdir.mkdir(parents=True, exist_ok=True)
    found = report_data(run.config, Data(run.config.data, refuse=False), run.workdir / "data.png")
    write_atomically(run.workdir / "data.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for line in [*sentences(found), verdict(found)]:
        print(line)
    if "clips_read" in found:
        print(
            f"{found['tokens_valid_fraction']:.1%} of tokens are valid; {found['clips_per_second']:.1f} clips and "
            f"{found['frames_per_second']:.0f} frames a second"
        )
    print(f"wrote {run.workdir / 'data.json'}" + (f" and {run.workdir / 'data.png'}" if "clips_read" in found else ""))


def prepare(values: flags.FlagValues) -> None:
    """Makes a data set of raw video; both may be remote."""
    from etils import epath

    out = epath.Path(values.workdir)
    knobs = knobs_of(values, out)

    from walt_jax.config import build
    from walt_jax.data.prepare import prepare
    from walt_jax.data.prepare_config import Knobs

    print(prepare(build(Knobs, knobs, "config").prepare, out))


def encode(values: flags.FlagValues) -> None:
    """Makes a data set of latents of the config's clips, with the tokenizer of the workdir's run."""
    from etils import epath

    run, _ = open_run(values)
    workdir = run.workdir
    out = epath.Path(values.out) if values.out else workdir / "encoded"
    tokenizer = run.tokenizer() if run.config.tokenizer_from else run.run_in(workdir).tokenizer()
    with run.on_mesh():
        report = run.encode(out, tokenizer, values.clips, values.stage)
    print(
        f"wrote {report['clips']:,} clips, {report['latents_bytes']:,} bytes of latents, to {out}; train on them with "
        f"--config.tokenizer_from={workdir} --config.stages.NAME.latents={out}"
    )


def plan(values: flags.FlagValues) -> None:
    """Prints the config, or that of the workdir's run, and counts its parameters and operations; reads no data.

    With a topology it also says whether the config fits there and how fast it can be.
    """
    from walt_jax.parallel.topology import topology
    from walt_jax.workdir import folder_of, write_atomically

    named = values.topology and topology(values.topology)
    if named is None and values.price_per_chip_hour is not None:
        raise UserError("--price_per_chip_hour is of the chips of a --topology; name one, such as --topology=v5e:4x4.")

    workdir = folder_of(values.workdir)
    knobs = knobs_of(values, workdir)

    from walt_jax.config import build
    from walt_jax.training.plan import plan
    from walt_jax.training.run_config import RunConfig
    from walt_jax.workdir import flatten

    config = build(RunConfig, knobs, "config")
    # First: a mesh that does not fit says so at once.
    on_hardware = {} if named is None else _plan_hardware(config, named, values.price_per_chip_hour, workdir)
    counts = plan(config) | on_hardware
    for name, value in flatten(counts["config"]).items():
        print(f"--config.{name}={value!r}")
    for name, size in counts["params"].items():
        forward = counts["forward_flops_per_clip"][name]
        print(f"{name:13} {size:15,} parameters {forward / 1e9:12,.2f} GFLOP forward a clip")
    for name, stage in counts["stages"].items():
        encoding = "encoding_flops_per_step" in stage and (
            f"; encoding its clips {stage['encoding_flops_per_step'] / 1e12:,.4f}, "
            + ("in each step" if config.stages[name].encodes else "once, before the first step")
            + f"; their latents {stage['latents_bytes_per_clip'] / 1e3:,.3g} GB a million clips"
        )
        print(f"stage {name:20} {stage['train_flops_per_step'] / 1e12:12,.4f} TFLOP a step{encoding or ''}")
    if named is not None:
        from walt_jax.training.plan_hardware import sentences
        from walt_jax.training.plan_search import ranking_lines

        for line in [*sentences(counts), *(ranking_lines(counts["ranking"]) if "ranking" in counts else [])]:
            print(line)
    write_atomically(workdir / "plan.json", json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {workdir / 'plan.json'}" + (f" and {workdir / 'plan.png'}" if named is not None else ""))


def _plan_hardware(config: Any, topology: Any, price: float | None, workdir: pathlib.Path) -> dict[str, Any]:
    """The plan on a topology, with a ranking of others where it does not fit or is slow; draws `plan.png`."""
    from walt_jax.training.plan_hardware import plan_hardware
    from walt_jax.training.plan_picture import picture
    from walt_jax.training.plan_search import SLOW, ranked

    found = plan_hardware(config, topology, price)
    if not found["fits"] or found["estimated_mfu"] < SLOW:
        found["ranking"] = ranked(config, topology)
    workdir.mkdir(parents=True, exist_ok=True)
    picture(found, workdir / "plan.png")
    return found


def benchmark(values: flags.FlagValues) -> None:
    """Times the config's parts, or those of the workdir's run, on this machine."""
    from walt_jax.workdir import write_atomically

    run, _ = open_run(values)

    from walt_jax.training.benchmark import benchmark

    rows = benchmark(run.config)
    for row in rows:
        mfu = f"{row['mfu']:6.1%} of peak" if "mfu" in row else ""
        rate = f"{row['tokens_per_second']:12,.0f} tokens a second" if "tokens_per_second" in row else ""
        if "frames_per_second" in row:
            rate += f"{row['frames_per_second']:12,.0f} frames a second"
        print(f"{row['name']:36} {row['seconds_median']:9.4f} s {mfu:15} {rate}")
    print(f"peak: {rows[0]['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s, {rows[0]['peak']}")
    write_atomically(run.workdir / "benchmark.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {run.workdir / 'benchmark.json'}")


def export(values: flags.FlagValues) -> None:
    """Writes a trained run for others to read, see `docs/export.md`."""
    if not values.out:
        raise UserError("Name the folder to write: --out=FOLDER; or for DiT and Latte a file: --out=FILE.safetensors.")
    run = open_trained_run(values)

    from walt_jax.export.export import export

    print(export(run, values.format, pathlib.Path(values.out)))


def serve(values: flags.FlagValues) -> None:
    """Answers requests for videos over HTTP, and shows a page to ask for them."""
    from walt_jax.workdir import local

    local(values.workdir, "serve")  # keeps videos in it
    sign = _signer(values)
    run = open_trained_run(values)

    from walt_jax.serving.serve import serve

    generator = _as_asked(values, run.generator())
    if generator.low_res is not None:
        raise UserError("This run upscales clips, and a prompt has none; serve the base run.")
    data = run.config.data
    serve(
        generator,
        (data.frames, data.height, data.width),
        data.fps,
        run.workdir,
        run.identity(),
        run.made_by(),
        run.on_mesh,
        values.host,
        values.port,
        values.token,
        not values.no_metadata,
        sign,
    )


RUN = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "report": report,
    "reconstruct": reconstruct,
    "data": data,
    "prepare": prepare,
    "encode": encode,
    "plan": plan,
    "benchmark": benchmark,
    "export": export,
    "serve": serve,
}


CHANGED_BY_LORA = ("sample", "export")
UNREAD = "does not read it, leave it out"
OF_ONE_MODE = {  # flags, with their mode and what others do
    "auto_mesh": ("train", UNREAD),
    "profile_steps": ("train", UNREAD),
    "topology": ("plan", UNREAD),
    "price_per_chip_hour": ("plan", UNREAD),
    "compare": ("report", "compares no runs"),
    "int8": ("sample", "keeps the weights as they are"),
}
HERE = ("video", "image", "last_image", "condition", "mask", "prompts", "lora", "videos", "reference", "weights",
        "c2pa_key", "c2pa_certificate")  # flags of files that are read from this machine  # fmt: skip
WRITTEN_HERE = ("reconstruct", "export")  # modes whose --out is on this machine
ALONE = ("data", "prepare", "plan", "reconstruct", "report", "benchmark", "export", "serve")  # modes of one process
JOINING = ("reconstruct", "benchmark", "export", "serve")  # those that find out whether there are others


def usage() -> str:
    """What `--help` says."""
    values = command_line.defined([], list(RUN))
    helps = {name: values[name].help for name in values if not name.startswith("config")}
    helps["mode"] = f"what to do; default {values['mode'].default!r}"
    helps["config"] = "the config file; --config.GROUP.KNOB=VALUE sets a knob, which its dataclass explains"
    modes = {name: mode.__doc__.splitlines()[0] for name, mode in RUN.items()}
    lines = [__doc__.strip()]
    for title, entries in {"modes": modes, "flags": {f"--{name}": helps[name] for name in sorted(helps)}}.items():
        lines += ["", f"{title}:"]
        for name, text in entries.items():
            text = " ".join(text.split(";\n")[0].split())
            lines += textwrap.wrap(f"  {name:14} {text}", 110, subsequent_indent=17 * " ")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs a mode; returns the exit code."""
    if {"--help", "-h", "help"} & set(argv):
        print(usage())
        return 0
    stopping.leaves(stopping.RESUMES)
    try:
        values = parse(argv)
        if not values.workdir and not (values.mode == "evaluate" and values.videos and values.out):
            raise UserError("--workdir is missing; name the folder of the run: --workdir=DIR.")
        if values.lora and values.mode not in CHANGED_BY_LORA:
            raise UserError(f"--lora is for {' and '.join(CHANGED_BY_LORA)}; --mode={values.mode} takes none.")
        if (values.c2pa_key or values.c2pa_certificate) and values.mode not in ("sample", "serve"):
            raise UserError(f"--c2pa_key signs videos of --mode=sample and serve; --mode={values.mode} signs nothing.")
        for name, (mode, elsewhere) in OF_ONE_MODE.items():
            if values[name].value and values.mode != mode:
                raise UserError(f"--{name} is for --mode={mode}; --mode={values.mode} {elsewhere}.")
        _check_here(values)
        _join(values)
        RUN[values.mode](values)
    except UserError as error:
        return _failed(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        return _failed(f"out of memory ({reason}); make batch_size or the models' sizes smaller.")
    except Exception as error:
        if (known := remote.as_user_error(error, values.workdir)) is not None:
            return _failed(known)
        if not isinstance(error, OSError):
            raise
        # a full disk, missing permissions
        return _failed(f"{error.filename or values.workdir}: {error.strerror}; check path and free space.")
    except Stopped as stopped:
        print(f"\nstopped; {stopped.saved}.", file=sys.stderr)
        return processes.leave(processes.RESTART, "" if stopped.together else "a signal stopped it")
    except KeyboardInterrupt:  # without `stop_at_once`, as in tests
        print(f"\nstopped; {Stopped(signal.SIGINT).saved}.", file=sys.stderr)
        return processes.leave(processes.RESTART, "a signal stopped it")
    return processes.leave(0)


def _check_here(values: flags.FlagValues) -> None:
    """Checks the flags of files on this machine.

    Raises:
        UserError: if one names an object store.
    """
    for name in HERE:
        given = values[name].value or []
        for path in [given] if isinstance(given, str) else given:
            if remote.is_remote(path):
                raise UserError(
                    f"--{name}={path} is remote, and is read from this machine; copy it here, and name that."
                )
    if values.mode in WRITTEN_HERE and values.out and remote.is_remote(values.out):
        raise UserError(f"--out={values.out} is remote, and is written to this machine; name a path here.")


def _join(values: flags.FlagValues) -> None:
    """Joins the other processes, in modes that several work on.

    Raises:
        UserError: if there are others in a mode of one process.
    """
    count = values.num_processes or 1
    if count == 1 or values.mode not in ALONE:
        if values.mode not in ALONE or values.mode in JOINING:
            processes.initialise(values.coordinator, values.num_processes, values.process_id)
        count = processes.place()[1]
    if count > 1 and values.mode in ALONE:
        raise UserError(
            f"--mode={values.mode} is the work of one process, and there are {count}; start it once, without "
            "--coordinator, --num_processes and --process_id."
        )


def _failed(error: str | UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return processes.leave(processes.RESTART if isinstance(error, Interrupted) else 1, str(error))


if __name__ == "__main__":
    keep_freed_memory()
    collect_seldom()
    stop_at_once()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    code = processes.guarded(lambda: main(sys.argv[1:]))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code == processes.RESTART:
        # XLA may still compute or compile what was stopped, and crashes where Python takes its objects away meanwhile.
        os._exit(code)
    sys.exit(code)
