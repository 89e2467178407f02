"""LoRAs in a part of the steps, and LoRAs that are drawn against others: formulas and pictures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from double import double
from torch import Tensor, nn

from unbraid.bases.base import Base, load
from unbraid.cli.lora_options import parsed_uses, with_opponents
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active, Lora
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import write
from unbraid.sampling.combine import Combine, by_step, difference, within
from unbraid.sampling.render import Sampling, StyleGuidance, attach, render
from unbraid.sampling.sample import NEGATIVE, Guided, Style, classifier_free, style_guidance
from unbraid.sampling.uses import Use

TIMES = [1 - i / 8 for i in range(8)]
A, B = Active("a"), Active("b", 0.5)


def modules(base: Base, seed: int) -> dict[str, Lora]:
    """A LoRA with random factors on every projection of attention."""
    rng, made = torch.Generator().manual_seed(seed), {}
    for name, layer in base.denoiser.named_modules():
        if isinstance(layer, nn.Linear) and ".attn" in name:
            d, k = layer.weight.shape
            down, up = torch.randn(2, k, generator=rng), torch.randn(d, 2, generator=rng)
            made[f"unet.{name}"] = Lora(down / 4, up / 4, 2.0)
    return made


def dense(base: Base, loras: Mapping[float, Mapping[str, Lora]], noisy: Tensor, prompt: str) -> Tensor:
    """What the base predicts with ΔW added to its weights; then they are put back."""
    weights = {name: p.detach().clone() for name, p in base.denoiser.named_parameters()}
    with torch.no_grad():
        for scale, some in loras.items():
            for name, lora in some.items():
                layer = base.denoiser.get_submodule(name.removeprefix("unet."))
                layer.weight += scale * delta(lora).double()
        found = base.predict(noisy, torch.tensor([500]), [base.encode_prompt(prompt)], torch.zeros(1, 6))
        for name, p in base.denoiser.named_parameters():
            p.copy_(weights[name])
    return found


def test_the_difference_is_its_formula(v_model: Base) -> None:
    """ConsisLoRA's guidance with four LoRAs, in double precision, against merged weights."""
    v_model.denoiser.double()
    loras = {name: modules(v_model, i) for i, name in enumerate(("c", "s", "c_other", "s_other"))}
    texts = {"main": "a sks cat in ink style", "c": "a sks", "s": "an image in ink style", NEGATIVE: ""}
    texts |= {"c_other": "a teapot", "s_other": "an image in red style"}
    adapters = attach(v_model, {name: (Path(name), some) for name, some in loras.items()})
    assert adapters
    double(adapters)
    noisy = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(9)).double()
    terms = (
        *classifier_free(4.0, "main", (Active("c", 0.9), Active("s", 0.7))),
        *difference(0.6, ("c", Active("c", 0.9)), ("c_other", Active("c_other", 0.9))),
        *difference(1.5, ("s", Active("s", 0.7)), ("s_other", Active("s_other", 0.7))),
    )
    prompts = {role: v_model.encode_prompt(text) for role, text in texts.items()}
    guided = Guided(v_model, terms, prompts, adapters)
    with torch.no_grad():
        (found,) = guided(noisy, torch.tensor(500))
    adapters.detach()
    both = {0.9: loras["c"], 0.7: loras["s"]}
    blank, joint = (dense(v_model, both, noisy, texts[role]) for role in (NEGATIVE, "main"))
    c, c_other = (dense(v_model, {0.9: loras[one]}, noisy, texts[one]) for one in ("c", "c_other"))
    s, s_other = (dense(v_model, {0.7: loras[one]}, noisy, texts[one]) for one in ("s", "s_other"))
    wanted = blank + 4.0 * (joint - blank) + 0.6 * (c - c_other) + 1.5 * (s - s_other)
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()  # the timestep's embedding is in single precision
    assert (found - blank - 4.0 * (joint - blank)).abs().max() > 0.01 * wanted.abs().max()


def test_windows_of_craft() -> None:
    """Content in steps 1 to 35 of 50, style from 15 to 50."""
    steps = within([A, B], [(0.0, 0.7), (0.28, 1.0)], 50)
    assert [i + 1 for i, some in enumerate(steps) if A in some] == list(range(1, 36))
    assert [i + 1 for i, some in enumerate(steps) if B in some] == list(range(15, 51))


def test_windows_and_guiding_styles_go_together() -> None:
    style = Style(Active("style"), "style", 2.0, start=0.7)
    steps = within([A, B], [(0.0, 0.5), (0.25, 1.0)], 8)
    terms = by_step(steps, TIMES, lambda now: style_guidance(4.0, "main", (style,), now))
    for time, some in zip(TIMES, steps, strict=True):
        wanted = [one for one in style_guidance(4.0, "main", (style,), some) if one.t_min <= time <= one.t_max]
        now = [one for one in terms if one.t_min <= time <= one.t_max]
        assert [(one.weight, one.prompt, one.active) for one in now] == [
            (one.weight, one.prompt, one.active) for one in wanted
        ]


