"""Pictures of any kind to PNGs of one size."""

import io

from PIL import Image

from modeling_mot.media_loading import flatten
from training.data.reading.values import decode_picture


def square_png(data: bytes | str, size: int) -> bytes:
    """Fit any raster picture into a white square of `size` pixels, as PNG."""
    picture = flatten(decode_picture(data))
    if picture.size != (size, size):
        scale = size / max(picture.size)
        fitted = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(fitted, Image.Resampling.LANCZOS)
        square = Image.new("RGB", (size, size), "white")
        square.paste(picture, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
        picture = square
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def svg_png(text: str, size: int) -> bytes:
    """Render an SVG to fit a white square of `size` pixels, as PNG.

    Raises:
        ValueError: it does not render, such as one without a size.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("rendering SVG needs resvg-py: pip install resvg-py") from error
    # Without a resolution, sizes in mm or pt come out as nothing.
    return square_png(bytes(resvg_py.svg_to_bytes(svg_string=text, width=size, dpi=96.0)), size)
