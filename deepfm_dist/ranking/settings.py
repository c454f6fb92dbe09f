"""The sections `evaluate`, `recommend` and `similar`."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from deepfm_dist.data.schema import DataConfig, check_names
from deepfm_dist.section import Section
from deepfm_dist.storage import LocalPath

Id = Annotated[str, Field(coerce_numbers_to_str=True)]
"""An id or a value, as files have it."""
_LARGEST_WEIGHT = 1e6
"""Largest weight of a target: logits times it are far below the largest float32."""


BaselineName = Literal["popularity", "item_knn", "ease", "ials"]
"""Rankings that a model can be compared with."""


class IalsConfig(Section):
    """Weighted matrix factorisation."""

    factors: int = Field(128, ge=1)
    """Length of the user and item vectors."""
    l2: float = Field(0.1, ge=0)
    """L2 regularisation."""
    alpha: float = Field(1.0, gt=0)
    """Weight of a positive; all other pairs have weight 1."""
    iterations: int = Field(15, ge=1)
    """Passes over users and items."""


EASE_L2 = 500.0
"""L2 of EASE where nothing speaks for another one."""


class EvaluateConfig(Section):
    """Evaluation on held-out rows; all but ``split`` is for rankings (``data.task=implicit``)."""

    split: Literal["valid", "test"] = "test"
    """Which held-out rows to evaluate."""
    k: tuple[int, ...] = (10,)
    """Cut-offs of the ranking metrics."""
    protocol: Literal["weak", "strong"] | None = None
    """weak: users with training rows are judged on other rows of theirs. strong: users without any,
    whom the model knows by a part of their items, on the rest; needs ``data.split.method=users``,
    and adds ``capped_recall``. Default: what the split gives."""
    validation_known: bool = True
    """On test rows, whether what users did in validation rows is known by then, as to any deployed
    model: it is in their histories, the baselines are fitted to it too, and a model that was refit
    on it (``trainer.refit_best``) is measured. False, and always with ``data.split.method=users``:
    only training rows are, for comparison with published figures of models that know no more."""
    mask_seen: bool | None = None
    """Whether items seen in earlier splits, liked or not, are left out of the rankings and of the
    relevant items. Default: true, but false if `data.interactions.repeated` is `all`."""
    baselines: tuple[BaselineName, ...] = ("popularity",)
    """Baselines to compare with, fitted on the same training positives. ials needs the library
    `implicit`. ease takes 12 bytes of memory per pair of items; if memory does not suffice, it is
    fitted on the most popular items, and its name in the table gives their number."""
    item_knn_neighbours: int = Field(100, ge=1)
    """Number of neighbours per item."""
    ease_l2: float | None = Field(None, gt=0)
    """L2 regularisation of EASE's matrix. Default: that with which EASE as published ranked
    best on the run's validation rows (``model.linear=ease``), otherwise 500."""
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

    def check_data(self, data: DataConfig) -> None:
        """Refuses settings that do not fit the data.

        Raises:
            ValueError: names the setting and what to change.
        """
        changed = self.model_dump(mode="json", exclude_defaults=True)
        changed.pop("split", None)
        if data.task == "ctr" and changed:
            name, value = next(iter(changed.items()))
            raise ValueError(
                f"evaluate.{name}={value}: rankings are measured where rows are positives, not "
                f"where they have labels (data.task=ctr); leave it out"
            )
        method = data.split.method
        if self.protocol == "strong" and method != "users":
            raise ValueError(
                f"evaluate.protocol=strong judges users who have no training rows, and "
                f"data.split.method={method} holds out rows of all users; set "
                f"data.split.method=users"
            )
        if self.protocol == "weak" and method == "users":
            raise ValueError(
                "evaluate.protocol=weak judges users who have training rows, and "
                "data.split.method=users holds out users entirely; leave evaluate.protocol out, or "
                "set data.split.method=per_user"
            )


