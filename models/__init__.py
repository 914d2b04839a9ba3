"""The tokenizer, the transformer, and how to sample from them."""

from models.flexvar import FlexVAR, FlexVARConfig
from models.sampling import Guidance, generate, sample_tokens
from models.scales import DEFAULT_SCHEDULE, ScaleSchedule, draw_schedule, shift_up
from models.vqvae import VQVAE, VQVAEConfig

__all__ = [
    "DEFAULT_SCHEDULE",
    "VQVAE",
    "FlexVAR",
    "FlexVARConfig",
    "Guidance",
    "ScaleSchedule",
    "VQVAEConfig",
    "draw_schedule",
    "generate",
    "sample_tokens",
    "shift_up",
]
