"""A small Google Cloud Storage on this machine: the calls of its JSON API that gcsfs, TensorStore and Orbax make.

Objects are in memory. Conditions on generations hold, so that locks can be tested.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

TIME = "2026-01-01T00:00:00.000Z"


class Stored(NamedTuple):
    """An object."""

    generation: int
    content: bytes


class GcsServer(ThreadingHTTPServer):
    """Serves buckets.

    Attributes:
        buckets: of each, its objects by name.
        refusal: (status, message) that all requests get, if it is set.
        gone: whether requests get no answer.
        requests: how many there were of each method.
        written: the name of each object that was written, in order.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self.refusal: tuple[int, str] | None = None
        self.gone, self.requests, self.written = False, {}, []
        self.lock, self.generations = threading.RLock(), itertools.count(1)
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}  # resumable ones: (bucket, name, content so far)

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of clients that are gone
            super().handle_error(*request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def variables(self) -> dict[str, str]:
        """What makes programs use this server, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which speaks gRPC
            "GOOGLE_CLOUD_PROJECT": "none",  # or it is asked of a server that is not there
            "NO_GCE_CHECK": "true",
        }

    def put(self, bucket: str, name: str, content: bytes) -> dict[str, Any]:
        with self.lock:
            self.buckets[bucket][name] = Stored(next(self.generations), content)
            self.written.append(name)
            return self.resource(bucket, name)

    def resource(self, bucket: str, name: str) -> dict[str, Any]:
        """An object's metadata."""
        found = self.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "timeCreated": TIME,
            "updated": TIME,
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
        }


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[GcsServer]:
    """A server with these buckets, in a thread."""
    with GcsServer(*buckets) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Answer(NamedTuple):
    """What a call returns."""

    content: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (of a tuple)
    status: int = 200


class Refused(Exception):
    """(status, message)"""


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(b"" if status == 304 else json.dumps(value).encode(), status=status)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet
    server: GcsServer

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if self.server.gone:
            self.close_connection = True
            return
        address = urllib.parse.urlsplit(self.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(address.query).items()}
        with self.server.lock:
            self.server.requests[self.command] = self.server.requests.get(self.command, 0) + 1
            try:
                if self.server.refusal is not None:
                    raise Refused(*self.server.refusal)
                answer = self._call(address.path, query, body)
            except Refused as refused:
                status, message = refused.args
                answer = as_json({"error": {"code": status, "message": message}}, status)
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _call(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(/.*)?)?)?", path)
        if not found:
            raise Refused(404, f"no such call: {path}")
        kind, bucket, name, more = found.groups()
        if bucket not in self.server.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        objects, name = self.server.buckets[bucket], urllib.parse.unquote(name or "")
        if kind == "/upload":
            return self._upload(bucket, query, body)
        if path.endswith(f"/b/{bucket}"):
            return as_json({"kind": "storage#bucket", "name": bucket, "location": "HERE"})
        if not name:
            return as_json(self._list(bucket, query))
        self._check(objects.get(name), query)
        if name not in objects:
            raise Refused(404, f"No such object: {bucket}/{name}")
        if more:
            return self._copy(bucket, name, more)
        if self.command == "DELETE":
            del objects[name]
            return Answer(b"", status=204)
        if query.get("alt") == "media" or kind == "/download":
            return self._content(objects[name])
        return as_json(self.server.resource(bucket, name))

    @staticmethod
    def _check(stored: Stored | None, query: dict[str, str]) -> None:
        """The conditions of a request."""
        generation = stored.generation if stored else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Refused(304, "")

    def _content(self, stored: Stored) -> Answer:
        content = stored.content
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(stored.generation)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return Answer(content, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            raise Refused(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return Answer(content[start:stop], headers, 206)

    def _list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, stop, after = (query.get(key, "") for key in ("startOffset", "endOffset", "pageToken"))
        items, prefixes = [], []
        for name in sorted(self.server.buckets[bucket]):
            if not name.startswith(prefix) or name < start or (stop and name >= stop) or name <= after:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.append(prefix + head + delimiter)
            else:
                items.append(self.server.resource(bucket, name))
        most = int(query.get("maxResults", len(items)))
        page = {"nextPageToken": items[most - 1]["name"]} if len(items) > most else {}
        return {"kind": "storage#objects", "items": items[:most], "prefixes": list(dict.fromkeys(prefixes)), **page}

    def _copy(self, bucket: str, name: str, more: str) -> Answer:
        to = re.fullmatch(r"/(rewriteTo/b/([^/]+)|moveTo)/o/([^/]+)", more)
        if not to:
            raise Refused(404, f"no such call: {more}")
        target, wanted = to[2] or bucket, urllib.parse.unquote(to[3])
        resource = self.server.put(target, wanted, self.server.buckets[bucket][name].content)
        if to[1] == "moveTo":
            del self.server.buckets[bucket][name]
            return as_json(resource)
        return as_json({"kind": "storage#rewriteResponse", "done": True, "resource": resource})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> Answer:
        if "upload_id" in query:
            return self._resumed(query["upload_id"], body)
        if query["uploadType"] == "multipart":
            kind = self.headers["Content-Type"]
            boundary = re.search(r'boundary="?([^";]+)', kind)[1].encode()
            parts = body.split(b"--" + boundary)[1:-1]
            about, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            name, content = json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", content, count=1)
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            self._check(self.server.buckets[bucket].get(name), query)
            number = str(next(self.server.generations))
            self.server.uploads[number] = bucket, name, bytearray()
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return Answer(b"", {"Location": where})
        else:
            name, content = query["name"], body
        self._check(self.server.buckets[bucket].get(name), query)
        return as_json(self.server.put(bucket, name, content))

    def _resumed(self, number: str, body: bytes) -> Answer:
        bucket, name, content = self.server.uploads[number]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return Answer(b"", {"Range": f"bytes=0-{len(content) - 1}"}, 308)
        del self.server.uploads[number]
        return as_json(self.server.put(bucket, name, bytes(content)))
