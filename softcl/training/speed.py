"""How the networks are computed: precision, memory format, compiled, in CUDA graphs.

    --precision bf16    student and teacher in bf16 where autocast has it so, weights in float32;
                        projections leave them in float32, and what follows (predictor, loss) is as
                        ever. The default on GPUs that have bf16; float32 elsewhere.
    --channels-last     convolutions in the order that GPUs prefer. The default on GPUs, but with
                        split batch norm, which would copy there and back at every layer.
    --compile           torch.compile of student and teacher as they train; evaluation stays eager
    --cuda-graph        the same, their kernels launched from CUDA graphs

All but the precision change the last bits alone. Views, loss, teacher's average, optimiser and
queue are a few fused calls each, and stay as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil

import torch

from softcl.training.config import ConfigError, TrainConfig
from softcl.training.step import TrainState

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # what autocast takes
_COMPILERS = ("g++", "clang++", "c++")


def check_speed(config: TrainConfig, device: torch.device) -> None:
    """Refuse what the device or the machine cannot do.

    Raises:
        ConfigError: naming the flag.
    """
    is_gpu = device.type == "cuda"
    if config.cuda_graph and not is_gpu:
        raise ConfigError("cuda_graph", "", "needs a CUDA device, and this run is on the CPU")
    if config.compile or config.cuda_graph:
        flag = "cuda_graph" if config.cuda_graph else "compile"
        if is_gpu and importlib.util.find_spec("triton") is None:
            raise ConfigError(flag, "", "torch.compile needs triton on a GPU")
        if not is_gpu and _compiler() is None:
            raise ConfigError(flag, "", "torch.compile needs a C++ compiler, and there is none")


def settle_speed(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fill what the flags and the method leave open about speed."""
    is_gpu, filled = device.type == "cuda", {}
    if config.precision is None:
        filled["precision"] = "bf16" if is_gpu and _has_bf16(device) else "fp32"
    if config.channels_last is None:
        filled["channels_last"] = is_gpu and (config.num_splits or 1) == 1
    return dataclasses.replace(config, **filled)


def _has_bf16(device: torch.device) -> bool:
    """In hardware: since compute capability 8.0, and on AMD's data-centre GPUs."""
    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, filter(None, (named, *_COMPILERS)))), None)


def speed_up(config: TrainConfig, state: TrainState) -> None:
    """Make the networks of a run compute as a settled configuration says, in place.

    Names and values of their parameters stay: a checkpoint does not tell the difference.
    """
    networks = [state.student, *([state.teacher] if state.method.teacher_sees() else ())]
    for network in networks:
        network.precision = PRECISIONS[config.precision or "fp32"]
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile or config.cuda_graph:
            # In place, the call alone: Encoder.features, which evaluation takes, is not compiled.
            mode = "reduce-overhead" if config.cuda_graph else "default"
            network.compile(dynamic=False, mode=mode)


def begin_step(config: TrainConfig) -> None:
    """Say that what the last step's CUDA graphs returned is no longer needed."""
    if config.cuda_graph:
        torch.compiler.cudagraph_mark_step_begin()


def describe_speed(config: TrainConfig) -> str:
    """The same in words, for a log."""
    words = [config.precision or "fp32"]
    words += ["channels last"] * bool(config.channels_last)
    if config.compile or config.cuda_graph:
        words.append("compiled, in CUDA graphs" if config.cuda_graph else "compiled")
    return ", ".join(words)
