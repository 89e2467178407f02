"""The settings of every method, as types. Made by `python -m tools.options` from the methods' entries; do not edit."""

from typing import Literal

from unbraid.runs.run_options import RunOptions


class UnziploraSettings(RunOptions, total=False):
    """UnZipLoRA (arXiv 2412.04465): split(…, method="unziplora")."""

    rank: int
    """Of each adapter. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 600; on icons 300."""
    content_lr: float
    """AdamW's learning rate for the content adapter. Default 5e-05; on icons 0.001."""
    style_lr: float
    """AdamW's learning rate for the style adapter. Default 5e-05; on icons 0.004."""
    merger_lr: float
    """AdamW's learning rate for the gates. Default 0.005."""
    weight_decay: float
    """AdamW's, for the adapters (with `official`, for the gates too). Default 0.0001."""
    sample_times: int
    """Periods of column separation. Default 3."""
    column_ratio: float
    """Share of the channels that each adapter is granted per period. Default 0.1; on icons 0.3."""
    overlap: float
    """Weight λ of the penalty on channels that both adapters use. Default 0.5."""
    window: int
    """Steps per period in which channels are scored; by default at most the whole period. Default 16."""
    column_separation: bool
    """Whether each adapter gets its own output channels. Default True."""
    block_separation: bool
    """Whether an adapter uses all channels in the blocks that control its role. Default True."""
    content_alone: float
    """Weight of an additional loss with this adapter alone, under its own prompt; 0 as published. Default 0.0; on icons 0.1."""
    style_alone: float
    """Weight of an additional loss with this adapter alone, under its own prompt; 0 as published. Default 0.0."""
    segments: bool
    """On Flux.1 and SD3.5, each step has one pass in which the text is [joint | content | style], three segments that cannot read each other, and each adapter acts on its own segment and on the picture; content_alone and style_alone are then 0 by default. Default False."""
    loss_scale: float
    """With `official`, what gradients are multiplied by before the threshold that channels are scored with; 65536 is that of fp16 training, 1 that of bf16. Default 65536.0."""
    compat: Literal["none", "official"]
    """`official` reproduces the published code, defects included. Default 'none'."""
    style_steps: int
    """Further steps at the end, in which the style is learnt again beside the finished content adapter, which acts but does not train, so that the style is what the content has not. Not with `official`. Default 0."""
    prior_weight: float
    """Weight of a further loss on pictures that the base draws of `a {subject}`, under that prompt, with one adapter alone (the two take turns): prior preservation as in DreamBooth, against what an adapter does without its words. It costs a pass per step. Default 0.0."""
    leak_weight: float
    """Weight of a further loss: under the prompt of the content, the style adapter alone must predict what the base predicts, so that it holds nothing of the subject. It costs a pass per step, and one of the base without gradients. Default 0.0."""
    content_part: str
    """The part of the way from noise (0) to picture (1) whose timesteps this adapter learns from, such as 0-0.7 or 0.3-1. If the two differ, each adapter has a pass of its own in every step, in which the other one acts but does not train, so that a step costs twice as much. Default '0-1'."""
    style_part: str
    """The part of the way from noise (0) to picture (1) whose timesteps this adapter learns from, such as 0-0.7 or 0.3-1. If the two differ, each adapter has a pass of its own in every step, in which the other one acts but does not train, so that a step costs twice as much. Default '0-1'."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class ZiploraSettings(RunOptions, total=False):
    """ZipRank, or ZipLoRA with granularity=column (arXiv 2504.13206, 2311.13600): zip(…, method="ziplora")."""

    granularity: Literal["rank", "column", "row", "layer"]
    """One coefficient per rank (ZipRank; per column in layers where the ranks differ and cannot be compared), input column (ZipLoRA), output row, or layer. Default 'rank'."""
    similarity: Literal["cos", "dot", "product"]
    """The penalty on two LoRAs' coefficients in a layer: |cos|, |dot product|, or mean |product|. Default 'cos'."""
    weight: float
    """Factor λ of the sum of similarities over layers. Default 0.01."""
    layer_prior: float
    """Weight of DuoLoRA's penalty on layers of low resolution in which the style has larger coefficients than the content; 0.1 in its paper. Default 0.0."""
    lr: float
    """AdamW's learning rate for the coefficients. Default 0.01; on icons 0.003."""
    weight_decay: float
    """AdamW's. Default 0.0."""
    steps: int
    """Optimiser steps at most. Default 100."""
    tolerance: float
    """Stop when the mean similarity over layers is below it. Default 0.0."""
    clamp: bool
    """Keep coefficients in 0..1. Default False."""
    shared_noise: bool
    """Use one noise and one timestep for all LoRAs of a step, as published. Default True."""
    single: bool
    """Write one file, with the sum of the ranks, in place of one per LoRA. Default False."""
    compat: Literal["none", "official"]
    """`official` is the public re-implementation (product, 5e-5, decay). Default 'none'."""


