"""Models that are no bases are named, and refused in one line, before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from unbraid.bases import recognised
from unbraid.bases.configuration import denoiser_config
from unbraid.bases.pipeline import open_pipeline
from unbraid.bases.recognised import family_preset, pipeline_class
from unbraid.bases.sniff import sniff
from unbraid.common.errors import UsageError

FOLDERS = {
    "Flux2KleinPipeline": "FLUX.2 klein",
    "Flux2Pipeline": "FLUX.2,",
    "FluxKontextPipeline": "Flux Kontext",
    "FluxFillPipeline": "Flux Fill",
    "QwenImagePipeline": "Qwen-Image",
    "QwenImageEditPipeline": "Qwen-Image",
    "ChromaPipeline": "Chroma",
    "HiDreamImagePipeline": "HiDream",
    "StableDiffusionXLImg2ImgPipeline": "refiner",
    "StableDiffusionInpaintPipeline": "no text-to-image model",
    "AuraFlowPipeline": "AuraFlow",
    "SomethingPipeline": "SomethingPipeline are not supported",
}
FILES = {
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "model.diffusion_model.distilled_guidance_layer.in_proj.weight": "Chroma",
    "double_stream_blocks.0.block.attn1.to_q.weight": "HiDream",
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "joint_blocks.0.x_block.attn.qkv.weight": "SD3",
    "txt_norm.weight": "Qwen-Image",
    "context_refiner.0.attention.qkv.weight": "Z-Image",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.1"}))
    assert pipeline_class(str(tmp_path)) == name
    for refuse in (lambda: open_pipeline(str(tmp_path), torch.float32), lambda: denoiser_config(str(tmp_path))):
        with pytest.raises(UsageError, match=FOLDERS[name]) as caught:
            refuse()
        assert "\n" not in str(caught.value)
    assert not family_preset(str(tmp_path), "pair").settings


@pytest.mark.parametrize("key", FILES)
def test_files(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=f"this is an? {FILES[key]}.* checkpoint") as caught:
        sniff(tmp_path / "model.safetensors")
    assert "diffusers folder" in str(caught.value)


def test_the_hub_is_asked_once_and_again_a_minute_after_a_long_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a network, huggingface_hub tries for half a minute."""
    asked, now = list[str](), 1000.0

    def answer(base: str) -> dict[str, str]:
        nonlocal now
        asked.append(base)
        if base == "some/offline":
            now += 24
            raise OSError("no network")
        if base == "some/unknown":
            raise OSError("404")
        return {"_class_name": f"{base.rpartition('/')[2].title()}Pipeline"}

    monkeypatch.setattr(recognised.DiffusionPipeline, "load_config", answer)
    monkeypatch.setattr(recognised, "_ASKED", {})
    monkeypatch.setattr(recognised, "time", SimpleNamespace(monotonic=lambda: now))
    (folder := tmp_path / "sdxl").mkdir()
    given = {"some/flux": "FluxPipeline", "some/offline": "", "some/unknown": "", str(folder): "SdxlPipeline"}
    for base, name in given.items():
        assert {pipeline_class(base) for _ in range(2)} == {name}
    assert family_preset("some/flux", "pair").settings
    assert asked == ["some/flux", "some/offline", *["some/unknown"] * 2, *[str(folder)] * 2], "folders can change"
    now += 61
    asked.clear()
    assert {base: pipeline_class(base) for base in given} == given
    assert asked == ["some/offline", "some/unknown", str(folder)]


def test_what_cannot_be_read_has_no_class(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"")
    assert [pipeline_class(str(one)) for one in ("icons", tmp_path, tmp_path / "file.safetensors")] == ["", "", ""]
