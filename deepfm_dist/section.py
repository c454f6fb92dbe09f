"""The base of every configuration section."""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

AUTO = "auto"
"""Value of a setting that the recipe decides (`deepfm_dist.recipe`)."""

DEFAULTS = "defaults"
"""Context for ``model_dump`` that writes the default instead of ``auto``."""


class Section(BaseModel):
    """A frozen group of settings; unknown fields are errors, docstrings of fields are their help.

    A setting in ``chosen`` that is missing or ``auto`` reads as its default and is saved as
    ``auto``: `deepfm_dist.recipe` chooses it from the data.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    chosen: ClassVar[frozenset[str]] = frozenset()
    """Settings that the recipe chooses unless the user sets them."""

    def is_auto(self, name: str) -> bool:
        """Whether the recipe decides a setting."""
        return name in self.chosen and name not in self.model_fields_set

    def auto_settings(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Settings that the recipe decides, by dotted name, with their defaults."""
        for name, value in self:
            if isinstance(value, Section):
                yield from value.auto_settings(f"{prefix}{name}.")
            elif self.is_auto(name):
                yield f"{prefix}{name}", value

    @model_validator(mode="before")
    @classmethod
    def _auto_is_left_out(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {k: v for k, v in tree.items() if not (k in cls.chosen and v == AUTO)}

    @model_serializer(mode="wrap")
    def _left_out_is_auto(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        if info.context == DEFAULTS:
            return tree
        return {k: AUTO if self.is_auto(k) else v for k, v in tree.items()}
