"""The HTTP API, in the shape of OpenAI's videos, and the page at `/`."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import pathlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import walt_jax
from walt_jax.data.limits import ClipError
from walt_jax.serving.fields import MEDIA, BadRequest, Limits, read
from walt_jax.serving.jobs import PREVIEW, SIDECAR, VIDEO, Job, Jobs, digest, new
from walt_jax.serving.worker import Worker

PAGE = pathlib.Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IDLE_SECONDS = 20.0  # without a byte of a request's body, it is ended
BODY_SECONDS = 120.0  # for all of it
JSON_BYTES = 2**20
DECODERS = 4  # uploads that are looked at at once
MEDIA_TYPES = {".mp4": "video/mp4", ".json": "application/json"}


def make_app(
    jobs: Jobs, worker: Worker, model: str, identity: str, fps: float, limits: Limits, token: str | None
) -> Starlette:
    """The application.

    Args:
        jobs: see `Jobs`.
        worker: makes them; it is started and ended with the application.
        model: its name.
        identity: tells this model from others, for the cache of equal requests.
        fps: frames a second of the model's clips.
        limits: see `Limits`.
        token: what clients have to know; None for those of this machine alone.
    """
    decoding = asyncio.Semaphore(DECODERS)
    requests: dict[tuple[str, int], int] = {}

    def check_room() -> None:
        if len(jobs.waiting()) >= limits.waiting:
            raise BadRequest(f"{limits.waiting} videos are waiting, as many as may; try again later.", status=429)
        if len(jobs.all()) >= limits.kept:
            raise BadRequest(f"{limits.kept} videos are kept, as many as may; delete some.", status=429)

    async def create(request: Request) -> Response:
        check_room()
        name, folder = jobs.new_folder()
        try:
            fields, files, digests = await _body(request, folder)
            asked = read(fields, worker.generator, worker.pixels, fps, model, limits)
            for field, file in files.items():
                async with decoding:
                    await asyncio.to_thread(_check_readable, field, folder / file)
            if "mask" in files and not {"input_reference", "image", "video"} & set(files):
                raise BadRequest("A mask says which part of a clip is made anew; give the clip too.", "mask")
            if asked["extend"] and not {"input_reference", "image", "video"} & set(files):
                raise BadRequest("extend goes on with a clip; give it as input_reference.", "extend")
            if not files:
                asked["num_frames"] = asked["num_frames"] or worker.pixels[0]
            same, group = (
                digest(identity, json.dumps(values, sort_keys=True), *digests)
                for values in (asked, {**asked, "seed": 0})
            )
            job = new(name, {**asked, "files": files}, same, group)
            job.frames = asked["num_frames"] if not files else None
            check_room()  # others may have come meanwhile; from here to `add` none does
            jobs.add(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return JSONResponse(shown(job))

    def shown(job: Job, waiting: list[Job] | None = None) -> dict[str, Any]:
        """A job with its place in the queue, its stage and the seconds that are left."""
        waiting = jobs.waiting() if waiting is None else waiting
        place = next((place for place, other in enumerate(waiting) if other is job), None)
        now = {"queue_position": place, "stage": worker.stage(job), "seconds_left": worker.seconds_left(job)}
        return {**described(job, model), **now}

    def _write(source: BinaryIO, path: pathlib.Path) -> str:
        with path.open("xb") as file:
            shutil.copyfileobj(source, file, 2**20)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _check_readable(field: str, path: pathlib.Path) -> None:
        try:
            worker.reader.describe(str(path))
        except ClipError as error:
            raise BadRequest(f"{field} can't be read: {error}; send a picture or a video.", field) from error

    async def _body(request: Request, folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """(fields, names of the uploads' files by field, their digests)"""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > JSON_BYTES:
                    raise BadRequest(f"A body of JSON may have {JSON_BYTES:,} bytes.", status=413)
            try:
                fields = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise BadRequest("The body is no JSON.") from error
            if not isinstance(fields, dict):
                raise BadRequest("The body should be an object.")
            for field in MEDIA:
                if fields.pop(field, None) is not None:
                    raise BadRequest(
                        f"{field} is not fetched from elsewhere; send the file as multipart/form-data.", field
                    )
            return fields, {}, []
        if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
            raise BadRequest("Send JSON, or multipart/form-data with files.", status=415)
        fields, files, digests = {}, {}, []
        try:
            form = await request.form(max_files=len(MEDIA), max_fields=64, max_part_size=2**16)
        except HTTPException as error:
            raise BadRequest(f"The form can't be read: {error.detail}.") from error
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(form.close)
            for field, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    if field in MEDIA:
                        raise BadRequest(f"{field} should be a file.", field)
                    fields[field] = value
                    continue
                if field not in MEDIA:
                    raise BadRequest(f"{field!r} is no field of a file; there are {', '.join(MEDIA)}.", field)
                if not value.size and value.filename:
                    raise BadRequest(f"{field} is an empty file; send a picture or a video.", field)
                if not value.size:
                    continue  # a form's field that was left empty
                if field in files:
                    raise BadRequest(f"{field} is there twice; send one file.", field)
                # The client's name of the file is not used; decoders look at what is in it.
                files[field] = field
                digests += [field, await asyncio.to_thread(_write, value.file, folder / field)]
        return fields, files, digests

    async def listed(request: Request) -> Response:
        query = request.query_params
        order, after = query.get("order", "desc"), query.get("after")
        if order not in ("asc", "desc"):
            raise BadRequest("order is asc or desc.", "order")
        limit = query.get("limit", "20")
        if not limit.isdecimal() or not 1 <= int(limit) <= 100:
            raise BadRequest("limit is a number from 1 to 100.", "limit")
        found = jobs.all()[:: -1 if order == "desc" else 1]
        if after is not None:
            places = [place for place, job in enumerate(found) if job.id == after]
            if not places:
                raise BadRequest(f"There is no video {after!r:.60}.", "after", 404)
            found = found[places[0] + 1 :]
        waiting = jobs.waiting()
        page = [shown(job, waiting) for job in found[: int(limit)]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(found) > len(page)})

    def found(request: Request) -> Job:
        job = jobs.get(request.path_params["id"])
        if job is None:
            raise BadRequest("There is no such video.", "id", 404)
        return job

    async def one(request: Request) -> Response:
        return JSONResponse(shown(found(request)))

    async def content(request: Request) -> Response:
        job = found(request)
        if request.query_params.get("variant", "video") != "video":
            raise BadRequest("There is no such variant; there is 'video' alone.", "variant")
        return _file(job, VIDEO)

    async def sidecar(request: Request) -> Response:
        return _file(found(request), SIDECAR)

    async def preview(request: Request) -> Response:
        job = found(request)
        if job.status in ("queued", "in_progress"):
            worker.wanted.add(job.id)
        path = jobs.path(job) / PREVIEW
        try:
            return Response(path.read_bytes(), media_type="image/webp", headers={"cache-control": "no-store"})
        except FileNotFoundError:
            return Response(status_code=204)

    async def delete(request: Request) -> Response:
        job = found(request)
        worker.wanted.discard(job.id)
        await asyncio.to_thread(jobs.delete, job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    def _file(job: Job, name: str) -> Response:
        path = jobs.path(job) / name
        if job.status != "completed":
            raise BadRequest(f"The video is {job.status}.", "id", 409 if job.status != "failed" else 404)
        if not path.exists():
            raise BadRequest("There is no such video.", "id", 404)
        kind = MEDIA_TYPES[path.suffix]
        return FileResponse(path, media_type=kind, filename=f"{job.id}{path.suffix}", content_disposition_type="inline")

    async def about(request: Request) -> Response:
        frames, height, width = worker.pixels
        strides = worker.generator.model.codec.tokenizer.config.strides
        patch = worker.generator.model.denoiser.config.patch_size
        units = [stride * size for stride, size in zip(strides, patch, strict=True)]
        config = worker.generator.config
        return JSONResponse(
            {
                "model": model,
                "walt_jax": walt_jax.__version__,
                "frames": frames,
                "height": height,
                "width": width,
                "fps": fps,
                "units": units,
                "steps": config.steps,
                "guidance": config.guidance.scale,
                "most_frames": int(limits.frames * frames),
                "most_pixels": int(limits.pixels * height * width),
            }
        )

    async def page(request: Request) -> Response:
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
        )
        policy += (
            "media-src 'self' blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        )
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": policy})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(exposition(jobs, worker, requests), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "walt_jax"}]})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.end()
        await asyncio.to_thread(worker.join, 10)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/metrics", metrics),
            Route("/v1/about", about),
            Route("/v1/models", models),
            Route("/v1/videos", create, methods=["POST"]),
            Route("/v1/videos", listed),
            Route("/v1/videos/{id}", one),
            Route("/v1/videos/{id}", delete, methods=["DELETE"]),
            Route("/v1/videos/{id}/content", content),
            Route("/v1/videos/{id}/preview", preview),
            Route("/v1/videos/{id}/sidecar", sidecar),
        ],
        exception_handlers={
            BadRequest: _refused,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _broken,
        },
        lifespan=lifespan,
    )
    app.add_middleware(Guard, token=token, limits=limits, counts=requests)
    return app


