"""A GPU kernel is taken after a trial, once: with stand-ins that are wrong, fail, hang or crash."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from softcl import trust
from softcl.ops import backends, trial
from softcl.ops.call import StatisticsCall

GPU = torch.device("cuda:0")
STAND_INS = """
import os, time
def note(calls): open(calls, "a").write("tried\\n")
def right(device, calls): note(calls)
def wrong(device, calls): note(calls); assert False, "gradient is off by 3.1e-01"
def hangs(device, calls): note(calls); time.sleep(60)
def crashes(device, calls): note(calls); os._exit(11)
def lacks(device, calls): note(calls); raise RuntimeError("Failed to find C compiler.")
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A GPU by name, a cache of its own, and the stand-ins' module on the path."""
    monkeypatch.setattr(trust, "_name_of", lambda device: "a GPU")
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("SOFTCL_TRUST", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    return tmp_path


def ask(machine, which: str) -> str | None:
    calls = str(machine / "calls")
    return trust.reason_against(f"stand_ins:{which}", "backend triton", GPU, calls=calls)


def trials(machine) -> int:
    return len((machine / "calls").read_text().splitlines())


def test_one_that_is_right_is_tried_once_on_a_machine(machine, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(machine, "right") is None and ask(machine, "right") is None
        monkeypatch.setattr(trust, "_verdicts", {})  # another process
        assert ask(machine, "right") is None
    assert trials(machine) == 1
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "_name_of", lambda device: "another GPU")
    assert ask(machine, "right") is None and trials(machine) == 2


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("wrong", "AssertionError: gradient is off by 3.1e-01"),
        ("lacks", "RuntimeError: Failed to find C compiler."),
        ("crashes", "its process ended with status 11"),
        ("hangs", "it did not come back within 2 s"),
    ],
)
def test_one_that_fails_is_passed_over_with_one_warning(machine, monkeypatch, which, reason):
    monkeypatch.setattr(trust, "SECONDS", 2.0 if which == "hangs" else 60.0)
    with pytest.warns(RuntimeWarning, match="backend triton is not used on cuda:0: ") as told:
        assert ask(machine, which) == reason
        assert ask(machine, which) == reason
    assert len(told) == 1 and reason in str(told[0].message)
    if which == "hangs":  # may not have come as far in two seconds
        return
    assert trials(machine) == 1
    monkeypatch.setattr(trust, "_verdicts", {})  # the next process tries it again
    with pytest.warns(RuntimeWarning):
        assert ask(machine, which) == reason
    assert trials(machine) == 2


def test_a_damaged_or_missing_cache_costs_a_trial_alone(machine):
    file = machine / "cache" / "softcl" / "verdicts.json"
    file.parent.mkdir(parents=True)
    file.write_text('["not ours"')
    assert ask(machine, "right") is None and trials(machine) == 1
    assert list(json.loads(file.read_text()).values()) == [""]


def test_nothing_is_tried_during_a_capture_or_when_told(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(machine, "wrong") is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("SOFTCL_TRUST", "1")
    assert ask(machine, "wrong") is None
    assert not (machine / "calls").exists()


FACTS = dict(D=16, vector_dtype="float32", queue_dtype="float32", cold=False, excluded=True)


@pytest.mark.parametrize("numbers", [None, [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
def test_the_trial_of_a_backend_finds_what_is_wrong(numbers, monkeypatch):
    facts = dict(backend="reference", numbers=numbers, num_neighbors=4, **FACTS)
    trial.run("cpu", **facts)
    honest = backends.load_backend("reference").run

    class Wrong:
        @staticmethod
        def run(call):
            first, second, *rest = honest(call)
            return (first, 1.01 * second, *rest) if numbers else (1.001 * first, second, *rest)

    monkeypatch.setattr(backends, "load_backend", lambda name: Wrong)
    with pytest.raises(AssertionError, match="is off by"):
        trial.run("cpu", **{**facts, "backend": "wrong"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_knows_the_rounding_of_what_is_normalised(dtype):
    name = str(dtype).removeprefix("torch.")
    facts = {**FACTS, "vector_dtype": name, "queue_dtype": name, "excluded": False}
    numbers = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    trial.run("cpu", backend="reference", numbers=numbers, num_neighbors=4, **facts)


def test_auto_asks_before_it_takes_a_backend(monkeypatch):
    asked = []

    class Called:
        unsupported = staticmethod(lambda call: None)

    def reason_against(name, call):
        asked.append(name)
        return "it was wrong here" if name == "triton" else None

    monkeypatch.setattr(backends, "load_backend", lambda name: Called)
    monkeypatch.setattr(trial, "reason_against", reason_against)
    monkeypatch.setattr(backends.tune, "prefers_cuda", lambda call: False)
    rows = SimpleNamespace(device=GPU, shape=(4, 8), dtype=torch.float32)
    call = StatisticsCall(rows, rows, 0.1, 0, True)
    choice = backends.choose(call)
    assert choice.name == "reference" and choice.reasons == {"triton": "it was wrong here"}
    asked.clear()
    assert backends.choose(call._replace(backend="triton")).name == "triton" and not asked
    on_cpu = call._replace(query=SimpleNamespace(device=torch.device("cpu"), shape=(4, 8)))
    assert backends.choose(on_cpu).name == "cpu" and not asked


def test_the_enqueue_falls_back_to_pytorch(monkeypatch):
    """On a GPU whose trial failed; here the rows are on the CPU and said to be elsewhere."""
    from softcl.nn import enqueue

    class Elsewhere:
        device, dtype, shape = GPU, torch.float32, (64, 16)

    monkeypatch.setattr(enqueue, "_runs_triton", lambda device: True)
    monkeypatch.setattr(enqueue, "_triton", lambda: "the kernel")
    for verdict, kernel in ((None, "the kernel"), ("it was wrong", None)):
        monkeypatch.setattr(trust, "reason_against", lambda *a, v=verdict, **facts: v)
        assert enqueue.kernel_for(Elsewhere, Elsewhere) == kernel


@pytest.mark.parametrize("wrong", [False, True])
def test_the_trial_of_the_enqueue(wrong, monkeypatch):
    from softcl.nn import enqueue

    def stand_in(kernel, keys, rows, refused, pointer, normalize):
        enqueue.enqueue_torch(keys, rows, refused, pointer + wrong, normalize)

    monkeypatch.setattr(enqueue, "enqueue_triton", stand_in)
    facts = dict(device="cpu", D=16, key_dtype="bfloat16", row_dtype="float32")
    if not wrong:
        return enqueue.try_kernel(**facts)
    with pytest.raises(AssertionError, match="rows are off by"):
        enqueue.try_kernel(**facts)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_trial_of_the_views(wrong, monkeypatch):
    from softcl.data import views

    if views.kernel_missing(torch.device("cpu")):
        pytest.skip("softcl._C is not built")
    honest = views.compiled_view
    stand_in = lambda *arguments: honest(*arguments) + 0.1 * wrong  # noqa: E731
    monkeypatch.setattr(views, "compiled_view", stand_in)
    if not wrong:
        return views.try_kernel("cpu", columns=15)
    with pytest.raises(AssertionError, match="a weak view is off by"):
        views.try_kernel("cpu", columns=15)


def test_the_views_fall_back_to_pytorch(monkeypatch):
    from softcl.data import views

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(views, "_has_triton", lambda: True)
    monkeypatch.setattr(trust, "reason_against", lambda *a, **facts: "it was wrong")
    assert views.kernel_missing(GPU) == "failed on this machine: it was wrong"
    assert views.kernel_missing(GPU, tried=False) is None
