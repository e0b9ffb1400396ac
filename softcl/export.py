"""``python -m softcl.export RUN FILE``: the backbone of a checkpoint, for other programs.

    timm          safetensors with timm's keys, for timm.create_model(..., checkpoint_path=FILE)
    torchvision   torchvision's keys, for ResNets that both have: .safetensors, else torch.save
    onnx          a graph with any batch size; needs onnx and onnxscript

RUN is a run folder (its best.pt, or else its newest checkpoint) or a checkpoint. The lines that
load the file without softcl, with the stem that a backbone for small images has, are printed, and
written to a model card beside it.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import softcl
from softcl.card import loading_lines, write_card
from softcl.command import CommandParser, carry_out
from softcl.errors import ExportError
from softcl.files import check_target, replace_file, user_path
from softcl.train.checkpoint import NETWORKS, Stored, load_backbone

FORMATS = ("timm", "torchvision", "onnx")
PROG = "softcl.export"


def build_parser() -> CommandParser:
    parser = CommandParser(PROG, "RUN FILE [flags]", __doc__.splitlines()[0].partition(": ")[2])
    add = parser.add_argument
    # fmt: off
    add("run", metavar="RUN", help="a run folder or a checkpoint")
    add("file", metavar="FILE", help="to write; replaced in one moment if it exists")
    add("--format", choices=FORMATS, metavar="NAME",
        help="timm, torchvision or onnx (default: onnx for *.onnx, else timm)")
    add("--network", choices=NETWORKS, default="student", metavar="NAME",
        help="student or teacher (default: student)")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected failure is one line on stderr.

    Returns:
        0 done, 1 could not run, 2 wrong flags.
    """

    def command() -> None:
        options = build_parser().read(sys.argv[1:] if argv is None else argv)
        file = user_path(options.file)
        check_target(file)
        stored = load_backbone(user_path(options.run), options.network)
        kind = options.format or ("onnx" if file.suffix == ".onnx" else "timm")
        data = {"timm": to_timm, "torchvision": to_torchvision, "onnx": to_onnx}[kind](stored, file)
        replace_file(file, data)
        card = write_card(stored, file, kind)
        print(f"checkpoint {stored.path}, step {stored.content['step']}, {options.network}")
        print(f"written    {file}, {len(data) / 1e6:.1f} MB, {kind}")
        print(f"card       {card}")
        print("load       by these lines, without softcl:\n")
        print("\n".join(loading_lines(stored, file, kind)))

    return carry_out(PROG, command)


def weights_of(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in backbone.state_dict().items()}


def metadata_of(stored: Stored) -> dict[str, str]:
    """What a reader of the file should know, as safetensors keeps it: text."""
    config = stored.config
    found = {
        "format": "pt",
        "softcl": softcl.__version__,
        "arch": config.arch,
        "image_size": str(config.image_size),
        "stem": stored.backbone.stem_rule,
        "num_features": str(stored.backbone.num_features),
        "method": config.method,
        "step": str(stored.content["step"]),
    }
    if "normalisation" in stored.content:
        mean, std = stored.content["normalisation"]
        found.update(mean=str(list(mean)), std=str(list(std)))
    return found


def to_timm(stored: Stored, file: Path) -> bytes:
    """A safetensors file; the backbone is timm's, and so are its keys."""
    return _safetensors(weights_of(stored.backbone), stored)


def _safetensors(weights: dict[str, Tensor], stored: Stored) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ExportError('needs safetensors: pip install "softcl[train]"') from error
    return save(weights, metadata_of(stored))


def to_torchvision(stored: Stored, file: Path) -> bytes:
    """The same weights under torchvision's keys, which for its ResNets are timm's.

    Raises:
        ExportError: torchvision has no such model.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise ExportError('needs torchvision: pip install "softcl[train]"') from error
    name = stored.config.arch.split(".")[0]
    if name not in models.list_models(models):
        raise ExportError(f"torchvision has no model {name!r}; --format timm writes it")
    with torch.device("meta"):
        expected = models.get_model(name).state_dict()
    weights = weights_of(stored.backbone)
    classifier = {key for key in expected if key.startswith(("fc.", "heads.", "classifier."))}
    if expected.keys() - classifier != weights.keys():
        raise ExportError(f"torchvision's {name!r} has other parts; --format timm writes it")
    if file.suffix == ".safetensors":
        return _safetensors(weights, stored)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def to_onnx(stored: Stored, file: Path) -> bytes:
    """images (N, 3, S, S), normalised, -> features (N, F); `metadata_of` is the model's metadata.

    Raises:
        ExportError: onnx or onnxscript is absent, or the backbone has an operation ONNX lacks.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxscript"
        )
    size = stored.config.image_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        try:
            torch.onnx.export(
                stored.backbone,
                (torch.zeros(2, 3, size, size),),
                str(path),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: "N"},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many kinds: the reason matters
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"cannot export {stored.config.arch} to ONNX: {reason}") from error
        return _with_metadata(path, metadata_of(stored))


def _with_metadata(path: Path, metadata: dict[str, str]) -> bytes:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


if __name__ == "__main__":
    sys.exit(main())
