"""Every method on the generated set: k-NN accuracy, time, speed and memory, as a Markdown table.

    python bench/methods_table.py                      # all methods, one after the other
    python bench/methods_table.py --jobs 2             # two at a time, each with half of the cores
    python bench/methods_table.py --only ascl snclr    # some of them
    python bench/methods_table.py --epochs 2           # another budget (a flag of softcl.train)

Each row is one run of ``python -m softcl.train --method NAME`` with its recipe for ``shapes`` and
one seed, in a process of its own. All train for EPOCHS epochs, more than the 8 of the recipes: MoCo
and the BYOL form of ASCL need them to end ten points above the first weights. Finished runs in
--out are not repeated and unfinished ones are continued, so the command may be stopped and started
again.

"Over untrained" is the gain over the first weights, whose batch norms were given the statistics of
the images: with those that a new network starts with, 0 and 1, its features are nearly all the
same, and any training, by whatever loss, uncovers what they tell of an image. "Centred" is the k-NN
with the mean of all features subtracted before their norms are divided out, which removes what is
still common to them.

The last rows are negative controls, ASCL with a teacher's view that tells nothing of the student's:
that of another image, and noise. The other image is drawn from the whole set, not from the batch:
batch norm makes the vectors of a batch sum to about zero, so that every other image of it tells
something of one's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Name of the row -> flags of softcl.train.
ROWS = {
    "ascl": ["--method", "ascl"],
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
CONTROLS = ("control: shuffled pairs", "control: noise for keys")
ALL = ROWS | dict.fromkeys(CONTROLS, ROWS["ascl"])
EPOCHS = 12
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train every method on shapes; print a table")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="rows that run side by side")
    parser.add_argument("--only", nargs="+", choices=[*ALL], default=[*ALL], metavar="ROW")
    arguments, flags = parser.parse_known_args()
    lines = [
        "| method | k-NN | over untrained | centred | loss's backend | seconds | images/s "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    threads = max((os.cpu_count() or 1) // arguments.jobs, 1)
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the children
    folders = [arguments.out / folder_name(name) for name in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = pool.map(run, arguments.only, folders, [flags] * len(folders))
        for name, folder in zip(arguments.only, runs, strict=True):
            lines.append(row(name, folder))
            print(lines[-1], flush=True)
    untrained = json.loads((folder / "baselines.json").read_text())
    start, pixels = untrained["untrained"], untrained["pixels"]
    middle = json.loads((folder / "centred.json").read_text())["untrained"]
    text = "\n".join(lines) + f"\n\nUntrained backbone {start:.1%}, centred {middle:.1%}, "
    text += f"raw pixels {pixels:.1%}."
    (arguments.out / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    return 0


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def run(name: str, folder: Path, flags: list[str]) -> Path:
    """Train one row to its end; the folder of its run."""
    if not (folder / "result.json").exists():
        train(name, folder, flags)
    if not (folder / "centred.json").exists():
        child(name, [__file__, "--centred", str(folder)])
    return folder


def train(name: str, folder: Path, flags: list[str]) -> None:
    if (folder / "last.pt").exists():
        command = ["--resume", str(folder)]
    else:
        command = ["--data", "shapes", *ALL[name], "--knn-every", "0"]
        command += ["--epochs", str(EPOCHS)]
        command += [*flags, "--out", str(folder), "--overwrite"]
    program = [__file__, "--control", name] if name in CONTROLS else ["-m", "softcl.train"]
    memory = child(name, [*program, *command])
    (folder / "peak_memory.json").write_text(json.dumps(memory))


def child(name: str, command: list[str]) -> int:
    """Run Python to its end; the largest memory that it had, in bytes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # the memory of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(output.decode() + f"{name}: {command[1]} ended with {process.returncode}")
    return usage.ru_maxrss * 1024


def row(name: str, folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    memory = json.loads((folder / "peak_memory.json").read_text())
    centred = json.loads((folder / "centred.json").read_text())["trained"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(step["images_per_s"] for step in steps if "images_per_s" in step)
    gain = 100 * (result["knn_top1"] - result["knn_untrained"])
    return (
        f"| {name} | {result['knn_top1']:.1%} | {gain:+.1f} | {centred:.1%} | {result['backend']} "
        f"| {result['seconds']:.0f} | {speeds[len(speeds) // 2]:.0f} | {memory / 2**20:.0f} MiB |"
    )


def control(name: str, flags: list[str]) -> int:
    """softcl.train with keys that tell nothing of their queries."""
    import torch

    from softcl.train import parts
    from softcl.train.__main__ import main as train

    original = parts.build_views

    def views_of_others(method, images, size, kernel=None):
        views = original(method, images, size, kernel)

        def noise(batch, generator):
            shape, device = (len(batch), 3, size, size), generator.device
            return torch.randn(shape, generator=generator, device=device).to(batch.device)

        def other(batch, generator):
            chance = torch.rand(len(batch), generator=generator, device=generator.device)
            others = images.batch((chance * len(images)).long().cpu()).to(batch.device)
            return views["key"](others, generator)

        return {**views, "key": noise if "noise" in name else other}

    parts.build_views = views_of_others
    return train(flags)


def measure_centred(folder: Path) -> None:
    """k-NN of the untrained and of the trained backbone, with the bank's mean row subtracted."""
    import torch
    from torch.nn.functional import normalize

    from softcl.evaluation import eval_mode, extract
    from softcl.evaluation.recalibration import recalibrated
    from softcl.train.checkpoint import find_checkpoint
    from softcl.train.config import TrainConfig
    from softcl.train.defaults import fill
    from softcl.train.images import load_images
    from softcl.train.parts import build_knn, build_state

    _, content = find_checkpoint(folder / "last.pt")
    config, device = TrainConfig.of(**content["config"]), torch.device("cpu")
    images, *sets, _ = load_images(config)
    config, method, _ = fill(config, images, config.image_size)
    encoder, knn = build_state(config, method, device).student, build_knn(config, *sets, device)

    def score() -> float:
        places = ((knn.queries, knn.query_indices), (knn.bank, knn.bank_indices))
        with eval_mode(encoder):
            queries, bank = (
                extract(*place, encoder.features, knn.size, device, normalize=False)
                for place in places
            )
        mean = bank.mean(0)
        return knn.accuracy(*(normalize(x - mean, dim=1) for x in (queries, bank)))

    with recalibrated(encoder, knn.bank, knn.size, device):
        scores = {"untrained": score()}
    encoder.load_state_dict(content["student"])
    scores["trained"] = score()
    (folder / "centred.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--control"]:
        sys.exit(control(sys.argv[2], sys.argv[3:]))
    if sys.argv[1:2] == ["--centred"]:
        sys.exit(measure_centred(Path(sys.argv[2])))
    sys.exit(main())