class NpLoraSettings(RunOptions, total=False):
    """NP-LoRA (arXiv 2511.11051): zip(…, method="np-lora")."""

    mu: float
    """How much is removed: 0 is nothing, a large number everything. Default 0.5."""
    single: bool
    """Write one file, with the sum of the ranks, in place of one per LoRA. Default False."""


class PairSettings(RunOptions, total=False):
    """Pair Customization (arXiv 2405.01536): pair(…, method="pair")."""

    rank: int
    """Of each adapter. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 750; on icons 300."""
    style_from: int
    """The step at which training of the style adapter begins; by default after half of the steps or earlier. Default 250; on icons 150."""
    lr: float
    """AdamW's learning rate. Default 1e-05; on icons 0.003."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    slot: int
    """Which orthonormal rows this style uses; styles in different slots do not interfere. Default 0."""
    orthogonal: bool
    """Whether the adapters have orthogonal rows; if not, both factors train and nothing separates the adapters. Default True."""
    joint: bool
    """Whether there is a content adapter; if not, the style adapter learns the picture after alone. Default True."""
    compat: Literal["none", "official"]
    """`official` updates the content adapter before it computes the loss of the style, as published, not both at once. Default 'none'."""
    prior_weight: float
    """Weight of a further loss on pictures that the base draws of `a {subject}`, under that prompt, with one adapter alone (the style): prior preservation as in DreamBooth, against what an adapter does without its words. It costs a pass per step. Default 0.0."""
    content_part: str
    """The part of the way from noise (0) to picture (1) whose timesteps this adapter learns from, such as 0-0.7 or 0.3-1. If the two differ, each adapter has a pass of its own in every step, in which the other one acts but does not train, so that a step costs twice as much. Default '0-1'."""
    style_part: str
    """The part of the way from noise (0) to picture (1) whose timesteps this adapter learns from, such as 0-0.7 or 0.3-1. If the two differ, each adapter has a pass of its own in every step, in which the other one acts but does not train, so that a step costs twice as much. Default '0-1'."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class SliderSettings(RunOptions, total=False):
    """Concept Slider (arXiv 2311.12092): pair(…, method="slider")."""

    rank: int
    """Of the adapter. Default 4; on icons 16."""
    steps: int
    """Optimiser steps. Default 1000; on icons 300."""
    lr: float
    """AdamW's learning rate. Default 0.0002; on icons 0.001."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class BloraSettings(RunOptions, total=False):
    """B-LoRA (arXiv 2403.14572): split(…, method="blora")."""

    rank: int
    """Of each LoRA. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 1000; on icons 300."""
    lr: float
    """AdamW's learning rate. Default 5e-05; on icons 0.002."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class ConsisloraSettings(RunOptions, total=False):
    """ConsisLoRA (arXiv 2503.10614): split(…, method="consislora")."""

    rank: int
    """Of each LoRA. Default 64; on icons 16."""
    steps: int
    """Optimiser steps of the content adapter. Default 1500; on icons 300."""
    x0_from: int
    """The step from which on the loss is that of the clean picture; before it, the loss is that of the prediction; by default after a third of the steps or earlier. Default 500; on icons 100."""
    style_steps: int
    """Further steps, which train the style adapter beside the finished content adapter; by default at most two thirds of `steps`. Default 1000; on icons 200."""
    lr: float
    """AdamW's learning rate before `x0_from`. Default 0.0002; on icons 0.002."""
    x0_lr: float
    """AdamW's learning rate after it. Default 0.0001; on icons 0.001."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    noise_offset: float
    """While the style trains, this times one normal number per channel is added to the noise at all positions, so that the mean colour has to be learnt, too; 0 for none. Default 0.03."""


class BreakSettings(RunOptions, total=False):
    """Break-for-Make: a module (doi 10.1145/3728461): break_module(…, method="break")."""

    rank: int
    """Of the module; must be even. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 1500; on icons 300."""
    lr: float
    """AdamW's learning rate for the module's own factor. Default 0.0001; on icons 0.005."""
    partner_lr: float
    """AdamW's learning rate for the partners' factor. Default 1e-05; on icons 0.0005."""
    partner_count: int
    """Partner pictures per step; 0 for none. Default 3; on icons 1."""
    split: float
    """The share of rows and columns that is frozen. Default 0.5."""
    halves: Literal["heads", "first"]
    """`heads` freezes some rows of every attention head, `first` the first rows, as published. Default 'heads'."""
    interaction: bool
    """Whether modules get a common block, in which fine-tuning can fuse them. Default False."""
    orthogonal: bool
    """Whether the frozen halves are orthonormal; if not, they are correlated, as in the published code. Default True."""
    compat: Literal["none", "official"]
    """`official` lets every loss train both factors, in turn, with the published clipping and weight decay. Default 'none'."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class MakeSettings(RunOptions, total=False):
    """Break-for-Make: fine-tuning (doi 10.1145/3728461): make(…, method="make")."""

    metric: Literal["riemannian", "euclidean"]
    """`riemannian` measures steps by the change of ΔW, `euclidean` by that of each factor, as AdamW does. Default 'riemannian'."""
    lr: float
    """Learning rate; with `euclidean` for entries of a factor, with `riemannian` for entries of ΔW. Default 0.0001; on icons 0.001."""
    delta: float
    """Damping, relative to the size of the factors. Default 0.01."""
    every: int
    """Steps between checks of the validation loss (both pictures under the joint prompt). Default 25."""
    patience: int
    """Training stops after this many checks without a lower loss. Default 4."""
    compat: Literal["none", "official"]
    """`official` initialises the content factor and the frozen halves of queries, and of square keys and values, again before training, as the published code does. Default 'none'."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class DreamboothSettings(RunOptions, total=False):
    """DreamBooth-LoRA (arXiv 2208.12242): learn(…, method="dreambooth")."""

    rank: int
    """Of the adapter, unless training goes on from a LoRA. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 1000; on icons 300."""
    lr: float
    """AdamW's learning rate. Default 5e-05; on icons 0.001."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    targets: Literal["attention", "transformers"]
    """Which layers train: attention's projections, or all linear layers of the transformers. Default 'attention'."""
    prior_weight: float
    """Weight of the loss on pictures of the class (prior preservation). Default 0.0."""
    mask: Literal["none", "alpha"]
    """With `alpha`, the transparent parts of a picture do not count in its loss. Default 'none'."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class QrLoraSettings(RunOptions, total=False):
    """QR-LoRA (arXiv 2507.04599): learn(…, method="qr-lora")."""

    rank: int
    """Of the adapter, and of the basis. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 1000; on icons 300."""
    lr: float
    """AdamW's learning rate. Default 0.0001; on icons 0.002."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    targets: Literal["attention", "transformers"]
    """Which layers train: attention's projections, or all linear layers of the transformers. Default 'attention'."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class QrSplitSettings(RunOptions, total=False):
    """QR-LoRA, split (arXiv 2507.04599): split(…, method="qr-split")."""

    rank: int
    """Of each adapter, and of the basis. Default 64; on icons 16."""
    steps: int
    """Optimiser steps. Default 1000; on icons 300."""
    lr: float
    """AdamW's learning rate. Default 0.0001; on icons 0.002."""
    weight_decay: float
    """AdamW's. Default 0.0001."""
    overlap: float
    """Weight of the penalty on what both adapters change alike: the mean over layers of cos² between ΔW of content and style, which the shared basis makes cheap and exact. Default 0.5."""
    content_alone: float
    """Weight of an additional loss with this adapter alone, under its own prompt. Default 0.0; on icons 0.5."""
    style_alone: float
    """Weight of an additional loss with this adapter alone, under its own prompt. Default 0.0."""
    loss: Literal["prediction", "x0"]
    """What is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`). Default 'prediction'."""
    x0_from: int
    """With `x0`, the step from which on that loss is used; before it, the loss is that of the prediction. Default 0."""


class SplitOptions(UnziploraSettings, BloraSettings, ConsisloraSettings, QrSplitSettings, total=False):
    """Settings of any method of `split`; which of them a method has is checked when it is called."""


class LearnOptions(DreamboothSettings, QrLoraSettings, total=False):
    """Settings of any method of `learn`; which of them a method has is checked when it is called."""


class PairOptions(PairSettings, SliderSettings, total=False):
    """Settings of any method of `pair`; which of them a method has is checked when it is called."""


class ZipOptions(ZiploraSettings, NpLoraSettings, total=False):
    """Settings of any method of `zip`; which of them a method has is checked when it is called."""


class BreakOptions(BreakSettings, total=False):
    """Settings of any method of `break_module`; which of them a method has is checked when it is called."""


class MakeOptions(MakeSettings, total=False):
    """Settings of any method of `make`; which of them a method has is checked when it is called."""
