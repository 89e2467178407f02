"""Prompts of any length, in chunks. Those of one chunk are compared with the pipeline, longer ones with a reference below."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_run import cli_in_process
from tiny_bases import Tiny
from torch import Tensor

from unbraid.bases.base import Base, load
from unbraid.bases.families.long_prompts import chunks, remarks
from unbraid.common.errors import UsageError
from unbraid.runs.api import learn_job
from unbraid.runs.batch import run_many
from unbraid.runs.job import Job
from unbraid.runs.run import run
from unbraid.sampling.render import Sampling, render

KINDS = ["tiny_sdxl", "tiny_sd15", "tiny_sd21", "v_base", "sd15_base"]


def words(base: Base, count: int) -> str:
    """A text with this number of tokens."""
    text = " ".join(["cat"] * count)
    while len(base.pipe.tokenizer(text, add_special_tokens=False).input_ids) > count:
        text = text.rpartition(" ")[0]
    return text


def opened(kind: str, request: pytest.FixtureRequest) -> Base:
    found: Any = request.getfixturevalue(kind)
    return load(str(found.folder if isinstance(found, Tiny) else found), "cpu")


@torch.no_grad()
def by_hand(base: Base, text: str) -> tuple[Tensor, Tensor | None]:
    """The reference: each chunk alone through the text encoder, framed by transformers itself."""
    rows, pooled = [], None
    for name in ("", "_2") if base.family.name == "sdxl" else ("",):
        tokenizer, encoder = getattr(base.pipe, f"tokenizer{name}"), getattr(base.pipe, f"text_encoder{name}")
        ids, room, found = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.model_max_length - 2, []
        for i in range(0, len(ids), room):
            one = tokenizer.prepare_for_model(ids[i : i + room], padding="max_length", max_length=room + 2) if hasattr(tokenizer, "prepare_for_model") else {"input_ids": ([tokenizer.bos_token_id, *ids[i : i + room], tokenizer.eos_token_id] + [tokenizer.pad_token_id] * room)[: room + 2]}  # fmt: skip
            out = encoder(torch.tensor([one["input_ids"]]), output_hidden_states=True)
            found.append(out.hidden_states[-2][0] if base.family.name == "sdxl" else out.last_hidden_state[0])
            if name and i == 0:
                pooled = out.text_embeds[0]
        rows.append(torch.cat(found))
    return torch.cat(rows, -1), pooled


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_every_length(kind: str, request: pytest.FixtureRequest) -> None:
    base = opened(kind, request)
    room, full = base.pipe.tokenizer.model_max_length - 2, base.pipe.tokenizer.model_max_length
    for text in ("", "a cat", words(base, room)):
        pipe: Any = base.pipe
        expected = pipe.encode_prompt(
            text, device=base.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        got = base.encode_prompt(text)
        assert torch.equal(got.embeds, expected[0][0]) and not remarks(base.pipe, [text])
        assert (got.pooled is None) == (base.family.name != "sdxl")
        assert got.pooled is None or torch.equal(got.pooled, expected[2][0])
    for count, most in ((room + 1, 2), (2 * room, 2), (2 * room + 5, 3)):
        text = words(base, count)
        got, (embeds, pooled) = base.encode_prompt(text), by_hand(base, text)
        assert got.embeds.shape[0] == most * full and len(chunks(base.pipe.tokenizer, text)) == most
        assert torch.allclose(got.embeds, embeds, atol=1e-5)
        assert pooled is None or (got.pooled is not None and torch.allclose(got.pooled, pooled, atol=1e-5))
        (remark,) = remarks(base.pipe, [text, text])
        assert f"{count} tokens, is read in {most} chunks of {room}" in remark


def test_shorter_ones_are_followed_by_empty_chunks(request: pytest.FixtureRequest) -> None:
    base = opened("tiny_sdxl", request)
    made = {
        "long": base.encode_prompt(words(base, 100)),
        "short": base.encode_prompt("a cat"),
        "blank": base.encode_negative(),
    }
    got, empty = base.alike(made), base.encode_prompt("").embeds
    assert {len(prompt.embeds) for prompt in got.values()} == {2 * len(empty)}
    assert torch.equal(got["short"].embeds, torch.cat([made["short"].embeds, empty])) and got["long"] is not None
    assert got["short"].pooled is made["short"].pooled
    assert bool(got["blank"].embeds.any()) == bool(made["blank"].embeds.any())
    assert base.alike({"a": made["short"]})["a"] is made["short"]


def test_they_are_drawn_and_their_end_counts(request: pytest.FixtureRequest) -> None:
    base = opened("v_base", request)
    text = words(base, base.pipe.tokenizer.model_max_length + 20)
    pictures = [render(base, one, sampling=Sampling(steps=2))[0].tobytes() for one in (text, text + " teapot", text)]
    assert pictures[0] == pictures[2] != pictures[1]
    plain, negative = (
        render(base, "a cat", sampling=Sampling(steps=2, negative=words))[0].tobytes() for words in ("", text)
    )
    assert plain != negative


def long_job(base: Path, picture: Path, out: Path, many: int) -> Job:
    file = out.with_suffix(".png")
    Image.open(picture).save(file)
    if many:
        file.with_suffix(".txt").write_text("a sks cat\n" + " ".join(["dog"] * many))
    options: dict[str, Any] = {"base": str(base), "rank": 2, "steps": 6, "previews": 1, "lr": 1e-2, "out": out}
    return learn_job(file, prompt="a sks cat", **options)


@pytest.mark.slow
def test_they_are_trained_alone_and_beside_short_ones(v_base: Path, picture: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    alone = long_job(v_base, picture, tmp_path / "alone", 300)
    warnings = [event.warning for event in run(alone, device="cpu") if event.warning]
    assert len(warnings) == 1 and "tokens, is read in" in warnings[0]
    many = [long_job(v_base, picture, tmp_path / "a", 300), long_job(v_base, picture, tmp_path / "b", 0)]
    assert not [event for _, event in run_many(many, 2, device="cpu") if isinstance(event, UsageError) or event.undone]
    one, other = (load_file(job.out / "lora.safetensors") for job in (alone, many[0]))
    a, b = (torch.cat([value.flatten() for value in some.values()]) for some in (one, other))
    assert (a - b).norm() < 5e-4 * a.norm()


def test_generate_says_it_and_refuses_what_cannot_be_drawn(v_base: Path, tmp_path: Path) -> None:
    common = ["generate", "--base", str(v_base), "--out", str(tmp_path / "x.png")]
    code, text = cli_in_process([*common, "--prompt", " ".join(["a red"] * 200), "--steps", "1"])
    assert code == 0 and "tokens, is read in" in text
    for more in (["--steps=0"], ["--n=0"], ["--n=-1"]):
        assert cli_in_process([*common, "--prompt", "a cat", *more])[0] == 2
    code, text = cli_in_process([*common, "--prompt", "a cat", "--width=101", "--height=70", "--steps=1"])
    assert code == 1 and "cannot be drawn" in text and len(text.splitlines()) == 1
