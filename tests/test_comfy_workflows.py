"""ComfyUI's workflows: nodes and inputs are those that its documentation has, and the graph computes style guidance.

ComfyUI itself is not run. `Stand` is a stand-in: it does with a tiny base what ComfyUI's documentation says of each node."""

import copy
import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tools import workflow_pictures
from tools.comfy_workflows import GUIDANCE, OUT, WORKFLOWS, Words, of_run, text
from unbraid.bases import base as bases
from unbraid.bases.base import Base
from unbraid.core.lora import Active
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import read
from unbraid.runs.api import pair_job
from unbraid.runs.run import run
from unbraid.sampling.attach import attach
from unbraid.sampling.sample import NEGATIVE, Guided, Style, style_guidance

NODES = tomllib.loads((Path(__file__).parent.parent / "tools" / "comfy_nodes.toml").read_text("utf-8"))
QUICK = {"rank": 4, "steps": 6, "style_from": 2, "lr": 1e-2, "previews": 0}
Graph = dict[str, dict[str, Any]]


def graphs() -> dict[str, Graph]:
    return {name: json.loads(text(make(Words()))) for name, make in WORKFLOWS.items()}


def fault(graph: Graph, nodes: dict[str, Any] = NODES) -> str:
    """What is wrong with a workflow by the documentation of its nodes; "" if nothing."""
    for name, node in graph.items():
        if node["class_type"] not in nodes:
            return f"{name}: no such node"
        inputs = nodes[node["class_type"]]["inputs"]
        needed = {key for key, kind in inputs.items() if not kind.endswith("?")}
        if node["inputs"].keys() - inputs.keys() or needed - node["inputs"].keys():
            return f"{name}: inputs {sorted(node['inputs'])}"
        for key, value in node["inputs"].items():
            if wrong := unfit(graph, nodes, inputs[key].removesuffix("?"), value):
                return f"{name}.{key}: {wrong}"
    return ""


def unfit(graph: Graph, nodes: dict[str, Any], kind: str, value: Any) -> str:
    """Why a value is none of this kind: a link to an output of the kind, a number in its range, one of the choices, a text."""
    kind, _, rest = kind.partition(" ")
    if kind in ("FLOAT", "INT"):
        low, high = map(float, rest.split())
        right = isinstance(value, int if kind == "INT" else float) and low <= value <= high
    elif kind == "COMBO":
        right = value in rest.split("|")
    elif kind == "STRING":
        right = isinstance(value, str)
    else:
        source, output = value if isinstance(value, list) else ("", 0)
        right = source in graph and nodes[graph[source]["class_type"]]["outputs"][output : output + 1] == [kind]
    return "" if right else f"{value!r} is no {kind}"


def test_workflows_are_as_documented_and_up_to_date() -> None:
    for name, graph in graphs().items():
        assert fault(graph) == ""
        assert json.loads((OUT / name).read_text("utf-8")) == graph, "run python -m tools.comfy_workflows"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("DualCFGGuider", {"cfg_conds": 101.0}),
        ("DualCFGGuider", {"cfg": 4.0}),
        ("DualCFGGuider", {"style": "other"}),
        ("DualCFGGuider", {"cond1": ["1", 0]}),
        ("RandomNoise", {"noise_seed": 1.5}),
        ("SaveImage", {"images": ["99", 0]}),
    ],
)
def test_wrong_workflows_are_found(kind: str, change: dict[str, Any]) -> None:
    graph = graphs()["style_guidance.json"]
    (node,) = (node for node in graph.values() if node["class_type"] == kind)
    node["inputs"] |= change
    assert fault(graph)
    node["class_type"] = "Nothing"
    assert fault(graph)


