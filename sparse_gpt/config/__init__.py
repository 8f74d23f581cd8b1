"""The run configuration, section by section. Names are the authors' own where they have one.

What DeepSpeed gets is derived from it in `train/engine.py`, never written by the user.
"""

from sparse_gpt.config.model import IFTConfig, ModelConfig
from sparse_gpt.config.run import RunConfig
from sparse_gpt.config.section import Fraction, Positive, Section
from sparse_gpt.config.sparsity import (
    PARAM_FILTER,
    Kernel,
    SparsityConfig,
    StructureConfig,
    UpdateConfig,
)
from sparse_gpt.config.training import (
    CheckpointConfig,
    DataSource,
    DeepSpeedConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TimeoutsConfig,
    UnfreezingConfig,
)

__all__ = [
    "PARAM_FILTER",
    "CheckpointConfig",
    "DataSource",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "Fraction",
    "IFTConfig",
    "Kernel",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Positive",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SparsityConfig",
    "StructureConfig",
    "TimeoutsConfig",
    "UnfreezingConfig",
    "UpdateConfig",
]
