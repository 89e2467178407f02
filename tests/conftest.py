"""Tiny random bases of every kind, built once from configurations, without downloads."""

import gc
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import second_device
import torch
import type_checks
from copies import copier
from PIL import Image, ImageDraw
from tiny_bases import Tiny, save_both, sd15, sd21, sdxl

from tools.recipe import captions, config, model, vae
from unbraid.bases import base as bases
from unbraid.bases.pipeline import Pipeline, location, open_pipeline

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background by a script: trainings would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(20_000)  # as the command line does
torch.set_num_threads(1)  # two threads on busy cores are 4–15× slower on tensors this small
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so do the processes that tests start: studio, trainings, Ray's workers
if "MPLCONFIGDIR" not in os.environ:  # the account's list of fonts may be damaged, and a test must not damage it
    fonts = tempfile.TemporaryDirectory(prefix="unbraid-fonts-")  # removed when pytest ends; its workers inherit it
    os.environ["MPLCONFIGDIR"] = fonts.name
WORDS = ("dog", "cat", "line", "teapot")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load the second device before any test: autograd only knows devices that exist at the first backward pass."""
    if any("second" in getattr(item, "fixturenames", ()) for item in session.items):
        second_device.available()
    gc.freeze()  # the libraries are there to stay: collections need not walk through them


@pytest.fixture(autouse=True)
def checked_anew() -> Iterator[None]:
    """In every test, the first calls of each function have their shapes checked; so have those of fixtures before it."""
    type_checks.calls.clear()
    yield
    type_checks.calls.clear()


@pytest.fixture
def arranged() -> None:
    """For tests of plots: the margins are arranged, as for users."""


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw with one sampling step: random weights draw only noise, so more steps would show nothing more. Plots without arranged margins,
    which take half of their time: every training draws one."""
    monkeypatch.setattr("unbraid.runs.pace.PREVIEW_STEPS", 1)
    monkeypatch.setattr("unbraid.runs.pace.SHEET_STEPS", 1)
    if "arranged" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *given: None)


@cache
def opened(state: tuple[tuple[Path, int], ...], *arguments: Any) -> Callable[[], Pipeline]:
    """Makes copies of a base as it is on the disk; `state` has its files and when they were changed."""
    del state
    pipe = open_pipeline(*arguments)
    return copier(pipe, tuple(part for key, part in pipe.components.items() if key.startswith("tokenizer")))


@pytest.fixture(autouse=True)
def bases_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base is read from the disk once in a process; each test that loads it has a copy of its own."""

    def copied(name: str, dtype: torch.dtype, vae: str = "", prediction: str = "", parts: str = "") -> Pipeline:
        places = [Path(place) for place in (location(name), vae, parts) if place]
        files = [file for place in places for file in (place, *place.rglob("*"))]
        state = tuple((file, file.stat().st_mtime_ns) for file in sorted(files) if file.exists())
        return opened(state, name, dtype, vae, prediction, parts)()

    monkeypatch.setattr(bases, "open_pipeline", copied)


@pytest.fixture
def bases_from_disk(bases_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For results that another process must repeat bit for bit: sums can depend on where weights lie in memory."""
    monkeypatch.setattr(bases, "open_pipeline", open_pipeline)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    captions.train_tokenizer(WORDS, out)
    return out


# The sizes of the bases with random weights.
TINY = config.Sizes(pixels=32, vae=(8, 16, 16), latent=4, unet=(32, 64, 64), text=32)


def _save_base(out: Path, tokenizer_folder: Path, prediction: str) -> Path:
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = model.pipeline(
            model.build_unet(TINY), model.build_text_encoders(TINY, tokenizer), vae.build(TINY), tokenizer
        )
        if prediction == "epsilon":
            pipe.scheduler.register_to_config(prediction_type="epsilon", rescale_betas_zero_snr=False)
            pipe.register_to_config(force_zeros_for_empty_prompt=True)  # as SDXL itself
        pipe.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def v_base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """An SDXL-type base with v-prediction and zero terminal SNR: the kind of `icons`, smaller."""
    return _save_base(tmp_path_factory.mktemp("v"), tokenizer_folder, "v_prediction")


@pytest.fixture(scope="session")
def eps_base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The same with epsilon-prediction, as SDXL itself."""
    return _save_base(tmp_path_factory.mktemp("eps"), tokenizer_folder, "epsilon")


@pytest.fixture(scope="session")
def sd15_base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """An SD1.5-type base: one text encoder, convolutional projections, no pooled text."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32, 64),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=16,
    )
    out = tmp_path_factory.mktemp("sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts: dict[str, Any] = {
            "vae": vae.build(TINY),
            "text_encoder": model.build_text_encoders(TINY, tokenizer)[0],
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        }
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.save_pretrained(out)
    return out


@pytest.fixture
def v_model(v_base: Path) -> bases.Base:
    return bases.load(str(v_base), "cpu")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    image = Image.new("RGB", (48, 48), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, 40, 40), fill="#e07020", outline="black", width=2)
    pen.polygon(((10, 14), (16, 2), (22, 10)), fill="#803010")
    image.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """SDXL's proportions and vocabulary, epsilon."""
    return save_both(sdxl(), tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same with v-prediction and zero terminal SNR, as its file says by two keys."""
    return save_both(sdxl(v=True), tmp_path_factory.mktemp("tiny_v"), v_pred="", ztsnr="")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_both(sd15(), tmp_path_factory.mktemp("tiny_sd15"))


@pytest.fixture(scope="session")
def tiny_sd21(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_both(sd21(), tmp_path_factory.mktemp("tiny_sd21"))