def test_the_command_line_reads_them() -> None:
    (one, two, three) = parsed_uses(["a:b.safetensors:0.8@0.2-1.0", "x@y.safetensors@0-.5", "c.safetensors"], [])
    assert (one.file, one.scale, one.steps) == (Path("a:b.safetensors"), 0.8, (0.2, 1.0))
    assert (two.file, two.scale, two.steps) == (Path("x@y.safetensors"), 1.0, (0.0, 0.5))
    assert (three.file, three.steps) == (Path("c.safetensors"), (0.0, 1.0))
    (near,) = with_opponents([one], ["d.safetensors:0.4"])
    assert (near.against, near.contrast, near.steps) == (Path("d.safetensors"), 0.4, (0.2, 1.0))
    with pytest.raises(UsageError, match="1 files for 2 LoRAs"):
        with_opponents([one, two], ["d.safetensors"])


def test_pictures_and_errors(v_base: Path, tmp_path: Path) -> None:
    base, files = load(str(v_base), "cpu"), [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        write(file, modules(base, i), family="sdxl", metadata={"unbraid.prompt": f"a {i}"} if i else {})

    def draw(*uses: Use, **more: str) -> np.ndarray:
        (image,) = render(base, "a cat", uses, sampling=Sampling(steps=4), **more)  # type: ignore[arg-type]
        return np.asarray(image, np.int16)

    by_turns = draw(Use(files[0]), Use(files[1]), combine="switch")
    assert not np.array_equal(by_turns, draw(Use(files[0], steps=(0.0, 0.5)), Use(files[1], steps=(0.5, 1.0))))
    two = Sampling(steps=2)
    (turns,) = render(base, "a cat", [Use(files[0]), Use(files[1])], combine="switch", sampling=two)
    halves = [Use(files[0], steps=(0.0, 0.5)), Use(files[1], steps=(0.5, 1.0))]
    (parts,) = render(base, "a cat", halves, sampling=two)
    assert np.array_equal(np.asarray(turns), np.asarray(parts)), "one step each"
    alone = draw(Use(files[1]))
    assert np.abs(draw(Use(files[1], against=files[2], contrast=0.0)) - alone).max() <= 1
    assert np.abs(draw(Use(files[1], against=files[2])) - alone).max() > 2
    for use, what in (
        (Use(files[0], against=files[1]), "records no prompt"),
        (Use(files[1], steps=(0.5, 0.5)), "steps from 0.5 to 0.5"),
        (Use(files[1], steps=(0.0, 1.5)), "steps from 0 to 1.5"),
        (Use(files[1], steps=(0.4, 0.45)), "none of 4 steps"),
    ):
        with pytest.raises(UsageError, match=what):
            draw(use)
    with pytest.raises(UsageError, match="do not go with switch"):
        draw(Use(files[1]), Use(files[2], steps=(0.0, 0.5)), combine="switch")
    with pytest.raises(UsageError, match="no steps, no layers and no contrast"):
        render(base, "a cat", styles=StyleGuidance([Use(files[1], steps=(0.0, 0.5))]))


def test_a_lora_without_some_layers_is_the_file_without_them(v_model: Base, tmp_path: Path) -> None:
    """In every way of combining, and for what a LoRA is drawn against."""
    some = [modules(v_model, i) for i in range(3)]
    left = [{name: lora for name, lora in one.items() if "up_blocks" not in name} for one in some]
    files = [tmp_path / f"{i}.safetensors" for i in range(6)]
    for file, one in zip(files, (*some, *left), strict=True):
        write(file, one, family="sdxl", metadata={"unbraid.prompt": "a cat"})
    out = ("up_blocks",)

    def drawn(uses: list[Use], combine: Combine = "sum") -> np.ndarray:
        return np.asarray(render(v_model, "a cat", uses, combine=combine, sampling=Sampling(steps=2))[0])

    for combine in ("sum", "switch", "composite", "k-lora"):
        whole = drawn([Use(files[0]), Use(files[1])], combine)
        found = drawn([Use(files[0], without=out), Use(files[1], without=out)], combine)
        assert (found == drawn([Use(files[3]), Use(files[4])], combine)).all() and (found != whole).any()
    against = drawn([Use(files[0], without=out, against=files[2])])
    assert (against == drawn([Use(files[3], against=files[5])])).all()
    with pytest.raises(UsageError, match="no steps, no layers and no contrast"):
        render(v_model, "a cat", styles=StyleGuidance([Use(files[0], prompt="ink", without=out)]))
