"""ComfyUI's nodes in comfyui-nodes compute what unbraid computes. ComfyUI itself is not run: see comfy_stand_in.py."""

import ast
import asyncio
import inspect
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy_stand_in as comfy
import pytest
import torch
from safetensors.torch import save_file
from test_comfy_workflows import NODES, fault, sizes_of
from torch import Tensor, nn

from tools.comfy_node_workflows import OUT, WORKFLOWS
from tools.comfy_workflows import text
from unbraid.bases.base import Base
from unbraid.core.lora import Active, Lora
from unbraid.files.formats.encode import kohya_name
from unbraid.files.lora_file import read, write
from unbraid.sampling.attach import attach
from unbraid.sampling.combine import RULES, by_choice, choices, switch
from unbraid.sampling.sample import NEGATIVE, Guided, Style, Term, classifier_free, style_guidance

NAMES = ("content", "ink", "sepia", "style")
TIMES = (0.98, 0.7, 0.5, 0.3, 0.1)
SIGMAS = torch.tensor([*TIMES, 0.0])
MAIN = {"content": "a sks cat", "style": "a dog in line style", "ink": "a teapot in line style", "sepia": "a sks dog"}


@pytest.fixture
def model(v_model: Base) -> Base:
    """In double precision: the differences that remain are small ones of single precision elsewhere."""
    v_model.denoiser.double()
    return v_model


@pytest.fixture
def loras(model: Base, tmp_path: Path) -> Path:
    """Four LoRAs of different ranks and strengths on the attention of the base, but for a few layers."""
    rng = torch.Generator().manual_seed(1)
    folder = tmp_path / "loras"
    folder.mkdir()
    attention = [(name, one) for name, one in model.denoiser.named_modules()
                 if isinstance(one, nn.Linear) and ".attn" in name]  # fmt: skip
    assert len(attention) > 8
    for i, name in enumerate(NAMES):
        modules = {
            f"unet.{path}": Lora(
                torch.randn(2 + i, one.in_features, generator=rng) * (0.5 + torch.rand(1, generator=rng)),
                torch.randn(one.out_features, 2 + i, generator=rng) / 8,
                3.0,
            )
            for number, (path, one) in enumerate(attention)
            if number % 9 != i
        }
        write(folder / f"{name}.safetensors", modules, family="sdxl")
    return folder


@pytest.fixture
def made(model: Base, loras: Path) -> Iterator[tuple[Any, comfy.Patcher]]:
    with comfy.nodes(loras) as nodes, torch.no_grad():
        before = {name: one.clone() for name, one in model.denoiser.state_dict().items()}
        yield nodes, comfy.Patcher(comfy.Inner(model))
        assert all(torch.equal(one, before[name]) for name, one in model.denoiser.state_dict().items())
        assert not any(one._forward_hooks for one in model.denoiser.modules()), "all hooks are removed"


def prompts_of(base: Base) -> dict[str, Any]:
    found = {role: base.encode_prompt(words) for role, words in {"main": "a sks cat in line style", **MAIN}.items()}
    return {**found, NEGATIVE: base.encode_negative("")}


def ours(base: Base, terms: Sequence[Term], loras: Mapping[str, Any], noisy: Tensor) -> list[Tensor]:
    """What unbraid predicts at each time."""
    adapters = attach(base, loras)
    assert adapters
    try:
        guided = Guided(base, terms, prompts_of(base), adapters)
        given = {"added_cond_kwargs": {"time_ids": sizes_of(base).expand(len(noisy), -1)}}
        steps = [torch.tensor(round(time * base.process.steps)) for time in TIMES]
        return [guided.at(noisy, step, given) for step in steps]
    finally:
        adapters.detach()


def agree(guider: Any, wanted: Sequence[Tensor], noisy: Tensor) -> None:
    for time, right in zip(TIMES, wanted, strict=True):
        off = float((guider(noisy, time) - right).abs().max() / right.abs().max())
        assert off < 2e-5, f"{off} at {time}"


def noisy() -> Tensor:
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def plain_guider(base: Base, patcher: comfy.Patcher) -> comfy.CFGGuider:
    prompts = prompts_of(base)
    guider = comfy.CFGGuider(patcher)
    guider.inner_set_conds({"positive": comfy.conditioning(prompts["main"]), "negative": comfy.conditioning(prompts[NEGATIVE])})  # fmt: skip
    guider.set_cfg(4.0)
    return guider


def opened(loras: Path, *names: str) -> dict[str, Any]:
    return {name: (path, read(path).modules) for name in names if (path := loras / f"{name}.safetensors")}


@pytest.mark.parametrize("own", [True, False])
def test_a_pair_with_own_prompts(own: bool, made: Any, model: Base, loras: Path) -> None:
    nodes, patcher = made
    prompts = prompts_of(model)
    given = {f"{role}_prompt": comfy.conditioning(prompts[role]) for role in ("content", "style")} if own else {}
    (patched,) = nodes.UnbraidPair.execute(patcher, "content.safetensors", 0.8, "style.safetensors", 1.0, **given)
    actives = tuple(
        Active(role, scale, prompt=role if own else None) for role, scale in (("content", 0.8), ("style", 1.0))
    )
    wanted = ours(model, classifier_free(4.0, "main", actives), opened(loras, "content", "style"), noisy())
    agree(plain_guider(model, patched), wanted, noisy())
    off = plain_guider(model, patcher)(noisy(), 0.5)
    assert (off - wanted[2]).abs().max() > 1e-2 * off.abs().max(), "the LoRAs do something"


