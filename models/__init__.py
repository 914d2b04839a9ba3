"""The tokenizer, the transformer, and how to sample from them."""

from models.editing import inpaint
from models.flexvar import FlexVAR, FlexVARConfig
from models.head import sample_tokens
from models.pipeline import SARPipeline, open_pipeline
from models.released import build_vae_var
from models.sampling import Draw, Guidance, generate
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule, draw_schedule, shift_up
from models.vqvae import VQVAE, VQVAEConfig

__all__ = [
    "DEFAULT_SCHEDULE",
    "VQVAE",
    "Draw",
    "FlexVAR",
    "FlexVARConfig",
    "Guidance",
    "SARPipeline",
    "ScaleSchedule",
    "VQVAEConfig",
    "build_vae_var",
    "draw_schedule",
    "generate",
    "inpaint",
    "open_pipeline",
    "sample_tokens",
    "shift_up",
]
