"""The section `model`."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deepfm_dist.section import Section


class ModelConfig(Section):
    """The DeepFM."""

    chosen = frozenset(
        (
            *("embedding_dim", "init_at_mean", "fm_pairs", "linear"),
            *("deep", "over_arch_layer_sizes", "dropout", "batch_norm"),
        )
    )

    embedding_dim: int = Field(16, ge=1)
    """Length D of each field's factor vector."""
    init_std: float = Field(0.01, ge=0)
    """Standard deviation of the tables' initial values."""
    init_at_mean: bool = False
    """Whether the untrained model predicts the mean label of the training rows: its bias starts at
    their log-odds, and the last layer of the MLP at 0. auto: true where rows have labels
    (``data.task=ctr``)."""
    first_order: bool = True
    """The linear part."""
    fm: bool = True
    """The pairwise part."""
    fm_pairs: Literal["all", "across"] = "all"
    """Which pairs of fields it contains: all, as in the paper, or only those across, of an item
    field with a user or context field. Other pairs do not affect rankings beyond what the
    first-order part can learn."""
    linear: Literal["ease", "logistic", "none"] = "none"
    """The part that is fitted rather than trained. ease adds EASE, fitted to the users' items and
    the items' fields, as further columns of the factors when training is over; its scores are in
    units of the deviation of each item's residuals. Its L2, its weight next to the trained part,
    the number of its columns and the weight of the fields are measured on the validation rows, or
    cross-validated where there are fewer than 20,000 training positives and fewer than 1,000 users
    to validate on.
    Where the sum is not clearly better, EASE alone is used. For an FM of the users' histories.
    logistic starts the first-order weights
    from a logistic regression, whose L2 is estimated for each field from the training rows. How
    much of it is used instead of a constant is decided by cross-validation, and how much of what
    the FM and the over-arch learn from there by the validation rows.
    For rows with labels. auto: ease where that can be done and there are no more than 20,000 items;
    logistic below 100,000 labelled rows, and below 300,000 with trainer.refit_best."""
    deep: bool = True
    """The over-arch. first_order alone is LR; with fm, an FM; deep alone, a DNN."""
    over_arch: str = "mlp"
    """mlp, or the import path ``package.module:Class`` of a module [B, in] -> [B], which is called
    with in_features and over_arch_options."""
    over_arch_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of an over-arch given by import path."""
    over_arch_layer_sizes: tuple[int, ...] = (400, 400, 400)
    """Hidden layers of the MLP."""
    shared_layers: int = Field(0, ge=0)
    """With several targets (``data.interactions.labels``): number of the MLP's lowest hidden layers
    that all targets share. Each has its own upper layers. 0: only the embeddings are shared."""
    activation: Literal["relu", "gelu", "tanh", "sigmoid"] = "relu"
    """Activation of the MLP."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after each hidden layer."""
    batch_norm: bool = False
    """Batch norm (over the global batch) after each hidden linear layer, which then has no bias."""
    over_arch_init: Literal["uniform", "xavier_normal"] = "uniform"
    """Initial weights of the MLP: torch's default, uniform within 1 / sqrt(inputs), biases too; or
    normal with variance 2 / (inputs + outputs), biases 0."""

    def check_targets(self, labels: Sequence[str]) -> None:
        """Refuses settings that exclude or require several targets.

        Raises:
            ValueError: names the setting.
        """
        if self.shared_layers and not labels:
            raise ValueError(
                f"model.shared_layers={self.shared_layers}: several targets share layers; name "
                f"them in data.interactions.labels, or leave it out"
            )
        if labels and self.linear == "logistic":
            raise ValueError(
                f"model.linear=logistic: fits one label, and data.interactions.labels names "
                f"{len(labels)}; set model.linear=none"
            )

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if not (self.first_order or self.fm or self.deep):
            raise ValueError("first_order, fm and deep are all off: nothing is left to train")
        if any(size < 1 for size in self.over_arch_layer_sizes):
            raise ValueError(
                f"over_arch_layer_sizes must be positive: {self.over_arch_layer_sizes}"
            )
        n_layers = len(self.over_arch_layer_sizes)
        if self.shared_layers and (self.over_arch != "mlp" or not self.deep):
            raise ValueError(
                f"shared_layers={self.shared_layers} are of the MLP (deep=true, over_arch=mlp)"
            )
        if self.shared_layers > n_layers and not self.is_auto("over_arch_layer_sizes"):
            raise ValueError(
                f"shared_layers={self.shared_layers}: over_arch_layer_sizes has {n_layers}; share "
                f"{n_layers} at most"
            )
        if self.fm_pairs == "across" and not self.fm:
            raise ValueError("fm_pairs=across chooses pairs of the fm part, which is off")
        if self.over_arch == "mlp" and self.over_arch_options:
            raise ValueError("over_arch_options go with an over_arch given by import path")
        return self
