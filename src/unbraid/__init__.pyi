"""The verbs in Python. Made by `python -m tools.options` from the methods' entries; do not edit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Unpack, overload

from unbraid.common.errors import UsageError as UsageError
from unbraid.images.given import Source
from unbraid.methods.b4m import Kind
from unbraid.runs import options as o
from unbraid.runs.batch import batch as batch
from unbraid.runs.cluster import Cluster as Cluster
from unbraid.runs.drawing import generate as generate
from unbraid.runs.grid import grid as grid
from unbraid.runs.job import Job, Progress
from unbraid.runs.push import push as push
from unbraid.runs.run_path import Run as Run
from unbraid.sampling.render import Use as Use

__version__: str

@overload
def split(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["unziplora"] = "unziplora",
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.UnziploraSettings],
) -> Run:
    """One image → `content.safetensors` and `style.safetensors`. Returns the run folder."""

@overload
def split(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["blora"],
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.BloraSettings],
) -> Run: ...
@overload
def split(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["consislora"],
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.ConsisloraSettings],
) -> Run: ...
@overload
def split(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["qr-split"],
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.QrSplitSettings],
) -> Run: ...
@overload
def split_job(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["unziplora"] = "unziplora",
    **options: Unpack[o.UnziploraSettings],
) -> Job: ...
@overload
def split_job(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["blora"],
    **options: Unpack[o.BloraSettings],
) -> Job: ...
@overload
def split_job(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["consislora"],
    **options: Unpack[o.ConsisloraSettings],
) -> Job: ...
@overload
def split_job(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: Literal["qr-split"],
    **options: Unpack[o.QrSplitSettings],
) -> Job: ...
@overload
def learn(
    images: Source | Sequence[Source],
    *,
    prompt: str,
    class_prompt: str = "",
    class_images: str | Path | None = None,
    from_: str | Path | None = None,
    method: Literal["dreambooth"] = "dreambooth",
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.DreamboothSettings],
) -> Run:
    """Images of one thing → `lora.safetensors`. Returns the run folder."""

@overload
def learn(
    images: Source | Sequence[Source],
    *,
    prompt: str,
    class_prompt: str = "",
    class_images: str | Path | None = None,
    from_: str | Path | None = None,
    method: Literal["qr-lora"],
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.QrLoraSettings],
) -> Run: ...
@overload
def learn_job(
    images: Source | Sequence[Source],
    *,
    prompt: str,
    class_prompt: str = "",
    class_images: str | Path | None = None,
    from_: str | Path | None = None,
    method: Literal["dreambooth"] = "dreambooth",
    **options: Unpack[o.DreamboothSettings],
) -> Job: ...
@overload
def learn_job(
    images: Source | Sequence[Source],
    *,
    prompt: str,
    class_prompt: str = "",
    class_images: str | Path | None = None,
    from_: str | Path | None = None,
    method: Literal["qr-lora"],
    **options: Unpack[o.QrLoraSettings],
) -> Job: ...
@overload
def pair(
    before: Source,
    after: Source,
    *,
    subject: str,
    style: str,
    beside: Sequence[str | Path] = (),
    method: Literal["pair"] = "pair",
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.PairSettings],
) -> Run:
    """A picture before and after → `style.safetensors` and `content.safetensors`; of two folders, the style alone. Returns the run folder."""

@overload
def pair(
    before: Source,
    after: Source,
    *,
    subject: str,
    style: str,
    beside: Sequence[str | Path] = (),
    method: Literal["slider"],
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.SliderSettings],
) -> Run: ...
@overload
def pair_job(
    before: Source,
    after: Source,
    *,
    subject: str,
    style: str,
    beside: Sequence[str | Path] = (),
    method: Literal["pair"] = "pair",
    **options: Unpack[o.PairSettings],
) -> Job: ...
@overload
def pair_job(
    before: Source,
    after: Source,
    *,
    subject: str,
    style: str,
    beside: Sequence[str | Path] = (),
    method: Literal["slider"],
    **options: Unpack[o.SliderSettings],
) -> Job: ...
@overload
def zip(
    content: str | Path,
    style: str | Path,
    *,
    also: Sequence[str | Path] = (),
    images: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str] | None = None,
    method: Literal["ziplora"] = "ziplora",
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.ZiploraSettings],
) -> Run:
    """LoRAs → the same LoRAs without interference, one file each, or `merged.safetensors` with `single=True`. Returns the run folder."""

@overload
def zip(
    content: str | Path,
    style: str | Path,
    *,
    also: Sequence[str | Path] = (),
    images: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str] | None = None,
    method: Literal["np-lora"],
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.NpLoraSettings],
) -> Run: ...
@overload
def zip_job(
    content: str | Path,
    style: str | Path,
    *,
    also: Sequence[str | Path] = (),
    images: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str] | None = None,
    method: Literal["ziplora"] = "ziplora",
    **options: Unpack[o.ZiploraSettings],
) -> Job: ...
@overload
def zip_job(
    content: str | Path,
    style: str | Path,
    *,
    also: Sequence[str | Path] = (),
    images: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str] | None = None,
    method: Literal["np-lora"],
    **options: Unpack[o.NpLoraSettings],
) -> Job: ...
def break_module(
    images: Source | Sequence[Source],
    *,
    kind: Kind,
    prompt: str,
    partners: str | Path | None = None,
    method: Literal["break"] = "break",
    progress: Callable[[Progress], None] | None = None,
    **options: Unpack[o.BreakSettings],
) -> Run:
    """Images of one content or style → `module.safetensors`. Returns the run folder."""

def break_job(
    images: Source | Sequence[Source],
    *,
    kind: Kind,
    prompt: str,
    partners: str | Path | None = None,
    method: Literal["break"] = "break",
    **options: Unpack[o.BreakSettings],
) -> Job: ...
def make(
    content: str | Path,
    style: str | Path,
    *,
    fine_tune: int | None = None,
    images: Mapping[str, str | Path] | None = None,
    prompt: str = "",
    method: Literal["make"] = "make",
    **options: Unpack[o.MakeSettings],
) -> Path:
    """A content and a style module → one LoRA; returns `merged.safetensors` in the folder `out`."""

def make_job(
    content: str | Path,
    style: str | Path,
    *,
    fine_tune: int | None = None,
    images: Mapping[str, str | Path] | None = None,
    prompt: str = "",
    method: Literal["make"] = "make",
    **options: Unpack[o.MakeSettings],
) -> Job: ...
