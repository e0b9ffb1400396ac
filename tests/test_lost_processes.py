"""A first process that is stopped, and a rendezvous where nobody is, end the others in a line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from processes import environment, free_port

from softcl.distributed import world as world_module
from softcl.train.__main__ import main

# Seconds in place of the minute that people have.
PATIENCE = 3
_WAITING = """
import sys, time
from datetime import timedelta
from softcl.distributed import world as module
module.PATIENCE, module.BEAT = timedelta(seconds=float(sys.argv[1])), timedelta(seconds=0.5)
world = module.World.start(cuda=False)

def work(seconds):
    if seconds > 100:
        print("stopped", flush=True)
    time.sleep(seconds)
    return seconds

assert world.on_main_process(lambda: work(2 * float(sys.argv[1]))) > 0
assert world.together(lambda: work(2 * world.rank * float(sys.argv[1]))) >= 0
print("waited", flush=True)
try:
    world.on_main_process(lambda: work(1000))
except module.PeerError as error:
    print(error, flush=True)
"""


def test_a_stopped_first_process_is_noticed_outside_a_step(tmp_path: Path):
    """And one that works for longer than the others' patience is not taken for one."""
    port, processes = free_port(), []
    for rank in range(2):
        command = [sys.executable, "-c", _WAITING, str(PATIENCE)]
        processes.append(
            subprocess.Popen(
                command, env=environment(rank, 2, port), stdout=subprocess.PIPE, text=True
            )
        )
    first, second = processes
    try:
        assert first.stdout.readline() == "waited\n"
        assert first.stdout.readline() == "stopped\n"
        first.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        said, _ = second.communicate(timeout=60)
        assert time.monotonic() - stopped < 60 * PATIENCE / 50 + 10
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    (waited, reason) = said.splitlines()
    assert waited == "waited"
    assert reason.startswith("process 1 of 2 waited for the others and another one failed or does")


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "1"}, "process 1: nobody listens at MASTER_ADDR 127.0.0.1 MASTER_PORT"),
        ({"RANK": "1", "MASTER_ADDR": "no.host.invalid"}, "nobody listens at MASTER_ADDR no.host."),
        ({"RANK": "1", "MASTER_PORT": "99999"}, "nobody listens at"),
        ({"RANK": "1", "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number, got 'http'"),
        ({}, "WORLD_SIZE is 2 but RANK is not set: start with torchrun, or unset it"),
        ({"RANK": "2"}, "WORLD_SIZE is 2 but RANK is 2"),
        ({"RANK": "1", "MASTER_ADDR": ""}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
        ({"RANK": "0"}, "process 0 of 2 waited to start and another one failed or does not answer"),
    ],
)
def test_processes_that_cannot_meet_say_so(variables, message: str, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world_module, "PATIENCE", timedelta(seconds=1))
    usual = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {**usual, **variables}.items():
        monkeypatch.setenv(name, value)
    assert main(["--data", "shapes:64", "--device", "cpu"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
