"""``python -m softcl.doctor``: what it finds, and that it notices a wrong backend."""

from __future__ import annotations

import json

import pytest
import torch

from softcl import doctor
from softcl.ops import BACKENDS


def test_report_names_versions_devices_and_every_backend(capsys):
    assert doctor.main(["--seconds", "0.2"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "device     cpu:" in text
    for name in BACKENDS:
        line = next(row for row in text.splitlines() if row.startswith(f"backend    {name} "))
        assert "checks passed" in line or " no: " in line
    assert "reference  cpu     works" in text


def test_json_is_one_object(capsys):
    assert doctor.main(["--seconds", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["the operator"]["torch"] == torch.__version__
    rows = {(row["backend"], row["device"]): row for row in found["backends"]}
    assert rows["reference", "cpu"]["works"] and rows["reference", "cpu"]["checks"] == 0
    # What cannot run says why; exactly one backend of a device is the one that auto takes.
    assert all(row["works"] or row["reason"] for row in found["backends"])
    assert sum(row.get("chosen", False) for row in found["backends"]) == len(
        {row["device"] for row in found["backends"]}
    )


@pytest.mark.parametrize("wrong", ["loss", "gradient", "neighbors"])
def test_a_wrong_backend_is_found(monkeypatch, capsys, wrong: str):
    from softcl.ops import reference

    right = reference.run

    def run(call):
        results = dict(zip(call.empty_results(), right(call), strict=True))
        if call.query.dtype != torch.float64:  # what it is held to stays right
            if wrong == "loss" and "loss" in results:
                results["loss"] = results["loss"] * (1 + 1e-5)
            if wrong == "gradient" and "dquery" in results:
                results["dquery"] = results["dquery"] * 1.02
            if wrong == "neighbors" and call.num_neighbors > 1:
                results["neighbor_indices"] = results["neighbor_indices"].roll(1, 0)
        return tuple(results.values())

    monkeypatch.setattr(reference, "run", run)
    row = doctor.examine("reference", "cpu", 5.0)
    assert row["works"] and "AssertionError" in row["failure"] and "; at " in row["failure"]
    assert row["checks"] < 10
    monkeypatch.setattr(doctor, "BACKENDS", ("reference",))
    assert doctor.main([]) == 1
    assert "WRONG: AssertionError" in capsys.readouterr().out


def test_a_short_check_sees_every_rule_shape_dtype_and_kind():
    cases = list(doctor.cases())
    assert len(set(map(doctor.words, cases))) > len(cases) * 0.8  # rules shrink on a queue of one
    for part in range(4):
        values = {repr(case[part]) for case in cases if case[1] != (1, 1, 1)}
        early = {repr(case[part]) for case in cases[:40] if case[1] != (1, 1, 1)}
        assert early == values


def test_wrong_flags(capsys):
    assert doctor.main(["--seconds", "-1"]) == 2
    assert "--seconds -1.0: must be at least 0" in capsys.readouterr().err
    assert doctor.main(["--jsn"]) == 2
    assert "unknown flag --jsn; did you mean --json?" in capsys.readouterr().err