class Stand:
    """What ComfyUI's documentation says of each node, on a tiny base. Conditionings are lists of (prompt, hooks, part of the
    steps in which it counts); several that count at once are averaged. A guider is a function of noisy latents and a time."""

    def __init__(self, base: Base, loras: dict[str, Path], graph: Graph) -> None:
        self.base, self.loras, self.graph = base, loras, graph

    def guider(self) -> Callable[[Tensor, float], Tensor]:
        (name,) = (name for name, node in self.graph.items() if node["class_type"] == "DualCFGGuider")
        return self.output(name)[0]

    def output(self, name: str) -> tuple[Any, ...]:
        node = self.graph[name]
        given = {
            key: self.output(value[0])[value[1]] if isinstance(value, list) else value
            for key, value in node["inputs"].items()
        }
        return getattr(self, node["class_type"])(**given)

    def CheckpointLoaderSimple(self, ckpt_name: str) -> tuple[Any, ...]:
        return self.base.denoiser, self.base, self.base.vae

    def LoraLoaderModelOnly(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any]:
        return (self.patched(model, [(lora_name, strength_model)]),)

    def CLIPTextEncode(self, text: str, clip: Base) -> tuple[Any]:
        prompt = clip.encode_prompt(text) if text else clip.encode_negative(text)
        return ([(prompt, [], (0.0, 1.0))],)

    def CreateHookLoraModelOnly(self, lora_name: str, strength_model: float) -> tuple[Any]:
        return ([(lora_name, strength_model)],)

    def ConditioningTimestepsRange(self, start_percent: float, end_percent: float) -> tuple[Any, ...]:
        return (start_percent, end_percent), (0.0, start_percent), (end_percent, 1.0)

    def ConditioningSetProperties(
        self, cond_NEW: Any, strength: float, set_cond_area: str, hooks: Any = (), timesteps: Any = (0.0, 1.0)
    ) -> tuple[Any]:
        assert strength == 1.0 and set_cond_area == "default"
        return ([(prompt, [*old, *hooks], timesteps) for prompt, old, _ in cond_NEW],)

    def ConditioningSetPropertiesAndCombine(self, cond: Any, **given: Any) -> tuple[Any]:
        return ([*cond, *self.ConditioningSetProperties(**given)[0]],)

    def DualCFGGuider(
        self, model: Any, cond1: Any, cond2: Any, negative: Any, cfg_conds: float, cfg_cond2_negative: float, style: str
    ) -> tuple[Any]:
        assert style == "regular"

        def guided(noisy: Tensor, time: float) -> Tensor:
            one, two, blank = (self.clean(model, cond, noisy, time) for cond in (cond1, cond2, negative))
            return blank + cfg_cond2_negative * (two - blank) + cfg_conds * (one - two)

        return (guided,)

    def clean(self, model: Any, cond: Any, noisy: Tensor, time: float) -> Tensor:
        """The clean latents that the model predicts under a conditioning: ComfyUI guides in them."""
        found = [self.predict(self.patched(model, hooks), noisy, time, prompt)
                 for prompt, hooks, (begin, end) in cond if begin <= 1 - time < end]  # fmt: skip
        assert found, "a conditioning that does not count would be zero"
        return torch.stack(found).mean(0)

    def predict(self, model: Any, noisy: Tensor, time: float, prompt: Any) -> Tensor:
        t = steps(self.base, time).expand(len(noisy))
        pipe = copy.copy(self.base.pipe)
        pipe.unet = model
        sizes = sizes_of(self.base).expand(len(noisy), -1)
        out = replace(self.base, pipe=pipe).predict(noisy, t, [prompt] * len(noisy), sizes)
        return self.base.process.to_x0(out, noisy, t)

    def patched(self, model: Any, loras: list[tuple[str, float]]) -> Any:
        """A copy of the model with W + strength · alpha / r · up @ down."""
        model = copy.deepcopy(model)
        for name, strength in loras:
            for module, lora in read(self.loras[name]).modules.items():
                weight = model.get_submodule(module.removeprefix("unet.")).weight
                weight.data += strength * delta(lora).to(weight.dtype).view_as(weight)
        return model


