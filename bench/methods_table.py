"""Every method on the generated set: k-NN accuracy, time, speed and memory, as a Markdown table.

    python bench/methods_table.py                      # all methods, one after the other
    python bench/methods_table.py --only ascl snclr    # some of them
    python bench/methods_table.py --epochs 2           # another budget (a flag of softcl.train)

Each row is one run of ``python -m softcl.train --method NAME`` with its recipe for ``shapes`` and
one seed, in a process of its own. Finished runs in --out are not repeated and unfinished ones are
continued, so the command may be stopped and started again.

The last rows are negative controls: ASCL with the teacher's view taken of another image, so that
the pairs teach nothing. That image is drawn from the whole set. Within the batch would not do:
batch norm makes the vectors of a batch sum to about zero, so that every other image of it tells
something of one's own, and the network learns that.

Without batch norm at the projector's end such a control still moves: all outputs fall together and
then drift, told apart from the older keys of the queue, and the features of a net so moved have a
better k-NN than those of its first weights. So there are two controls, each to be compared with the
row of the same flags; that with batch norm is the one from which nothing is learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

# Name of the row -> flags of softcl.train.
BATCH_NORM = ["--projector-norm", "all"]
ROWS = {
    "ascl": ["--method", "ascl"],
    "ascl (batch norm)": ["--method", "ascl", *BATCH_NORM],
    "ascl (byol form)": ["--method", "ascl", "--form", "byol"],
    "snclr": ["--method", "snclr"],
    "snclr (code form)": ["--method", "snclr", "--form", "code"],
    "reco": ["--method", "reco"],
    "moco": ["--method", "moco"],
    "ressl": ["--method", "ressl"],
    "sce": ["--method", "sce"],
    "nnclr": ["--method", "nnclr"],
    "msf": ["--method", "msf"],
}
CONTROLS = {
    "control: shuffled pairs (batch norm)": ROWS["ascl (batch norm)"],
    "control: shuffled pairs": ROWS["ascl"],
}
ALL = ROWS | CONTROLS
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train every method on shapes; print a table")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=[*ALL], default=[*ALL], metavar="ROW")
    arguments, flags = parser.parse_known_args()
    lines = [
        "| method | k-NN | over untrained | loss's backend | seconds | images/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in arguments.only:
        folder = arguments.out / "".join(c if c.isalnum() else "-" for c in name).strip("-")
        lines.append(row(name, run(name, folder, flags)))
        print(lines[-1], flush=True)
    untrained = json.loads((folder / "baselines.json").read_text())
    start, pixels = untrained["untrained"], untrained["pixels"]
    text = "\n".join(lines) + f"\n\nUntrained backbone {start:.1%}, raw pixels {pixels:.1%}."
    (arguments.out / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    return 0


def run(name: str, folder: Path, flags: list[str]) -> Path:
    """Train one row to its end; the folder of its run."""
    if (folder / "result.json").exists():
        return folder
    if (folder / "last.pt").exists():
        command = ["--resume", str(folder)]
    else:
        command = ["--data", "shapes", *ALL[name], "--knn-every", "0"]
        command += [*flags, "--out", str(folder), "--overwrite"]
    program = [__file__, "--control"] if name in CONTROLS else ["-m", "softcl.train"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *program, *command],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # the memory of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(output.decode() + f"{name}: softcl.train ended with {process.returncode}")
    (folder / "peak_memory.json").write_text(json.dumps(usage.ru_maxrss * 1024))
    return folder


def row(name: str, folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    memory = json.loads((folder / "peak_memory.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(step["images_per_s"] for step in steps if "images_per_s" in step)
    gain = 100 * (result["knn_top1"] - result["knn_untrained"])
    return (
        f"| {name} | {result['knn_top1']:.1%} | {gain:+.1f} | {result['backend']} "
        f"| {result['seconds']:.0f} | {speeds[len(speeds) // 2]:.0f} | {memory / 2**20:.0f} MiB |"
    )


def control(flags: list[str]) -> int:
    """softcl.train with pairs that do not belong together: the key's view of some other image."""
    import torch

    from softcl.train import main as train
    from softcl.training import run as training

    original = training.build_views

    def shuffled_views(method, images, size):
        views = original(method, images, size)

        def key(batch, generator):
            chance = torch.rand(len(batch), generator=generator, device=generator.device)
            others = images.batch((chance * len(images)).long().cpu()).to(batch.device)
            return views["key"](others, generator)

        return {**views, "key": key}

    training.build_views = shuffled_views
    return train(flags)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--control"]:
        sys.exit(control(sys.argv[2:]))
    sys.exit(main())
