"""Runs whose workdir is in an object store: the lock, files that grow, checkpoints, mistakes, and a whole run.

The store is `gcs_server`, which speaks to the same gcsfs, TensorStore and Orbax that Google's does.
"""

import os
import pathlib
import re
import shutil
import signal
import threading
import time

import commands
import gcs_server
import gcsfs.retry
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from PIL import Image

from walt_jax import lease, local_copy, main, staging
from walt_jax.clock import CLOCK, Clock, account, read_clock
from walt_jax.data.latents import Encoded, LatentClips, write_latents
from walt_jax.errors import Interrupted, UserError
from walt_jax.evaluation.report_previews import previews_section, steps_of
from walt_jax.parallel import processes
from walt_jax.training import preview
from walt_jax.training.checkpoint import Checkpoints, saved_steps, set_aside
from walt_jax.training.metrics import MetricsLog
from walt_jax.training.state import TrainState
from walt_jax.workdir import copy_folder, folder_of, locked, read_config, remove_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, gcs_server.serving("bucket") as served:
        for name, value in served.variables().items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # of copies
        yield served


@pytest.fixture
def remote(server, request) -> pathlib.Path:
    """A folder of its own."""
    yield folder_of(f"gs://bucket/{request.node.name}")
    server.refusal, server.gone = None, False


# The lock


@pytest.fixture
def quick_lease(monkeypatch):
    for name, seconds in {"RENEW_SECONDS": 0.05, "STALE_SECONDS": 0.4, "POLL_SECONDS": 0.02}.items():
        monkeypatch.setattr(lease, name, seconds)


def test_a_second_writer_is_refused_and_a_released_lock_is_free(remote, quick_lease):
    for _ in range(2):
        with (
            locked(remote),
            pytest.raises(UserError, match=rf"Another process is writing to {remote} \(process {os.getpid()} on"),
            locked(remote),
        ):
            pass
    assert not (remote / lease.LOCK).exists()


def test_a_lock_that_is_not_renewed_is_taken_over_and_its_owner_notices(remote, quick_lease, capsys):
    store, runs, lost = lease.open_store(str(remote)), threading.Event(), threading.Event()

    class Paused:
        read = store.read

        def write(self, *key_and_value, if_equal):
            runs.wait()
            return store.write(*key_and_value, if_equal=if_equal)

    runs.set()
    with lease.leased(Paused(), str(remote), "--workdir", lambda sentence: lost.set()):
        runs.clear()
        with lease.leased(store, str(remote), "--workdir", pytest.fail):
            assert "it is taken over if it does not change for" in capsys.readouterr().err
            runs.set()
            assert lost.wait(5)
            assert store.read(lease.LOCK).result().state == "value"
    assert store.read(lease.LOCK).result().state == "missing"


def test_of_many_that_want_a_stale_lock_one_gets_it(remote, quick_lease):
    (remote / lease.LOCK).write_text("{")  # of a killed process, damaged
    inside, most, refused = [0], [0], []

    def want():
        try:
            with lease.leased(lease.open_store(str(remote)), str(remote), "--workdir", pytest.fail):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.5)
                inside[0] -= 1
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and len(refused) == 4, refused


def test_a_write_whose_answer_is_lost_does_not_lose_the_lock(remote, quick_lease):
    """TensorStore repeats it, and the store refuses what has replaced the generation itself."""
    store = lease.open_store(str(remote))

    class Losing:
        read = store.read

        def write(self, key, value, if_equal):
            store.write(key, value, if_equal=if_equal).result()
            return store.write(key, value, if_equal=if_equal)

    with lease.leased(Losing(), str(remote), "--workdir", pytest.fail):
        time.sleep(0.3)


def test_a_process_that_ends_at_once_gives_the_lock_back(remote):
    """As the thread does that ends a process some seconds after a signal."""
    with locked(remote):
        assert (remote / lease.LOCK).exists()
        processes.leave(processes.RESTART)
        assert not (remote / lease.LOCK).exists()


# Files


