"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Longest first: processes that share the files out (make test) then end at nearly the same time.
LONG_FILES = """
    triton_interpreted cuda_host distributed cuda_hopper cpu_sanitizers train_methods cuda_build
    triton_aot examples methods_table gpu_check kill_storm train shapes
""".split()


# What tests decode is kept nowhere but where a test says so.
os.environ["SOFTCL_CACHE"] = "off"

# Of tests/cuda_host.py: whichever test calls one of them first compiles the kernels in it.
COMPILING = {"load_host_module", "find_check_program"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption("--every", type=int, default=1, help="of each test's cases every N-th")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        # Named on the command line, a test runs whatever its mark.
        named = any("::" in argument for argument in config.args)
        for item in items:
            if item.get_closest_marker("long") and not named:
                item.add_marker(pytest.mark.skip(reason="long: make test-all, or --long"))
    every = config.getoption("--every")
    if every > 1:
        seen: dict[str, int] = {}
        for item in list(items):
            if item.get_closest_marker("skip"):
                continue
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % every:
                items.remove(item)
    for item in items:
        if COMPILING & vars(item.module).keys():
            item.add_marker(pytest.mark.timeout(900))
    if not hasattr(config, "workerinput"):
        return  # one process keeps the order that it was given: bench/gpu_check.sh's matters
    places = {f"test_{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))  # stable


@pytest.fixture(autouse=True)
def own_draws():
    """What a test draws without a generator does not depend on the tests before it."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty returns NaN (and the largest integer): nothing unwritten goes unnoticed."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def one_thread():
    """Tensors this small are computed faster by one thread, on a busy machine by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """128 + 32 images of four classes (the direction of a bright stripe), as PNG files."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    chooser = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for label in range(4):
            path = root / split / f"class{label}"
            path.mkdir(parents=True)
            for number in range(count):
                image = chooser.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                at = chooser.integers(3, 13)
                view = np.rot90(image, label % 2)
                view[at, :, label // 2 : label // 2 + 2] = 255
                Image.fromarray(image).save(path / f"{number:03d}.png")
    return root


RUN = (
    "--epochs 2 --batch-size 32 --queue-size 64 --num-splits 2 --lr 0.05 --arch resnet_tiny "
    "--projection-dim 16 --projector-hidden 32 --warmup-epochs 0.5 --device cpu"
).split()


@pytest.fixture
def flags(folder: Path, tmp_path: Path, monkeypatch, one_thread) -> list[str]:
    """A run of 2 epochs of 4 steps on `folder`, in the folder `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return ["--data", str(folder), *RUN]


@pytest.fixture(scope="session")
def whole(folder: Path, tmp_path_factory) -> Path:
    """The folder of such a run that was left in peace, finished; read it, or copy it."""
    from softcl.train import fit
    from softcl.train.__main__ import parse_flags

    out, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fitted = fit(**parse_flags(["--data", str(folder), *RUN, "--out", str(out)]))
    finally:
        torch.set_num_threads(threads)
    assert (fitted.exit_code, fitted.folder) == (0, out) and fitted.result["step"] == 8
    return out


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton's kernels run: "cpu" in its interpreter, "cuda", or the test is skipped."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return "cuda"
