"""Small images in rows, inside the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from torch import Tensor

SIDE = 96  # pixels that an image is stored with at most
_COLUMN = 84  # pixels of a column, at most


def tile(pixels: Tensor, title: str = "", mark: str = "") -> str:
    """An image (3, H, W) uint8.

    Args:
        title: in words.
        mark: the colour of the page that its border has; "" for no border.
    """
    from PIL import Image

    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    # A third of a PNG's bytes; with colours as fine as the rest, for small images are enlarged.
    image.save(stream, format="JPEG", quality=88, subsampling=0, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    words = html.escape(title)
    shown = f' class="{mark}"' if mark else ""
    return f'<img{shown} alt="{words}" title="{words}" src="data:image/jpeg;base64,{data}">'


def table_of(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """Rows of tiles, in columns of one width that shrinks with the window.

    Args:
        heads: words above the columns, for each or none.
    """
    columns = max(map(len, rows))
    above = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = [f"<tr>{above}</tr>"] if heads else []
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    width = f"width:min(100%,{columns * _COLUMN}px)"
    return f'<table class="tiles" style="{width}">{"".join(lines)}</table>'
