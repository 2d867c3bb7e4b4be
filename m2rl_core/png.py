"""Small PNG files: a chart has few colours, so a palette of 256 does, at about a tenth of the size."""
from __future__ import annotations

import io

from PIL import Image


def shrink(png: bytes) -> bytes:
    """The same picture on white with a palette of at most 256 colours; resolution kept."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    out = io.BytesIO()
    dpi = Image.open(io.BytesIO(png)).info.get("dpi")
    flat.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True, **({"dpi": dpi} if dpi else {}))
    return out.getvalue()