@pytest.mark.parametrize("way", ["k-lora", "switch"])
def test_turns(way: str, made: Any, model: Base, loras: Path) -> None:
    nodes, patcher = made
    names = ("content.safetensors", "style.safetensors")
    (patched,) = nodes.UnbraidTurns.execute(patcher, names[0], 1.0, names[1], 0.7, way, SIGMAS)
    files, actives = opened(loras, "content", "style"), (Active("content"), Active("style", 0.7))
    if way == "switch":
        terms: Sequence[Term] = switch(4.0, "main", actives, TIMES)
    else:
        modules = [found for _, found in files.values()]
        plan = choices(RULES["k-lora"], *modules, steps=len(TIMES))
        assert len(set(plan.values())) > 3, "layers change hands at different steps"
        parts, terms = by_choice((4.0, "main"), RULES["k-lora"], actives, modules, TIMES)
        files = {role: (loras, some) for role, some in parts.items()}
    agree(plain_guider(model, patched), ours(model, terms, files, noisy()), noisy())


def test_several_styles(made: Any, model: Base, loras: Path) -> None:
    nodes, patcher = made
    prompts = {role: comfy.conditioning(prompt) for role, prompt in prompts_of(model).items()}
    (patched,) = nodes.UnbraidPair.execute(patcher, "content.safetensors", 1.0, "style.safetensors", 0.0)
    (one,) = nodes.UnbraidStyle.execute("ink.safetensors", prompts["ink"], 0.6, 0.0)
    (two,) = nodes.UnbraidStyle.execute("sepia.safetensors", prompts["sepia"], 0.5, 0.4, one)
    (guider,) = nodes.UnbraidStyleGuider.execute(patched, prompts["main"], prompts[NEGATIVE], 4.0, two)
    styles = [Style(Active("ink"), "ink", 2.4), Style(Active("sepia"), "sepia", 2.0, 0.6)]
    terms = style_guidance(4.0, "main", styles, (Active("content"),))
    agree(guider, ours(model, terms, opened(loras, "content", "ink", "sepia"), noisy()), noisy())


def test_bad_files_and_prompts_are_refused(made: Any, model: Base, loras: Path) -> None:
    nodes, patcher = made
    down, up = torch.randn(2, 7), torch.randn(7, 2)
    layer = kohya_name("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "sdxl")
    for name, tensors, words in (
        ("other", {"lora_unet_nowhere.lora_down.weight": down, "lora_unet_nowhere.lora_up.weight": up}, "another one"),
        ("conv", {f"{layer}.lora_down.weight": down[..., None, None], f"{layer}.lora_up.weight": up}, "convolution"),
        ("empty", {"a": down}, "--to kohya"),
    ):
        save_file(tensors, loras / f"{name}.safetensors")
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            nodes.opened(patcher, f"{name}.safetensors")
    with pytest.raises(ValueError, match="no layer in common"):
        nodes.turns("k-lora", {"a": None}, {"b": None}, 3)
    short = [[torch.randn(1, 5, model.encode_prompt("a").embeds.shape[1]), {}]]
    (patched,) = nodes.UnbraidPair.execute(patcher, "content.safetensors", 1.0, "style.safetensors", 1.0, short)
    with pytest.raises(ValueError, match="5 tokens"):
        plain_guider(model, patched)(noisy(), 0.5)


def documented(nodes: Any) -> dict[str, Any]:
    """The schemas in the form of tools/comfy_nodes.toml."""
    found = {}
    for node in nodes.NODES:
        schema = node.define_schema()
        inputs = {}
        for one in schema.inputs:
            more = {"FLOAT": "{min} {max}", "COMBO": "|".join(one.given.get("options", ()))}.get(one.kind, "")
            kind = " ".join((one.kind, more.format(**one.given))).strip()
            inputs[one.id] = kind + "?" * one.given.get("optional", False)
        assert list(inspect.signature(node.execute).parameters) == list(inputs)
        found[schema.node_id] = {"inputs": inputs, "outputs": [one.kind for one in schema.outputs]}
    return found


def test_workflows_fit_the_nodes_and_are_up_to_date(loras: Path) -> None:
    with comfy.nodes(loras) as nodes:
        known = NODES | documented(nodes)
        assert asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list()) == nodes.NODES
    used = set()
    for name, make in WORKFLOWS.items():
        graph = json.loads(text(make()))
        assert fault(graph, known) == ""
        assert json.loads((OUT / name).read_text("utf-8")) == graph, "run python -m tools.comfy_node_workflows"
        used |= {node["class_type"] for node in graph.values()}
    assert used >= known.keys() - NODES.keys(), "each node has an example"


def test_the_package_needs_torch_alone() -> None:
    project = tomllib.loads((comfy.FOLDER / "pyproject.toml").read_text("utf-8"))["project"]
    assert "ComfyUI" not in project["name"] and project["dependencies"] == []
    for path in comfy.FOLDER.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text("utf-8")))
        names = {getattr(one, "module", None) or alias.name for one in tree if isinstance(one, ast.Import | ast.ImportFrom)
                 if not getattr(one, "level", 0) for alias in one.names}  # fmt: skip
        roots = {name.partition(".")[0] for name in names}
        assert roots <= {
            "torch",
            "comfy",
            "comfy_api",
            "folder_paths",
            "collections",
            "contextlib",
            "dataclasses",
            "typing",
        }
