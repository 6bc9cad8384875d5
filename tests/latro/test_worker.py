from __future__ import annotations

import os
import signal
import subprocess

import pytest

from latro.worker import Worker, WorkerEndedError

SCRIPT = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
for line in sys.stdin:
    request = json.loads(line)
    if request == "crash":
        raise ValueError("of its own")
    if request == "kill":
        os.kill(os.getpid(), 9)
    print(json.dumps([request, os.getpid()]), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return Worker(script)


def test_a_worker_answers(worker):
    (first, pid), (second, same) = worker.ask({"a": "π\n"}), worker.ask(2)
    assert (first, second) == ({"a": "π\n"}, 2)
    assert pid == same != os.getpid()


@pytest.mark.parametrize(
    ("request_", "code", "told"),
    [("crash", 1, "ValueError: of its own"), ("kill", -signal.SIGKILL, "SIGKILL")],
)
def test_one_that_ended_says_how_and_answers_no_more(worker, request_, code, told):
    for request in (request_, "another"):
        with pytest.raises(WorkerEndedError, match=told) as raised:
            worker.ask(request)
        assert raised.value.code == code


def test_a_file_beside_the_script_is_no_module(tmp_path, worker):
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    assert Worker(tmp_path / "script.py").ask("here")[0] == "here"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_process_that_was_forked_leaves_it_alone(worker):
    assert worker.ask(1)[0] == 1
    pid = os.fork()
    if pid == 0:
        worker.__dict__.clear()
        del worker
        os._exit(0)
    os.waitpid(pid, 0)
    assert worker.ask(2)[0] == 2


def test_the_process_ends_with_the_object(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    worker = Worker(script)
    process = worker._process
    assert isinstance(process, subprocess.Popen)
    assert process.poll() is None
    del worker
    assert process.poll() == -signal.SIGKILL
