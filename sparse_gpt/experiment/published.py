"""Numbers the papers print, with their source, to stand beside ours.

Sparse-IFT: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency", ICML 2024. Tables 16, 17, 20 and 21 are in the appendix of its ICLR 2024 submission.
"""

from dataclasses import dataclass

ICML = "Sparse-IFT, ICML 2024"
ICLR = "Sparse-IFT, ICLR 2024 submission, appendix C"


@dataclass(frozen=True)
class Size:
    """A row of Tables 14 and 16, `d_head` as printed: 64 in all rows.

    The FLOPs of Table 17 reject that for the sparse ones (d_model / n_head = 91 and 128).
    """

    model: str
    transformation: str
    sparsity: float
    n_layer: int
    d_model: int
    d_ff: int
    n_head: int
    d_head: int


SIZES_SOURCE = f"Table 14 ({ICML}), the same as Table 16 ({ICLR})"
SIZES = (
    Size("GPT-3 Small", "Dense", 0.0, 12, 768, 3072, 12, 64),
    Size("GPT-3 Small", "Sparse Wide", 0.5, 12, 1092, 4344, 12, 64),
    Size("GPT-3 Small", "Sparse Wide", 0.75, 12, 1536, 6144, 12, 64),
)


@dataclass(frozen=True)
class Leaderboard:
    """A row of Table 15: percent, SET."""

    transformation: str
    sparsity: float
    scores: dict[str, float]  # by eval/report.py's column
    average: float


LEADERBOARD_SOURCE = f"Table 15 ({ICML}): GPT-3 Small, the Pile, 2.5 B tokens, one run"
COLUMNS = {
    "arc": "ARC",
    "hellaswag": "HellaSwag",
    "truthfulqa": "TruthfulQA",
    "mmlu": "MMLU",
    "winogrande": "Winogrande",
}
LEADERBOARD = (
    Leaderboard("Dense", 0.0, dict(zip(COLUMNS, (20.8, 27.2, 47.0, 24.6, 49.4))), 33.8),
    Leaderboard("Sparse Wide", 0.5, dict(zip(COLUMNS, (20.6, 27.4, 47.4, 25.6, 49.6))), 34.1),
    Leaderboard("Sparse Wide", 0.75, dict(zip(COLUMNS, (22.1, 27.8, 47.5, 25.6, 50.4))), 34.7),
)


@dataclass(frozen=True)
class EndToEnd:
    """A row of Table 17: WikiText-103 test perplexity, mean and spread of 3 seeds."""

    model: str
    transformation: str
    sparsity: float
    sequences: float
    flops_per_sequence: float
    flops: float
    perplexity: float
    spread: float


END_TO_END_SOURCE = (
    f"Table 17 ({ICLR}): WikiText-103 end to end, test perplexity of 3 seeds; "
    "whether a token's or a word's is not said"
)
END_TO_END = (
    EndToEnd("GPT-3 Small", "Dense", 0.0, 2.28e6, 8.763e11, 2.0011e18, 20.8, 0.3),
    EndToEnd("GPT-3 Small", "Sparse Wide", 0.5, 2.28e6, 1.029e12, 2.3498e18, 20.4, 0.2),
    EndToEnd("GPT-3 Medium", "Dense", 0.0, 2.28e6, 2.4845e12, 5.6734e18, 20.5, 0.2),
)


@dataclass(frozen=True)
class Recipe:
    """Table 20, the same as Table 13 of the ICML paper."""

    model: str
    parameters: str
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    batch: int
    lr: float
    tokens: float


RECIPE_SOURCE = f"Table 20 ({ICLR}), the same as Table 13 ({ICML})"
RECIPE = Recipe("GPT-3 Small", "125M", 12, 768, 12, 64, 256, 6e-4, 2.5e9)


@dataclass(frozen=True)
class Spdf:
    """A number of Table 21: WikiText-103 perplexity after fine-tuning."""

    transformation: str
    sparsity: float
    mode: str
    perplexity: float


SPDF_SOURCE = (
    f"Table 21 ({ICLR}): GPT-3 Small pretrained on the Pile, fine-tuned on WikiText-103; "
    "whether a token's or a word's perplexity is not said"
)
SPDF = (
    Spdf("Dense", 0.0, "dense", 15.9),
    Spdf("Sparse Wide", 0.5, "sparse", 15.6),
    Spdf("Sparse Wide", 0.75, "sparse", 16.0),
    Spdf("Sparse Wide", 0.5, "dense", 15.1),
    Spdf("Sparse Wide", 0.75, "dense", 14.6),
)
GPT3_SMALL = (12, 768, 3072, 12)  # n_layer, d_model, d_ff, n_head
