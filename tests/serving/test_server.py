"""The server: what is asked for is made, once, for whom it is meant; what can't be is refused; nothing is lost."""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import re
import socket
import threading
import time
import types

import av
import jax
import numpy as np
import pytest
from PIL import Image
from small_server import FPS, PIXELS, application
from starlette.testclient import TestClient

from walt_jax.data.media import write_video
from walt_jax.data.video import read_clip
from walt_jax.errors import UserError
from walt_jax.generation.latent_diffusion import SamplingConfig
from walt_jax.serving import app, worker
from walt_jax.serving.fields import Limits
from walt_jax.serving.serve import serve
from walt_jax.workdir import locked

pytestmark = pytest.mark.usefixtures("quick_compilation")
BAD = pathlib.Path(__file__).parents[3] / "shared" / "data" / "bad"
LIMITS = Limits(upload_bytes=300_000, waiting=5, kept=8, prompt=100)
ASKED = {"prompt": "ab", "seed": 1, "num_inference_steps": 1, "guidance_scale": 1}


@pytest.fixture
def server(generator, tmp_path):
    """Opens a client of a server over a folder: (paused: nothing is made, token) -> client."""
    with contextlib.ExitStack() as stack:

        def start(paused=False, token=None, limits=LIMITS):
            app, worker, jobs = application(generator, tmp_path / "videos", limits, token)
            if paused:
                worker.run = lambda: None
            client = stack.enter_context(TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False))
            client.worker, client.jobs = worker, jobs
            return client

        yield start


def ask(client, status=200, files=None, **changed):
    asked = {**ASKED, **changed}
    reply = client.post("/v1/videos", data=asked, files=files) if files else client.post("/v1/videos", json=asked)
    assert reply.status_code == status, reply.text
    return reply.json()


