"""What a run tells of itself: the lines before its first step, the device and the versions."""

from __future__ import annotations

import dataclasses
import platform
from typing import TYPE_CHECKING, Any

import torch

import softcl
from softcl.data.kernels import describe_kernel
from softcl.training.speed import describe_speed

if TYPE_CHECKING:
    from softcl.training.run import Run


def versions() -> dict[str, str]:
    return {
        "softcl": softcl.__version__,
        "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu, {torch.get_num_threads()} threads"


def describe(run: Run) -> None:
    """Say what will run: the data, the settings and where each default comes from, the backend."""
    config, say = run.config, run.progress.say
    module = run.state.student
    trained = [*module.parameters(), *run.state.heads.parameters()]
    parameters = sum(p.numel() for p in trained)
    say(f"softcl     {softcl.__version__}, torch {torch.__version__}, {device_name(run.device)}")
    say(f"data       {run.images.describe()}")
    for note in run.images.notes:
        say(f"           {note}")
    for line in run.images.skipped[:3]:
        say(f"           skipped {line}")
    say(f"evaluation {run.parts.evaluation}")
    say(
        f"model      {config.arch} at {config.image_size} px ({module.backbone.stem_rule}), "
        f"{module.backbone.num_features} features, {parameters / 1e6:.2f} M parameters"
    )
    say(f"networks   {describe_speed(config)}")
    say(f"views      {describe_kernel(run.device, config.view_kernel)}")
    say(f"method     {config.method} (defaults of {run.parts.defaults!r})")
    for line in wrapped(dataclasses.asdict(run.state.method)):
        say(f"           {line}")
    say(
        f"training   {config.epochs} epochs of {run.feed.steps_per_epoch} steps, "
        f"batch {config.batch_size}, {config.optimizer}, lr {config.lr:g} after "
        f"{config.warmup_epochs:g} epochs of warm-up, weight decay {config.weight_decay:g}, "
        f"seed {config.seed}"
    )
    say(f"backend    {run.backend}")
    if run.world.size > 1:
        kept = "each keeps a part of the queue" if config.queue_sharding else "each keeps the queue"
        say(
            f"processes  {run.world.size}, {config.batch_size // run.world.size} images of a batch "
            f"each; {kept}"
        )
    say(f"run        {run.folder.path}")


def record(run: Run) -> dict[str, Any]:
    """The content of config.json: the settings, and what they came to on this machine."""
    return {
        "config": run.config.to_dict(),
        "backend": {"name": run.backend.name, "passed_over": run.backend.reasons},
        "views": describe_kernel(run.device, run.config.view_kernel),
        "device": device_name(run.device),
        "versions": versions(),
    }


def wrapped(numbers: dict[str, Any], width: int = 85) -> list[str]:
    """``name value`` of each number, in lines of at most `width` columns."""
    lines = [""]
    for name, value in numbers.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        word = f"{name.replace('_', ' ')} {shown}"
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return lines
