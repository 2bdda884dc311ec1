"""What a run is made of; every field is also a flag of `codir-fast distill` or `pretrain`."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from codir_fast.distillation.layer_mapping import parse_layer_mapping
from codir_fast.loss_arguments import OBJECTIVES
from codir_fast.ops.masked_pool import MODES

# What --preset sets, for flags that are not given. The paper's form is that of the defaults; the
# released code (github.com/intersun/CoDIR) reads the first token of every second layer, keeps a
# bank of either side, draws 100 rows and weighs CE and KD alike. nce_all is its form for each layer
# alone, against all rows of other labels, with KD as in the defaults. Fidelity leaves heads and
# features nothing to satisfy the contrast with, so that the student's layers must come near the
# teacher's.
_OFFICIAL = {
    "layer_mapping": "official",
    "pooling": "first",
    "objective": "nce",
    "positive": "bank",
    "negatives": "other_labels",
    "both_sides": True,
    "bank_init": "random",
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "layer_mapping": "uniform",
        "pooling": "mean",
        "objective": "infonce",
        "positive": "current",
        "negatives": "other_labels",
        "num_negatives": 0,
        "both_sides": False,
        "bank_init": "empty",
        "contrast_layers": "joint",
    },
    "official": _OFFICIAL | {"num_negatives": 100, "ce_weight": 0.5, "kd_weight": 0.5},
    "nce_all": _OFFICIAL | {"num_negatives": 0, "contrast_layers": "each"},
    "fidelity": {
        "contrast_layers": "each",
        "negatives": "all",
        "temperature": 0.2,
        "codir_weight": 1.0,
        "standardize_features": True,
        "head_init": "equal",
        "train_heads": False,
    },
}


Config = TypeVar("Config", bound="LayerConfig")


@dataclass
class LayerConfig:
    """What both stages have: KD, CoDIR and PKD, and how CoDIR and PKD see the layers.

    Defaults are those of the paper where it gives one; a weight of 0 switches its term off.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations for Language
        Model Compression, sections 3 and 4.1.
    """

    layer_mapping: str = field(
        default="uniform",
        metadata={
            "help": "Teacher layers that the student's layers learn from: uniform (2,4,..,12 for 6 "
            "of 12), official (1,3,..,11), last (the last of both), or pairs student:teacher as "
            "1:4,2:8,3:12. A student made from the teacher starts as those layers."
        },
    )
    pooling: str = field(
        default="mean",
        metadata={"help": "Pooling of hidden states over the real tokens: mean, max, first, last."},
    )
    projection_dim: int = field(
        default=128, metadata={"help": "Width of the space in which both sides are compared."}
    )
    temperature: float = field(
        default=0.07, metadata={"help": "Temperature of the contrastive term."}
    )
    kd_temperature: float = field(
        default=2.0,
        metadata={
            "help": "Temperature of the teacher's and the student's logits; not in regression."
        },
    )
    kd_weight: float = field(
        default=0.9,
        metadata={"help": "Weight of the teacher's logits, in regression squared error to them."},
    )
    codir_weight: float = field(default=0.1, metadata={"help": "Weight of the contrastive term."})
    pkd_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of PKD: distance of the mapped layers' pooled unit vectors."},
    )
    bank_init: str = field(
        default="empty",
        metadata={"help": "Bank rows before they are written: empty (no negatives), random."},
    )
    objective: str = field(
        default="infonce", metadata={"help": "Of the contrastive term: infonce, nce."}
    )
    num_negatives: int = field(
        default=0,
        metadata={"help": "Draw so many negatives for each example, with replacement; 0: all."},
    )
    both_sides: bool = field(
        default=False,
        metadata={"help": "The teacher's embedding looks for the student's among a bank too."},
    )
    contrast_layers: str = field(
        default="joint",
        metadata={"help": "Layers side by side in one term (joint), or a term for each of them."},
    )
    standardize_features: bool = field(
        default=False,
        metadata={
            "help": "Pooled features minus their mean, over their deviation, per dimension: the "
            "teacher's over the training examples (a student of another width by its own)."
        },
    )
    head_init: str = field(
        default="apart",
        metadata={"help": "Projection heads begin apart, or equal (as the teacher's)."},
    )
    train_heads: bool = field(
        default=True, metadata={"help": "Train the projection heads, or leave them as they begin."}
    )

    FILE_NAME: ClassVar[str]
    WEIGHTS: ClassVar[tuple[str, ...]]
    # Smallest and largest value; beyond, memory or float64's integers end.
    COUNTS: ClassVar[dict[str, tuple[int, int]]] = {
        "num_negatives": (0, 2**20),
        "projection_dim": (1, 2**16),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "bank_init": ("empty", "random"),
        "objective": OBJECTIVES,
        "head_init": ("apart", "equal"),
        "contrast_layers": ("joint", "each"),
    }

    def __post_init__(self) -> None:
        parse_layer_mapping(self.layer_mapping)
        if self.pooling not in MODES:
            raise ValueError(f"`pooling` must be one of {MODES}, got {self.pooling!r}")
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}")
        for name, (lowest, highest) in self.COUNTS.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise ValueError(f"`{name}` must be in [{lowest}, {highest}], got {value}")
        for name in ("temperature", "kd_temperature"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive and finite, got {value}")
        for name in self.WEIGHTS:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be 0 or more and finite, got {value}")
        if not any(getattr(self, name) for name in self.WEIGHTS):
            names = ", ".join(f"`{name}`" for name in self.WEIGHTS)
            raise ValueError(f"{names} are all 0: no loss is left")

    def save(self, directory: str | Path) -> None:
        """Writes FILE_NAME, such as distillation.json."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        Path(directory, self.FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls: type[Config], directory: str | Path) -> Config:
        """Reads what `save` wrote."""
        return cls(**json.loads(Path(directory, cls.FILE_NAME).read_text(encoding="utf-8")))