def finished(client, name, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = client.get(f"/v1/videos/{name}").json()
        if job["status"] in ("completed", "failed"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def frames_of(client, name, tmp_path):
    (tmp_path / "got.mp4").write_bytes(client.get(f"/v1/videos/{name}/content").content)
    return read_clip(tmp_path / "got.mp4")


def test_a_video_is_made_and_the_same_is_not_made_twice(server, tmp_path):
    client = server()
    first = ask(client)
    assert first["object"] == "video" and first["status"] == "queued" and first["size"] == "16x16"
    done = finished(client, first["id"])
    assert done["status"] == "completed" and done["progress"] == 100, done
    assert frames_of(client, first["id"], tmp_path).shape == (9, 16, 16, 3)
    with av.open(str(tmp_path / "got.mp4")) as file:
        tags = json.loads(file.metadata["comment"])
        assert tags["seed"] == 1 and tags["model"] == "small" and file.metadata["title"] == "ab"
    sidecar = client.get(f"/v1/videos/{first['id']}/sidecar").json()
    assert tags.items() <= sidecar.items() and sidecar["digitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert sidecar["sha256"] == hashlib.sha256((tmp_path / "got.mp4").read_bytes()).hexdigest()
    batches = client.worker.counts["batches"]
    again = finished(client, ask(client)["id"])
    assert again["status"] == "completed" and client.worker.counts["batches"] == batches
    content = [client.get(f"/v1/videos/{name}/content").content for name in (first["id"], again["id"])]
    assert content[0] == content[1]
    other = finished(client, ask(client, seed=2)["id"])
    assert client.get(f"/v1/videos/{other['id']}/content").content != content[0]
    text = client.get("/metrics").text
    assert 'walt_jax_videos{status="completed"} 3' in text and "walt_jax_videos_total 2" in text


def test_equal_requests_that_wait_are_made_once(server, monkeypatch):
    """Also beyond the number that is made together; and one of them can be deleted while it is made."""
    paused = server(paused=True, limits=dataclasses.replace(LIMITS, waiting=9, kept=9))
    names = [ask(paused, seed=seed)["id"] for seed in (1, 1, 2, 1, 1, 1)]
    gone = []

    def shot(*_):
        if not gone:
            gone.append(client.jobs.get(names[0]))
            client.jobs.delete(gone[0])

    client = server(paused=True)
    monkeypatch.setattr(worker, "write_video", lambda *args: (shot(), write_video(*args)))
    client.worker.make_some()
    contents = [client.get(f"/v1/videos/{name}/content") for name in names]
    assert [reply.status_code for reply in contents] == [404, 200, 200, 200, 200, 200]
    assert len({reply.content for reply in contents[1:]}) == 2 and contents[1].content == contents[3].content
    assert client.worker.counts["batches"] == 1 and client.worker.counts["videos"] == 2


def test_one_that_can_not_be_made_does_not_take_others_with_it(server, monkeypatch):
    """Neither where its uploads are read, nor where it is sampled; and the worker goes on."""
    client = server(paused=True)
    names = {prompt: ask(client, prompt=prompt)["id"] for prompt in ("a", "b", "unread", "failing")}
    resolve, generate = worker.resolve, worker.Worker._sample

    def sample(self, ready):
        if any(one.request.prompt == "failing" for one in ready):
            raise MemoryError("no memory")
        generate(self, ready)

    def read(generator, *args):
        read.calls += 1
        if read.calls == 3:
            raise ZeroDivisionError("in a decoder")
        return resolve(generator, *args)

    read.calls = 0
    monkeypatch.setattr(worker, "resolve", read)
    monkeypatch.setattr(worker.Worker, "_sample", sample)
    client.worker.make_some()
    found = {prompt: client.get(f"/v1/videos/{name}").json() for prompt, name in names.items()}
    states = {prompt: job["status"] for prompt, job in found.items()}
    assert states == {"a": "completed", "b": "completed", "unread": "failed", "failing": "failed"}
    assert found["failing"]["error"]["code"] == "server_error" and "memory" not in found["failing"]["error"]["message"]
    assert client.get(f"/v1/videos/{names['failing']}/content").status_code == 404


def test_a_job_has_so_much_time(server):
    client = server(paused=True, limits=dataclasses.replace(LIMITS, seconds=0.0))
    name = ask(client)["id"]
    client.worker.make_some()
    assert "longer than 0 s" in client.get(f"/v1/videos/{name}").json()["error"]["message"]


def test_time_left_is_known_between_the_first_evaluation_and_the_last(server, monkeypatch):
    """Not while the first one waits for the compiler, nor while the video is decoded."""
    client, now = server(paused=True), [100.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    job = client.jobs.get(ask(client)["id"])

    def shown():
        job = client.get("/v1/videos").json()["data"][0]
        return job["stage"], job["progress"], job["seconds_left"]

    assert shown() == (None, 0, None)
    client.jobs.update(job, status="in_progress")
    assert shown() == ("starting", 0, None)
    for seconds, done, expected in ((160, 1, 0), (162, 2, 396), (164, 3, 394), (358, 100, 200), (556, 199, 2)):
        now[0] = float(seconds)
        client.worker._advance(job, done / 200)
        assert shown() == ("sampling", done // 2, expected or None)
    now[0] += 1.5
    assert shown() == ("sampling", 99, 0.5), "it also gets less between evaluations"
    client.worker._advance(job, 1.0)
    assert shown() == ("decoding", 99, None)


def test_few_programs_are_kept(server, monkeypatch):
    """Other steps and guidance need none; each size has a sampler and a decoder, and there is room for two."""
    client, cleared, clear = server(paused=True), [], jax.clear_caches
    clear()
    monkeypatch.setattr(worker, "PROGRAMS", 4)
    monkeypatch.setattr(worker.jax, "clear_caches", lambda: cleared.append(worker.programs()) or clear())
    for number, size in enumerate(("16x16", "16x16", "24x16", "16x16")):
        ask(client, seed=number, num_inference_steps=1 + number, guidance_scale=2 + number, size=size)
        client.worker.make_some()
        assert worker.programs() == (2, 2, 4, 2)[number] and cleared == [4] * (number == 3)


def test_cancelling_does_not_wait_for_a_compiler(server, monkeypatch):
    """The next video is made while what is cancelled is still being compiled."""
    compiling, compiled = threading.Event(), threading.Event()
    sample = worker.Worker._sample

    def slowly(self, ready):
        if ready[0].request.seed == 7:
            compiling.set()
            assert compiled.wait(60)
        sample(self, ready)

    monkeypatch.setattr(worker.Worker, "_sample", slowly)
    client = server()
    name = ask(client, seed=7)["id"]
    assert compiling.wait(60)
    client.delete(f"/v1/videos/{name}")
    assert finished(client, ask(client, seed=3)["id"])["status"] == "completed"
    compiled.set()
    assert finished(client, ask(client, seed=4)["id"])["status"] == "completed"
    assert client.worker.counts["videos"] == 2


def test_those_that_wait_are_made_together_whatever_their_size(server, tmp_path, generator):
    """After a restart; each gets the video of its own size."""
    paused = server(paused=True)
    sizes = {ask(paused, seed=n, size=size)["id"]: size for n, size in enumerate(("16x16", "24x16", "16x16"))}
    client = server()
    for name, size in sizes.items():
        assert finished(client, name)["status"] == "completed"
        width, height = map(int, size.split("x"))
        assert frames_of(client, name, tmp_path).shape == (9, height, width, 3)
    assert client.worker.counts["batches"] == 1


def test_what_was_being_made_is_made_after_a_restart(server, tmp_path):
    paused = server(paused=True)
    job = paused.jobs.get(ask(paused)["id"])
    paused.jobs.update(job, status="in_progress", progress=40)
    (tmp_path / "videos" / "video_broken").mkdir()
    (tmp_path / "videos" / "video_broken" / "job.json").write_text("{")
    unended = tmp_path / "videos" / f"video_{'0' * 24}"
    unended.mkdir()
    (unended / "image").write_bytes(b"an upload that did not end")
    client = server()
    assert finished(client, job.id)["status"] == "completed"
    assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [job.id]
    assert (tmp_path / "videos" / "video_broken").exists() and not unended.exists()


def test_deleting_stops_what_is_made(server):
    client = server()
    finished(client, ask(client)["id"])  # compiled
    name = ask(client, num_inference_steps=200, seed=7)["id"]
    end = time.monotonic() + 60
    while client.get(f"/v1/videos/{name}").json()["progress"] < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert client.delete(f"/v1/videos/{name}").json() == {"id": name, "object": "video.deleted", "deleted": True}
    time.sleep(1)
    evaluations = client.worker.counts["evaluations"]
    assert evaluations < 200
    time.sleep(0.5)
    assert client.worker.counts["evaluations"] == evaluations
    for path in ("", "/content", "/preview"):
        assert client.get(f"/v1/videos/{name}{path}").status_code == 404
    assert finished(client, ask(client, seed=3)["id"])["status"] == "completed"  # and the next is made


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({"size": "16"}, 400, "WIDTHxHEIGHT"), ({"size": "17x16"}, 400, "multiple of 8"),
        ({"size": "64x64"}, 400, "1,024 in all"), ({"num_frames": 10}, 400, "1 \\+ 4"),
        ({"num_frames": 161}, 400, "at most 144"), ({"seed": -1}, 400, "from 0"), ({"seed": 1.5}, 400, "whole"),
        ({"num_inference_steps": 1000}, 400, "from 1 to 200"), ({"guidance_scale": "nan"}, 400, "number"),
        ({"prompt": "a" * 101}, 400, "at most 100"), ({"prompt": "a\nb"}, 400, "one line"),
        ({"prompt": 3}, 400, "text"),
        ({"model": "sora"}, 404, "'small'"), ({"colour": "red"}, 400, "'colour' is no field"),
        ({"extend": "up"}, 400, "forward"), ({"extend": "loop"}, 400, "clip"), ({"seconds": "x"}, 400, "seconds"),
        ({"input_reference": "http://example.com/a.png"}, 400, "not fetched"),
        ({"output_path": "/etc"}, 400, "no field"),
    ],
)  # fmt: skip
def test_what_can_not_be_made_is_refused(server, tmp_path, changed, status, says):
    client = server(paused=True)
    error = ask(client, status, **changed)["error"]
    assert re.search(says, error["message"]) and error["type"] == "invalid_request_error"
    assert not list((tmp_path / "videos").iterdir())


def test_seconds_are_frames(server):
    assert ask(server(paused=True), seconds="2")["num_frames"] == 17


def picture(tmp_path, colour=(200, 30, 30), size=(20, 16)):
    path = tmp_path / "picture.png"
    Image.new("RGB", size, colour).save(path)
    return path.read_bytes()


def test_a_picture_that_is_sent_is_the_first_frame(server, tmp_path):
    """Whatever name the client gives it."""
    client = server()
    files = {"input_reference": ("../../../../etc/passwd", picture(tmp_path), "image/png")}
    name = ask(client, files=files)["id"]
    done = finished(client, name)
    assert done["status"] == "completed" and done["given"] == ["input_reference"]
    assert any("16 × 20" in note for note in done["notes"])
    there = sorted(path.name for path in (tmp_path / "videos" / name).iterdir())
    assert there == ["input_reference", "job.json", "video.json", "video.mp4"]


def test_bad_uploads_are_refused_and_leave_nothing(server, tmp_path):
    client = server(paused=True)
    bad = {"text": b"hello", "cut": picture(tmp_path)[:40], "zeros": bytes(1000)}
    if BAD.exists():
        bad |= {
            path.name: path.read_bytes()
            for path in sorted(BAD.iterdir())
            if path.is_file() and path.stat().st_size < 2e5
        }
    accepted = 0
    for name, content in bad.items():
        reply = client.post("/v1/videos", data=ASKED, files={"image": (name, content)})
        assert reply.status_code in (200, 400), (name, reply.text)
        accepted += reply.status_code == 200
        if accepted == 4:
            client.jobs.delete(client.jobs.all()[0])
            accepted -= 1
    assert client.post("/v1/videos", data=ASKED, files={"image": ("x", b"hello")}).status_code == 400
    empty = client.post("/v1/videos", data=ASKED, files={"image": ("x.png", b"")})
    assert empty.status_code == 400 and "image is an empty file" in empty.json()["error"]["message"]
    assert client.post("/v1/videos", data=ASKED, files={"shell": ("x", b"hello")}).status_code == 400
    assert len(list((tmp_path / "videos").iterdir())) == accepted


def test_too_much_is_refused(server):
    client = server(paused=True)
    large = bytes(LIMITS.upload_bytes + 1)
    assert client.post("/v1/videos", content=large, headers={"content-type": "application/json"}).status_code == 413

    def in_parts():
        yield from (large[:100_000] for _ in range(5))

    assert (
        client.post("/v1/videos", content=in_parts(), headers={"content-type": "application/json"}).status_code == 413
    )
    assert client.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/v1/videos", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    for seed in range(LIMITS.waiting):
        ask(client, seed=seed)
    assert "waiting" in ask(client, 429)["error"]["message"]


def test_places_in_the_queue_are_counted_when_uploads_have_come(server, monkeypatch):
    """Whoever is slow finds it full."""
    client = server(paused=True)
    for seed in range(LIMITS.waiting - 1):
        ask(client, seed=seed)
    read = app.read

    def slowly(*args):
        if len(client.jobs.waiting()) < LIMITS.waiting:
            other = client.jobs.all()[0]
            client.jobs.add(dataclasses.replace(other, id=client.jobs.new_folder()[0]))
        return read(*args)

    monkeypatch.setattr(app, "read", slowly)
    ask(client, 429)
    assert len(client.jobs.waiting()) == LIMITS.waiting


def test_odd_requests(server, tmp_path):
    client = server(paused=True)
    large = json.dumps({**ASKED, "prompt": " " * 2**20})
    client.worker.limits = dataclasses.replace(LIMITS, upload_bytes=2**24)
    reply = server(paused=True, limits=client.worker.limits).post(
        "/v1/videos", content=large, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413 and "JSON" in reply.json()["error"]["message"]
    twice = [("image", ("a", picture(tmp_path))), ("image", ("b", picture(tmp_path)))]
    assert "twice" in ask(client, 400, files=twice)["error"]["message"]
    name = ask(client)["id"]
    assert client.get(f"/v1/videos/{name}/content?variant=thumbnail").status_code == 400
    assert client.get("/v1/videos", headers={"host": "[::1"}).status_code == 403
    assert client.put("/v1/videos").json()["error"]["type"] == "invalid_request_error"


def test_a_server_that_can_not_start_says_why(tmp_path):
    with pytest.raises(UserError, match="at least 16"):
        start(tmp_path, token="short")
    with locked(tmp_path / "videos"), pytest.raises(UserError, match="Another process"):
        start(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="can't be listened on"):
            start(tmp_path, port=taken.getsockname()[1])


def start(tmp_path, port=0, token=None):
    generator = types.SimpleNamespace(config=SamplingConfig(1))
    serve(generator, PIXELS, FPS, tmp_path, "", {}, contextlib.nullcontext, "127.0.0.1", port, token)


def test_lists_in_pages(server):
    client = server(paused=True)
    names = [ask(client, seed=seed)["id"] for seed in range(3)]
    first = client.get("/v1/videos?limit=2").json()
    assert [one["id"] for one in first["data"]] == names[:0:-1] and first["has_more"]
    rest = client.get(f"/v1/videos?limit=2&after={first['last_id']}").json()
    assert [one["id"] for one in rest["data"]] == names[:1] and not rest["has_more"]
    assert [one["id"] for one in client.get("/v1/videos?order=asc").json()["data"]] == names
    for wrong in ("limit=0", "limit=x", "order=up", "after=none"):
        assert client.get(f"/v1/videos?{wrong}").status_code in (400, 404)
    assert client.get(f"/v1/videos/{names[0]}/content").status_code == 409
    for path in ("/v1/videos/..%2f..%2fjob.json", "/v1/videos/x/content", "/etc/passwd"):
        assert client.get(path).status_code == 404


def test_strangers_are_refused(server):
    """Other names of this machine, pages of other sites, and clients without the token."""
    client = server(paused=True)
    assert client.get("/v1/videos", headers={"host": "evil.example"}).status_code == 403
    origin = {"origin": "http://evil.example"}
    assert client.post("/v1/videos", json=ASKED, headers=origin).status_code == 403
    assert client.post("/v1/videos", json=ASKED, headers={"origin": "http://127.0.0.1"}).status_code == 200
    client = server(paused=True, token="secret")
    assert client.get("/").status_code == 200  # the page has nothing of the videos
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}):
        assert client.get("/v1/videos", headers=headers).status_code == 401
    assert client.get("/v1/videos", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/v1/videos?token=secret").status_code == 200


def test_the_page_needs_no_network(server):
    page = app.PAGE.read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page) and "http" not in page.replace("http-equiv", "")
    reply = server(paused=True).get("/")
    assert "default-src 'none'" in reply.headers["content-security-policy"] and "walt_jax" in reply.text


def test_previews_are_made_for_those_who_watch(server):
    client = server()
    finished(client, ask(client)["id"])
    name = ask(client, num_inference_steps=200, seed=9)["id"]
    end, reply = time.monotonic() + 60, None
    while time.monotonic() < end:
        reply = client.get(f"/v1/videos/{name}/preview")
        if reply.status_code == 200:
            break
        time.sleep(0.05)
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/webp"
    assert np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB")).shape == (16, 16, 3)
    client.delete(f"/v1/videos/{name}")