def test_files_that_grow_are_uploaded_and_go_on_in_another_process(remote):
    """Steps that were logged after the last checkpoint are done again, so are taken out."""
    log = MetricsLog(remote, "denoiser", 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
    assert not (remote / "metrics.jsonl").exists()
    staging.staging(remote).upload()
    assert [row[1] for row in commands.losses(remote)] == [1, 2, 3]
    with Clock(remote) as clock:
        log.close()
        clock.row("other")
    staging.staging.cache_clear()  # as another process begins
    with Clock(remote):
        log = MetricsLog(remote, "denoiser", 2)
        log.write(3, {"loss": 0.5})
        log.close()
    assert [row[1:] for row in commands.losses(remote)] == [(1, "1.0"), (2, "0.5"), (3, "0.5")]
    assert len(account(read_clock(remote / CLOCK)).attempts) == 2
    assert len(list((remote / "tensorboard" / "denoiser").iterdir())) >= 1
    staging.staging.cache_clear()


def test_only_changed_files_are_uploaded_and_of_a_local_folder_none(remote, server, tmp_path):
    with staging.Staging(remote) as folder:
        (folder / "a").write_bytes(b"1")
        (folder / "b.tmp").write_bytes(b"half")
    made = staging.Staging(remote)
    made.file("a").touch()
    assert made.file("a").read_bytes() == b"1"
    before = len(server.written)
    with made as folder, made:
        (folder / "a").write_bytes(b"12")
    assert len(server.written) == before + 1 and (remote / "a").read_bytes() == b"12"
    assert not (remote / "b.tmp").exists()
    assert staging.Staging(tmp_path).folder == tmp_path


def test_what_others_write_is_seen_at_once(remote, server):
    (remote / "a").write_bytes(b"1")
    assert [path.name for path in remote.iterdir()] == ["a"] and not (remote / "b").exists()
    server.put("bucket", f"{remote.name}/b", b"22")
    server.put("bucket", f"{remote.name}/a", b"333")
    assert [path.name for path in remote.iterdir()] == ["a", "b"] and (remote / "b").exists()
    assert (remote / "a").stat().length == 3 and (remote / "a").read_bytes() == b"333"


def test_folders_are_copied_both_ways(remote, tmp_path):
    (tmp_path / "from" / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (tmp_path / "from" / name).write_text(name)
    copy_folder(tmp_path / "from", remote / "to", lambda names: [name for name in names if name == "b"])
    copy_folder(remote / "to", tmp_path / "back")
    assert sorted(str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*")) == [
        "a",
        "sub",
        "sub/c",
    ]
    for folder in (remote / "to", tmp_path / "back", tmp_path / "none"):
        remove_folder(folder)
        assert not folder.exists()


def test_videos_of_steps_are_written_removed_and_reported(remote):
    clip = np.zeros((2, 16, 16, 3), np.uint8)
    shown = preview.Shown(Image.new("RGB", (4, 4)), [[clip]], ["a"], "clips", 8.0)
    for step in (5, 10, 15, 10):
        preview.write_preview(remote, "s", step, shown)
    assert steps_of(remote / "previews" / "s") == [5, 10]
    section = previews_section(remote, ["s"], lambda path: path.name)
    assert re.findall(r"<figure>(.*?)<figcaption>", section) == ["5.mp4", "10.mp4"]


def test_cached_latents_are_read_from_a_copy(remote, server, monkeypatch):
    clips = [Encoded(np.full((1, 2, 2, 3), number, np.float32), f"clip {number}") for number in range(3)]
    write_latents(remote, {"tokenizer": "t"}, 3, lambda numbers: (clips[number] for number in numbers))
    with monkeypatch.context() as patch:
        patch.setattr(local_copy.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(UserError, match=r"copied to .*copies.* to be read, which takes .* free some space"):
            LatentClips(remote)
    for _ in range(2):
        found = LatentClips(remote, tokenizer="t")
        assert [found[index].caption for index in range(3)] == ["clip 0", "clip 1", "clip 2"]
        np.testing.assert_array_equal(found[2].latents, clips[2].latents)
        for name in list(server.buckets["bucket"]):  # the second time without the shards
            if "array_record" in name:
                del server.buckets["bucket"][name]


# Checkpoints


def state(step: int) -> TrainState:
    weights = np.random.default_rng(step).normal(size=(16, 16)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(weights)}, {}, {"w": jnp.asarray(2 * weights)}, {})


def test_checkpoints_come_back_and_damaged_or_incomplete_ones_do_not(remote, server, capsys):
    folder, logged = remote / "checkpoints" / "denoiser", []
    checkpoints = Checkpoints(folder, writer=True, before_commit=lambda: logged.append(saved_steps(remote, "denoiser")))
    for step in (1, 2):
        checkpoints.save(state(step), {"at": step}, {})
    checkpoints.close()
    assert logged == [[], [1]] and saved_steps(remote, "denoiser") == [1, 2]
    objects = server.buckets["bucket"]
    (name,) = (name for name in objects if name.endswith("denoiser/2/weights/manifest.ocdbt"))
    server.put("bucket", name, objects[name].content[:-1])
    for name, stored in list(objects.items()):  # one that was being written
        if "/denoiser/1/" in name and not name.endswith("commit_success.txt"):
            server.put("bucket", name.replace("/denoiser/1/", "/denoiser/3/"), stored.content)
    restored, position, _ = Checkpoints(folder, writer=False).restore(state(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state(1))) and position == {"at": 1}
    assert "2 is damaged (weights/manifest.ocdbt has" in capsys.readouterr().err


def test_a_folder_that_is_set_aside_is_renamed(remote):
    for _ in range(2):
        (remote / "4" / "weights" / "a").write_bytes(b"1")
        aside = set_aside(remote / "4", "damaged")
    assert (
        aside == remote / "4.damaged-2" and not (remote / "4").exists() and set_aside(remote / "4", "damaged") is None
    )
    assert (aside / "weights" / "a").read_bytes() == (remote / "4.damaged" / "weights" / "a").read_bytes() == b"1"


def test_a_checkpoint_that_can_not_be_written_is_a_sentence(remote, server, at_once):
    """Lost connections ask for a restart, refusals do not; the last good checkpoint stays."""
    folder = remote / "checkpoints" / "denoiser"
    for refusal, kind, words in (
        ((403, "x@y does not have storage.objects.create access"), UserError, "check credentials and permissions"),
        (None, Interrupted, "the checkpoint of step 1 is complete; the same command goes on"),
    ):
        checkpoints = Checkpoints(folder, writer=True)
        checkpoints.save(state(1), {}, {}) if refusal else None
        checkpoints.wait()
        server.refusal, server.gone = refusal, refusal is None
        with pytest.raises(UserError, match=words) as raised:
            checkpoints.save(state(2), {}, {})
            checkpoints.wait()
        assert raised.type is kind
        server.refusal, server.gone = None, False
        assert saved_steps(remote, "denoiser") == [1]


# Mistakes


@pytest.fixture
def at_once(monkeypatch):
    """Requests are repeated without waiting."""

    async def no_time(seconds):
        pass

    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", no_time)


def error_of(capsys, *flags: str, code: int = 1) -> str:
    assert main.main(list(flags)) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("gs://nowhere/run", "no bucket nowhere .* gcloud storage buckets create gs://nowhere"),
        ("gs://bucket", "names no folder of a bucket; name one, as in gs://BUCKET/FOLDER"),
        ("gs://", "names no folder of a bucket"),
        ("s3://bucket/run", "s3://bucket/run is remote, and runs are kept in local folders and on gs://"),
        ("gs://bucket/nothing", "holds no run"),
    ],
)
def test_mistakes_are_a_sentence(server, workdir, words, capsys):
    assert re.search(words, error_of(capsys, "--mode=report", f"--workdir={workdir}"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode=sample", "--image=gs://b/a.png"], "--image=gs://b/a.png is remote, and is read from this machine;"),
        (["--mode=sample", "--lora=gs://b/run:0.5"], "--lora=gs://b/run:0.5 is remote"),
        (["--mode=reconstruct", "--video=a.mp4", "--out=gs://b/a.mp4"], "--out=gs://b/a.mp4 is remote, and is written"),
        (["--mode=export", "--out=gs://b/export"], "name a path here"),
    ],
)
def test_files_of_this_machine_that_are_elsewhere_are_a_sentence(flags, words, tmp_path, capsys):
    assert words in error_of(capsys, *flags, f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "Anonymous caller does not have storage.objects.list access"), "Anonymous caller"),
        ((403, "x@y does not have storage.objects.get access"), "does not have storage.objects.get access"),
        (None, "Server disconnected"),
    ],
)
def test_a_store_that_refuses_or_does_not_answer_is_a_sentence(
    remote, server, refusal, words, at_once, monkeypatch, capsys
):
    server.refusal, server.gone = refusal, refusal is None
    said = error_of(capsys, "--mode=report", f"--workdir={remote}")
    assert words in said and "check its address, network and credentials" in said
    server.refusal, server.gone = None, False

    def later(values):  # once it has been reached
        folder = folder_of(values.workdir)
        server.refusal, server.gone = refusal, refusal is None
        (folder / "report.html").write_bytes(b"")

    monkeypatch.setitem(main.RUN, "report", later)
    code = 1 if refusal else processes.RESTART
    said = error_of(capsys, "--mode=report", f"--workdir={remote}", code=code)
    assert words in said and ("check credentials" if refusal else "the same command goes on") in said


