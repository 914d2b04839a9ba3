"""The tables of generators and tokenizers: all that the other files know of each is its name here.

A generator is one file: its config (`FlexVARConfig`, or a subclass) with its flags and their rules, the recognition of
its weight files, and `build()`, which makes the model. The model answers

- `inputs(tokens, pathway, schedule, …)`: tokens of all scales → the inputs of a parallel pass;
- `forward(labels, inputs, schedule, targets, first, sampler, …)`: a parallel pass, and its loss and samples;
- `init_cache`, `decode_scale`: the same scale by scale, with a cache; `trim(schedule)`: the scales that it knows;
- `draw_noise`, `guidance_weights`, `guided`, `draw_scale`: sampling; `reads`: the settings of it that it reads;
- `no_decay`: names of the parameters that weight decay leaves alone.

A tokenizer is a config (`VQVAEConfig`, or a subclass) and a `Tokenizer` (`models/tokenizer.py`): `tokenize` (images →
codes of every side), `decode_at` (codes → the picture of a side), and its `pathway`, which says what tokens feed: the
next scale alone (`models/scales.py`), or a sum of all coarser ones (`models/residual_pathway.py`). A model's head
answers `predict` (`models/head.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from models.flexvar import FlexVARConfig
from models.flowar import FlowARConfig
from models.hybrid import HybridConfig
from models.kl_vae import KLConfig
from models.residual_vqvae import ResidualVQVAEConfig
from models.var import VARConfig
from models.vqvae import VQVAEConfig

Config = TypeVar("Config")

GENERATORS: dict[str, type[FlexVARConfig]] = {
    "flexvar": FlexVARConfig,
    "hybrid": HybridConfig,
    "var": VARConfig,
    "flowar": FlowARConfig,
}


TOKENIZERS: dict[str, type[VQVAEConfig]] = {"flexvar": VQVAEConfig, "residual": ResidualVQVAEConfig, "none": KLConfig}


def config_of(sizes: Mapping[str, Any]) -> FlexVARConfig:
    """The config of a model whose `asdict` these sizes are, or the most specific one that they are arguments of."""
    return first_with(GENERATORS.values(), sizes, "model")


def tokenizer_of(sizes: Mapping[str, Any]) -> VQVAEConfig:
    """The config of a tokenizer whose `asdict` these sizes are."""
    return first_with(TOKENIZERS.values(), sizes, "tokenizer")


def first_with(kinds: Iterable[type[Config]], sizes: Mapping[str, Any], what: str) -> Config:
    for kind in kinds:
        if set(sizes) <= {f.name for f in fields(kind)}:  # type: ignore[arg-type]
            return kind(**sizes)
    raise ValueError(f"no {what} has such sizes: {', '.join(sizes)}")


def recognise(weights: Mapping[str, Tensor], source: str | Path) -> FlexVARConfig:
    """The config of the model that a state dict is of. Raises ValueError when it is of none."""
    return recognised(GENERATORS.values(), weights, f"{source} is not a transformer known here")


def recognise_tokenizer(weights: Mapping[str, Tensor], source: str | Path) -> VQVAEConfig:
    """The config of the tokenizer that a state dict is of. Raises ValueError when it is of none."""
    return recognised(TOKENIZERS.values(), weights, f"{source} is not a tokenizer")


def recognised(kinds: Iterable[Any], weights: Mapping[str, Tensor], otherwise: str) -> Any:
    """The last of the kinds that recognises the weights, with the sizes that it reads off them."""
    first, *more = kinds
    kind = next((kind for kind in reversed(more) if kind.recognises(weights)), first)
    try:
        return kind(**kind.sizes_of(kind.adapted(weights)))
    except KeyError as error:
        raise ValueError(f"{otherwise}: it has no {error.args[0]}") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{otherwise}: {error}") from None
