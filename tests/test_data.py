"""Good and bad pictures."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from unbraid.common.errors import UsageError
from unbraid.images.crop import fit, open_image
from unbraid.images.folders import list_images


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert open_image(save(tmp_path / "a.png", image)).getpixel((5, 5)) == (255, 255, 255)
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0] * 256)
    assert open_image(save(tmp_path / "p.png", palette, transparency=0)).getpixel((5, 5)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "white")
    exif = image.getexif()
    exif[0x0112] = 6
    assert open_image(save(tmp_path / "r.jpg", image, exif=exif)).size == (20, 40)


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (100, 300), (1000, 700), (17, 20)])
def test_fit_keeps_area_aspect_and_honest_numbers(size: tuple[int, int]) -> None:
    pixels = fit(Image.new("RGB", size, "#4080c0"), 64 * 64, 16)
    _, height, width = pixels.values.shape
    assert height % 16 == 0 and width % 16 == 0
    assert 0.6 < height * width / 64**2 < 1.5
    original_h, original_w, top, left, target_h, target_w = pixels.sizes
    assert (original_w, original_h, target_h, target_w) == (*size, height, width) and top >= 0 and left >= 0
    assert torch.allclose(pixels.values[:, 0, 0], torch.tensor((0x40, 0x80, 0xC0)) / 127.5 - 1)


def test_bad_pictures_are_told(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("this is not a picture")
    cut = save(tmp_path / "whole.png", Image.effect_noise((64, 64), 50))
    cut.write_bytes(cut.read_bytes()[:-400])
    for path, what in ((tmp_path / "none.png", "no such image"), (text, "not an image"), (cut, "not an image")):
        with pytest.raises(UsageError, match=what):
            open_image(path)
    with pytest.raises(UsageError, match="only 1×1"):
        fit(Image.new("RGB", (1, 1)), 64 * 64, 16)
    with pytest.raises(UsageError, match="20000×20"):
        fit(Image.new("RGB", (20000, 20)), 64 * 64, 16)


def test_folders_list_their_images_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images in this folder"):
        list_images(tmp_path)
    (tmp_path / "prompt.txt").write_text("a cat")
    for name in ("b.png", "a.jpg"):
        save(tmp_path / name, Image.new("RGB", (32, 32)))
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.png"]
