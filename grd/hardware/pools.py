"""The pools that GPUs are leased from; what is in them say ``training_gpus`` and ``inference_gpus``."""

from __future__ import annotations

from typing import Final

TRAINING: Final = "training"
INFERENCE: Final = "inference"
POOLS: Final = (TRAINING, INFERENCE)
