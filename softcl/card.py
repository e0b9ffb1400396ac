"""What stands beside exported weights: the lines that load them without softcl, and a model card.

The card is a README.md as the Hugging Face Hub reads it, with a head in YAML.
"""

from __future__ import annotations

from pathlib import Path

from softcl.files import replace_file
from softcl.nn.backbones import building_lines
from softcl.train.checkpoint import Stored

CARD = "README.md"
_MARK = "# Written by softcl.export, which replaces it."  # a comment in YAML
_LIBRARIES = {"timm": "timm", "torchvision": "pytorch", "onnx": "onnx"}


def loading_lines(stored: Stored, file: Path | str, kind: str) -> list[str]:
    """Python that loads the file, with timm, torchvision or onnxruntime alone.

    It leaves `model`, or of ONNX `session`, which gives features of normalised images.
    """
    size, name = stored.config.image_size, stored.config.arch
    mean, std = stored.content.get("normalisation", (None, None))
    images = f"# images: float (N, 3, {size}, {size})"
    if mean is not None:
        images += f", pixels in [0, 1] minus {list(mean)}, over {list(std)}"
    if kind == "onnx":
        return [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({str(file)!r})",
            images,
            '# (features,) = session.run(["features"], {"images": images})',
        ]
    if str(file).endswith(".safetensors"):
        library, load = "from safetensors.torch import load_file", f"load_file({str(file)!r})"
    else:
        library, load = "import torch", f"torch.load({str(file)!r}, weights_only=True)"
    imports, build = building_lines(stored.backbone, name, size, kind)
    return [
        *sorted({*imports, library}, key=lambda line: (line.startswith("from"), line)),
        "",
        *build,
        f"model.load_state_dict({load})",
        "model.eval()",
        images,
        "# features = model(images)",
    ]


def card(stored: Stored, file: Path, kind: str) -> str:
    """The text of a model card for an exported backbone."""
    config, content = stored.config, stored.content
    mean, std = content.get("normalisation", ("unknown", "unknown"))
    accuracy = content.get("accuracy")
    rows = {
        "backbone": f"{config.arch} ({stored.backbone.stem_rule})",
        "features": stored.backbone.num_features,
        "input": f"{config.image_size} x {config.image_size}, RGB",
        "mean": mean,
        "std": std,
        "method": config.method,
        "trained on": Path(config.data).name,
        "steps": content["step"],
    }
    if accuracy is not None:
        rows["k-NN top-1"] = f"{accuracy:.1%}"
    return "\n".join(
        [
            "---",
            _MARK,
            f"library_name: {_LIBRARIES[kind]}",
            "pipeline_tag: image-feature-extraction",
            "tags:",
            "- image-feature-extraction",
            "- self-supervised-learning",
            "- softcl",
            "---",
            "",
            f"# {file.stem}",
            "",
            f"An image backbone without a classifier, trained without labels ({config.method}).",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "```python",
            *loading_lines(stored, file.name, kind),
            "```",
            "",
        ]
    )


def write_card(stored: Stored, file: Path, kind: str) -> Path:
    """Write the card beside the file: README.md, or FILE.md where that is somebody else's.

    Returns:
        Its path.

    Raises:
        OSError: as the file system gave it.
    """
    path = file.with_name(CARD)
    if path.exists() and _MARK not in path.read_text(errors="replace"):
        path = file.with_name(f"{file.name}.md")
    replace_file(path, card(stored, file, kind).encode())
    return path
