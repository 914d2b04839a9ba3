"""The table of generators: all that the other files know of each is its name here and what its config answers.

A generator is one file: its config (`FlexVARConfig`, or a subclass) with its flags and their rules, the recognition of
its weight files, and `build()`, which makes the model. The model answers

- `inputs(tokens, pathway, schedule)`: tokens of all scales → the inputs of a parallel pass;
- `forward(labels, inputs, schedule, targets, first, sampler, …)`: a parallel pass, and its loss and samples;
- `init_cache`, `decode_scale`: the same scale by scale, with a cache; `trim(schedule)`: the scales that it knows;
- `unmasks_first_scale`, `unmask_first_scale`: where sampling the first side takes several steps;
- `no_decay`: names of the parameters that weight decay leaves alone.

Its tokenizer answers `tokenize` (images → codes of every side), `pathway` (what tokens feed the next scale: `inputs`,
`canvas`; `models/scales.py`) and `decode_at` (codes → the picture of a side); its head, `predict` (`models/head.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from models.flexvar import FlexVARConfig
from models.hybrid import HybridConfig

GENERATORS: dict[str, type[FlexVARConfig]] = {"flexvar": FlexVARConfig, "hybrid": HybridConfig}


def config_of(sizes: Mapping[str, Any]) -> FlexVARConfig:
    """The config whose `asdict` these sizes are, or the most specific one that they are arguments of."""
    for kind in GENERATORS.values():
        if set(sizes) <= {f.name for f in fields(kind)}:
            return kind(**sizes)
    raise ValueError(f"no model has such sizes: {', '.join(sizes)}")


def recognise(weights: Mapping[str, Tensor], source: str | Path) -> FlexVARConfig:
    """The config of the model that a state dict is of. Raises ValueError when it is of none."""
    kinds = [kind for kind in reversed(GENERATORS.values()) if kind.recognises(weights)]
    try:
        kind = kinds[0] if kinds else FlexVARConfig
        return kind(**kind.sizes_of(weights))
    except KeyError as error:
        raise ValueError(f"{source} is not a FlexVAR transformer: it has no {error.args[0]}") from None
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{source} is not a FlexVAR transformer: {error}") from None
