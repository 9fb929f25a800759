"""Flags of several processes, what they exchange, and that one process needs none of it."""

import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from walt_jax import main
from walt_jax.errors import UserError
from walt_jax.parallel import processes


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("host:1234", None, None), "--num_processes and --process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("host", 2, 0), r"--coordinator=host is no HOST:PORT, such as"),
        (("host:0", 2, 0), r"--coordinator=host:0 is no HOST:PORT"),
        (("host:1234", 2, 2), "--process_id=2 should be from 0 to 1, as --num_processes is 2"),
    ],
)
def test_wrong_flags_are_sentences(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        processes.initialise(*flags)


def test_states_of_processes_are_one_if_they_agree():
    assert processes.merged([{"a": {"0": 1}}, {"a": {"1": [2]}}, {"a": {"0": 1}}]) == {"a": {"0": 1, "1": [2]}}
    with pytest.raises(RuntimeError, match="processes disagree: 1 and 2"):
        processes.merged([{"a": 1}, {"a": 2}])


def test_one_process_waits_for_nobody():
    assert processes.is_first() and processes.exchanged({"x": 1}) == [{"x": 1}]
    assert processes.agreed_stop(15, "stage", 3) == 15 and processes.agreed_stop(0, "stage", 3) == 0
    with processes.one_after_the_first() as first:
        assert first
    np.testing.assert_array_equal(processes.fetched(np.arange(3)), [0, 1, 2])
    assert processes.place() == (0, 1)
    assert processes.together(jax.jit(lambda x: x + 1), 1) == 2


class Service:
    """JAX's coordination service, as far as values are exchanged."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, milliseconds / 1000)
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            del self.values[key]


def test_values_are_exchanged_in_order_and_do_not_pile_up(monkeypatch):
    service, found, here = Service(), {}, threading.local()
    monkeypatch.setattr(processes, "_client", service)
    monkeypatch.setattr(processes, "PATIENCE_MS", 30_000)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)

    class Numbers:  # of each process its own
        def __next__(self):
            here.number = getattr(here, "number", -1) + 1
            return here.number

    monkeypatch.setattr(processes, "_numbers", Numbers())

    def process(index):
        here.index = index
        found[index] = [processes.exchanged({"step": step, "by": index}) for step in range(20)]

    threads = [threading.Thread(target=process, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = [[{"step": step, "by": index} for index in range(3)] for step in range(20)]
    assert found == dict.fromkeys(range(3), expected)
    assert len(service.values) == 3  # of the last exchange


@pytest.mark.parametrize("mode", sorted(main.ALONE))
def test_modes_of_one_process_refuse_others(mode, tmp_path, capsys):
    others = ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1"]
    assert main.main([f"--mode={mode}", f"--workdir={tmp_path / 'run'}", *others]) == 1
    assert f"--mode={mode} is the work of one process, and there are 2; start it once" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


ABORTS = """
import os, socket, sys
from walt_jax.parallel import processes

listener = socket.create_server(("127.0.0.1", 0))
processes._explain_abort(f"127.0.0.1:{listener.getsockname()[1]}")
if sys.argv[1] == "gone":
    listener.close()
os.abort()
"""


@pytest.mark.parametrize(("first", "code"), [("gone", 42), ("there", -signal.SIGABRT)])
def test_an_abort_is_explained_where_process_0_is_gone(first, code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ABORTS, first], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (processes.GONE in done.stderr) == (first == "gone")
