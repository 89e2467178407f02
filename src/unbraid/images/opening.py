"""Opening pictures of any format that Pillow reads as upright RGB in sRGB, transparency on white. All pictures are opened here."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import ceil, isqrt
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from unbraid.common.errors import UsageError

FORMATS = (  # without EPS, PS, WMF and PDF, which contain programs
    "PNG JPEG MPO WEBP AVIF GIF BMP DIB TIFF JPEG2000 PPM TGA PSD ICO QOI PCX SGI DDS"
).split()
MOST = 178_956_970  # pixels; the limit at which Pillow refuses pictures, too
ENOUGH = 2 * 1024**2  # pixels; from four times as many a picture is reduced by a whole factor while it is read
STRIP = 512  # rows that are converted at a time
KEPT_TEXT = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # PNG texts that can contain the orientation
LONGEST_TEXT = 1 << 16  # bytes
BROKEN = (  # what Pillow raises for damaged files, found with mutated files of all formats
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    NotImplementedError, struct.error, zlib.error,
)  # fmt: skip
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation → the transposition that makes the picture upright
WHOLE = "whole size"  # key in Image.info: width and height in the file


def open_image(path: Path, enough: int = ENOUGH) -> Image.Image:
    """Read a picture, or the first one of an animation, as 8-bit RGB: colours converted to sRGB by the colour profile, turned by the EXIF
    orientation, transparency on white. A picture of 4·`enough` pixels or more is reduced while it is read; `whole_size` gives its size in
    the file. UsageError if it cannot be read."""
    rgba = _read(path, enough)
    out = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    out.info[WHOLE] = rgba.info[WHOLE]
    return out


def open_alpha(path: Path, enough: int = ENOUGH) -> Image.Image:
    """The opacity of a picture as an `L` image with the size that `open_image` gives; white without transparency."""
    rgba = _read(path, enough)
    out = rgba.getchannel("A")
    out.info[WHOLE] = rgba.info[WHOLE]
    return out


def whole_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture in its file."""
    return image.info.get(WHOLE, image.size)


def moves(path: Path) -> bool:
    """Whether a file is an animation, of which only the first picture is read."""
    with _file(path) as file:  # further pictures in a camera's MPO are previews, or for the other eye
        return file.format != "MPO" and getattr(file, "n_frames", 1) > 1


def _read(path: Path, enough: int) -> Image.Image:
    with _file(path) as file:
        size = file.size
        fraction = isqrt(size[0] * size[1] // enough) or 1
        if fraction > 1:
            file.draft(file.mode, (size[0] // fraction, size[1] // fraction))  # JPEGs can be decoded at 1/2, 1/4 or 1/8
        file.load()
        orientation = file.getexif().get(0x0112, 1)  # read after `load`, because Pillow turns TIFFs itself
        out = _reduced(file, isqrt(file.width * file.height // enough) or 1)
    if orientation in TURNS:
        out = out.transpose(TURNS[orientation])
    out.info = {WHOLE: size[::-1] if orientation in (5, 6, 7, 8) else size}
    return out


@contextmanager
def _file(path: Path) -> Iterator[Image.Image]:
    """An opened picture that is not decoded yet. Every error inside is raised as UsageError."""
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for names that are too long)
        raise UsageError("there is no such image", path, "Check the path.")
    too_many = UsageError(
        f"the picture is too large: {MOST // 10**6} million pixels at most", path, "Make it smaller, or crop it."
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd EXIF data and large pictures
            with Image.open(_source(path), formats=_formats()) as file:
                if file.width * file.height > MOST:
                    raise too_many
                yield file
    except Image.DecompressionBombError as error:
        raise too_many from error
    except MemoryError as error:
        raise UsageError("there is not enough memory for this picture", path, "Make it smaller.") from error
    except BROKEN as error:
        raise UsageError(
            "this is not an image that can be read", path, "Give a whole PNG, JPEG or WebP file."
        ) from error


@cache
def _formats() -> list[str]:
    """The FORMATS that this version of Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _source(path: Path) -> Path | io.BytesIO:
    """The file to open. From a PNG large texts are removed, because Pillow refuses to open files with them."""
    with path.open("rb") as file:
        start = file.read(8)
        if start != b"\x89PNG\r\n\x1a\n":
            return path
        out, size = io.BytesIO(), path.stat().st_size
        out.write(start)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            end = min(file.tell() + length + 4, size)
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                at, name = file.tell(), file.read(min(40, length))
                file.seek(at)
                if length > LONGEST_TEXT or not name.startswith(KEPT_TEXT):
                    file.seek(end)
                    continue
            out.write(head + file.read(end - file.tell()))
            if kind == b"IEND":
                break
    out.seek(0)
    return out


def _reduced(image: Image.Image, fraction: int) -> Image.Image:
    """RGBA at 1/`fraction` of width and height. Converted in strips, so that a large picture is never in memory as RGBA at full size."""
    white, profile = _white(image), _profile(image)
    if fraction == 1:
        return _rgba(image, white, profile)
    rows, (width, height) = max(1, STRIP // fraction) * fraction, image.size
    out = Image.new("RGBA", (ceil(width / fraction), ceil(height / fraction)))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        out.paste(_rgba(strip, white, profile).reduce(fraction), (0, top // fraction))
    return out


def _white(image: Image.Image) -> float | None:
    """The value of white for modes that do not define it: that of 16 bits, or one that fits the brightest value. None for other modes."""
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode not in ("I", "F"):
        return None
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    if not np.isfinite((low, high)).all():
        raise ValueError("NaN or infinite brightness")
    if image.mode == "I":
        return 65535.0 if low >= 0 and high <= 65535 else float(2**32 - 1)
    return next((white for white in (1.0, 255.0, 65535.0) if high <= white), high)


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile; None for sRGB, and for a profile that cannot be read."""
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        return None if ImageCms.getProfileDescription(profile).strip().startswith("sRGB") else profile
    except (OSError, ImageCms.PyCMSError):
        return None


def _rgba(image: Image.Image, white: float | None, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    mode, clear = image.mode, image.info.get("transparency")
    alpha = None
    if white:
        values = np.asarray(image)
        if isinstance(clear, int):
            alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        values = values.astype(np.float64) if mode != "I" or white < 2**32 - 1 else values.view(np.uint32)
        image = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    elif mode == "LAB":
        image, profile = _in_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))), None
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode in ("P", "PA") or clear is not None:
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    if profile:
        image = _in_srgb(image, profile)
    out = image.convert("RGB").convert("RGBA")
    if alpha:
        out.putalpha(alpha)
    return out


def _in_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Convert colours from a profile to sRGB; unchanged if the profile is for other channels."""
    try:
        out = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        return image
    return out or image
