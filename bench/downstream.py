"""What a backbone is worth downstream: few labels and detection, beside random weights, by seeds.

    python bench/downstream.py runs/NAME
    python bench/downstream.py runs/NAME --data FOLDER --scenes COCO-FOLDER --seeds 5

Of each seed the same images have labels for both, the same batches are seen, and all that is not
the backbone starts from the same numbers. Printed are means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from softcl import detect, finetune  # noqa: E402
from softcl.detect import SCENES  # noqa: E402
from softcl.train.weights import load_pretrained  # noqa: E402


def run(command, line: list[str]) -> None:
    code = command(line)
    if code:
        raise SystemExit(code)


def tuned(given: argparse.Namespace, labels: str, seed: int) -> dict[str, float]:
    """top-1 in percent of the backbone and of random weights."""
    out = given.out / f"finetune-{labels.replace('%', '')}-{seed}.json"
    line = [given.spec, "--data", given.data, "--labels", labels, "--seed", str(seed)]
    if not out.exists():
        run(finetune.main, [*line, "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    return {row["weights"]: 100 * row["top1"] for row in results}


def detected(given: argparse.Namespace, arch: str, spec: str, seed: int) -> dict[str, float]:
    """AP in percent of boxes and of masks."""
    name = "random" if spec == finetune.RANDOM else "backbone"
    out = given.out / f"detect-{name}-{seed}"
    line = [spec, "--task", "masks", "--data", given.scenes, "--seed", str(seed), "--arch", arch]
    if not (out / detect.RESULT).exists():
        run(detect.main, [*line, "--epochs", str(given.epochs), "--out", str(out)])
    scores = json.loads((out / detect.RESULT).read_text())["scores"]
    return {kind: 100 * its["AP"] for kind, its in scores.items()}


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", help="a run, or whatever else softcl.train's --init takes")
    parser.add_argument("--data", default="shapes", help="labelled images")
    parser.add_argument("--labels", nargs="*", default=["1%", "10%"])
    parser.add_argument("--scenes", default=SCENES, help="a COCO folder")
    parser.add_argument("--epochs", type=int, default=12, help="of the detectors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/downstream"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    seeds, rows = range(given.seeds), {}
    for labels in given.labels:
        found = [tuned(given, labels, seed) for seed in seeds]
        random, own = ([one[name] for one in found] for name in (finetune.RANDOM, given.spec))
        rows[f"top-1, {labels} of the labels"] = (random, own)
    arch = load_pretrained(given.spec).arch
    both = [
        [detected(given, arch, spec, seed) for seed in seeds]
        for spec in (finetune.RANDOM, given.spec)
    ]
    for kind in ("boxes", "masks"):
        rows[f"AP, {kind}"] = tuple([one[kind] for one in found] for found in both)
    print("\n| | random weights | backbone |\n|---|---|---|")
    for name, (random, own) in rows.items():
        print(f"| {name} | {cell(random)} | {cell(own)} |")


if __name__ == "__main__":
    main()
