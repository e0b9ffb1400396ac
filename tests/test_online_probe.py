"""--online-probe: a classifier beside the run that changes nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from softcl.train import online
from softcl.train.__main__ import main
from softcl.train.checkpoint import read_checkpoint


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_run_is_the_same_and_the_probe_learns(flags, capsys):
    assert main([*flags, "--out", "plain"]) == 0
    capsys.readouterr()
    assert main([*flags, "--out", "probed", "--online-probe"]) == 0
    shown = capsys.readouterr().out
    plain, probed = (read_checkpoint(Path(name) / "last.pt") for name in ("plain", "probed"))
    for part in ("student", "teacher"):
        for key, value in plain[part].items():
            assert torch.equal(probed[part][key], value), key
    found = [row["probe_top1"] for row in rows_of(Path("probed")) if "probe_top1" in row]
    assert len(found) == 2 and f"probe {found[-1]:.1%}" in shown
    assert json.loads(Path("probed/result.json").read_text())["probe_top1"] == found[-1]
    weight = probed["online_probe"]["classifier"]["weight"]
    assert weight.shape[0] == 4 and not weight.requires_grad
    assert "online_probe" not in plain


def test_a_step_is_cross_entropys_on_detached_features(flags, monkeypatch):
    """Every step against the recipe written out, with the features of the student's first view."""
    steps = []
    real = online.OnlineProbe.step

    def watched(probe, indices):
        before = [p.detach().clone() for p in probe.classifier.parameters()]
        seen = [x.clone() for x in probe._seen]
        assert all(not x.requires_grad for x in seen)
        real(probe, indices)
        steps.append((before, seen, probe.labels[indices], probe.optimizer.param_groups[0]["lr"]))
        steps[-1] += ([p.detach().clone() for p in probe.classifier.parameters()],)

    monkeypatch.setattr(online.OnlineProbe, "step", watched)
    assert main([*flags, "--out", "run", "--online-probe", "--accumulate", "2"]) == 0
    momentum = [0.0, 0.0]
    for before, seen, labels, rate, after in steps:
        values = [value.requires_grad_() for value in before]
        assert len(seen) == 2 and sum(map(len, seen)) == len(labels)
        scores = torch.cat(seen) @ values[0].T + values[1]
        gradients = torch.autograd.grad(F.cross_entropy(scores, labels), values)
        for place, gradient in enumerate(gradients):
            momentum[place] = 0.9 * momentum[place] + gradient
            wanted = values[place].detach() - rate * momentum[place]
            assert torch.allclose(after[place], wanted, atol=1e-6)
    rates = [rate for _, _, _, rate, _ in steps]
    assert rates == sorted(rates, reverse=True) and rates[0] < 0.1 and rates[-1] < 1e-3


def test_a_resumed_probe_ends_in_the_same_bits(flags):
    assert main([*flags, "--out", "whole", "--online-probe"]) == 0
    assert main([*flags, "--out", "parts", "--online-probe", "--max-steps", "3"]) == 0
    assert main(["--resume", "parts", "--max-steps", "99"]) == 0
    first, second = (
        read_checkpoint(Path(n) / "last.pt")["online_probe"] for n in ("whole", "parts")
    )
    for key, value in first["classifier"].items():
        assert torch.equal(second["classifier"][key], value)


def test_without_labels_or_compiled_it_is_refused(folder: Path, tmp_path: Path, flags, capsys):
    for number, file in enumerate(sorted(folder.rglob("*.png"))[:40]):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    line = ["--device", "cpu", "--batch-size", "8", "--num-splits", "1", "--online-probe"]
    assert main(["--data", str(tmp_path), *line]) == 2
    assert "--online-probe: needs labels" in capsys.readouterr().err
    assert main([*flags, "--online-probe", "--compile"]) == 2
    assert "--online-probe: does not see" in capsys.readouterr().err
