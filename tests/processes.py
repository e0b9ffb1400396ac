"""Several processes on gloo that run cases together, started once for all tests of a size.

``python tests/processes.py FOLDER`` is one of them; `run_cases` starts them and collects, for each
case, what went wrong in each process. A case that fails in one process ends the group: the others
would wait for it.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softcl.distributed import World

SECONDS = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    here = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    paths = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **paths, **{name: str(value) for name, value in own.items()}}


def run_cases(names: list[str], size: int, folder: Path) -> dict[str, str]:
    """Failures of cases (module.name), with what happened in each process where one failed."""
    port = free_port()
    (folder / "cases.json").write_text(json.dumps(names))
    processes = []
    for rank in range(size):
        command = [sys.executable, __file__, str(folder)]
        with open(folder / f"{size}-output-{rank}.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    command, env=environment(rank, size, port), stdout=output, stderr=output,
                    cwd=folder,
                )
            )  # fmt: skip
    try:
        for process in processes:
            process.wait(SECONDS)
    finally:
        for process in processes:
            process.kill()
    failures: dict[str, str] = {}
    for name in names:
        for rank in range(size):
            file = folder / f"{size}-{name}-{rank}.txt"
            text = file.read_text() if file.exists() else "it never came to this case"
            if text != "passed":
                failures[name] = failures.get(name, "") + f"\nprocess {rank}: {text}"
    return failures


def join() -> World:
    """The world of this process; one process has an engine too."""
    import torch.distributed as dist

    from softcl.distributed import World

    if os.environ["WORLD_SIZE"] == "1":
        dist.init_process_group("gloo")
        return World.joined()
    return World.start(cuda=False)


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    world = join()
    for name in json.loads((folder / "cases.json").read_text()):
        report = folder / f"{world.size}-{name}-{world.rank}.txt"
        module, case = name.split(".")
        try:
            importlib.import_module(module).CASES[case](world, folder)
        except BaseException:
            report.write_text(traceback.format_exc())
            os._exit(1)
        report.write_text("passed")
    world.wait()
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
