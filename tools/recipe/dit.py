"""`icons-dit`: a transformer with joint attention (SD3's, in miniature) on the base's latents, so that choices about such bases
can be measured on a CPU. The base's autoencoder, text encoders and tokenizer are taken as they are."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection

from tools.recipe import config, latents, parallel, unet
from tools.recipe.config import Schedule
from unbraid.bases.pipeline import quiet

FILE = "dit.safetensors"


class Batch(NamedTuple):
    latents: Tensor  # [b, c, h, w]
    noise: Tensor  # as latents
    sigma: Tensor  # [b], between 0 and 1
    texts: Tensor  # [b, TOKENS, 2 · text]
    pooled: Tensor  # [b, 3 · text]


@dataclass(frozen=True)
class Tables:
    """What batches are drawn from. `tokens` of the pictures' tables are here one number per caption: a row of the other two."""

    pictures: latents.Tables
    texts: Tensor  # [captions, TOKENS, 2 · text], half precision
    pooled: Tensor  # [captions, 3 · text], half precision

    def to(self, device: torch.device) -> "Tables":
        return Tables(self.pictures.to(device), self.texts.to(device), self.pooled.to(device))

    def share_memory(self) -> "Tables":
        return Tables(self.pictures.share_memory(), self.texts.share_memory_(), self.pooled.share_memory_())


def build(sizes: config.DitSizes) -> SD3Transformer2DModel:
    side = config.SIZES.pixels // 2 ** (len(config.SIZES.vae) - 1)
    return SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=config.SIZES.latent,
        out_channels=config.SIZES.latent,
        num_layers=sizes.layers,
        attention_head_dim=sizes.head,
        num_attention_heads=sizes.width // sizes.head,
        caption_projection_dim=sizes.width,
        joint_attention_dim=2 * config.SIZES.text,
        pooled_projection_dim=3 * config.SIZES.text,
        pos_embed_max_size=side,  # twice what the pictures need, for larger ones
        qk_norm="rms_norm",
    )


def encoders(base: Path) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The base's two text encoders. SD3 wants a projection of the first one, too; it is the identity."""
    with quiet():  # that the first one has no projection is expected
        second = CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2", dtype=torch.float32)
        width = second.config.hidden_size
        first = CLIPTextModelWithProjection.from_pretrained(
            base / "text_encoder", projection_dim=width, dtype=torch.float32
        )
    torch.nn.init.eye_(first.text_projection.weight)
    return first.eval(), second.eval()


@torch.no_grad()
def encode(tokens: Tensor, base: Path) -> tuple[Tensor, Tensor]:
    """The texts as SD3's pipeline encodes them, `[n, TOKENS, 2 · text]`, and the pooled vectors `[n, 3 · text]`, in half precision."""
    texts, pooled = [], []
    models = encoders(base)
    for part in tokens.long().split(256):
        done = [model(part, output_hidden_states=True) for model in models]
        texts.append(torch.cat([one.hidden_states[-2] for one in done], -1).half())
        pooled.append(torch.cat([one.text_embeds for one in done], -1).half())
    return torch.cat(texts), torch.cat(pooled)


def tables(work: Path, names: tuple[str, ...], base: Path, subjects: tuple[str, ...]) -> Tables:
    """The tables that `make` left in `work`, cut to some subjects. `names`: all subjects that the UNet was trained on."""
    chosen = torch.tensor([names.index(name) for name in subjects])
    every = load_file(work / latents.TOKENS_FILE)["tokens"][chosen]
    captions, index = every.flatten(0, 2).unique(dim=0, return_inverse=True)
    shares = torch.arange(1, len(chosen) + 1) / len(chosen)
    clean = load_file(work / latents.FILE)["latents"][chosen]
    return Tables(latents.Tables(clean, index.view(every.shape[:3]), shares), *encode(captions, base))


def draw(source: Tables, count: int, rng: torch.Generator) -> Batch:
    """A random batch: pictures and captions as for the UNet, times logit-normal (arXiv 2403.03206)."""
    drawn = unet.draw(source.pictures, count, rng)
    sigma = torch.randn(count, generator=rng, device=rng.device).sigmoid()
    return Batch(drawn.latents, drawn.noise, sigma, source.texts[drawn.tokens], source.pooled[drawn.tokens])


def flow_loss(model: SD3Transformer2DModel, batch: Batch) -> Tensor:
    """Mean squared error of the velocity ε - x (arXiv 2210.02747), unweighted."""
    sigma = batch.sigma[:, None, None, None]
    noisy = (1 - sigma) * batch.latents + sigma * batch.noise
    # For a few positions, the fused attention's gradient is slow on a CPU.
    plain = sdpa_kernel(SDPBackend.MATH) if noisy.device.type == "cpu" else nullcontext()
    with plain:
        out = model(
            noisy.to(model.dtype),
            batch.texts.to(model.dtype),
            batch.pooled.to(model.dtype),
            batch.sigma * 1000,
            return_dict=False,
        )[0]
    return F.mse_loss(out.float(), batch.noise - batch.latents)


def train(
    source: Tables, sizes: config.DitSizes, schedule: Schedule, out: Path, workers: int, device: torch.device
) -> None:
    """Train on from the state in the folder `out`, or from random weights."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    state = parallel.start_state(build(sizes), out / FILE, workers, device, parallel.half(device))
    parallel.spawn(_worker, state, source.share_memory() if device.type == "cpu" else source, sizes, schedule, out)


def _worker(
    rank: int,
    barrier: Any,
    state: parallel.State,
    source: Tables,
    sizes: config.DitSizes,
    schedule: Schedule,
    out: Path,
) -> None:
    device = state["weights"].device
    model: Any = build(sizes)
    model, source = model.to(device), source.to(device)

    def batch(seed: int) -> Batch:
        return draw(source, schedule.batch, torch.Generator(device).manual_seed(seed))

    def loss(*drawn: Tensor) -> Tensor:
        return flow_loss(model, Batch(*drawn))

    parallel.train(rank, barrier, state, model, parallel.Training(batch, loss, schedule, out / FILE))