def steps(base: Base, time: float) -> Tensor:
    return torch.tensor(round(time * base.process.steps))


def sizes_of(base: Base) -> Tensor:
    return torch.tensor([[base.size, base.size, 0, 0, base.size, base.size]], dtype=torch.float32)


@pytest.fixture(scope="module")
def made(v_base: Path, eps_base: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of base → a short run of `pair` on it."""
    out = tmp_path_factory.mktemp("comfy")
    with Image.open(picture) as image:
        image.convert("1", dither=Image.Dither.NONE).convert("RGB").save(out / "after.png")
    found = {}
    for name, base in (("v", v_base), ("eps", eps_base)):
        job = pair_job(picture, out / "after.png", subject="cat", style="line", out=out / name, base=str(base), **QUICK)  # type: ignore[arg-type]
        list(run(job, device="cpu"))
        found[name] = job.out
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v", "eps"])
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_computes_what_generate_does(
    kind: str, workflow: str, made: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    words = replace(of_run(made[kind]), style_scale=0.75)
    base = bases.load(str(request.getfixturevalue(f"{kind}_base")), "cpu")
    files = {role: made[kind] / f"{role}.safetensors" for role in ("style", "content")}
    graph = json.loads(text(WORKFLOWS[workflow](words)))
    subject = workflow == "subject_and_style.json"
    with torch.no_grad():
        stand = Stand(base, {words.style_file: files["style"], words.content_file: files["content"]}, graph).guider()
        prompt = words.subject if subject else words.prompt
        prompts = {"main": base.encode_prompt(prompt), "style": base.encode_prompt(f"{prompt} in line style")}
        prompts[NEGATIVE] = base.encode_negative("")
        style = Style(Active("style"), "style", 0.75 * GUIDANCE, words.style_from if subject else 1.0)
        terms = style_guidance(GUIDANCE, "main", [style], (Active("content"),) if subject else ())
        noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
        times = (0.95, 0.85, 0.75, 0.4, 0.05)
        theirs = [stand(noisy, time) for time in times]
        adapters = attach(base, {role: (file, read(file).modules) for role, file in files.items()})
        assert adapters
        guided = Guided(base, terms, prompts, adapters)
        for time, found in zip(times, theirs, strict=True):
            t = steps(base, time)
            given = {"added_cond_kwargs": {"time_ids": sizes_of(base).expand(2, -1)}}
            ours = base.process.to_x0(guided.at(noisy, t, given), noisy, t.expand(2))
            scale = ours.abs().max()
            assert (ours - found).abs().max() < 1e-4 * scale, f"at {time}"
            plain = Guided(base, style_guidance(GUIDANCE, "main", [], terms[0].active), prompts, adapters)
            off = base.process.to_x0(plain.at(noisy, t, given), noisy, t.expand(2))
            guides = not subject or time < words.style_from
            assert ((off - found).abs().max() > 1e-3 * scale) == guides, "the style does something, when it is on"


@pytest.mark.slow
def test_the_words_are_those_of_the_run(made: dict[str, Path]) -> None:
    words = of_run(made["v"])
    assert (words.prompt, words.subject, words.style) == ("a cat", "a sks cat", "line")
    assert (words.style_file, words.content_file) == ("v_style.safetensors", "v_content.safetensors")


@pytest.mark.parametrize("file", workflow_pictures.WORKFLOWS, ids=lambda file: file.stem)
def test_the_picture_of_a_workflow_shows_every_node_after_what_it_reads(file: Path) -> None:
    nodes = json.loads(file.read_text("utf-8"))
    columns = workflow_pictures.columns(nodes)
    assert columns.keys() == nodes.keys() and min(columns.values()) == 0
    for name, node in nodes.items():
        assert all(columns[value[0]] < columns[name] for value in node["inputs"].values() if isinstance(value, list))
    drawn = workflow_pictures.draw(nodes)
    assert drawn.width > 300 * (1 + max(columns.values())), "a column is three inches at 100 dots an inch"
