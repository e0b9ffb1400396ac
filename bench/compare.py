"""What changed between two files of results, beyond the spread of their own rounds.

    python -m bench.compare OLD.json NEW.json [--most-slower PERCENT]

Files as `pytest bench/ --benchmark-json FILE` writes them. A benchmark has changed where its
medians differ by more than both runs' interquartile ranges together, and by more than 3 %. With
--most-slower the exit status is 1 if one that has changed is slower by more than that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

LEAST_CHANGE = 0.03


class Change(NamedTuple):
    name: str
    old: float  # seconds, medians
    new: float
    spread: float  # seconds: both interquartile ranges

    @property
    def ratio(self) -> float:
        return self.new / self.old

    @property
    def is_beyond_spread(self) -> bool:
        difference = abs(self.new - self.old)
        return difference > self.spread and difference > LEAST_CHANGE * self.old


def read_medians(path: Path) -> dict[str, tuple[float, float]]:
    """Name -> (median, interquartile range) in seconds."""
    try:
        benchmarks = json.loads(path.read_text())["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"compare: {path} holds no results of pytest-benchmark ({error})"
        ) from None
    return {b["fullname"]: (b["stats"]["median"], b["stats"]["iqr"]) for b in benchmarks}


def compare(old: dict, new: dict) -> list[Change]:
    """Those in both, in the order of the new."""
    return [
        Change(name, old[name][0], median, old[name][1] + spread)
        for name, (median, spread) in new.items()
        if name in old
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--most-slower", type=float, metavar="PERCENT")
    options = parser.parse_args(arguments)
    old, new = read_medians(options.old), read_medians(options.new)
    changes = compare(old, new)
    beyond = [c for c in changes if c.is_beyond_spread]
    print("| benchmark | old ms | new ms | change | spread ms |")
    print("|---|---:|---:|---:|---:|")
    for c in sorted(beyond, key=lambda c: -c.ratio):
        print(
            f"| {c.name} | {c.old * 1e3:.3f} | {c.new * 1e3:.3f} | {c.ratio - 1:+.1%} "
            f"| {c.spread * 1e3:.3f} |"
        )
    print(
        f"\n{len(beyond)} of {len(changes)} changed beyond their spread; "
        f"{len(old.keys() - new.keys())} only in the old, "
        f"{len(new.keys() - old.keys())} only in the new."
    )
    if options.most_slower is None:
        return 0
    return int(any(c.ratio > 1 + options.most_slower / 100 for c in beyond))


if __name__ == "__main__":
    sys.exit(main())
