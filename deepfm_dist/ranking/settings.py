"""The sections `evaluate`, `recommend` and `similar`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deepfm_dist.section import Section
from deepfm_dist.storage import LocalPath

Id = Annotated[str, Field(coerce_numbers_to_str=True)]
"""An id or a value, as files have it."""


BaselineName = Literal["popularity", "item_knn", "ease", "ials"]
"""Rankings that a model can be compared with."""


class IalsConfig(Section):
    """Weighted matrix factorisation."""

    factors: int = Field(128, ge=1)
    """Length of a user's and an item's vector."""
    l2: float = Field(0.1, ge=0)
    """Weight of their squared norms."""
    alpha: float = Field(1.0, gt=0)
    """Weight of a positive; everything else has 1."""
    iterations: int = Field(15, ge=1)
    """Passes over users and items."""


class EvaluateConfig(Section):
    """Evaluation on held-out rows; all but ``split`` is for rankings (``data.task=implicit``)."""

    split: Literal["valid", "test"] = "test"
    """Which rows."""
    k: tuple[int, ...] = (10,)
    """Cut-offs of the ranking metrics."""
    protocol: Literal["weak", "strong"] | None = None
    """weak: users with training rows are judged on other rows of theirs. strong: users without any,
    whom the model knows by a part of their items, on the rest; needs ``data.split.method=users``,
    and adds ``capped_recall``. Default: what the split gives."""
    mask_seen: bool | None = None
    """Whether what users have met in earlier splits, liked or not, is left out of their rankings,
    and out of what counts as relevant. Default: true, but false where
    ``data.interactions.repeated`` is ``all``."""
    baselines: tuple[BaselineName, ...] = ("popularity",)
    """Rankings to compare the model's with, fitted on the same training positives. ials needs the
    library ``implicit``. ease takes 12 bytes of memory per pair of items; without room for all
    items it is fitted on the most popular ones, and its name in the table says on how many."""
    item_knn_neighbours: int = Field(100, ge=1)
    """Items that an item votes for."""
    ease_l2: float = Field(500.0, gt=0)
    """Weight of the squared norm of EASE's matrix."""
    ials: IalsConfig = IalsConfig()
    """Settings of iALS."""
    reference: str | None = None
    """A parquet file (``user, item, score``) under ``data.root`` whose ranking is shown next to the
    model's: the sample's generator writes its true log-odds there."""

    @model_validator(mode="after")
    def _cutoffs_are_positive(self) -> Self:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k needs positive cut-offs (got {list(self.k)})")
        return self


class RecommendConfig(Section):
    """Every user's top-K items."""

    k: int = Field(10, ge=1)
    """Items per user."""
    mask: tuple[Literal["train", "valid", "test"], ...] | None = None
    """What a user has met in these splits, liked or not, is not recommended; ``[]`` allows all.
    Default: all three, but none where ``data.interactions.repeated`` is ``all``."""
    context: dict[str, Id] = Field(default_factory=dict)
    """Values of the context fields to recommend for, as files have them."""
    users: LocalPath | tuple[Id, ...] | None = None
    """Only these: a list of ids, or a file with a column ``user`` (csv, tsv, parquet)."""
    histories: LocalPath | None = None
    """Recommend for the users of this file instead, whom the model knows by these items alone: rows
    of ``user`` and ``item`` (csv, tsv, parquet). For models with a history field."""
    allow_items: LocalPath | tuple[Id, ...] | None = None
    """Only these: a list of ids, or a file with a column ``item``."""
    block_items: LocalPath | tuple[Id, ...] | None = None
    """None of these: a list of ids, or a file with a column ``item``."""
    candidates: int | None = Field(None, ge=1)
    """Score in full only this many items of each user, the best without the over-arch; it is
    measured on a sample of users what that misses and saves. Default: all items."""
    index: str | None = None
    """Kind of faiss index that finds the candidates, as its factory has it: ``IVF1024,Flat``,
    ``HNSW32``; what it misses is measured too. Default: all items are looked at."""
    probes: int = Field(16, ge=1)
    """Lists of an ``IVF`` index that are looked through for a user."""
    memory_bytes: int = Field(1 << 30, ge=1)
    """Limit in bytes of what a rank keeps of the items: of a larger catalogue a share each, and of
    one that exceeds that too a block at a time. An index comes on top."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the over-arch's products on CUDA: ``tf32`` rounds factors to 11
    bits, ``bf16`` to 8; a CPU computes in fp32."""
    matrix: Literal["int8", "fp16", "fp32"] | None = None
    """Also write score_matrix.parquet, all items' scores as a list for each user: logits as fp16 or
    fp32, or probabilities in units of 1/127 as int8; its metadata's ``item_ids`` is their order."""

    @model_validator(mode="after")
    def _users_of_one_kind(self) -> Self:
        if self.histories is not None and self.users is not None:
            raise ValueError("histories names its users itself: leave users out")
        if self.histories is not None and self.mask is not None:
            raise ValueError(
                f"mask={list(self.mask)} is of users who were there in training: leave it out, or "
                f"histories"
            )
        return self

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        if self.candidates is not None and self.candidates < self.k:
            raise ValueError(f"candidates={self.candidates} cannot give k={self.k} items")
        if self.index is not None and self.candidates is None:
            raise ValueError(f"index={self.index} finds candidates: set candidates=500, say")
        if self.index is None and self.probes != type(self).model_fields["probes"].default:
            raise ValueError(f"probes={self.probes} are of an index: set index=IVF1024,Flat, say")
        return self


class SimilarConfig(Section):
    """Every item's most similar items."""

    k: int = Field(10, ge=1)
    """Items per item."""
    metric: Literal["cosine", "inner_product"] = "cosine"
    """Similarity of two items' summed factor vectors."""