def test_a_missing_package_is_a_sentence(server, monkeypatch, capsys):
    def missing(path):
        raise ImportError("no such package")

    monkeypatch.setattr(backend.fsspec_backend, "fs", missing)
    assert "pip install gcsfs" in error_of(capsys, "--mode=report", "--workdir=gs://bucket/run")


def test_modes_that_need_a_local_folder_say_so(server, capsys):
    assert "gcloud storage cp -r gs://bucket/run FOLDER" in error_of(
        capsys, "--mode=serve", "--workdir=gs://bucket/run"
    )
    assert read_config(epath.Path("gs://bucket/run")) is None


# Runs


def check_equal(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    assert commands.measured(workdir) == commands.measured(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, commands.trained(workdir), commands.trained(expected)))
    for file in ("evaluate.json", "samples/samples.json"):
        assert (workdir / file).read_bytes() == (expected / file).read_bytes()


def committed(server: gcs_server.GcsServer) -> int:
    """How many checkpoints have been complete, also those that are removed by now."""
    return sum(bool(re.search(r"/checkpoints/\w+/\d+/commit_success.txt$", name)) for name in server.written)


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_equals_a_local_one(remote, server, tiny_run, cache, tmp_path):
    flags = [commands.TINY, f"--workdir={remote}"]
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process, before = commands.start(*flags, cache=cache, quick=False), committed(server)
        while process.poll() is None and committed(server) < before + 1 + number:
            time.sleep(0.05)
        process.send_signal(sent)
        _, err = process.communicate()
        assert process.returncode == (42 if sent == signal.SIGTERM else -sent), err
        assert (remote / lease.LOCK).exists() == (sent == signal.SIGKILL), err
    code, out, err = commands.run(*flags, cache=cache, quick=False)
    assert code == 0 and "it is taken over if it does not change for 45 s" in err, err
    assert f"look at {remote}/report.html first" in out
    check_equal(remote, tiny_run)
    assert (remote / "preview.png").read_bytes() == (tiny_run / "preview.png").read_bytes()
    assert len(account(read_clock(remote / CLOCK)).attempts) >= 4
    for workdir, out in ((remote, remote / "two"), (tiny_run, tmp_path / "two")):
        asked = ["--mode=sample", "--prompt=a red circle moving up", "--gif", "--no_metadata", f"--out={out}"]
        assert commands.run(*asked, f"--workdir={workdir}", cache=cache, quick=False)[0] == 0
        assert commands.run("--mode=evaluate", f"--workdir={workdir}", cache=cache, quick=False)[0] == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in (folder / "two").iterdir()} for folder in (remote, tmp_path)
    )
    assert ours == theirs and len(ours) == 4
    check_equal(remote, tiny_run)


@pytest.mark.slow
def test_two_processes_write_to_a_bucket_what_they_write_to_a_disk(remote, server, cache, tmp_path):
    flags = [commands.TINY, "--config.stages.tokenizer.steps=8", "--config.stages.denoiser.steps=16"]
    codes, errors = commands.ended(
        commands.start_together(*flags, f"--workdir={tmp_path}", cache=cache, processes=2, devices=1)
    )
    assert codes == [0, 0], errors
    before = committed(server)
    processes = commands.start_together(*flags, f"--workdir={remote}", cache=cache, processes=2, devices=1)
    while all(process.poll() is None for process in processes) and committed(server) < before + 2:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = commands.ended(processes)
    assert codes == [42, 42], errors
    codes, errors = commands.ended(
        commands.start_together(*flags, f"--workdir={remote}", cache=cache, processes=2, devices=1)
    )
    assert codes == [0, 0], errors
    check_equal(remote, tmp_path)
