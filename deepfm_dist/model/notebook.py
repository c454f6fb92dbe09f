"""A notebook's DeepFM: one offset table for all fields -> a table per field, and an over-arch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepfm_dist.errors import DataError

_LINEAR = re.compile(r"mlp_layers\.(\d+)\.(weight|bias)")
EXPECTED = (
    "bias [1], fc.weight [N, 1], embedding.weight [N, D], and mlp_layers.<i>.weight [out, in] and "
    "mlp_layers.<i>.bias [out] of two or more linear layers, the last with one output"
)


@dataclass(frozen=True)
class NotebookWeights:
    """The weights of a notebook's model.

    Attributes:
        bias: ``[1]``.
        rows: ``[N, D + 1]`` factors and first-order weight of every id of every field, field by
            field.
        layers: weight ``[out, in]`` and bias ``[out]`` of each linear layer.
    """

    bias: Tensor
    rows: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "NotebookWeights":
        """Takes a state dict apart.

        Args:
            state: of a module with ``bias``, ``fc`` and ``embedding`` (``nn.Embedding``) and
                ``mlp_layers`` (``nn.Sequential`` of linear layers and modules without weights).

        Raises:
            DataError: a key is missing or unknown, a shape does not fit the others, or a weight is
                no finite float.
        """
        numbers = sorted({int(m[1]) for key in state if (m := _LINEAR.fullmatch(key))})
        names = ["bias", "fc.weight", "embedding.weight"]
        names += [f"mlp_layers.{n}.{part}" for n in numbers for part in ("weight", "bias")]
        missing = [name for name in names if name not in state]
        unknown = [key for key in state if key not in names]
        if unknown or missing or len(numbers) < 2:
            found = f"unknown: {', '.join(unknown)}" if unknown else ""
            found += f"missing: {', '.join(missing)}" if missing and not unknown else ""
            raise DataError(f"{found or 'too few linear layers'}; expected are {EXPECTED}")
        for name in names:
            if not state[name].is_floating_point():
                raise DataError(f"{name} holds {state[name].dtype}, not floats")
            if wrong := int((~state[name].isfinite()).sum()):
                raise DataError(f"{name}: {wrong:,} of its weights are NaN or infinite")
        weights = {name: state[name].detach().float() for name in names}
        n, dim = (*weights["embedding.weight"].shape, 0, 0)[:2]
        wanted: dict[str, tuple[int, ...]] = {
            "bias": (1,),
            "embedding.weight": (n, dim),
            "fc.weight": (n, 1),
        }
        width = weights[f"mlp_layers.{numbers[0]}.weight"].shape[-1]
        for number in numbers:
            out = 1 if number == numbers[-1] else len(weights[f"mlp_layers.{number}.bias"])
            wanted[f"mlp_layers.{number}.weight"] = (out, width)
            wanted[f"mlp_layers.{number}.bias"] = (out,)
            width = out
        for name, shape in wanted.items():
            if tuple(weights[name].shape) != shape:
                raise DataError(
                    f"{name} has shape {list(weights[name].shape)}, not {list(shape)}; expected "
                    f"are {EXPECTED}"
                )
        return cls(
            weights["bias"],
            torch.cat([weights["embedding.weight"], weights["fc.weight"]], 1),
            tuple(
                (weights[f"mlp_layers.{n}.weight"], weights[f"mlp_layers.{n}.bias"])
                for n in numbers
            ),
        )

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.rows.shape[1] - 1

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Hidden layers."""
        return tuple(len(bias) for _, bias in self.layers[:-1])

    def interaction_arch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """State of `deepfm_dist.model.deepfm.InteractionArch` with an `OverArch`.

        Args:
            places: for each of our fields, its place among the notebook's.
        """
        first, bias = self.layers[0]
        by_field = first.view(len(bias), len(places), self.embedding_dim)
        layers = [(by_field[:, list(places)].flatten(1), bias), *self.layers[1:]]
        names = [*(f"hidden.{i}" for i in range(len(layers) - 1)), "output"]
        return {"bias": self.bias} | {
            f"over_arch.{name}.{part}": tensor
            for name, layer in zip(names, layers, strict=True)
            for part, tensor in zip(("weight", "bias"), layer, strict=True)
        }
