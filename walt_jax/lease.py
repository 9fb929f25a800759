"""A lock in an object store: an object that its owner renews, for such a store has no lock that goes with a process.

Who finds the object watches it. If it changes, its owner is alive, and the folder is refused; if it does not change for
a while, its owner was killed, and the object is taken over. Clocks of different machines are not compared. Each write
names the generation of the object that it replaces, none for the first one, and the store refuses it where there is
another by then: of several that want the object at once one gets it, and an owner that was taken for dead notices.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import tensorstore as ts

from walt_jax.errors import UserError, reason_of
from walt_jax.parallel.processes import GIVE_BACK

LOCK = "lock"
RENEW_SECONDS = 10.0
STALE_SECONDS = 45.0  # an owner that misses four renewals is taken for dead
POLL_SECONDS = 2.0
ANSWER_SECONDS = 60.0  # within which the store answers
GIVE_BACK_SECONDS = 5.0  # the same at the end of the process


def open_store(folder: str) -> ts.KvStore:
    """The objects of a folder gs://BUCKET/FOLDER, by TensorStore, which writes conditionally."""
    bucket, _, path = folder.removeprefix("gs://").partition("/")
    retries = {"max_retries": 6}  # some two minutes; the default are twenty
    spec = {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}
    return ts.KvStore.open({**spec, "context": {"gcs_request_retries": retries}}).result(timeout=ANSWER_SECONDS)


@contextlib.contextmanager
def leased(store: ts.KvStore, where: str, flag: str, lost: Callable[[str], None]) -> Iterator[None]:
    """Within, this process owns a folder.

    Args:
        store: of the folder.
        where: names it in messages.
        flag: what names the folder on the command line.
        lost: called from a thread, with a sentence, if another process has taken the folder over meanwhile.

    Raises:
        UserError: if another process has it, or the store refuses.
    """
    lease = _Lease(store)
    try:
        lease.take(where, flag)
    except (ValueError, RuntimeError, TimeoutError) as error:  # as TensorStore raises them
        reason = reason_of(error).partition(" [")[0]  # then come the answer's parts
        raise UserError(
            f"{flag}={where} can't be written to ({reason}); check network, credentials and permissions."
        ) from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(ValueError, RuntimeError, TimeoutError):  # the network may come back
                if not lease.write():
                    lost(f"Another process has taken {where} over, for this one was not heard of for too long.")
                    return

    def give_back() -> None:
        ended.set()
        if threading.current_thread() is thread:
            return  # it has lost the lock
        thread.join(GIVE_BACK_SECONDS)
        with contextlib.suppress(ValueError, RuntimeError, TimeoutError):  # it will be stale
            lease.release()

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    GIVE_BACK.append(give_back)
    try:
        yield
    finally:
        GIVE_BACK.remove(give_back)
        give_back()


class _Lease:
    """The object as this process writes it."""

    def __init__(self, store: ts.KvStore):
        self._store, self._generation, self._count = store, b"", 0
        self._owner = {"host": socket.gethostname(), "process": os.getpid(), "owner": uuid.uuid4().hex}

    def take(self, where: str, flag: str) -> None:
        """Waits for a stale lock.

        Raises:
            UserError: if another process renews it.
        """
        before, since = None, 0.0
        while True:
            found = self._store.read(LOCK).result(timeout=ANSWER_SECONDS)
            self._generation = found.stamp.generation
            stale = self._generation == before and time.monotonic() - since > STALE_SECONDS
            if (found.state == "missing" or stale) and self.write():
                return
            if found.state == "missing":
                continue  # another one was faster
            if before not in (None, self._generation):
                raise UserError(
                    f"Another process is writing to {where} ({_owner(found.value)}); wait for it or stop it, or choose "
                    f"another {flag}."
                )
            if before is None:
                print(
                    f"{where} has a lock of {_owner(found.value)}; it is taken over if it does not change for "
                    f"{STALE_SECONDS:.0f} s.",
                    file=sys.stderr,
                    flush=True,
                )
                before, since = self._generation, time.monotonic()
            time.sleep(POLL_SECONDS)

    def write(self) -> bool:
        """Replaces the object of the last known generation; False where there is another by now."""
        self._count += 1
        content = json.dumps({**self._owner, "renewals": self._count})
        stamp = self._store.write(LOCK, content, if_equal=self._generation).result(timeout=ANSWER_SECONDS)
        if not stamp.generation:
            # A write whose answer was lost is repeated by TensorStore, and then refused for what it has written itself.
            found = self._store.read(LOCK).result(timeout=ANSWER_SECONDS)
            if self._owner["owner"].encode() not in found.value:
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True

    def release(self) -> None:
        """Removes the object, if it is still this process's."""
        self._store.write(LOCK, None, if_equal=self._generation).result(timeout=GIVE_BACK_SECONDS)


def _owner(content: bytes) -> str:
    """Who a lock is of, in words."""
    try:
        owner = json.loads(content)
        return f"process {owner['process']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
