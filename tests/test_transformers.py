"""The diffusion transformers on tiny random bases: drawing, training and LoRA files, compared with diffusers' own pipelines and
with the formulas of its DreamBooth-LoRA scripts."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers as tiny
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft import LoraConfig
from PIL import Image
from test_every_base import loaded, material
from tiny_bases import SIDE
from torch import Tensor

from unbraid.bases import base as bases
from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families import FAMILIES
from unbraid.bases.families.flux import pack, places, unpack
from unbraid.bases.presets import Loading
from unbraid.common.errors import UnsuitedError, UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.layers import ATTENTION, TRANSFORMERS
from unbraid.core.lora import Active, Branch, Factors
from unbraid.core.passes import answer
from unbraid.core.recipe import ForwardRequest
from unbraid.files.lora_file import read, write
from unbraid.methods import METHODS
from unbraid.methods.pair import rows
from unbraid.runs import run as running
from unbraid.runs import shortest
from unbraid.runs.api import learn_job, pair_job, split_job
from unbraid.runs.memory import estimate
from unbraid.runs.selftest.rows import selftest
from unbraid.runs.settings import schema
from unbraid.sampling.canvas import Control, Start, prepare
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, attach, render
from unbraid.sampling.sample import Guided, classifier_free

pytestmark = pytest.mark.slow

REFUSED = {
    "blora": "which blocks",
    "consislora": "which blocks",
    "slider": "self-attention",
}  # method → why it cannot train without such layers
SIZE: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 3}
SUFFIXES: Mapping[str, Sequence[str]] = {  # the layers that diffusers' scripts train by default
    "flux": "attn.to_k attn.to_q attn.to_v attn.to_out.0 attn.add_k_proj attn.add_q_proj attn.add_v_proj attn.to_add_out".split(),
    "sd3": "add_k_proj add_q_proj add_v_proj to_add_out to_k to_out.0 to_q to_v".split(),  # and those of attn2, unlike the script
    "z-image": "to_k to_q to_v to_out.0".split(),
}


@dataclass(frozen=True)
class Kind:
    """A base: how it is made, its family, and how its stock pipeline draws without and with classifier-free guidance of 4."""

    make: Callable[[], Any]
    family: str
    plain: Mapping[str, Any]
    guided: Mapping[str, Any]
    embedded: float = 1.0
    encoding: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "flux-dev": Kind(
        tiny.flux,
        "flux",
        {"guidance_scale": 3.5},
        {"guidance_scale": 3.5, "true_cfg_scale": 4.0, "negative_prompt": ""},
        3.5,
    ),
    "flux-schnell": Kind(
        lambda: tiny.flux(dev=False),
        "flux",
        {},
        {"true_cfg_scale": 4.0, "negative_prompt": ""},
        encoding={"max_sequence_length": 256},
    ),
    "sd35-medium": Kind(tiny.sd35, "sd3", {"guidance_scale": 1.0}, {"guidance_scale": 4.0}),
    "sd35-large": Kind(lambda: tiny.sd35(medium=False), "sd3", {"guidance_scale": 1.0}, {"guidance_scale": 4.0}),
    "z-image": Kind(tiny.z_image, "z-image", {"guidance_scale": 0.0}, {"guidance_scale": 3.0}),
}

ONE_EACH = ("flux-dev", "sd35-medium", "z-image")  # the kinds for tests that take long


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of each kind; the name of its folder is that of the kind."""
    return tiny.save(KINDS[request.param].make(), tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture
def kind(folder: Path) -> Kind:
    return KINDS[folder.name]


@pytest.fixture
def base(folder: Path) -> Base:
    return bases.load(str(folder), "cpu")


def stock(folder: Path) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, kind: Kind, how: Mapping[str, Any]) -> np.ndarray:
    """A picture of the stock pipeline, `[h, w, 3]`, from 0 to 1."""
    rng = torch.Generator().manual_seed(0)
    return pipe("a cat", **SIZE, **how, **kind.encoding, generator=rng, output_type="np").images[0]


