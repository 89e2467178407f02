"""diffusers' samplers, under the short names that users know."""

import copy
from dataclasses import replace
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from unbraid.bases.base import Base
from unbraid.bases.families.flow import Flow
from unbraid.common.errors import UsageError, suggestion

SAMPLERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
FLOW_SAMPLERS: dict[str, Any] = {"euler": FlowMatchEulerDiscreteScheduler}  # for bases with flow matching


def with_sampler(base: Base, name: str) -> Base:
    """The same base with another sampler, which keeps the base's noise levels and spacing. UsageError: unknown name, or
    one that cannot draw with this base's kind of noise."""
    if name not in SAMPLERS:
        raise UsageError(f"there is no sampler {name!r}", "--sampler", suggestion(name, SAMPLERS))
    known = FLOW_SAMPLERS if isinstance(base.process, Flow) else SAMPLERS
    if name not in known:
        raise UsageError(f"{name} cannot draw with flow matching", "--sampler", f"There are: {', '.join(known)}.")
    pipe = copy.copy(base.pipe)
    pipe.scheduler = known[name].from_config(base.pipe.scheduler.config)
    return replace(base, pipe=pipe)