@dataclass
class DistillationConfig(LayerConfig):
    """Loss = ce_weight CE + kd_weight KD + codir_weight CoDIR + pkd_weight PKD: the fine-tuning
    stage. Weights of 0 make CE, CE + KD, CE + KD + PKD and CE + KD + CoDIR one program.
    """

    ce_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the labels: cross-entropy, in regression squared error."},
    )
    positive: str = field(
        default="current",
        metadata={"help": "Key of an example: current (its embedding), bank (its row of before)."},
    )
    negatives: str = field(
        default="other_labels",
        metadata={"help": "Bank rows that count: other_labels, all (but the example's own row)."},
    )
    label_bins: int = field(
        default=5,
        metadata={
            "help": "In regression: bins of as many training examples each, by label; other_labels "
            "are those of another bin."
        },
    )
    bank_momentum: float = field(
        default=0.5, metadata={"help": "Share of a bank row that an update keeps, 0 to 1."}
    )

    FILE_NAME = "distillation.json"
    WEIGHTS = ("ce_weight", "kd_weight", "codir_weight", "pkd_weight")
    CHOICES = LayerConfig.CHOICES | {
        "positive": ("current", "bank"),
        "negatives": ("other_labels", "all"),
    }
    COUNTS = LayerConfig.COUNTS | {"label_bins": (2, 2**20)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bank_momentum <= 1:
            raise ValueError(f"`bank_momentum` must be in [0, 1], got {self.bank_momentum}")


@dataclass
class PretrainingConfig(LayerConfig):
    """Loss = mlm_weight MLM + kd_weight KD + codir_weight CoDIR + pkd_weight PKD: the pre-training
    stage. MLM and KD are means over the masked positions. With mlm_weight alone it is plain masked
    language modelling and needs no teacher.
    """

    mlm_weight: float = field(
        default=1.0, metadata={"help": "Weight of the masked tokens' cross-entropy."}
    )
    kd_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the teacher's logits at the masked tokens; 0 without a teacher."
        },
    )
    mlm_probability: float = field(
        default=0.15,
        metadata={
            "help": "Share of the tokens that are masked: 80 %% become the mask token, 10 %% "
            "another token, 10 %% stay."
        },
    )
    queue_size: int = field(
        default=65536,
        metadata={"help": "Texts whose teacher embeddings are kept as negatives, the newest."},
    )

    FILE_NAME = "pretraining.json"
    WEIGHTS = ("mlm_weight", "kd_weight", "codir_weight", "pkd_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"`mlm_probability` must be in (0, 1], got {self.mlm_probability}")
        if self.queue_size < 1:
            raise ValueError(f"`queue_size` must be at least 1, got {self.queue_size}")
