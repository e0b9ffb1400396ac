"""What --tune measures and keeps, with CPU backends in the places of the GPU's."""

from __future__ import annotations

import json

import pytest
import torch
from test_ops_preference import make_call

from softcl import doctor, trust
from softcl.ops import backends, tune
from softcl.ops.backends import choose
from softcl.ops.tune import prefers_cuda, store

GPU = torch.device("cuda", 0)
KIND = ("soft_contrastive", "bfloat16", 1024, 65536, 128)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_name_of", lambda device: "a GPU")
    tune._preferred.cache_clear()
    yield tmp_path / "softcl" / tune.FILE
    tune._preferred.cache_clear()


def test_the_faster_one_is_kept(cache, monkeypatch):
    """Each in a process of its own; one that does not run says why and is never preferred."""
    monkeypatch.setattr(tune, "PAIR", ("triton", "reference"))
    for name, sizes in (("N", (2,)), ("K", (8,)), ("D", (4,)), ("DTYPES", ("float32",))):
        monkeypatch.setattr(tune, name, sizes)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loss, statistics, last = tune.tune("cpu")
    assert loss.startswith("soft_contrastive float32 N=2 K=8 D=4: triton ")
    assert loss.endswith(" us") and statistics.endswith(" us")
    assert last == "auto prefers reference for 2 of 2 kinds of call here"
    (kept,) = json.loads(cache.read_text()).values()
    assert kept == [[name, "float32", 2, 8, 4] for name in tune.OPERATIONS]
    monkeypatch.setattr(tune, "PAIR", ("reference", "triton"))
    assert list(tune.tune("cpu"))[-1] == "auto prefers triton for 0 of 2 kinds of call here"


def test_a_backend_that_ends_its_process_is_named(monkeypatch):
    monkeypatch.setattr(tune, "PAIR", ("nobody", "triton"))
    with pytest.raises(RuntimeError, match="nobody: ModuleNotFoundError"):
        next(tune.tune("cpu"))


def test_auto_prefers_what_was_kept_for_this_machine(monkeypatch):
    store(GPU, [KIND])
    assert prefers_cuda(make_call(N=1024)) and prefers_cuda(make_call(N=257, K=5000))
    for other in (
        {"N": 256},
        {"N": 1025},
        {"K": 4096},
        {"D": 64},
        {"operation": "queue_statistics"},
        {"vector_dtype": torch.float32},
        {"vector_dtype": torch.float32, "queue_dtype": torch.float32},
    ):
        assert not prefers_cuda(make_call(**other)), other
    tune._preferred.cache_clear()
    monkeypatch.setattr(trust, "_name_of", lambda device: "another GPU")
    assert not prefers_cuda(make_call(N=1024))


def test_the_choice_follows(monkeypatch):
    class Backend:
        unsupported = staticmethod(lambda call: None)

    monkeypatch.setattr(backends, "load_backend", lambda name: Backend)
    monkeypatch.setattr(backends, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(backends.trial, "reason_against", lambda name, call: None)
    assert choose(make_call()).name == "triton"
    tune._preferred.cache_clear()
    store(GPU, [KIND])
    assert choose(make_call()).name == "cuda"


@pytest.mark.parametrize("content", ["[]", "{", '{"KEY": 3}', '{"KEY": [[[]]]}'])
def test_a_damaged_file_prefers_nothing(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("KEY", json.dumps(trust.machine(GPU))[1:-1]))
    assert not prefers_cuda(make_call())


def test_the_doctor_tunes_every_gpu(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "device_names", lambda: ["cpu"])
    assert doctor.main(["--tune", "--seconds", "0"]) == 0
    assert "tune       no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "device_names", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(doctor, "BACKENDS", {})
    monkeypatch.setattr(doctor, "describe_devices", dict)
    monkeypatch.setattr(tune, "tune", lambda device: iter([f"timed {device}"]))
    assert doctor.main(["--tune"]) == 0
    assert capsys.readouterr().out.endswith("tune       timed cuda:0\n")
