"""LoRA files on a base's denoiser."""

from contextlib import ExitStack

from torch import nn

from unbraid.bases.base import Base
from unbraid.bases.families.family import Network
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Factors
from unbraid.files.made_for import made_for, recorded_base
from unbraid.sampling.uses import Loras


def attach(base: Base, loras: Loras) -> Adapters | None:
    """Attach LoRAs to the base's denoiser, by name. None if there are none. UsageError if one does not fit."""
    return attach_to(base.denoiser, base.family.network, loras, base.name)


def attach_to(denoiser: nn.Module, network: Network, loras: Loras, base: str) -> Adapters | None:
    """`attach` for a denoiser without its base. `base`: the name of the base, for error messages."""
    prefix = f"{network.part}."
    for path, modules in loras.values():
        outside = [name for name in modules if not name.startswith(prefix)]
        if outside:
            what = f"{len(outside)} of its modules are not in the {network.title}, such as {outside[0]}"
            fix = f"unbraid applies {network.title} LoRAs; drop the rest with `unbraid edit`."
            raise UsageError(what, path, fix)
    own = {
        role: (path, {name.removeprefix(prefix): lora for name, lora in modules.items()})
        for role, (path, modules) in loras.items()
    }
    linears = {name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    for path, modules in own.values():
        if missing := sorted(modules.keys() - linears):
            lacks = f"{len(missing)} of its {len(modules)} modules are not there"
            what = f"made for {made_for(path)}, and used with {base}: {lacks}"
            fix = f"Give the base that it was made for: --base {recorded_base(path) or 'NAME'}."
            raise UsageError(what, path, fix)
    if not (names := {name for _, modules in own.values() for name in modules}):
        return None
    adapters = Adapters.attach_named(denoiser, sorted(names), network.layers)
    with ExitStack() as undo:
        undo.callback(adapters.detach)
        for role, (path, modules) in own.items():
            made = {
                name: Factors(lora.down.float(), lora.up.float(), lora.alpha / len(lora.down))
                for name, lora in modules.items()
            }
            adapters.add(role, made, where=path)
        undo.pop_all()
    return adapters
