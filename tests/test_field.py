"""The papers' metrics, on tiny random models of the real kinds, compared with results of transformers and torchmetrics."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import SIZE, VIEW, save_clip, save_dino
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTImageProcessorPil,
    ViTModel,
)

from unbraid.bench.field.models import FieldModels, load_models
from unbraid.bench.field.scores import TEXT, diversity, embed, embed_texts, lpips, measure, merged, patch_distance
from unbraid.common.errors import UsageError

PROMPTS = ("a dog in line style", "a cat", "a red teapot on a table in cartoon style", "a cat")


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    values = torch.rand((5, 5, 3), generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(values.byte().numpy(), "RGB").resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(0), picture(1, (60, 30)), picture(2, (25, 50)), picture(3)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), tokenizer_folder)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def registers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("registers")
    torch.manual_seed(2)
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=7, num_register_tokens=3
    )
    Dinov2WithRegistersModel(config).save_pretrained(out)
    crop = {"height": SIZE, "width": SIZE}
    BitImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=crop).save_pretrained(out)
    return out


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGelu())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """CLIP's vision tower, written from the paper on torch's own attention, with the names of CSD's checkpoints."""

    def __init__(self, width: int = 128, layers: int = 2, patch: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.1)
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // patch) ** 2 + 1, width) * 0.1)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.Sequential(*(Block(width, width // 64) for _ in range(layers)))}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).permute(2, 0, 1)
        first = self.class_embedding.expand(1, x.shape[1], -1)
        x = self.ln_pre(torch.cat([first, x]) + self.positional_embedding[:, None])
        return self.ln_post(self.transformer["resblocks"](x)[0])


@dataclass(frozen=True)
class Csd:
    file: Path
    tower: Tower
    style: Tensor