def ours(base: Base, kind: Kind, guidance: float, loras: Mapping[str, Any] | None = None) -> np.ndarray:
    """A picture of unbraid, as `drawn`."""
    base = replace(base, guidance=kind.embedded)
    prompts = {"main": base.encode_prompt("a cat"), "negative": base.encode_negative()}
    adapters, pipe = attach(base, loras or {}), copy.copy(base.pipe)
    terms = classifier_free(guidance, "main", tuple(Active(name) for name in loras or {}))
    pipe.transformer = Guided(base, terms, prompts, adapters)
    given = base.family.network.prompt_arguments(prompts["main"], 1)
    made: Any = pipe(**SIZE, **given, generator=torch.Generator().manual_seed(0), output_type="np")
    if adapters:
        adapters.detach()
    return made.images[0]


def random_lora(base: Base, path: Path, targets: str = ATTENTION, rank: int = 2, seed: int = 0) -> Path:
    """A LoRA of random numbers on a base, strong enough to change pictures."""
    rng = torch.Generator().manual_seed(seed)
    adapters = Adapters.attach(base.denoiser, targets, base.family.network.layers)
    adapters.new("lora", rank, rng, up_std=0.3)
    modules = {f"transformer.{name}": lora for name, lora in adapters.folded("lora").items()}
    adapters.detach()
    words = {"unbraid.style": "ink", "unbraid.prompt": "a sks cat"}
    write(path, modules, family=base.family.name, dialect="diffusers", metadata=words, dtype=None)
    return path


def test_pictures_are_those_of_the_stock_pipeline(folder: Path, kind: Kind, base: Base) -> None:
    pipe = stock(folder)
    for guidance, how in ((1.0, kind.plain), (4.0, kind.guided)):
        assert np.abs(ours(base, kind, guidance) - drawn(pipe, kind, how)).max() < 1e-4, how


@pytest.mark.parametrize("targets", (ATTENTION, TRANSFORMERS))
def test_the_stock_pipeline_uses_every_key_of_a_lora(
    folder: Path, kind: Kind, base: Base, targets: str, tmp_path: Path
) -> None:
    file = random_lora(base, tmp_path / "lora.safetensors", targets)
    found, pipe = read(file), stock(folder)
    assert found.family == kind.family and all(name.startswith("transformer.") for name in found.modules)
    plain = drawn(pipe, kind, kind.guided)
    with loaded(pipe, file):
        layers = {f"transformer.{name}" for name, one in pipe.transformer.named_modules() if hasattr(one, "lora_A")}
        assert layers == found.modules.keys()
        theirs = drawn(pipe, kind, kind.guided)
    mine = ours(base, kind, 4.0, {"lora": (file, found.modules)})
    assert np.abs(mine - theirs).max() < 1e-4 and np.abs(theirs - plain).max() > 0.01


def test_a_training_step_is_that_of_diffusers_script(folder: Path, kind: Kind, base: Base) -> None:
    """Loss and gradients of all factors, in fp64."""
    denoiser, theirs = base.denoiser.double(), stock(folder).transformer.double().requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    clean = torch.randn(16, 8, 12, generator=rng)  # not square
    prompt = base.encode_prompt("a sks cat")
    data = RunData(base, {"image": [Picture(clean, torch.zeros_like(clean), torch.zeros(6))]}, {"both": prompt})
    (sample,) = data.draw(["image"], frozenset(), rng)
    noise, double = (
        (sample.target + clean).double(),
        {name: getattr(sample, name).double() for name in ("noisy", "t", "target")},
    )
    double["noisy"] = (1 - double["t"] / 1000) * clean + double["t"] / 1000 * noise
    double["target"] = noise - clean

    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=list(SUFFIXES[kind.family]))
    theirs.add_adapter(config)
    factors = {}
    for name, layer in theirs.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.nn.init.normal_(up, std=0.1, generator=rng)
            factors[name] = (down, up)
    loss = STEPS[kind.family](theirs, clean[None].double(), noise, double["t"], prompt)
    loss.backward()

    adapters = Adapters.attach(denoiser, ATTENTION, base.family.network.layers)
    assert adapters.layers.keys() == factors.keys()
    made = {name: Factors(down.detach().clone(), up.detach().clone()) for name, (down, up) in factors.items()}
    adapters.add("lora", made)
    request = ForwardRequest(data, adapters, [Branch("image", "both", (Active("lora"),))], [replace(sample, **double)])
    (mine,) = answer(request, 1)
    torch.testing.assert_close(mine.double(), loss.detach(), atol=1e-6, rtol=1e-6)
    for name, one in adapters.of("lora").items():
        for found, expected in ((one.down, factors[name][0]), (one.up, factors[name][1])):
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-6)


