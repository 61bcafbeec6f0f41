"""Training of image classifiers on timm's parts: options, data, loop, checkpoints and a report."""
from .config import ConfigError, TrainConfig, parse_config
from .digits import Digits
from .engine import evaluate, predictions, train, train_one_epoch
from .report import write_report
from .run import Run, prepare
from .tasks import (
    TASKS,
    AttentionDistillation,
    Classification,
    RecordedTask,
    ReductionBudget,
    ReductionConsistency,
    ReductionDistillation,
)

__all__ = ["TASKS", "AttentionDistillation", "Classification", "ConfigError", "Digits", "RecordedTask",
           "ReductionBudget", "ReductionConsistency", "ReductionDistillation", "Run", "TrainConfig", "evaluate",
           "parse_config", "predictions", "prepare", "train", "train_one_epoch", "write_report"]