@pytest.fixture(scope="module")
def csd(tmp_path_factory: pytest.TempPathFactory) -> Csd:
    torch.manual_seed(3)
    tower, style, content = Tower().eval(), torch.randn(128, 24), torch.randn(128, 24)
    for block in (module for module in tower.modules() if isinstance(module, Block)):
        nn.init.normal_(
            block.attn.in_proj_weight, std=0.3
        )  # otherwise all pictures would have nearly the same embedding
    for norm in (module for module in tower.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    state = {f"module.backbone.{key}": value.detach() for key, value in tower.state_dict().items()}
    state |= {"module.last_layer_style": style, "module.last_layer_content": content}
    file = tmp_path_factory.mktemp("csd") / "model.safetensors"
    save_file(state, file)
    return Csd(file, tower, style)


@pytest.fixture(scope="module")
def models(clip_folder: Path, dino_folder: Path, csd: Csd) -> FieldModels:
    return load_models(str(clip_folder), str(dino_folder), str(csd.file), device="cpu")


def transformers_logits(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """Cosines of pictures and texts, from CLIPModel's own forward pass."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()


def test_clip_t_is_the_cosine_that_transformers_computes(
    models: FieldModels, clip_folder: Path, pictures: list[Image.Image]
) -> None:
    cosines = transformers_logits(clip_folder, pictures, PROMPTS).diagonal()
    assert measure(models, pictures, PROMPTS)[TEXT] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert cosines.std() > 0.005, "the pictures and prompts differ"


def test_clip_i_is_torchmetrics_clip_score(models: FieldModels, clip_folder: Path, pictures: list[Image.Image]) -> None:
    from torchmetrics.multimodal.clip_score import CLIPScore

    class AsBefore5(nn.Module):
        """Returns plain tensors as transformers 4 does, which torchmetrics expects."""

        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = CLIPModel.from_pretrained(clip_folder)

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return self.inner.get_image_features(pixels).pooler_output

    prepare = CLIPImageProcessorPil.from_pretrained(clip_folder)

    def processor(images: list[Tensor], **options: object) -> Any:
        return prepare([Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images], return_tensors="pt")

    score = CLIPScore(lambda: (AsBefore5(), processor))  # type: ignore[arg-type]
    tensors = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in pictures]
    tensors = [one.permute(2, 0, 1) for one in tensors]
    with torch.no_grad():
        theirs = score(tensors[:2], tensors[2:]) / 100
    pairs = zip(pictures[:2], pictures[2:], strict=True)
    ours = [measure(models, [one], ["a cat"], [other])["CLIP-I to content"][0] for one, other in pairs]
    assert sum(ours) / 2 == pytest.approx(float(theirs), abs=1e-5)


def test_dino_is_the_class_token_of_transformers(
    models: FieldModels, dino_folder: Path, pictures: list[Image.Image]
) -> None:
    pixels = ViTImageProcessorPil.from_pretrained(dino_folder)(pictures, return_tensors="pt")
    with torch.no_grad():
        tokens = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False)(**pixels).last_hidden_state
    cosines = F.cosine_similarity(tokens[:1, 0], tokens[1:, 0])
    found = measure(models, pictures[1:], PROMPTS[1:], contents=pictures[:1])
    assert found["DINO to content"] == pytest.approx(cosines.tolist(), abs=1e-5)
    patches = 1 - F.cosine_similarity(tokens[:1, 1:], tokens[1:, 1:], dim=-1).mean(1)
    assert found["DINO patch distance to content"] == pytest.approx(patches.tolist(), abs=1e-5)


def test_registers_are_no_patches(registers_folder: Path, pictures: list[Image.Image]) -> None:
    encoder = load_models(dino=str(registers_folder), device="cpu").dino
    assert encoder and encoder.patches
    with torch.no_grad():
        assert encoder.patches(encoder.prepare(pictures[:2])).shape == (2, 16, 32)
    pixels = BitImageProcessorPil.from_pretrained(registers_folder)(pictures, return_tensors="pt")
    with torch.no_grad():
        outputs = Dinov2WithRegistersModel.from_pretrained(registers_folder)(**pixels)
    assert torch.allclose(embed(encoder, pictures), F.normalize(outputs.pooler_output), atol=1e-5)


def test_csd_is_the_style_head_on_openai_s_tower(models: FieldModels, csd: Csd, pictures: list[Image.Image]) -> None:
    assert models.csd and models.csd.label == "CSD"
    pixels = models.csd.prepare(pictures)
    assert pixels.shape == (4, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = F.normalize(csd.tower(pixels) @ csd.style)
    assert torch.allclose(embed(models.csd, pictures), expected, atol=1e-5)


def test_a_clip_tower_is_a_style_model_but_not_called_csd(
    clip_folder: Path, models: FieldModels, pictures: list[Image.Image]
) -> None:
    encoder = load_models(csd=str(clip_folder), device="cpu").csd
    assert encoder and models.clip and "CSD" not in encoder.label
    assert torch.allclose(embed(encoder, pictures), embed(models.clip.image, pictures), atol=1e-6)


def test_the_same_picture_is_1_and_another_is_less(models: FieldModels, pictures: list[Image.Image]) -> None:
    found = measure(models, pictures[:2], PROMPTS[:2], contents=pictures[:1], styles=pictures[1:2])
    assert len(found) == 2 * 4 + 1
    for name, (first, second) in found.items():
        if name == TEXT:
            continue
        same, other = (first, second) if name.endswith("content") else (second, first)
        if "distance" in name:
            assert same == pytest.approx(0, abs=1e-5) and other > 1e-3
        else:
            assert same == pytest.approx(1, abs=1e-5) and other < 1 - 1e-3, name


def test_several_references_count_alike(models: FieldModels, pictures: list[Image.Image]) -> None:
    both = measure(models, pictures[:1], PROMPTS[:1], contents=pictures[2:])
    single = [measure(models, pictures[:1], PROMPTS[:1], contents=[one]) for one in pictures[2:]]
    for name in both:
        assert both[name][0] == pytest.approx(sum(one[name][0] for one in single) / 2, abs=1e-5)


def test_order_and_batch_do_not_matter(models: FieldModels, pictures: list[Image.Image]) -> None:
    assert models.clip and models.dino and models.csd
    for encoder in (models.clip.image, models.dino, models.csd):
        rows = embed(encoder, pictures)
        assert torch.allclose(embed(encoder, pictures[::-1]).flip(0), rows, atol=1e-5)
        assert torch.allclose(embed(encoder, pictures, batch=1), rows, atol=1e-5)
    texts = embed_texts(models.clip, PROMPTS)
    assert torch.allclose(embed_texts(models.clip, PROMPTS[::-1]).flip(0), texts, atol=1e-5)
    assert torch.allclose(embed_texts(models.clip, PROMPTS, batch=1), texts, atol=1e-5)
    assert torch.equal(texts[1], texts[3]), "the same prompt"
    whole = measure(models, pictures, PROMPTS, pictures[:1], pictures[1:])
    parts = [measure(models, [a], [b], pictures[:1], pictures[1:]) for a, b in zip(pictures, PROMPTS, strict=True)]
    together = merged(parts)
    assert together.keys() == whole.keys()
    for name, values in whole.items():
        assert together[name] == pytest.approx(values, abs=1e-5)


def test_absent_models_and_references_are_absent_columns(
    dino_folder: Path, models: FieldModels, pictures: list[Image.Image]
) -> None:
    assert measure(FieldModels(), pictures, PROMPTS, pictures, pictures) == {}
    only = load_models(dino=str(dino_folder), device="cpu")
    assert set(measure(only, pictures, PROMPTS, styles=pictures[:1])) == {
        "DINO to style",
        "DINO patch distance to style",
    }
    assert set(measure(models, pictures, PROMPTS)) == {TEXT}
    assert diversity(FieldModels(), pictures) == {}


def test_diversity_is_zero_of_one_picture_again_and_again(models: FieldModels, pictures: list[Image.Image]) -> None:
    assert diversity(models, pictures[:1]) == {}
    same = diversity(models, pictures[:1] * 3)
    assert set(same) == {"CLIP-I diversity", "DINO diversity", "CSD diversity"}
    assert all(value == pytest.approx(0, abs=1e-5) for value in same.values())
    assert models.dino
    rows = embed(models.dino, pictures[:3])
    expected = 1 - (rows[0] @ rows[1] + rows[0] @ rows[2] + rows[1] @ rows[2]) / 3
    assert diversity(models, pictures[:3])["DINO diversity"] == pytest.approx(float(expected), abs=1e-6)


def test_patch_distance_sees_layout_alone(models: FieldModels, pictures: list[Image.Image]) -> None:
    assert models.dino
    mirrored = pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert patch_distance(models.dino, [mirrored], pictures[:1])[0] > 1e-3


@pytest.mark.parametrize("kind", ["clip", "dino", "csd", "lpips"])
def test_a_name_that_is_nothing(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no"):
        load_models(**{kind: str(tmp_path / "nowhere")})


@pytest.mark.parametrize("kind", ["clip", "dino", "csd", "lpips"])
def test_an_empty_folder(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_models(**{kind: str(tmp_path)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["clip", "dino", "csd"])
def test_pickled_weights_are_refused(kind: str, clip_folder: Path, dino_folder: Path, csd: Csd, tmp_path: Path) -> None:
    source = {"clip": clip_folder, "dino": dino_folder, "csd": csd.file.parent}[kind]
    shutil.copytree(source, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors|safetensors") as caught:
        load_models(**{kind: str(tmp_path / "model")})
    assert "\n" not in str(caught.value)
    if kind == "csd":
        with pytest.raises(UsageError, match="only safetensors are read"):
            load_models(csd=str(tmp_path / "model" / "pytorch_model.bin"))


def test_missing_weights_are_refused_and_not_made_up(clip_folder: Path, dino_folder: Path, tmp_path: Path) -> None:
    for kind, source, lost in (
        ("clip", clip_folder, "visual_projection.weight"),
        ("dino", dino_folder, "embeddings.cls_token"),
    ):
        shutil.copytree(source, tmp_path / kind)
        tensors = load_file(source / "model.safetensors")
        save_file({key: t for key, t in tensors.items() if key != lost}, tmp_path / kind / "model.safetensors")
        with pytest.raises(UsageError, match=f"1 weights are missing, such as {lost}"):
            load_models(**{kind: str(tmp_path / kind)})


def test_damaged_weights(csd: Csd, clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(csd.file.read_bytes()[:100])
    with pytest.raises(UsageError, match="damaged"):
        load_models(csd=str(tmp_path))
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_models(clip=str(tmp_path / "clip"))


def test_another_kind_of_model(clip_folder: Path, dino_folder: Path) -> None:
    with pytest.raises(UsageError, match="a model of type clip"):
        load_models(dino=str(clip_folder))
    with pytest.raises(UsageError, match=r"cannot be loaded|weights are missing"):
        load_models(clip=str(dino_folder))
    with pytest.raises(UsageError, match="not an LPIPS backbone"):
        load_models(lpips=str(clip_folder))


def test_a_csd_checkpoint_that_lacks_or_misfits(csd: Csd, tmp_path: Path) -> None:
    tensors = load_file(csd.file)
    bad = tmp_path / "bad.safetensors"
    key = "module.backbone.transformer.resblocks.1.ln_1.weight"
    save_file({name: t for name, t in tensors.items() if name != key}, bad)
    with pytest.raises(UsageError, match="does not fit"):
        load_models(csd=str(bad))
    save_file({name: t for name, t in tensors.items() if "conv1" not in name}, bad)
    with pytest.raises(UsageError, match=r"lacks 'conv1\.weight'"):
        load_models(csd=str(bad))


def test_a_style_folder_as_transformers_saves_it(tmp_path: Path, pictures: list[Image.Image]) -> None:
    torch.manual_seed(4)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIEW, projection_dim=16)).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_vision_model"
    encoder = load_models(csd=str(tmp_path), device="cpu").csd
    assert encoder
    with torch.no_grad():
        expected = F.normalize(model(**processor(pictures, return_tensors="pt")).image_embeds)
    assert torch.allclose(embed(encoder, pictures), expected, atol=1e-5)


@pytest.mark.parametrize(("net", "name"), [("vgg", "vgg16"), ("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_takes_a_local_backbone(
    net: str, name: str, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with torchmetrics' own metric, which gets the same backbone in place of a download."""
    torchvision = pytest.importorskip("torchvision")
    from torchmetrics.functional.image import lpips as theirs

    torch.manual_seed(5)
    backbone = getattr(torchvision.models, name)(weights=None)
    features = {f"features.{key}": t.contiguous() for key, t in backbone.features.state_dict().items()}
    save_file(features, tmp_path / "model.safetensors")
    model = load_models(lpips=str(tmp_path), device="cpu").lpips
    assert model and model.label == f"LPIPS ({net})"
    found = lpips(model, pictures[:2], pictures[2:])
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: backbone.features)
    fitted = [one.resize((256, 256), Image.Resampling.BICUBIC) for one in (pictures[0], pictures[3])]
    first, second = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(1, 256, 256, 3) for p in fitted)
    inputs = [one.permute(0, 3, 1, 2).float() / 127.5 - 1 for one in (first, second)]
    expected = theirs.learned_perceptual_image_patch_similarity(*inputs, net_type=net, reduction="sum")  # type: ignore[arg-type]
    assert lpips(model, pictures[:1], pictures[3:])[0] == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(lpips(model, pictures[:2], pictures[2:], batch=1), found, rtol=1e-4)
    assert lpips(model, pictures[:1], pictures[:1])[0] == pytest.approx(0, abs=1e-7)
    columns = measure(FieldModels(lpips=model), pictures[:1], PROMPTS[:1], contents=pictures[:2])
    assert columns[f"LPIPS ({net}) to content"][0] == pytest.approx(
        float(lpips(model, pictures[:1], pictures[1:2])[0]) / 2, rel=1e-5
    )
    save_file({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="these are not the weights of alex"):
        load_models(lpips=str(tmp_path))


def test_lpips_without_its_libraries_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match=r"pip install unbraid\[bench\]"):
        load_models(lpips=str(tmp_path), device="cpu")
