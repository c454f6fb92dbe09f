"""FuxiCTR's DeepFM, put together from its layers as its model zoo does."""

from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


def feature_map(vocabulary_sizes: dict[str, int], dim: int) -> FeatureMap:
    """Describes one-hot fields, their ids starting at 1, and the column ``label``."""
    described = FeatureMap("rows", ".")
    for name, size in vocabulary_sizes.items():
        described.features[name] = {
            "source": "",
            "type": "categorical",
            "vocab_size": size,
            "padding_idx": 0,
        }
    described.labels, described.num_fields = ["label"], len(vocabulary_sizes)
    described.default_emb_dim = dim
    described.total_features = sum(vocabulary_sizes.values())
    described.set_column_index()
    return described


class DeepFM(BaseModel):
    """First order, pairs and an MLP on the same vectors; Adam 1e-3.

    Args:
        fields: what `feature_map` returns.
        dim: length of a vector.
        layers: widths of the MLP.
        dropout: the dropout of each hidden layer.
        batch_norm: before each activation.
        settings: BaseModel's, ``embedding_regularizer`` and ``model_root`` among them.
    """

    def __init__(
        self,
        fields: FeatureMap,
        dim: int,
        layers: list[int],
        dropout: float = 0.0,
        batch_norm: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(fields, verbose=0, **({"model_root": "."} | settings))
        self.embedding_layer = FeatureEmbedding(fields, dim)
        self.fm = FactorizationMachine(fields)
        self.mlp = MLP_Block(
            input_dim=fields.sum_emb_out_dim(),
            output_dim=1,
            hidden_units=layers,
            hidden_activations="ReLU",
            output_activation=None,
            dropout_rates=dropout,
            batch_norm=batch_norm,
        )
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: object) -> dict[str, torch.Tensor]:
        """Returns the probabilities, float32 [B, 1], under ``y_pred``."""
        x = self.get_inputs(inputs)
        embedded = self.embedding_layer(x)
        y = self.fm(x, embedded) + self.mlp(embedded.flatten(start_dim=1))
        return {"y_pred": self.output_activation(y)}
