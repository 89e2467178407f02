"""Drawing on pictures and maps, compared with diffusers' own pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image, ControlNetModel
from PIL import Image, ImageDraw

from unbraid.bases import base as bases
from unbraid.bases.base import Base
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.files.lora_file import write
from unbraid.images.crop import cropped, open_image
from unbraid.sampling.canvas import Control, Start, load_control
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render

STEPS, GUIDANCE = 6, 5.0


def controlnet(base: Base, out: Path) -> Path:
    """A small ControlNet with an effect: its last layers, normally initialised with zeros, are random."""
    torch.manual_seed(0)
    channels = (8, 8, 16, 16)[: base.pipe.vae_scale_factor.bit_length()]
    model = ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=channels)
    for module in (*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out):
        assert isinstance(module, torch.nn.Conv2d)
        torch.nn.init.normal_(module.weight, std=0.2)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mask") / "mask.png"
    image = Image.new("L", (48, 48))
    ImageDraw.Draw(image).rectangle((24, 0, 48, 48), fill=255)
    image.save(file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True], ids=["plain", "controlnet"])
@pytest.mark.parametrize("what", ["text", "image", "part"])
@pytest.mark.parametrize("kind", ["v_base", "eps_base", "sd15_base"])
def test_plain_guidance_equals_the_stock_pipelines(
    kind: str, what: str, control: bool, picture: Path, mask: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = bases.load(str(request.getfixturevalue(kind)), "cpu")
    kinds = {"text": AutoPipelineForText2Image, "image": AutoPipelineForImage2Image, "part": AutoPipelineForInpainting}
    small = cropped(open_image(picture), base.size**2, base.step)[0]
    given: dict[str, Any] = {"image": small, "strength": 0.7} if what != "text" else {}
    if what == "part":
        given["mask_image"] = cropped(open_image(mask), base.size**2, base.step)[0].convert("L")
    if what != "image":
        given |= {"height": base.size, "width": base.size}
    more = {}
    if control:
        more = {"controlnet": load_control(base, str(controlnet(base, tmp_path / "net")))}
        given |= {"image" if what == "text" else "control_image": small, "controlnet_conditioning_scale": 0.8}
    rng = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pipe = kinds[what].from_pipe(base.pipe, **more)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(["a cat", "a cat"], guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=rng, **given).images
    ours = render(
        base,
        "a cat",
        sampling=Sampling(guidance=GUIDANCE, seeds=(3, 4), steps=STEPS),
        inputs=ImageInputs(
            start=Start(picture, 0.7, mask if what == "part" else None) if what != "text" else None,
            control=Control(str(tmp_path / "net"), picture, 0.8) if control else None,
        ),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert np.asarray(other).std() > 1, "the oracle's picture must not be blank"
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    (without,) = render(base, "a cat", sampling=Sampling(guidance=GUIDANCE, seeds=(3,), steps=STEPS))
    assert (what, control) == ("text", False) or without.tobytes() != ours[0].tobytes()


def style_file(base: Base, out: Path) -> Path:
    adapters = Adapters.attach(base.denoiser)
    adapters.new("a", 4, torch.Generator().manual_seed(0), up_std=0.3)
    modules = {f"unet.{name}": lora for name, lora in adapters.folded("a").items()}
    adapters.detach()
    write(out, modules, family="sdxl", metadata={"unbraid.style": "ink"})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["image", "part", "controlnet"])
def test_styles_guide_on_every_canvas(what: str, v_model: Base, picture: Path, mask: Path, tmp_path: Path) -> None:
    """A style at 0 changes nothing; at 1 it needs as many evaluations as plain guidance, and changes the picture where allowed."""
    net = controlnet(v_model, tmp_path / "net")
    start = None if what == "controlnet" else Start(picture, 0.8, mask if what == "part" else None)
    control = Control(str(net), picture) if what == "controlnet" else None
    inputs = ImageInputs(start, control)
    file = style_file(v_model, tmp_path / "style.safetensors")
    none, off, on = (
        render(v_model, "a cat", styles=StyleGuidance(styles), sampling=Sampling(steps=STEPS), inputs=inputs)[0]
        for styles in ((), [Use(file, 0.0)], [Use(file, 1.0)])
    )
    assert none.tobytes() == off.tobytes() != on.tobytes()


def test_inpainting_keeps_what_is_black(v_model: Base, picture: Path, mask: Path) -> None:
    one, other = (
        np.asarray(image, np.float32)
        for image in render(
            v_model,
            "a cat",
            sampling=Sampling(seeds=(0, 1), steps=STEPS),
            inputs=ImageInputs(start=Start(picture, 1.0, mask)),
        )
    )
    change = np.abs(one - other).mean((0, 2))
    assert change[:8].mean() < change[20:].mean() / 4, "of the kept half, what the autoencoder draws anew alone"


def test_the_embedded_base_inpaints(picture: Path, mask: Path) -> None:
    """Its latents have 16 channels; the stock pipeline would take some of them for channels of a mask."""
    base = bases.load("icons", "cpu")
    (image,) = render(base, "a cat", sampling=Sampling(steps=2), inputs=ImageInputs(start=Start(picture, 1.0, mask)))
    assert image.size == (128, 128) and np.asarray(image).std() > 1


def test_a_canvas_has_its_own_shape(v_model: Base, tmp_path: Path) -> None:
    Image.new("RGB", (96, 48), "orange").save(tmp_path / "wide.png")
    net = controlnet(v_model, tmp_path / "net")
    start, control = Start(tmp_path / "wide.png"), Control(str(net), tmp_path / "wide.png")
    for inputs in (ImageInputs(start=start), ImageInputs(control=control)):
        (image,) = render(v_model, "a cat", sampling=Sampling(steps=2), inputs=inputs)
        assert image.width > image.height
    sampling = Sampling(steps=2, height=32, width=32)
    (image,) = render(v_model, "a cat", sampling=sampling, inputs=ImageInputs(control=control))
    assert image.size == (32, 32)


def test_bad_canvases_are_one_clear_line(
    v_model: Base, sd15_base: Path, picture: Path, mask: Path, tmp_path: Path
) -> None:
    Image.new("L", (48, 48)).save(tmp_path / "black.png")
    Image.new("L", (48, 32), 255).save(tmp_path / "small.png")
    other = controlnet(bases.load(str(sd15_base), "cpu"), tmp_path / "other")
    (tmp_path / "empty").mkdir()
    cases = [
        (ImageInputs(start=Start(picture, 0.0)), "a strength of 0.0"),
        (ImageInputs(start=Start(picture, 1.5)), "a strength of 1.5"),
        (ImageInputs(start=Start(picture, 0.1)), "leaves none of 2 steps"),
        (ImageInputs(start=Start(tmp_path / "none.png")), "no such image"),
        (ImageInputs(start=Start(picture, mask=tmp_path / "black.png")), "the mask is black"),
        (ImageInputs(start=Start(picture, mask=tmp_path / "small.png")), "the mask is 48×32, the picture 48×48"),
        (ImageInputs(control=Control("no/such/net", picture)), "no such ControlNet"),
        (ImageInputs(control=Control(str(tmp_path / "empty"), picture)), "cannot be loaded"),
        (ImageInputs(control=Control(str(other), picture)), "its cross_attention_dim is"),
        (ImageInputs(edit=picture, start=Start(picture)), "keeps what it is"),
    ]
    for inputs, what in cases:
        with pytest.raises(UsageError, match=what):
            render(v_model, "a cat", sampling=Sampling(steps=2), inputs=inputs)
    with pytest.raises(UsageError, match="has its size"):
        render(v_model, "a cat", sampling=Sampling(height=32), inputs=ImageInputs(start=Start(picture)))
