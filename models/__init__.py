"""The tokenizer, the transformer, and how to sample from them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` below gives, for editors and type checkers
    from models.editing import inpaint
    from models.flexvar import FlexVAR, FlexVARConfig
    from models.head import sample_tokens
    from models.pipeline import SARPipeline, open_pipeline
    from models.released import build_vae_var
    from models.residual_vqvae import ResidualVQVAE, ResidualVQVAEConfig
    from models.sampling import Guidance, SamplingConfig, generate
    from models.scales import DEFAULT_SCHEDULE, ScaleSchedule, draw_schedule, shift_up
    from models.var import VAR, VARConfig
    from models.vqvae import VQVAE, VQVAEConfig

NAMES = {
    "editing": ("inpaint",),
    "flexvar": ("FlexVAR", "FlexVARConfig"),
    "head": ("sample_tokens",),
    "pipeline": ("SARPipeline", "open_pipeline"),
    "released": ("build_vae_var",),
    "sampling": ("Guidance", "SamplingConfig", "generate"),
    "scales": ("DEFAULT_SCHEDULE", "ScaleSchedule", "draw_schedule", "shift_up"),
    "residual_vqvae": ("ResidualVQVAE", "ResidualVQVAEConfig"),
    "var": ("VAR", "VARConfig"),
    "vqvae": ("VQVAE", "VQVAEConfig"),
}
MODULE_OF = {name: module for module, names in NAMES.items() for name in names}
__all__ = sorted(MODULE_OF)


def __getattr__(name: str) -> object:
    """Import a name when it is first asked for: `models.scales` needs neither the Hub nor torchvision."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