def described(job: Job, model: str) -> dict[str, Any]:
    """A job as OpenAI's API has it, with what else was asked for."""
    asked = job.asked
    frames = job.frames or asked["num_frames"]
    return {
        "id": job.id,
        "object": "video",
        "model": model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "size": f"{asked['width']}x{asked['height']}",
        "seconds": None if frames is None else f"{frames / asked['fps']:g}",
        "prompt": asked["prompt"],
        "remixed_from_video_id": None,
        "error": job.error,
        "notes": job.notes,
        "num_frames": frames,
        **{name: asked[name] for name in ("negative_prompt", "seed", "fps", "extend", "strength", "motion")},
        "num_inference_steps": asked["steps"],
        "guidance_scale": asked["guidance"],
        "given": sorted(asked["files"]),
        "group": job.group or job.id,
    }


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"retry-after": "5"} if status == 429 else None
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status, headers)


async def _refused(request: Request, error: BadRequest) -> Response:
    return _error(error.status, str(error), error.param)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


async def _broken(request: Request, error: Exception) -> Response:
    return _error(500, "The server could not answer; its log says why.")


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


class Guard:
    """Refuses strangers, requests from other sites' pages, and bodies that are too large or too slow."""

    def __init__(self, app: Any, token: str | None, limits: Limits, counts: dict[tuple[str, int], int]):
        self._app, self._token, self._limits, self._counts = app, token, limits, counts

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, status = Request(scope), 500

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(request)
            if refusal is not None:
                await refusal(scope, receive, counted)
                return
            await self._app(scope, self._limited(receive), counted)
        except _TooMuch as error:
            if status == 500:
                await _error(error.status, str(error))(scope, receive, counted)
        finally:
            key = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other", status
            self._counts[key] = self._counts.get(key, 0) + 1

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if self._token is None and _hostname(host) not in LOOPBACK:
            # A name that leads to this machine is not its user: pages of other sites could read what is here.
            return _error(403, "This server answers requests to 127.0.0.1 and localhost.")
        origin = request.headers.get("origin")
        if request.method not in ("GET", "HEAD") and origin and origin.partition("://")[2] != host:
            return _error(403, "Requests from pages of other sites are not answered.")
        if self._token is not None and request.url.path != "/":
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            given = given or request.query_params.get("token", "")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                return _error(401, "The token is missing or wrong; send it as Authorization: Bearer TOKEN.")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limits.upload_bytes:
            return _error(413, f"A request may have {self._limits.upload_bytes:,} bytes.")
        return None

    def _limited(self, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        total, start, ended = 0, time.monotonic(), False

        async def limited() -> Any:
            nonlocal total, ended
            if ended:
                return await receive()  # waits for the client to go
            try:
                message = await asyncio.wait_for(receive(), IDLE_SECONDS)
            except TimeoutError as error:
                raise _TooMuch(408, "The request's body did not come in time.") from error
            total += len(message.get("body", b""))
            ended = message["type"] != "http.request" or not message.get("more_body", False)
            if total > self._limits.upload_bytes:
                raise _TooMuch(413, f"A request may have {self._limits.upload_bytes:,} bytes.")
            if time.monotonic() - start > BODY_SECONDS:
                raise _TooMuch(408, "The request's body did not come in time.")
            return message

        return limited


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class _TooMuch(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def exposition(jobs: Jobs, worker: Worker, requests: dict[tuple[str, int], int]) -> str:
    """What Prometheus reads."""
    states = dict.fromkeys(("queued", "in_progress", "completed", "failed"), 0)
    for job in jobs.all():
        states[job.status] += 1
    lines = ["# HELP walt_jax_videos Videos that are there, by status.", "# TYPE walt_jax_videos gauge"]
    lines += [f'walt_jax_videos{{status="{status}"}} {count}' for status, count in states.items()]
    lines += ["# HELP walt_jax_up Whether videos are made.", "# TYPE walt_jax_up gauge"]
    lines.append(f"walt_jax_up {int(worker.is_alive())}")
    texts = {
        "batches": "Batches that were made.",
        "videos": "Videos that were made.",
        "failed": "Videos that could not be made.",
        "seconds": "Seconds that making batches took.",
        "sampling_seconds": "Of these, seconds of sampling latents.",
        "decoding_seconds": "Of these, seconds of decoding latents; the rest is writing files.",
        "evaluations": "Evaluations of the denoiser.",
    }
    for name, text in texts.items():
        lines += [f"# HELP walt_jax_{name}_total {text}", f"# TYPE walt_jax_{name}_total counter"]
        lines.append(f"walt_jax_{name}_total {worker.counts[name]}")
    lines += ["# HELP walt_jax_requests_total Requests by method and status.", "# TYPE walt_jax_requests_total counter"]
    lines += [
        f'walt_jax_requests_total{{method="{method}",status="{status}"}} {count}'
        for (method, status), count in sorted(requests.items())
    ]
    return "\n".join(lines) + "\n"
