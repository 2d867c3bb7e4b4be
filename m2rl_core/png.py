"""Small PNG files: a chart has few colours, so 256 of them in a palette do, at about a tenth of the size."""
from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def shrink(png: bytes) -> bytes:
    """An 8-bit RGB or RGBA PNG with filters 0 and 1 (what vl-convert writes) as an indexed one on white.

    Colours beyond the 256 most frequent go to the nearest of those. ValueError for another kind of PNG.
    """
    chunks = _chunks(png)
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {2: 3, 6: 4}.get(kind)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
    if depth != 8 or channels is None or chunks[b"IHDR"][12]:
        raise ValueError(f"PNG of depth {depth}, colour type {kind}: only 8-bit RGB and RGBA without interlace")
    lines = lines.reshape(height, 1 + width * channels)
    if lines[:, 0].max() > 1:
        raise ValueError(f"PNG with line filter {lines[:, 0].max()}: only 0 (none) and 1 (sub)")
    pixels = lines[:, 1:].reshape(height, width, channels)
    pixels = np.where((lines[:, :1, None] == 1), np.cumsum(pixels, axis=1, dtype=np.uint8), pixels)
    if channels == 4:
        alpha = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha)) // 255).astype(np.uint8)
    palette, index = _palette(pixels.reshape(-1, 3))
    data = np.zeros((height, 1 + width), np.uint8)
    data[:, 1:] = index.reshape(height, width)
    resolution = _chunk(b"pHYs", chunks[b"pHYs"]) if b"pHYs" in chunks else b""
    return b"".join([
        SIGNATURE, _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)), resolution,
        _chunk(b"PLTE", palette.astype(np.uint8).tobytes()), _chunk(b"IDAT", zlib.compress(data.tobytes(), 9)),
        _chunk(b"IEND", b""),
    ])


def _palette(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(colours (<= 256, 3), index (n,)) of pixels (n, 3)."""
    codes = pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    found, place, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.int32)
    kept = np.sort(np.argsort(-counts, kind="stable")[:256])
    gaps = ((colors[:, None] - colors[kept][None]) ** 2).sum(-1)  # (colours, 256)
    return colors[kept], gaps.argmin(axis=1).astype(np.uint8)[place]


def _chunks(png: bytes) -> dict[bytes, bytes]:
    if png[:8] != SIGNATURE:
        raise ValueError("not a PNG file")
    found: dict[bytes, bytes] = {}
    at = 8
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at:at + 8])
        found[name] = found.get(name, b"") + png[at + 8:at + 8 + size]
        at += 12 + size
    return found


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
