"""One picture in every file format gives the same pixels; files that are no pictures are refused in one line."""

import io
import os
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from unbraid.common.errors import UsageError
from unbraid.files.formats.metadata import data_uri
from unbraid.images.opening import MOST, moves, open_alpha, open_image, whole_size

W, H = 64, 48
YY, XX = np.mgrid[:H, :W]
RGB = np.stack([XX * 255 // W, YY * 255 // H, 255 - (XX + YY) * 2], 2).astype(np.uint8)
REF, GREY = Image.fromarray(RGB), Image.fromarray(RGB).convert("L")
GREY_RGB = np.asarray(GREY.convert("RGB"))
G16 = np.asarray(GREY, np.uint16) * 257
HALF = np.where(XX < W // 2, 255, 0).astype(np.uint8)
ON_WHITE, GREY_ON_WHITE = (np.where(HALF[..., None] > 0, one, 255) for one in (RGB, GREY_RGB))
RGBA = Image.fromarray(np.dstack([RGB, HALF]))
LA = Image.merge("LA", (GREY, Image.fromarray(HALF)))
SRGB: Any = ImageCms.createProfile("sRGB")
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip
JPEG = {"quality": 99, "subsampling": 0}
Form = tuple[
    str, Image.Image, np.ndarray, int, dict[str, Any]
]  # file, picture, pixels, largest difference, how it is saved


def few() -> Image.Image:
    """The picture in 256 colours, the expected pixels for files with a palette."""
    return REF.quantize(255)


def turned(orientation: int, suffix: str, **options: Any) -> Form:
    exif = Image.Exif()
    exif[0x0112] = orientation
    near = 6 if suffix == "jpg" else 0
    return f"{orientation}.{suffix}", REF.transpose(TURNED[orientation]), RGB, near, {"exif": exif, **options}


def see_through_palette() -> tuple[Image.Image, np.ndarray]:
    indices = np.where(HALF > 0, np.asarray(few()), 255).astype(np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([*(few().getpalette() or [])[:765], 0, 0, 0])
    return image, np.where(HALF[..., None] > 0, np.asarray(few().convert("RGB")), 255)


def wide_gamut() -> tuple[Image.Image, bytes]:
    """The same colours under another profile, in which red and blue are exchanged. Without the profile, colours would be wrong."""
    profile = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    data = bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    return Image.fromarray(RGB[..., ::-1].copy()), data


def as_lab(image: Image.Image) -> Image.Image:
    out = ImageCms.profileToProfile(image, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    assert out
    return out


def png16(values: np.ndarray) -> bytes:
    """The bytes of a 16-bit colour PNG, which Pillow cannot write."""
    height, width, channels = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


SOFT = Image.blend(
    REF, GREY.convert("RGB"), 0.7
)  # LAB with 8 bits and chroma subsampling are inexact for strong colours
FORMS: list[Form] = [
    ("rgb.png", REF, RGB, 0, {}),
    ("rgb.bmp", REF, RGB, 0, {}),
    ("rgb.tif", REF, RGB, 0, {}),
    ("lzw.tif", REF, RGB, 0, {"compression": "tiff_lzw"}),
    ("rgb.webp", REF, RGB, 0, {"lossless": True}),
    ("rgb.tga", REF, RGB, 0, {}),
    ("rgb.ppm", REF, RGB, 0, {}),
    ("rgb.jp2", REF, RGB, 0, {"irreversible": False}),
    ("rgb.jpg", REF, RGB, 6, JPEG),
    ("progressive.jpg", REF, RGB, 6, {**JPEG, "progressive": True}),
    ("lossy.webp", SOFT, np.asarray(SOFT), 6, {"quality": 100}),
    ("grey.png", GREY, GREY_RGB, 0, {}),
    ("grey.jpg", GREY, GREY_RGB, 6, JPEG),
    ("bits.png", REF.convert("1"), np.asarray(REF.convert("1").convert("RGB")), 0, {}),
    ("grey16.png", Image.fromarray(G16), GREY_RGB, 0, {}),
    ("grey16.tif", Image.fromarray(G16), GREY_RGB, 0, {}),
    ("grey16-big-endian.tif", Image.fromarray(G16.astype(">u2")), GREY_RGB, 0, {}),
    ("grey32.tif", Image.fromarray(G16.astype(np.int32)), GREY_RGB, 0, {}),
    ("grey16.pgm", Image.fromarray(G16.astype(np.int32)), GREY_RGB, 0, {}),
    ("float1.tif", Image.fromarray(np.asarray(GREY, np.float32) / 255), GREY_RGB, 0, {}),
    ("float255.tif", Image.fromarray(np.asarray(GREY, np.float32)), GREY_RGB, 0, {}),
    ("palette.png", few(), np.asarray(few().convert("RGB")), 0, {}),
    ("palette.gif", few(), np.asarray(few().convert("RGB")), 0, {}),
    ("palette.bmp", few(), np.asarray(few().convert("RGB")), 0, {}),
    ("clear-palette.png", see_through_palette()[0], see_through_palette()[1], 0, {"transparency": 255}),
    ("clear-palette.gif", see_through_palette()[0], see_through_palette()[1], 0, {"transparency": 255}),
    ("rgba.png", RGBA, ON_WHITE, 0, {}),
    ("rgba.webp", RGBA, ON_WHITE, 0, {"lossless": True}),
    ("rgba.tif", RGBA, ON_WHITE, 0, {}),
    ("la.png", LA, GREY_ON_WHITE, 0, {}),
    ("la.tif", LA, GREY_ON_WHITE, 0, {}),
    ("clear-colour.png", Image.fromarray(np.where(HALF[..., None] > 0, RGB, np.uint8(7))), ON_WHITE, 0, {"transparency": (7, 7, 7)}),
    ("clear-grey.png", Image.fromarray(np.where(HALF > 0, np.asarray(GREY), np.uint8(3))), GREY_ON_WHITE, 0, {"transparency": 3}),
    ("cmyk.tif", REF.convert("CMYK"), RGB, 1, {}),
    ("cmyk.jpg", REF.convert("CMYK"), RGB, 6, JPEG),
    ("ycbcr.tif", REF.convert("YCbCr"), RGB, 3, {"compression": "tiff_lzw"}),
    ("lab.tif", as_lab(SOFT), np.asarray(SOFT), 3, {}),
    ("profile.png", wide_gamut()[0], RGB, 1, {"icc_profile": wide_gamut()[1]}),
    ("profile.jpg", wide_gamut()[0], RGB, 6, {"icc_profile": wide_gamut()[1], **JPEG}),
    ("srgb.png", REF, RGB, 0, {"icc_profile": ImageCms.ImageCmsProfile(SRGB).tobytes()}),
    ("broken-profile.png", REF, RGB, 0, {"icc_profile": b"no profile"}),
    *(turned(orientation, "jpg", **JPEG) for orientation in range(2, 9)),
    *(turned(orientation, "png") for orientation in (2, 6, 7)),
    turned(6, "webp", lossless=True),
    turned(8, "tif"),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_every_form_gives_the_picture(form: Form, tmp_path: Path) -> None:
    name, image, wanted, near, options = form
    image.save(tmp_path / name, **options)
    got = open_image(tmp_path / name)
    assert got.mode == "RGB" and whole_size(got) == got.size == (W, H)
    apart = np.abs(np.asarray(got, int) - wanted)
    assert apart.max() <= near
    assert len(FORMS) >= 40


def test_uncompressed_ycbcr_in_tiff(tmp_path: Path) -> None:
    """Pillow 12 cannot read it without compression: then it is refused, as any file that cannot be read."""
    REF.convert("YCbCr").save(tmp_path / "ycbcr.tif")
    try:
        got = open_image(tmp_path / "ycbcr.tif")
    except UsageError as error:
        assert PIL.__version__ < "13" and "can be read" in str(error)
    else:
        assert np.abs(np.asarray(got, int) - RGB).max() <= 3


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path: Path) -> None:
    REF.save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    assert np.abs(np.asarray(open_image(tmp_path / "a.avif"), int) - RGB).max() <= 6


def test_sixteen_bits_of_colour(tmp_path: Path) -> None:
    for name, channels in (("rgb", RGB), ("rgba", np.dstack([RGB, HALF]))):
        (tmp_path / f"{name}.png").write_bytes(png16(channels.astype(np.uint16) * 257))
    assert np.abs(np.asarray(open_image(tmp_path / "rgb.png"), int) - RGB).max() <= 1
    assert np.abs(np.asarray(open_image(tmp_path / "rgba.png"), int) - ON_WHITE).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"])  # fmt: skip
def test_every_mode_of_pillow(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of one colour, also read in strips. Modes that no file format has are passed in as if a file had them."""
    from unbraid.images import opening

    grey = Image.new("L", (40, 30), 128)
    sixteen = Image.fromarray(np.full((30, 40), 128 * 257, np.uint16))
    made: dict[str, Callable[[], Image.Image]] = {
        "1": lambda: Image.new("1", (40, 30), 1), "F": lambda: grey.convert("F"), "I": lambda: Image.new("I", (40, 30), 128 * 257),
        "LAB": lambda: as_lab(grey.convert("RGB")), "La": lambda: grey.convert("LA").convert("La"),
        "RGBa": lambda: grey.convert("RGBA").convert("RGBa"), "PA": lambda: grey.convert("P").convert("PA"),
    }  # fmt: skip
    image = sixteen if mode.startswith("I;16") else made.get(mode, lambda: grey.convert("RGB").convert(mode))()
    if mode in ("I;16B", "I;16N"):
        image = Image.frombuffer(mode, (40, 30), np.full((30, 40), 128 * 257, ">u2" if mode == "I;16B" else "=u2").tobytes(), "raw", mode, 0, 1)  # fmt: skip
    monkeypatch.setattr(opening, "STRIP", 8)
    for fraction in (1, 4):
        out = opening._reduced(image, fraction)
        assert out.mode == "RGBA" and out.size == (-(-40 // fraction), -(-30 // fraction))
        wanted = (255, 255, 255, 255) if mode == "1" else (128, 128, 128, 255)
        out = out if mode != "P" else out.resize((1, 1), Image.Resampling.BOX)  # dithered
        assert np.abs(np.asarray(out, int) - wanted).max() <= 1, (mode, fraction)


def test_masks_thumbnails_and_alpha_go_through_it(tmp_path: Path) -> None:
    Image.fromarray(G16).save(tmp_path / "16.png")
    data = data_uri(tmp_path / "16.png")
    import base64

    small = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("L")
    assert np.abs(np.asarray(small, int) - np.asarray(GREY, int)).mean() < 3
    RGBA.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_alpha(tmp_path / "a.png")), HALF)
    assert np.asarray(open_alpha(tmp_path / "16.png")).min() == 255


def test_of_several_pictures_the_first(tmp_path: Path) -> None:
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        REF.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (W, H), "red")])
        assert moves(tmp_path / name)
        assert np.abs(np.asarray(open_image(tmp_path / name), int) - RGB).mean() < 6
    REF.save(tmp_path / "one.png")
    assert not moves(tmp_path / "one.png")


@pytest.mark.slow
def test_large_pictures_cost_what_is_needed(tmp_path: Path) -> None:
    """100 megapixels of one bit are read at a whole fraction of the size, in strips; the original size is kept."""
    Image.new("1", (10000, 10000), 1).save(tmp_path / "a.png")
    tracemalloc.start()
    begin = time.monotonic()
    image = open_image(tmp_path / "a.png")
    taken = time.monotonic() - begin
    tracemalloc.stop()
    assert image.size == (1667, 1667) and whole_size(image) == (10000, 10000) and image.getpixel((9, 9)) == (255,) * 3
    assert taken < 10
    big = REF.resize((4000, 3000))
    for name in ("b.jpg", "b.png"):
        big.save(tmp_path / name)
        got = open_image(tmp_path / name)
        assert got.size == (2000, 1500) and whole_size(got) == (4000, 3000)
        near = np.asarray(got.resize((W, H), Image.Resampling.BOX), int) - np.asarray(
            big.resize((W, H), Image.Resampling.BOX), int
        )
        assert np.abs(near).max() <= 3


def test_bombs_are_one_line(tmp_path: Path) -> None:
    """The size in the header is checked before anything is decoded."""
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")
    small = io.BytesIO()
    REF.save(small, "PNG")
    whole = bytearray(small.getvalue())
    whole[16:24] = struct.pack(">II", 100_000, 100_000)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    (tmp_path / "claims.png").write_bytes(whole)
    bmp = io.BytesIO()
    REF.save(bmp, "BMP")
    claims = bytearray(bmp.getvalue())
    claims[18:26] = struct.pack("<ii", 100_000, 100_000)
    (tmp_path / "claims.bmp").write_bytes(claims)
    for name in ("large.png", "claims.png", "claims.bmp"):
        for door in (open_image, open_alpha, data_uri, moves):
            with pytest.raises(UsageError, match="too large: 178 million pixels at most"):
                door(tmp_path / name)
    assert MOST < 14000**2


def test_texts_in_a_png_are_passed_over(tmp_path: Path) -> None:
    """A text of 2 MB, compressed or not, is ignored; EXIF data that rotate the picture are used."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    info.add_text("prompt", "y" * 300_000)
    info.add_itxt("other", "z" * 2_000_000, zip=True)
    REF.save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), RGB)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    REF.transpose(TURNED[6]).save(tmp_path / "b.png", pnginfo=info)
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), RGB)


def test_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "nan.tif")
    for name in ("pipe.png", "a.eps", "empty.png", "nan.tif", "n" * 300 + ".png", ""):
        with pytest.raises(UsageError) as raised:
            open_image(tmp_path / name)
        assert "\n" not in str(raised.value) and raised.value.fix


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """Files of every format with changed, removed and repeated bytes give pixels or an error of one line."""
    rng, file = random.Random(0), tmp_path / "file"
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TGA", {}),
        ("PPM", {}), ("JPEG2000", {}), ("ICO", {}), ("PCX", {}), ("DDS", {}), ("SGI", {}), ("QOI", {}),
    ]  # fmt: skip
    seen = set[str]()
    for kind, options in kinds:
        whole = io.BytesIO()
        REF.save(whole, kind, **options)
        for _ in range(25):
            data = bytearray(whole.getvalue())
            for _ in range(rng.choice((1, 1, 3, 20))):
                data[rng.randrange(min(len(data), rng.choice((30, 200, len(data)))))] = rng.randrange(256)
            file.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
            try:
                assert open_image(file).mode == "RGB"
                seen.add("read")
            except UsageError as error:
                assert "\n" not in str(error)
                seen.add("refused")
    assert seen == {"read", "refused"}