def flux_step(transformer: Any, clean: Tensor, noise: Tensor, t: Tensor, prompt: Any) -> Tensor:
    """examples/dreambooth/train_dreambooth_lora_flux.py of diffusers, with --guidance_scale 1."""
    sigmas = (t / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    b, c, h, w = noisy.shape
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float64)
    guidance = torch.full((1,), 1.0) if transformer.config.guidance_embeds else None
    out = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, b, c, h, w),
        timestep=t / 1000,
        guidance=guidance,
        pooled_projections=prompt.pooled[None].double(),
        encoder_hidden_states=prompt.embeds[None].double(),
        txt_ids=torch.zeros(len(prompt.embeds), 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    out = FluxPipeline._unpack_latents(out, height=h * 8, width=w * 8, vae_scale_factor=8)
    return torch.mean(((out - (noise - clean)) ** 2).reshape(b, -1), 1).mean()


def sd3_step(transformer: Any, clean: Tensor, noise: Tensor, t: Tensor, prompt: Any) -> Tensor:
    """examples/dreambooth/train_dreambooth_lora_sd3.py, with its defaults: --precondition_outputs 1, logit_normal."""
    sigmas = (t / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    out = transformer(
        hidden_states=noisy,
        timestep=t,
        encoder_hidden_states=prompt.embeds[None].double(),
        pooled_projections=prompt.pooled[None].double(),
        return_dict=False,
    )[0]
    out = out * (-sigmas) + noisy
    weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas=sigmas)
    return torch.mean((weighting * (out - clean) ** 2).reshape(len(clean), -1), 1).mean()


def z_image_step(transformer: Any, clean: Tensor, noise: Tensor, t: Tensor, prompt: Any) -> Tensor:
    """examples/dreambooth/train_dreambooth_lora_z_image.py."""
    sigmas = (t / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    time = (1000 - t) / 1000
    out = transformer(list(noisy.unsqueeze(2).unbind(dim=0)), time, [prompt.embeds.double()], return_dict=False)[0]
    out = -torch.stack(out, dim=0).squeeze(2)
    return torch.mean(((out - (noise - clean)) ** 2).reshape(len(clean), -1), 1).mean()


STEPS: Mapping[str, Callable[..., Tensor]] = {"flux": flux_step, "sd3": sd3_step, "z-image": z_image_step}


@contextmanager
def loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every run gets its own base, but the files are read only once."""
    kept = bases.load(str(folder), "cpu")

    def copied(name: str, device: str, loading: Any) -> Base:
        pipe = copy.copy(kept.pipe)
        pipe.transformer = copy.deepcopy(pipe.transformer)
        return Base(name, pipe, kept.device, timesteps=loading.timesteps)

    with monkeypatch.context() as patch:
        patch.setattr(running, "load", copied)
        yield


def test_every_method(folder: Path, kind: Kind, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = material(picture, tmp_path), dict[str, list[Path]]()
    with loaded_once(folder, monkeypatch):
        for method in shortest.in_order():
            if shortest.needs(method):
                loras = {file.stem: file for file in made[shortest.FIRST]}
                given = replace(given, loras=loras, modules=dict(zip(("content", "style"), made["break"], strict=True)))
            jobs = shortest.jobs(method, given, tmp_path, base=str(folder), previews=0)
            if method in REFUSED and not (method == "slider" and folder.name == "sd35-medium"):
                with pytest.raises(UnsuitedError, match=REFUSED[method]):
                    list(running.run(jobs[0], device="cpu"))
                continue
            for job in jobs:
                list(running.run(job, device="cpu"))
            made[method] = [file for job in jobs for file in sorted(job.out.glob("*.safetensors"))]
    pipe = stock(folder)
    plain = drawn(pipe, kind, kind.plain)
    for method, files in made.items():
        for file in files:
            assert read(file).family == kind.family
            with loaded(pipe, file):
                change = np.abs(drawn(pipe, kind, kind.plain) - plain).max()
                assert change > 1e-3, f"{method}: {file.name} changes {change}"


def test_every_way_of_drawing(base: Base, picture: Path, tmp_path: Path) -> None:
    first = random_lora(base, tmp_path / "first.safetensors")
    second = random_lora(base, tmp_path / "second.safetensors", seed=1)
    quick, uses, made = Sampling(steps=3), [Use(first), Use(second)], dict[str, Image.Image]()
    mask = tmp_path / "mask.png"
    with Image.open(picture) as shown:
        half = Image.new("L", shown.size)
        half.paste(255, (0, 0, shown.width // 2, shown.height))
        half.save(mask)
    made["plain"] = render(base, "a cat", sampling=quick)[0]
    for combine in ("sum", "switch", "composite", "k-lora"):
        made[combine] = render(base, "a cat", uses, combine=combine, sampling=quick)[0]
    made["style"] = render(base, "a cat", styles=StyleGuidance([Use(second)], 0.9), sampling=quick)[0]
    made["negative"] = render(base, "a cat", sampling=replace(quick, negative="a dog"))[0]
    start = Start(picture, 0.7)
    made["image"] = render(base, "a cat", uses, sampling=quick, inputs=ImageInputs(start))[0]
    made["inpainting"] = render(base, "a cat", uses, sampling=quick, inputs=ImageInputs(replace(start, mask=mask)))[0]
    arrays = {name: np.asarray(one).astype(int) for name, one in made.items()}
    assert all(one.shape == (SIDE, SIDE, 3) for one in arrays.values())
    for name, one in arrays.items():
        assert name == "plain" or np.abs(one - arrays["plain"]).max() > 2, f"{name} changes nothing"
    if base.family.name == "z-image":  # tests/test_segments.py has the others
        with pytest.raises(UsageError, match="reads one prompt"):
            render(base, "a cat", [Use(first, prompt="own")], sampling=quick)
    with pytest.raises(UsageError, match="cannot draw with flow matching"):
        render(base, "a cat", sampling=replace(quick, sampler="ddim"))


@pytest.mark.parametrize("folder", ONE_EACH, indirect=True)
def test_an_edit_of_strength_0_gives_the_picture_back(base: Base, picture: Path, tmp_path: Path) -> None:
    from unbraid.images.crop import fit, open_image
    from unbraid.sampling.invert import reconstruct

    style = random_lora(base, tmp_path / "style.safetensors")
    inputs = ImageInputs(edit=picture)
    steps = 160 if base.family.name == "z-image" else 40  # its random weights change quickly with the timestep
    best = np.asarray(reconstruct(base, fit(open_image(picture), base.size**2, base.step, picture))).astype(int)
    kept, changed = (
        np.asarray(
            render(base, "a cat", styles=StyleGuidance([Use(style, scale)]), sampling=Sampling(steps=n), inputs=inputs)[
                0
            ]
        )
        for scale, n in ((0.0, steps), (1.0, 5))
    )
    error, change = (np.abs(one.astype(int) - best).max() for one in (kept, changed))
    assert error <= 3 < change, (error, change)


@pytest.mark.parametrize("folder", ["flux-dev"], indirect=True)
def test_a_step_of_pair_is_that_of_its_version_for_flux(folder: Path, base: Base) -> None:
    """The content adapter learns the picture before, under its prompt; the style adapter learns the picture after on top of
    it. `down` is frozen: rows 0 to r of one orthonormal basis for content, r to 2 r for style. In fp64."""
    denoiser, theirs = base.denoiser.double(), stock(folder).transformer.double().requires_grad_(False)
    rng, rank = torch.Generator().manual_seed(1), 2
    (recipe,) = METHODS["pair"].make({}, **{**defaults("pair"), "rank": rank, "steps": 2, "style_from": 0})
    adapters = Adapters.attach(denoiser, recipe.targets, base.family.network.layers)
    recipe.prepare(adapters, rng)
    for factors in (one for name in ("content", "style") for one in adapters.of(name).values()):
        factors.double()
        torch.nn.init.normal_(factors.up, std=0.1, generator=rng)
    clean = {role: torch.randn(16, 8, 8, generator=rng) for role in ("before", "after")}
    pictures = {role: [Picture(one, torch.zeros_like(one), torch.zeros(6))] for role, one in clean.items()}
    prompts = {role: base.encode_prompt(f"a sks {role}") for role in ("content", "style")}
    data, branches = RunData(base, pictures, prompts), recipe.branches(0)
    samples = data.draw([branch.image for branch in branches], recipe.passes.shared, rng)
    noise, t = (samples[0].target + clean["before"]).double(), samples[0].t.double()
    exact = []
    for branch, sample in zip(branches, samples, strict=True):
        one = clean[branch.image][None].double()
        noisy = (1 - t / 1000) * one + t / 1000 * noise
        exact.append(replace(sample, noisy=noisy, t=t, target=noise - one))
    losses = answer(ForwardRequest(data, adapters, branches, exact), 1)

    for name in ("content", "style"):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(adapters.layers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about more than one adapter
            theirs.add_adapter(config, name)
    layers = {name: one for name, one in theirs.named_modules() if hasattr(one, "lora_A")}
    ups = dict[tuple[str, str], Any]()
    for which in ("content", "style"):
        for name, factors in adapters.of(which).items():
            basis = rows(factors.down.shape[1], 2 * rank, 0).double()
            layers[name].lora_A[which].weight.data = basis[:rank] if which == "content" else basis[rank:]
            ups[which, name] = layers[name].lora_B[which].weight
            ups[which, name].data = factors.up.detach().clone()
    theirs.set_adapters(["content"])
    first = flux_step(theirs, clean["before"][None].double(), noise, t, prompts["content"])
    first.backward()
    content = {name: ups["content", name].grad.clone() for name in layers}
    theirs.set_adapters(["content", "style"])
    second = flux_step(theirs, clean["after"][None].double(), noise, t, prompts["style"])
    second.backward()
    torch.testing.assert_close(torch.stack(losses), torch.stack([first, second]).detach(), atol=1e-6, rtol=1e-6)
    for name in layers:
        pairs = ((adapters.of("content")[name], content[name]), (adapters.of("style")[name], ups["style", name].grad))
        for mine, expected in pairs:
            torch.testing.assert_close(mine.up.grad, expected, atol=1e-6, rtol=1e-6)


def defaults(method: str) -> dict[str, Any]:
    return {name: one.default for name, one in schema(METHODS[method]).items()}


@pytest.mark.parametrize("folder", ONE_EACH, indirect=True)
def test_presets_of_the_family(folder: Path, kind: Kind, picture: Path, tmp_path: Path) -> None:
    split = split_job(picture, subject="cat", style="ink", base=str(folder), out=tmp_path / "split")
    assert (split.settings["content_alone"], split.settings["style_alone"]) == (1.0, 1.0)
    (recipe,) = METHODS["unziplora"].make({}, **split.settings)
    assert [branch.prompt for branch in recipe.branches(0)] == ["both", "content", "style"]
    given: dict[str, Any] = {"base": str(folder), "out": tmp_path / "pair", "subject": "cat", "style": "ink"}
    pair = pair_job(picture, picture, **given)
    flux = kind.family == "flux"
    assert pair.settings["rank"] == (32 if flux else defaults("pair")["rank"])
    assert pair.loading.timesteps == ("uniform+shift=3.1582" if flux else "")
    assert pair_job(picture, picture, **given, rank=4, timesteps="uniform").settings["rank"] == 4
    one = split_job(
        picture, subject="cat", style="ink", base=str(folder), out=tmp_path / "one", style_alone=0.0, rank=2
    )
    with pytest.raises(UsageError, match="cannot read a prompt of its own"):
        list(running.run(one, device="cpu"))


@pytest.mark.parametrize("folder", ONE_EACH, indirect=True)
def test_memory_is_estimated_and_presets_change_no_gradient(folder: Path, picture: Path, tmp_path: Path) -> None:
    found = {}
    for vram in ("max", "24", "16", "8"):
        given: dict[str, Any] = {"base": str(folder), "out": tmp_path / vram, "vram": vram, "rank": 2, "steps": 1}
        job = learn_job(picture, prompt="a sks cat", **given, previews=0)
        found[vram] = estimate(job, "cpu")
        list(running.run(job, device="cpu"))
        assert read(job.out / "lora.safetensors").modules
    assert found["max"].weights > found["24"].weights > found["8"].weights > 0
    assert found["24"].activations > found["16"].activations > 0


@pytest.mark.parametrize("folder", ONE_EACH, indirect=True)
@pytest.mark.parametrize("vram", ["max", "8"])
def test_it_computes_in_the_type_that_diffusers_says(folder: Path, vram: str) -> None:
    base = bases.load(str(folder), "cpu", Loading(vram=vram))
    adapters = Adapters.attach(base.denoiser, kinds=base.family.network.layers)
    adapters.new("lora", 2, torch.Generator().manual_seed(0))
    assert base.dtype == base.denoiser.dtype == (torch.float32 if vram == "max" else torch.bfloat16)


@pytest.mark.parametrize("folder", ONE_EACH, indirect=True)
def test_the_selftest_passes(folder: Path) -> None:
    rows = selftest(str(folder), device="cpu", only=["dreambooth", "blora", "classifier-free", "image to image"])
    assert len(rows) == 4 and all(row.passed for row in rows), [row.note for row in rows]
    assert "not for this base" in next(row.note for row in rows if row.name == "blora")


@pytest.mark.parametrize("folder", ["z-image"], indirect=True)
def test_options_that_do_not_fit_are_refused(folder: Path, picture: Path) -> None:
    with pytest.raises(UsageError, match="predicts the velocity"):
        bases.load(str(folder), "cpu", Loading(prediction="v"))
    with pytest.raises(UsageError, match="no way to draw timesteps"):
        bases.load(str(folder), "cpu", Loading(timesteps="normal"))
    with pytest.raises(UsageError, match="ControlNets for a transformer"):
        prepare(bases.load(str(folder), "cpu"), None, Control("some/controlnet", picture), None, None)


def test_packing_is_that_of_diffusers() -> None:
    latents = torch.randn(2, 16, 4, 6)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 4, 6))
    assert torch.equal(unpack(packed, 2, 3), latents)
    assert torch.equal(
        places(2, 3, torch.device("cpu")), FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32)
    )


REAL: Mapping[
    str, dict[str, Any]
] = {  # the configurations of the published models, where they differ from diffusers' defaults
    "flux": {"guidance_embeds": True},
    "sd3": {  # 3.5 medium
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "z-image": {},
}
COUNTS = {  # adapted layers: of attention, of the transformer blocks; SD3's last block gives no text, and has less for it
    "flux": (266, 19 * 12 + 38 * 5),
    "sd3": (24 * 8 - 1 + 13 * 4, 24 * 12 - 3 + 13 * 4),
    "z-image": (34 * 4, 34 * 7),
}


@pytest.mark.parametrize("name", COUNTS)
def test_which_layers_of_the_published_models_are_adapted(name: str) -> None:
    network = next(family.network for family in FAMILIES if family.name == name)
    for targets, count in zip((ATTENTION, TRANSFORMERS), COUNTS[name], strict=True):
        model = network.empty(REAL[name])
        assert len(Adapters.attach(model, targets, network.layers).layers) == count
