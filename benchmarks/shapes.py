"""The shapes that benchmarks run, by name, and what one pass over them costs."""

from dataclasses import dataclass

from codir_fast.errors import UsageError

OPERATORS = (
    "bank_contrast",
    "in_batch_contrast",
    "indexed_contrast",
    "masked_pool",
    "masked_pool_backward",
)


@dataclass(frozen=True)
class Shape:
    """Sizes of an operator's inputs, by the letters that all docs use."""

    name: str
    operator: str
    sizes: dict[str, int]
    why: str = ""
    gpu_only: bool = False

    @property
    def flop(self) -> int:
        """Of the products that loss and gradients need: two, in-batch three, of which both ways
        share each; 0 where bytes are what counts.
        """
        s = self.sizes
        if self.operator == "in_batch_contrast":
            return 6 * s["B"] ** 2 * s["D"]
        return 4 * s["B"] * s["K"] * s["D"] if self.operator == "bank_contrast" else 0

    @property
    def num_elements(self) -> int:
        """Of the largest input: positives and bank, or the states of all layers."""
        s = self.sizes
        if self.operator == "in_batch_contrast":
            return 2 * s["B"] * s["D"]
        return (s["B"] + s["K"]) * s["D"] if "D" in s else s["L"] * s["B"] * s["T"] * s["H"]

    def bytes(self, itemsize: int) -> int:
        """That must be read or written, inputs that every peer reads anyway."""
        s = self.sizes
        if self.operator == "bank_contrast":
            return itemsize * s["K"] * s["D"]
        if self.operator == "in_batch_contrast":
            return itemsize * self.num_elements
        if self.operator == "indexed_contrast":
            return itemsize * s["B"] * s["M"] * s["D"]
        every = itemsize * s["L"] * s["B"] * s["T"] * s["H"]
        return every if self.operator == "masked_pool_backward" else round(every * REAL_TOKENS)

    def __str__(self) -> str:
        sizes = ", ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        return f"{self.name} ({sizes})"


REAL_TOKENS = 0.57  # share of tokens that are not padding, in sentences batched at random


def bank(name: str, B: int, K: int, D: int, why: str = "", gpu_only: bool = False) -> Shape:
    return Shape(name, "bank_contrast", {"B": B, "K": K, "D": D}, why, gpu_only)


_POOL = {"L": 6, "B": 32, "T": 64, "H": 384}
_BERT_POOL = {"L": 12, "B": 32, "T": 128, "H": 768}
SHAPES = (
    bank("launch", 32, 4096, 128, "overhead shows"),
    bank("codir", 32, 65536, 128, "CoDIR's fine-tuning stage"),
    bank("moco", 256, 65536, 128, "MoCo's queue"),
    bank("wide", 1024, 65536, 128, "a large batch"),
    bank("deep", 256, 32768, 768, "BERT's width"),
    bank("huge", 64, 1048576, 128, "a bank of a million rows"),
    bank("clip", 4096, 1048576, 128, "a large batch and a large bank", gpu_only=True),
    bank("narrow", 4096, 65536, 64, "more exponentials than products", gpu_only=True),
    bank("broad", 4096, 65536, 256, "a wide embedding", gpu_only=True),
    Shape("pairs", "in_batch_contrast", {"B": 64, "D": 384}, "a batch of pairs of sentences"),
    Shape("batch", "in_batch_contrast", {"B": 1024, "D": 512}, "images and their texts, as CLIP"),
    Shape(
        "crd",
        "indexed_contrast",
        {"B": 32, "M": 16384, "K": 131072, "D": 128},
        "CRD's sampled negatives",
    ),
    Shape("pool", "masked_pool", _POOL, "all layers of a 6-layer MiniLM"),
    Shape("pool-backward", "masked_pool_backward", _POOL, "their gradient"),
    Shape("bert-pool", "masked_pool", _BERT_POOL, "all layers of BERT", True),
    Shape(
        "bert-pool-backward", "masked_pool_backward", _BERT_POOL, "their gradient", gpu_only=True
    ),
)
# Curves over one size.
SWEEPS = {
    "K": [bank("K", 256, 1 << n, 128) for n in range(10, 23, 2)],
    "B": [bank("B", B, 65536, 128) for B in (1, 2, 4, 6, 8, 12, 16, 24, 32, 33, 40, 48, 56, 64)],
}


def find_shape(text: str) -> Shape:
    """A shape by its name, or bank_contrast's by its sizes: B,K,D."""
    for shape in SHAPES:
        if shape.name == text:
            return shape
    parts = text.split(",")
    if len(parts) == 3 and all(part.strip().isdigit() and int(part) > 0 for part in parts):
        B, K, D = (int(part) for part in parts)
        return bank(f"{B}x{K}x{D}", B, K, D)
    names = ", ".join(shape.name for shape in SHAPES)
    raise UsageError(f"`shape` must be one of {names}, or B,K,D, got {text!r}")