class RecommendConfig(Section):
    """Every user's top-K items."""

    k: int = Field(10, ge=1)
    """Items per user."""
    mask: tuple[Literal["train", "valid", "test"], ...] | None = None
    """Splits whose items, liked or not, are not recommended to their users; `[]` allows all.
    Default: all three, but none if `data.interactions.repeated` is `all`."""
    context: dict[str, Id] = Field(default_factory=dict)
    """Values of the context fields to recommend for, as written in the input files."""
    users: LocalPath | tuple[Id, ...] | None = None
    """Recommend only for these users: a list of ids, or a file with a column of them, called as in
    the interactions or ``user`` (csv, tsv, parquet)."""
    histories: LocalPath | None = None
    """Recommend for new users, given their items, attributes or both: a file with the interactions'
    columns, or `user` and `item` (csv, tsv, parquet). Items rated below `min_rating` do not enter
    the history and are not recommended either. Columns of user fields are read as attributes; users
    who have some need no items. Items are for models with a history field."""
    requests: LocalPath | None = None
    """Answer the requests of a file (csv, tsv, parquet), one per row: a user of the training data,
    or ``items`` and attributes that describe one; context fields; and, each optional, ``allow`` and
    ``block`` (lists of items), ``where`` (such as ``genre=Drama and year!=1999``), ``k`` and
    ``request``, an id for the results. ``--requests FILE`` is the same."""
    allow_items: LocalPath | tuple[Id, ...] | None = None
    """Recommend only these items: a list of ids, or a file with a column of items."""
    block_items: LocalPath | tuple[Id, ...] | None = None
    """Never recommend these items: a list of ids, or a file with a column of items."""
    cold_items: Literal["include", "exclude", "only"] | None = None
    """Whether to rank items without training rows, by their attributes, here and in `evaluate`,
    `similar`, `nightly` and `serve`; only: rank no others. Default: include if the model was
    trained with `data.id_dropout`, otherwise exclude."""
    candidates: int | None = Field(None, ge=1)
    """Score only this many items per user in full, the best ones without the over-arch; the recall
    lost and the speed-up are measured on a sample of users. Default: all items."""
    index: str | None = None
    """Faiss index that finds the candidates, as an index factory string: `IVF1024,Flat`, `HNSW32`;
    its misses are measured too. Default: all items are searched."""
    probes: int = Field(16, ge=1)
    """Number of lists of an ``IVF`` index that are searched per user."""
    memory_bytes: int = Field(1 << 30, ge=1)
    """Maximum bytes of the item side that a rank keeps. A larger catalogue is divided over the
    ranks, and one that still does not fit is processed in blocks. An index is not included, nor are
    the items that filters, lists of requests and `candidates` pick, which take as much again."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the over-arch's products on CUDA: ``tf32`` rounds factors to 11
    bits, ``bf16`` to 8; a CPU computes in fp32."""
    targets: dict[str, float] = Field(default_factory=dict)
    """With several targets (``data.interactions.labels``): items are ranked by the sum of the
    targets' logits times these weights: ``{click: 0.3, buy: 1}``. Targets that are not named do not
    count. Default: 1 for each."""
    probability: bool = False
    """Also write the column `probability`: that the pair is a positive of the training rows,
    corrected for the share of negatives that training draws. For `trainer.loss: bce`."""
    popularity_penalty: float = Field(0.0, ge=0)
    """Subtract this times log(training positives + 1) of the item from each score, exactly; 0.1 to
    1 are usual. `evaluate` shows what it changes, as it does for `diversity` and `at_most`."""
    diversity: float = Field(0.0, ge=0, le=1)
    """Weight, from 0 to 1, of being unlike the items already chosen when the first `rerank` items
    are ranked again (MMR); 0.1 to 0.5 are usual. Scores are then not in order."""
    at_most: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Most items with the same value of an item field in a ranking: `{genre: 3}`. Chosen among the
    first `rerank` items, so a user may get fewer than `k`."""
    rerank: int = Field(100, ge=1)
    """Items per user that `diversity` and `at_most` choose from, the best by score."""
    explain: int = Field(0, ge=0, le=100)
    """Also write the column `explanation`: this many values of the user, item and context with the
    largest shares of the score, and the rest of it. Takes some milliseconds per user."""
    matrix: Literal["int8", "fp16", "fp32"] | None = None
    """Also write score_matrix.parquet, all items' scores as a list for each user: logits as fp16 or
    fp32, or probabilities in units of 1/127 as int8; its metadata's ``item_ids`` is their order."""

    def check_targets(self, labels: Sequence[str]) -> None:
        """Refuses settings that exclude or require several targets.

        Raises:
            ValueError: names the setting.
        """
        check_names("recommend.targets", self.targets, labels)
        for option, value in (("probability", self.probability), ("matrix", self.matrix)):
            if (value is True or value == "int8") and not self.ranks_by_one(labels):
                raise ValueError(
                    f"recommend.{option}={str(value).lower()}: a weighted sum of several targets' "
                    f"logits is no log-odds; rank by one of them, such as "
                    f"recommend.targets={{{labels[-1]}: 1}}, or use predict"
                )

    def weights_of(self, targets: Sequence[str]) -> list[float]:
        """``targets`` as the weights of several targets, in order."""
        return [self.targets.get(target, 0.0 if self.targets else 1.0) for target in targets]

    def ranks_by_one(self, targets: Sequence[str]) -> bool:
        """Whether scores are the logits of one target: there is one, or only one counts, once."""
        return not targets or [weight for weight in self.weights_of(targets) if weight] == [1]

    @field_validator("targets")
    @classmethod
    def _something_to_rank_by(cls, targets: dict[str, float]) -> dict[str, float]:
        if not all(abs(weight) <= _LARGEST_WEIGHT for weight in targets.values()):
            raise ValueError(f"weights must be from -1000000 to 1000000 (got {targets})")
        if targets and not any(targets.values()):
            raise ValueError(f"all weights are 0 ({', '.join(targets)}): nothing to rank by")
        return targets

    @model_validator(mode="after")
    def _users_of_one_kind(self) -> Self:
        if self.histories is not None and self.users is not None:
            raise ValueError("histories lists its own users: leave users out")
        if self.histories is not None and self.mask is not None:
            raise ValueError(
                f"mask={list(self.mask)} applies to users of the training data: leave it out, or "
                f"histories"
            )
        return self

    @model_validator(mode="after")
    def _requests_alone(self) -> Self:
        if self.requests is not None:
            for name in ("users", "histories", "candidates", "index", "matrix"):
                if (value := getattr(self, name)) is not None:
                    value = list(value) if isinstance(value, tuple) else value
                    raise ValueError(
                        f"{name}={value}: a file of requests names its own users, and each is "
                        f"ranked in full; leave {name} out, or requests"
                    )
        return self

    @model_validator(mode="after")
    def _enough_to_rerank(self) -> Self:
        is_reranked = bool(self.diversity or self.at_most)
        if is_reranked and self.rerank < self.k:
            raise ValueError(f"rerank={self.rerank} is less than k={self.k}; set rerank={self.k}")
        if is_reranked and self.candidates is not None and self.candidates < self.rerank:
            raise ValueError(
                f"candidates={self.candidates} is less than rerank={self.rerank}; lower rerank, or "
                f"set candidates={self.rerank}"
            )
        if not is_reranked and self.rerank != type(self).model_fields["rerank"].default:
            raise ValueError(f"rerank={self.rerank} needs diversity or at_most: set diversity=0.3")
        if self.popularity_penalty and self.matrix is not None:
            raise ValueError(
                f"matrix={self.matrix}: holds the model's own scores; leave it out, or "
                f"popularity_penalty"
            )
        return self

    @model_validator(mode="after")
    def _enough_candidates(self) -> Self:
        if self.candidates is not None and self.candidates < self.k:
            raise ValueError(f"candidates={self.candidates} cannot give k={self.k} items")
        if self.index is not None and self.candidates is None:
            raise ValueError(f"index={self.index} needs candidates: set candidates=500")
        if self.index is None and self.probes != type(self).model_fields["probes"].default:
            raise ValueError(f"probes={self.probes} needs an index: set index=IVF1024,Flat")
        return self


class SimilarConfig(Section):
    """Every item's most similar items."""

    k: int = Field(10, ge=1)
    """Number of similar items per item."""
    metric: Literal["cosine", "inner_product"] = "cosine"
    """Similarity of two items' summed factor vectors."""
