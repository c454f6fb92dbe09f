"""The section `data`: files, columns, features, splits and negatives."""

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from deepfm_dist.data.times import check_format
from deepfm_dist.section import Section
from deepfm_dist.storage import FolderName, PathOrUrl

Entity = Literal["user", "item", "context"]

OUT_OF_VOCABULARY = 0
"""The out-of-vocabulary row of every table."""

LABEL_OF = "label:"
"""Prefix of the columns of several labels; no field name can start with it."""
NO_LABEL = -1
"""Value of an unknown label."""
_NOT_FOR_THE_MODEL = ("label", "rating", "split", "weight")
"""Settings of columns that define the rows; these are not model fields."""


def _named(text: str) -> str:
    # A table's name is also that of a file and of a torch module, so it cannot contain a dot.
    if not re.fullmatch(r"\w[\w -]*", text):
        raise ValueError(
            f"{text!r} is not a valid name; use letters, digits, underscores, hyphens, spaces"
        )
    return text


_Name = Annotated[str, AfterValidator(_named)]
_Word = Annotated[str, Field(coerce_numbers_to_str=True)]


def _check_files(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    right = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
    if not (right and names and len(set(names)) == len(names)):
        raise ValueError(f"a file name, a pattern or a list of them, each once (got {value!r})")
    return value


Files = Annotated[str | tuple[str, ...], BeforeValidator(_check_files)]
"""A file name or pattern, or a list of them."""


def names_of(files: Files) -> tuple[str, ...]:
    """The names and patterns of a setting."""
    return (files,) if isinstance(files, str) else files


def label_of(files: Files) -> str:
    """A label for the files of a setting."""
    return ", ".join(names_of(files))


_TimeFormat = Annotated[str, AfterValidator(check_format)]


def _as_tree(section: Any) -> dict[str, Any]:
    """A section given as a dict or a model; other types are refused elsewhere."""
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return section if isinstance(section, dict) else {}


def _listed(formats: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if formats is None else (formats,) if isinstance(formats, str) else formats


def _unescaped(mark: str) -> str:
    r"""YAML has no escapes outside double quotes: ``delimiter: \t`` is a backslash and a t."""
    if not re.fullmatch(r"\\(t|x[\da-fA-F]{2}|u[\da-fA-F]{4}|[0-7]{3})", mark):
        return mark
    return mark.encode().decode("unicode_escape")


_Mark = Annotated[str, Field(min_length=1), AfterValidator(_unescaped)]


class FileFormat(Section):
    """The layout of an input file, if its name does not show it."""

    columns: tuple[str, ...] | None = None
    """Column names of a file without a header line; for libsvm: the label, then one per field."""
    delimiter: _Mark | None = None
    """Field separator; default by suffix: ``,`` for csv, tab for tsv, ``::`` for dat."""
    encoding: str | None = None
    """Text encoding; default: latin-1 for dat (as in MovieLens), otherwise utf-8."""
    quoted: bool = True
    """Whether double quotes enclose a cell, which may then contain line breaks and delimiters;
    false: quotes are text. Ignored for dat and libsvm, which have no quotes."""
    escape: str | None = None
    r"""Escape character, such as `\` if `\"` is a quote within a cell; default: none, a quote
    within a cell is doubled."""
    decimal: Literal[".", ","] = "."
    """Decimal separator."""
    thousands: Literal[",", ".", " ", "'"] | None = None
    """Separator between the thousands of numbers; default: none."""
    optional: tuple[str, ...] = ()
    """Columns that the file, or some files of the pattern, may lack: fields are empty there."""

    @model_validator(mode="after")
    def _marks_differ(self) -> Self:
        if self.delimiter is not None and set(self.delimiter) & set('\r\n"'):
            raise ValueError(f"delimiter: {self.delimiter!r} ends a line or quotes a cell")
        if self.escape is not None and (
            len(self.escape) != 1 or not self.escape.isascii() or self.escape in '\r\n"'
        ):
            raise ValueError(f"escape: one ASCII character, such as \\ (got {self.escape!r})")
        if self.thousands == self.decimal:
            raise ValueError(f"thousands and decimal are both {self.decimal!r}")
        if self.escape is not None and self.escape == self.delimiter:
            raise ValueError(f"escape and delimiter are both {self.escape!r}")
        return self

    @model_validator(mode="after")
    def _encoding_exists(self) -> Self:
        try:
            # rot13 and similar codecs do not return bytes
            text = "a\n".encode(self.encoding or "utf-8")
            codecs.getincrementaldecoder(self.encoding or "utf-8")().decode(text)
        except (LookupError, AttributeError, TypeError, UnicodeError):
            raise ValueError(f"encoding: unknown text encoding {self.encoding!r}") from None
        return self


class Interactions(Section):
    """The rows to learn from: who did what, and perhaps when and how."""

    file: Files
    """File name under ``data.root``, in a format that docs/data.md lists; a pattern with ``*``,
    ``?`` or ``[1-3]``, whose files are read in the order of their names; a range of days,
    ``{2026-11-01..2026-11-07}.csv``; or a list of these. ``nightly`` fills in ``{day}``,
    ``{day-1}``, ``{day-6..day}`` and ``{day:%Y%m%d}``."""
    user: str | None = None
    """Column of the user's id; needed for implicit data."""
    item: str | None = None
    """Column of the item's id; needed for implicit data."""
    time: str | None = None
    """Column of the time (a number, a date or a timestamp), exact to the nanosecond; orders
    histories and temporal splits."""
    time_format: _TimeFormat | tuple[_TimeFormat, ...] | None = None
    """Format of times: strptime codes (`%d/%m/%Y %H:%M`), `iso`, or `s`, `ms`, `us`, `ns` for
    numbers counting from 1970; of several, the first that matches. Default: ISO 8601 (`2020-01-31
    12:00:00.5`, UTC without a zone), or plain numbers."""
    label: str | None = None
    """Column of the 0/1 label; for click data (``task: ctr``), which needs it or ``labels``, and
    not allowed otherwise."""
    labels: tuple[str, ...] = ()
    """Columns of 0/1 labels, such as ``[click, buy]``, in place of ``label``: the model learns to
    predict each of them. A cell may be empty where its label is not known."""
    rating: str | None = None
    """Column of a rating. Rows below ``min_rating`` are not positives, but their items count as
    seen: they are neither recommended to the user nor sampled as negatives."""
    min_rating: float | None = None
    """Lowest rating that counts as a positive."""
    split: str | None = None
    """Column with the row's split: 0 / train, 1 / valid, 2 / test."""
    weight: str | None = None
    """Column of the row's weight, above 0, in the loss and in row metrics; a row of weight 2 counts
    twice. Sampled negatives have the weight of their positive."""

    repeated: Literal["latest", "earliest", "strongest", "all"] | None = None
    """Which of several rows with the same user and item to keep: the latest, the earliest, the
    strongest (by `order`, rating, label or weight), or all of them. Default: the latest for
    implicit data (without times, the strongest), all for click data."""
    order: dict[str, tuple[_Word, ...]] = Field(default_factory=dict)
    """For ``repeated: strongest``: a column and its values, weakest first, such as ``{behaviour:
    [pv, fav, cart, buy]}``."""
    min_rows_per_item: int = Field(1, ge=1)
    """Items with fewer rows, ratings below ``min_rating`` left out, are dropped with their rows,
    before anything is split. For implicit data."""
    min_rows_per_user: int = Field(1, ge=1)
    """Users who then have fewer rows are dropped, too."""
    impressions: str | None = None
    """Column of items shown together, each with its label: `N1-1 N2-0`. Every item becomes a row
    with the row's other cells; `item` and `label` then need no columns (in other files the key is
    `item` by default). For click data."""

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels in a prepared dataset, in the order of the targets."""
        return tuple(f"{LABEL_OF}{name}" for name in self.labels) or ("label",)

    @property
    def time_formats(self) -> tuple[str, ...]:
        """``time_format`` as a list."""
        return _listed(self.time_format)

    @model_validator(mode="before")
    @classmethod
    def _impressions_have_items_and_labels(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("impressions") is not None:
            return {
                **tree,
                "item": tree.get("item") or "item",
                "label": tree.get("label") or "label",
            }
        return tree

    @model_validator(mode="after")
    def _strength_is_known(self) -> Self:
        if self.order and self.repeated != "strongest":
            raise ValueError("order needs repeated: strongest")
        if len(self.order) > 1:
            raise ValueError(f"order takes one column (got {', '.join(self.order)})")
        for column, words in self.order.items():
            if len(set(words)) < max(2, len(words)):
                raise ValueError(f"order: {column} needs two words or more, each once")
        known = self.order or self.rating or self.label or self.weight
        if self.repeated == "strongest" and self.labels and not (self.order or self.weight):
            raise ValueError(
                "repeated: strongest cannot compare rows by several labels; give order or weight, "
                "or set repeated: latest"
            )
        if self.repeated == "strongest" and not known:
            raise ValueError(
                "repeated: strongest needs something to compare: rating, label, weight, or order, "
                "such as order: {behaviour: [pv, fav, cart, buy]}"
            )
        return self

    @model_validator(mode="after")
    def _columns_go_together(self) -> Self:
        if self.time_format is not None and self.time is None:
            raise ValueError("time_format describes the column interactions.time; set it")
        if (self.rating is None) != (self.min_rating is None):
            raise ValueError("rating and min_rating go together")
        if self.labels:
            self._check_labels()
        role_of: dict[str, str] = dict.fromkeys(self.labels, "labels")
        for role in ("user", "item", "time", *_NOT_FOR_THE_MODEL):
            column = getattr(self, role)
            if role == "weight" and column == self.rating:
                continue  # rows may count by their rating
            if column is not None and role_of.setdefault(column, role) != role:
                raise ValueError(f"{role_of[column]} and {role} are both the column {column!r}")
        return self

    def _check_labels(self) -> None:
        """Refuses settings that are incompatible with several labels."""
        names = list(self.labels)
        if self.impressions is not None:
            raise ValueError("impressions have one label for each item; leave labels out")
        if self.label is not None:
            raise ValueError(f"label and labels: list all targets in labels ({self.label} too)")
        if len(names) == 1:
            raise ValueError(f"labels names several targets; for one, set label: {names[0]}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"labels names {twice[0]!r} twice")
        if self.rating is not None:
            raise ValueError(
                "rating makes a label of its own (min_rating); leave rating out, or labels"
            )


class Feature(Section):
    """One field of the model."""

    name: _Name
    """Name of the field."""
    entity: Entity = "context"
    """What the field describes: the user, the item, or the row itself (context)."""
    file: Files | None = None
    """File of the field, a pattern or a list of them; default: the interactions file."""
    key: str | None = None
    """Column of that file with the entity's id; default: the interactions' column of the entity."""
    column: str | None = None
    """Column of the value, or a member of its objects (`genres.name`); default: the field's name
    (for a user or item field without a file: the entity's id). If the interactions file has a field
    of users or items, its value comes from each one's latest training row with a value."""
    kind: Literal["categorical", "numeric", "vector"] = "categorical"
    """How the value becomes the field's vector: looked up in a table (categorical), multiplied by a
    learned vector (numeric), or multiplied by a learned matrix (vector: a list of numbers of a user
    or item, such as an embedding of a text or an image)."""
    npy: Files | None = None
    """For a vector field: NumPy file with one vector for each row of ``file``, in the same order.
    ``file`` then gives only the ids. Default: the vectors are in a column of ``file``."""
    dim: int | None = Field(None, ge=1)
    """For a vector field: length of its vectors. Default: that of the first vector in the file."""
    separator: _Mark | None = None
    """Character that separates several values in a cell: ``Comedy|Drama``. Elements of lists are
    not split."""
    several: bool | None = None
    """Whether a cell may hold several values. Default: if there is a separator, or if preparation
    finds lists in the column: Parquet or JSON lists, or text such as `['Action', 'Drama']`."""
    missing: tuple[_Word, ...] = ()
    """Words or numbers that mean "no value", in addition to the empty cell."""
    fill: str | None = Field(None, min_length=1)
    """What an empty or missing cell of a categorical field counts as; default: no value, row 0."""
    derive: Literal["log_squared", "hour", "weekday", "weekend"] | None = None
    """Look up a value derived from the cell: of a number x, floor(ln(x)^2) if x is above 2 and its
    integer part otherwise; of a time, the hour, the day of the week (Monday: 0), or whether it is a
    weekend."""
    time_format: _TimeFormat | tuple[_TimeFormat, ...] | None = None
    """Format of the time to derive from, as in `interactions.time_format`; default: that format if
    the column is `interactions.time`, otherwise ISO 8601. Hour and day are in the cell's own time
    zone."""
    keep: Literal["all", "first"] = "all"
    """Keep all values of a user or item, or only the first one in the file."""
    pooling: Literal["mean", "sqrt", "sum"] = "mean"
    """How several values become one vector; sqrt: their sum divided by the square root of their
    number."""
    history: str | None = None
    """For a user field: the user's training items (`item`), or their values of the item field of
    this name. In training, the row's own item is left out. A history also serves new users whose
    items are known."""
    last: int | None = Field(None, ge=1)
    """For a history: only the user's latest items, at most this many. Needs `interactions.time` and
    a model trained on users (``trainer.loss``: softmax or bpr). Default: all items."""
    table: _Name | None = None
    """Embedding table; fields with the same table share its rows. A history may use the table of
    its source field, and a field of user or item ids (`N1 N2`) that of the users or items; ids not
    seen in training have row 0. Default: a separate table."""
    min_count: int = Field(1, ge=1)
    """Values with fewer training rows share the out-of-vocabulary row."""
    hash_rows: int | None = Field(None, ge=1, lt=2**31 - 1)
    """Hash values to this many rows instead of fitting a vocabulary."""
    transform: Literal["none", "log", "standard", "bucket"] = "none"
    """For numeric fields: unchanged, sign(x) * log(1 + |x|), (x - mean) / standard deviation, or
    the row of its bucket in a separate table."""
    buckets: int = Field(32, ge=2)
    """For ``transform: bucket``: number of buckets, with about equally many training rows each."""

    @property
    def time_formats(self) -> tuple[str, ...]:
        """``time_format`` as a list."""
        return _listed(self.time_format)

    @property
    def in_table(self) -> bool:
        """Whether the field is looked up in a table; otherwise its numbers enter the model."""
        return self.kind == "categorical" or self.transform == "bucket"

    @property
    def has_vocabulary(self) -> bool:
        """Whether its table has a vocabulary."""
        return self.kind == "categorical" and self.hash_rows is None and self.history is None

    @property
    def table_name(self) -> str:
        """The embedding table this field reads."""
        return self.table or self.name

    @property
    def is_id(self) -> bool:
        """Whether the field is the id of the user or item, with a vocabulary."""
        return self.names_entity and self.hash_rows is None

    @property
    def names_entity(self) -> bool:
        """Whether the field is the id of the user or item, hashed or not."""
        plain = self.file is None and self.column is None and self.history is None
        return self.entity != "context" and plain

    @property
    def describes_entity(self) -> bool:
        """Whether its values are stored once per user or item."""
        return self.entity != "context" and not self.is_id and self.history is None

    @property
    def derives_time(self) -> bool:
        """Whether its values are derived from times."""
        return self.derive in ("hour", "weekday", "weekend")

    @property
    def in_lists(self) -> bool:
        """Whether its cells are read as lists of values."""
        return self.kind == "categorical" and (self.separator is not None or bool(self.several))

    @property
    def multi_valued(self) -> bool:
        """Whether one row may hold several values."""
        many = self.in_lists or (self.file is not None and self.entity != "context")
        return self.history is not None or (many and self.keep == "all")

    def settled_by(self, prepared: "Feature") -> "Feature":
        """The field with open settings filled in by what preparation detected."""
        settled = {
            option: getattr(prepared, option)
            for option in ("several", "dim")
            if getattr(self, option) is None
        }
        return self.model_copy(update=settled)

    @property
    def meaning(self) -> dict[str, Any]:
        """The settings that map values to rows or numbers.

        Other settings describe files, which new values get rows, and how the model uses them; they
        may differ in a later dataset that keeps these rows.
        """
        free = {"name", "file", "key", "column", "missing", "time_format", "min_count", "pooling"}
        free |= {"last", "several", "npy"}  # `multi_valued` covers `several`
        if self.transform != "bucket":
            free.add("buckets")
        settings = self.model_dump(exclude=free)
        return settings | {
            "table": self.table_name,
            "entity's own id": self.names_entity,
            "several values": self.multi_valued,
        }

    @model_validator(mode="after")
    def _vectors_describe_users_or_items(self) -> Self:
        if self.kind != "vector":
            return self
        allowed = {"name", "entity", "file", "key", "column", "kind", "npy", "dim"}
        allowed |= {"separator", "missing", "keep"} if self.npy is None else set()
        if self.npy is not None:
            allowed.remove("column")
        for option, field in type(self).model_fields.items():
            if option not in allowed and getattr(self, option) != field.default:
                source = "in an npy file" if self.npy is not None else "field"
                raise ValueError(f"{self.name}: {option} does not apply to a vector {source}")
        if self.entity == "context":
            raise ValueError(
                f"{self.name}: a vector describes users or items; set entity: item or entity: user"
            )
        if self.file is None:
            raise ValueError(
                f"{self.name}: a vector needs a file with one row per {self.entity}; set file"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> Self:
        if self.kind == "numeric":
            for option in ("separator", "several", "table", "hash_rows", "fill", "derive"):
                if getattr(self, option) is not None:
                    raise ValueError(f"{option} is for categorical fields; {self.name} is numeric")
            if self.names_entity:
                raise ValueError(f"{self.name} is an id and cannot be numeric; name its column")
        elif self.transform != "none":
            raise ValueError(f"transform is for numeric fields; {self.name} is {self.kind}")
        for option in ("npy", "dim"):
            if self.kind != "vector" and getattr(self, option) is not None:
                raise ValueError(f"{option} is for vector fields; {self.name} is {self.kind}")
        if self.hash_rows is not None and self.min_count > 1:
            raise ValueError(f"{self.name}: hash_rows keeps no counts; leave min_count out")
        for option in ("fill", "derive"):
            if getattr(self, option) is not None and self.names_entity:
                raise ValueError(f"{option} is for values; {self.name} is an id")
        if self.several is False and self.separator is not None:
            raise ValueError(
                f"{self.name}: a separator makes several values; leave one of them out"
            )
        if self.several and self.names_entity:
            raise ValueError(f"several does not apply to an id such as {self.name}")
        if self.fill is not None and self.in_lists:
            option = "separator" if self.separator is not None else "several"
            raise ValueError(f"{self.name}: fill is for a cell of one value; leave {option} out")
        if self.entity == "context" and self.file is not None:
            raise ValueError(f"{self.name}: a context field is a column of the interactions file")
        if self.history is not None:
            own = {"name", "entity", "history", "last", "pooling", "table"}
            if self.entity != "user":
                raise ValueError(f"{self.name}: a history is a user's; set entity: user")
            for option, field in type(self).model_fields.items():
                if option not in own and getattr(self, option) != field.default:
                    raise ValueError(f"{self.name}: {option} does not go with history")
        elif self.last is not None:
            raise ValueError(f"{self.name}: last={self.last} is for a history; set history: item")
        return self


class History(Section):
    """The bag of items that history fields are of."""

    chosen = frozenset(("add", "dropout", "targets"))

    add: bool = False
    """Whether the field ``{name: seen, entity: user, history: item, pooling: sqrt}`` is added, by
    which users are known by their items. auto: for a model that ranks (``trainer.loss``: auto) and
    has no field of this kind. With ``targets: later``, a field of the latest items is added too.
    Where auto adds none and all fields are of items, the users' id becomes a field."""
    targets: Literal["random", "later"] = "random"
    """Which of a user's items a model trained on users (``trainer.loss``: softmax or bpr) predicts.
    random: those that ``dropout`` leaves out of the history; later: those after a point in time
    that is redrawn in every epoch, from the items before it. auto: later, if each user's last rows
    are held out (``split.method: leave_last``) and ``dropout`` is auto."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a user's items that training leaves out at random, redrawn in every epoch."""
    max_length: int | None = Field(None, ge=1)
    """Maximum number of items, chosen by the seed: redrawn every epoch in training, fixed
    otherwise. With ``targets: later``, the latest ones."""


class CatalogueFile(Section):
    """The items on offer."""

    file: Files
    """File under ``data.root`` with one row per item, a pattern or a list of them."""
    key: str | None = None
    """Column of the item's id; default: the interactions' item column."""


class Titles(Section):
    """Where items' titles stand, for people who read recommendations."""

    file: Files
    """File under ``data.root``, a pattern or a list of them."""
    key: str | None = None
    """Column of the item's id; default: the interactions' item column."""
    column: str = "title"
    """Column of the title."""


class Split(Section):
    """Which rows are held out."""

    method: Literal["random", "per_user", "temporal", "leave_last", "users"] = "random"
    """random: by row; per_user: a share of each user's rows, at random; temporal: the last rows of
    all; leave_last: each user's last rows (by time); users: users at random, who have no training
    rows: ``fold_in`` says how much of each is known, the rest is held out (strong generalization;
    for implicit data)."""
    valid: float = Field(0.1, ge=0)
    """Share of the rows for validation; leave_last: number of rows per user; users: share of the
    users, or from 1 on their number."""
    test: float = Field(0.1, ge=0)
    """The same for the test."""
    fold_in: float = Field(0.8, gt=0, lt=1)
    """For users: share of a held-out user's rows that the model knows the user by."""
    valid_file: Files | None = None
    """Held-out rows with the interactions' columns: a file, a pattern or a list of them; replaces
    ``valid``."""
    test_file: Files | None = None
    """Held-out rows with the interactions' columns: a file, a pattern or a list of them; replaces
    ``test``."""

    @model_validator(mode="after")
    def _sizes_fit_the_method(self) -> Self:
        if self.method == "leave_last":
            if self.valid != int(self.valid) or self.test != int(self.test):
                raise ValueError("leave_last holds out whole rows per user: give whole numbers")
        elif self.method == "users":
            for name in ("valid", "test"):
                if (value := getattr(self, name)) >= 1 and value != int(value):
                    raise ValueError(f"{name}={value:g}: a share below 1, or a number of users")
            if self.valid_file or self.test_file:
                raise ValueError("method=users does not go with valid_file or test_file")
        if self.method != "users" and self.fold_in != type(self).model_fields["fold_in"].default:
            raise ValueError(f"fold_in={self.fold_in:g} is for method=users; leave it out")
        are_shares = self.method not in ("leave_last", "users") or (
            self.method == "users" and max(self.valid, self.test) < 1
        )
        if are_shares and self.valid + self.test >= 1:
            raise ValueError(f"valid + test leave no training rows (got {self.valid + self.test})")
        return self

    def number(self, value: float, n: int) -> int:
        """Number of ``n`` rows or users that ``valid`` or ``test`` selects."""
        return int(value) if value >= 1 else round(n * value)

    def larger(self, name: str) -> str:
        """The override to try where ``valid`` or ``test`` holds out no row."""
        share = getattr(self, name)
        if self.method == "leave_last":
            return "data.split.method=random" if share else f"data.split.{name}=1"
        if share == 0:
            return f"data.split.{name}=0.1"
        return f"data.split.{name}=0.4" if share < 0.4 else "data.split.method=random"


class Negatives(Section):
    """Unobserved pairs that stand for "no", for implicit data."""

    per_positive: int = Field(4, ge=1)
    """Negatives sampled for each training positive in each epoch."""
    fixed_per_user: int | None = Field(None, ge=1)
    """Sample this many distinct negatives per user once, before the split, and split them together
    with the positives (the notebook's recipe); replaces `per_positive`."""
    evaluation_per_positive: int = Field(4, ge=1)
    """Negatives per held-out positive, sampled once; they avoid all items the user has interacted
    with, in any split."""
    popularity_power: float = Field(0.0, ge=0)
    """Training samples items in proportion to (training positives) ** popularity_power; 0:
    uniformly."""
    avoid: Literal["train", "all"] = "train"
    """What training negatives avoid: the user's items in training rows, or in held-out rows too."""
    redraw: bool = True
    """Whether every epoch samples new negatives; otherwise all epochs use those of the first."""

    @model_validator(mode="after")
    def _fixed_ones_are_not_drawn_again(self) -> Self:
        if self.fixed_per_user is not None:
            for option in ("evaluation_per_positive", "popularity_power", "avoid", "redraw"):
                if getattr(self, option) != type(self).model_fields[option].default:
                    raise ValueError(
                        f"{option} does not go with fixed_per_user, whose negatives are drawn "
                        f"once, all alike, before the split; leave {option} out"
                    )
        return self


class DataConfig(Section):
    """The input and how it becomes a prepared dataset."""

    name: FolderName | None = None
    """Folder of the prepared dataset under ``run.prepared_root``; default: the run's name."""
    root: PathOrUrl = "."
    """Folder of the input files (may contain ``${VARIABLES}``), or a URL that fsspec opens, such as
    ``s3://bucket/logs``. Relative paths are looked up in the working directory, then next to the
    bundled sample."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of splits and of the order of ids; default: ``run.seed``. Set it to train with several
    run seeds on one split."""
    chosen = frozenset(("id_dropout",))

    task: Literal["implicit", "ctr"] = "implicit"
    """implicit: every row is a positive and negatives are sampled; ctr: rows have a 0/1 label."""
    interactions: Interactions
    """The rows."""
    features: tuple[Feature, ...] = ()
    """The model's fields. Default for implicit data: the items' ids, and the users' histories of
    them or the users' ids (see ``history.add``)."""
    files: dict[str, FileFormat] = Field(default_factory=dict)
    """Formats of files that the file name does not determine."""
    titles: Titles | None = None
    """Titles of the items."""
    catalogue: CatalogueFile | None = None
    """The items without training rows that can be ranked. Default: those that the files of item
    fields describe."""
    id_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of user and item ids that each training step replaces by the unknown id, so that the
    model learns to judge an item without training rows by its attributes; drawn by (seed, step,
    row). auto: 0.2 where rows have labels and item files describe items without training rows."""
    split: Split = Split()
    """Held-out rows."""
    negatives: Negatives = Negatives()
    """Unobserved pairs."""
    history: History = History()
    """The users' bags of items, for fields that are histories."""
    refit: bool = False
    """Train on all rows, including held-out ones; for the final fit."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row whose id, label, time or number is invalid."""
    vocabulary_from: PathOrUrl | None = None
    """Folder of an earlier prepared dataset, or its URL: known ids keep their rows, new ids are
    appended, and its statistics of numeric fields are kept."""
    forget_after: int | None = Field(None, ge=1)
    """Days without a row after which a user or item may be forgotten: with ``vocabulary_from``, a
    new id takes the row of the one that has been missing for longest. Default: never."""
    lanes: int | None = Field(None, ge=1, le=4096)
    """Number of streams that training rows are divided into for reading from disk; default: 64, and
    up to 4,096 above a billion rows."""
    memory_bytes: int = Field(2 << 30, ge=0)
    """Training rows up to this size are read into memory; larger data is streamed from disk. User
    and item data is then memory-mapped, shared by all ranks of a machine."""
    on_device: Literal["auto"] | bool = "auto"
    """Whether training rows, and what is known of users and items, lie on the device, where batches
    are then made; the batches are the same. auto: on CUDA, where they take at most an eighth of the
    free memory of each GPU. Histories, losses over the catalogue, negatives by popularity,
    accumulated batches and streamed rows are left to the host; with true they are an error."""

    @model_validator(mode="before")
    @classmethod
    def _fields_of_the_time_are_written_like_it(cls, tree: Any) -> Any:
        """A field derived from the time column inherits its ``time_format``."""
        if not isinstance(tree, dict):
            return tree
        rows, features = _as_tree(tree.get("interactions")), tree.get("features")
        time, written = rows.get("time"), rows.get("time_format")
        if time is None or written is None or not isinstance(features, list | tuple):
            return tree
        inheriting = []
        for feature in features:
            own = _as_tree(feature)
            is_of_time = own.get("derive") in ("hour", "weekday", "weekend")
            same = own.get("file") is None and (own.get("column") or own.get("name")) == time
            if is_of_time and same and own.get("time_format") is None:
                feature = {**own, "time_format": written}
            inheriting.append(feature)
        return {**tree, "features": inheriting}

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        rows = self.interactions
        if not any(f.in_table for f in self.features):
            raise ValueError("features need at least one categorical field: the model is its table")
        if self.task == "implicit":
            if rows.user is None or rows.item is None:
                raise ValueError("implicit data needs interactions.user and interactions.item")
            if rows.label is not None or rows.labels:
                which = "label" if rows.impressions is None else "impressions"
                which = "labels" if rows.labels else which
                raise ValueError(f"interactions.{which} needs task: ctr")
        else:
            if rows.label is None and not rows.labels:
                raise ValueError("task: ctr needs interactions.label")
            if self.negatives != Negatives():
                raise ValueError("negatives go with task: implicit; ctr rows carry their labels")
            if rows.repeated not in (None, "all") and (rows.user is None or rows.item is None):
                raise ValueError(
                    f"interactions.repeated: {rows.repeated} needs interactions.user and "
                    f"interactions.item"
                )
        for entity in ("user", "item"):
            uses = [f.name for f in self.features if f.entity == entity]
            if uses and getattr(rows, entity) is None:
                raise ValueError(f"{uses[0]} describes the {entity}: name interactions.{entity}")
        for feature in self.features:
            self._check_column(feature)
        titles = self.titles
        if titles is not None and titles.column == (titles.key or rows.item):
            raise ValueError(
                f"titles: the column {titles.column!r} is the key of {label_of(titles.file)}"
            )
        names = [f.name for f in self.features]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two features are called {twice[0]!r}")
        reserved_names = {"id", "history", "seen_train", "seen_valid", "seen_test"}
        if reserved := sorted((reserved_names | {"count", "title", "label"}) & set(names)):
            raise ValueError(_reserved(reserved[0], self.features))
        context_fields = {f.name for f in self.features if f.entity == "context"}
        if reserved := sorted({"user", "item", "time", "drawer", "weight"} & context_fields):
            raise ValueError(_reserved(reserved[0], self.features))
        self._check_histories()
        self._check_cold_items()
        _check_shared_tables(self.features)
        if self.negatives.fixed_per_user is not None:
            self._check_fixed_negatives()
        if self.split.method == "users":
            self._check_held_out_users()
        for name in ("min_rows_per_item", "min_rows_per_user"):
            if getattr(rows, name) > 1:
                self._check_only_interactions(f"interactions.{name}={getattr(rows, name)}")
        if self.vocabulary_from is not None and self.negatives.fixed_per_user is not None:
            raise ValueError("vocabulary_from cannot go with negatives.fixed_per_user")
        if self.forget_after is not None and rows.time is None:
            raise ValueError(f"forget_after={self.forget_after} needs interactions.time")
        needs_time = self.split.method in ("temporal", "leave_last")
        if needs_time and rows.time is None and rows.split is None:
            raise ValueError(f"split.method={self.split.method} needs interactions.time")
        return self

    def settled_by(self, prepared: "DataConfig") -> "DataConfig":
        """The settings with `Feature.settled_by` of the prepared fields of the same names."""
        known = {f.name: f for f in prepared.features}
        features = tuple(f.settled_by(known.get(f.name, f)) for f in self.features)
        return self.model_copy(update={"features": features})

    @model_validator(mode="after")
    def _arrays_need_no_description(self) -> Self:
        arrays = [name for f in self.features if f.npy is not None for name in names_of(f.npy)]
        if described := [name for name in self.files if name in arrays]:
            raise ValueError(
                f"files: {described[0]} is a NumPy file, which describes itself; leave it out"
            )
        return self

    @property
    def repeated(self) -> Literal["latest", "earliest", "strongest", "all"]:
        """Which of several rows with the same user and item to keep."""
        default: Literal["latest", "all"] = "latest" if self.task == "implicit" else "all"
        return self.interactions.repeated or default

    @property
    def seen_is_masked(self) -> bool:
        """Whether users' seen items are left out of their rankings by default.

        False if repeated rows are kept: users may choose an item again.
        """
        return self.interactions.repeated != "all"

    def _check_column(self, feature: Feature) -> None:
        rows, column = self.interactions, feature.column or feature.name
        if feature.is_id or feature.history is not None:
            return
        in_rows = feature.file is None and not feature.names_entity
        if rows.impressions is not None and in_rows and feature.entity == "item":
            raise ValueError(
                f"{feature.name}: a row of impressions has many items; name the file that "
                f"describes them"
            )
        if feature.file is None:
            if column in rows.labels:
                raise ValueError(
                    f"{feature.name}: the column {column!r} is one of interactions.labels, and no "
                    f"field of the model"
                )
            for role in _NOT_FOR_THE_MODEL:
                if column == getattr(rows, role):
                    raise ValueError(
                        f"{feature.name}: the column {column!r} is interactions.{role}, and no "
                        f"field of the model"
                    )
        elif feature.npy is None and column == (feature.key or getattr(rows, feature.entity)):
            raise ValueError(
                f"{feature.name}: the column {column!r} is the key of {label_of(feature.file)}; "
                f"name the column that holds the value"
            )

    def source_of(self, history: Feature) -> Feature:
        """The item field that a history refers to: one with a vocabulary, or the item id."""
        named = (f for f in self.features if f.entity == "item" and f.name == history.history)
        itself = Feature(name="item", entity="item")
        return next((f for f in named if f.has_vocabulary), itself)

    def _check_cold_items(self) -> None:
        """Refuses settings of cold items that need ids which the model lacks."""
        if self.id_dropout and not any(f.names_entity for f in self.features):
            raise ValueError(
                f"id_dropout={self.id_dropout:g}: no field of data.features is the id of users or "
                f"items; leave id_dropout out"
            )
        if self.catalogue is not None and self.interactions.item is None:
            raise ValueError("catalogue lists items: name interactions.item")

    def _check_histories(self) -> None:
        histories = [f for f in self.features if f.history is not None]
        if self.history != History() and not histories:
            raise ValueError("history: no field has it; add one with history: item")
        self._check_order_of_time(histories)
        if histories and self.interactions.item is None:
            raise ValueError(f"{histories[0].name} is a history: name interactions.item")
        for field in histories:
            source = self.source_of(field)
            if source.name != field.history or not source.has_vocabulary:
                fitting = [f.name for f in self.features if f.entity == "item" and f.has_vocabulary]
                raise ValueError(
                    f"{field.name}: history is of {field.history!r}, no field of items with a "
                    f"vocabulary; available: {', '.join(dict.fromkeys(['item', *fitting]))}"
                )
            for other in self.features:
                shares = other is not field and other.table_name == field.table_name
                if shares and field.table_name != source.table_name:
                    raise ValueError(
                        f"table {field.table_name!r}: {field.name} can share that of "
                        f"{source.name}, or have its own"
                    )

    def _check_order_of_time(self, histories: Sequence[Feature]) -> None:
        """Checks settings that need time-ordered histories with validation items at the end."""
        settings = [f"{f.name}: last={f.last}" for f in histories if f.last is not None]
        if self.history.targets == "later":
            settings.append("history.targets=later")
        if not settings:
            return
        if self.interactions.time is None:
            raise ValueError(f"{settings[0]} needs the order of time: name interactions.time")
        method, given = self.split.method, self.interactions.split or self.split.valid_file
        if method not in ("leave_last", "temporal") and self.split.valid and not given:
            raise ValueError(
                f"{settings[0]}: with split.method={method}, validation items are not the latest; "
                f"set split.method to leave_last or temporal"
            )

    def _check_held_out_users(self) -> None:
        """Requires a field other than the id for users without training rows."""
        self._check_only_interactions("split.method=users")
        for feature in self.features:
            if feature.names_entity and feature.entity == "user":
                raise ValueError(
                    f"split.method=users: {feature.name} knows users by their id, and held-out "
                    f"users have no training rows; replace it by "
                    f"{{name: seen, entity: user, history: item}} in data.features"
                )
        if not any(f.history is not None for f in self.features):
            raise ValueError(
                "split.method=users: held-out users are known by their items alone; add "
                "{name: seen, entity: user, history: item} to data.features"
            )

    def _check_only_interactions(self, setting: str) -> None:
        """Refuses settings that are incompatible with rules over all rows of a user or item."""
        if self.task != "implicit":
            raise ValueError(f"{setting} is for implicit data (data.task=implicit)")
        if self.interactions.split or self.split.valid_file or self.split.test_file:
            raise ValueError(f"{setting} does not go with a given split")
        if self.negatives.fixed_per_user is not None:
            raise ValueError(f"{setting} does not go with negatives.fixed_per_user")
        if self.vocabulary_from is not None:
            raise ValueError(f"{setting} does not go with vocabulary_from")

    def _check_fixed_negatives(self) -> None:
        rows, split = self.interactions, self.split
        if rows.split or split.valid_file or split.test_file:
            raise ValueError(
                "negatives.fixed_per_user are split together with the positives: "
                "it cannot go with a given split"
            )
        if rows.weight is not None:
            raise ValueError("negatives.fixed_per_user have no interactions.weight; leave it out")
        if split.method not in ("random", "per_user"):
            raise ValueError(
                f"negatives.fixed_per_user have no time: split.method={split.method} cannot be used"
            )
        for feature in self.features:
            if feature.file is None and not (feature.names_entity or feature.history is not None):
                raise ValueError(
                    f"negatives.fixed_per_user have no {feature.column or feature.name}: "
                    f"the field {feature.name} cannot come from the interactions file"
                )


def check_names(setting: str, names: Iterable[str], labels: Sequence[str]) -> None:
    """Refuses names that are not among several labels.

    Raises:
        ValueError: names the setting.
    """
    if (unknown := next((name for name in names if name not in labels), None)) is not None:
        known = f"available: {', '.join(labels)}" if labels else "there is one label"
        raise ValueError(f"{setting}: {unknown!r} is not in data.interactions.labels; {known}")


def _reserved(name: str, features: Sequence[Feature]) -> str:
    """Explains which names are reserved in a prepared dataset, for messages."""
    feature = next(f for f in features if f.name == name)
    is_plain = feature.column is None and feature.history is None
    column = f", column: {name}" if is_plain else ""
    return f"{name!r} is a reserved name; rename the field: {{name: my_{name}{column}, ...}}"


def _check_shared_tables(features: Sequence[Feature]) -> None:
    first_of = {f.table_name: f for f in features if f.is_id}
    for feature in features:
        if not feature.in_table:
            continue
        first = first_of.setdefault(feature.table_name, feature)
        if first is not feature and not (feature.history is None is first.history):
            continue  # checked by `DataConfig._check_histories`
        if first is not feature and first.is_id:
            if feature.is_id or not feature.has_vocabulary:
                raise ValueError(
                    f"table {feature.table_name!r}: {feature.name} cannot share the table of the "
                    f"{first.entity}s' ids; only a categorical field of such ids can"
                )
            if feature.min_count != 1:
                raise ValueError(
                    f"{feature.name}: min_count is that of {first.name}, whose table it shares; "
                    f"leave it out"
                )
        if first is not feature and "bucket" in (first.transform, feature.transform):
            raise ValueError(f"table {feature.table_name!r}: a table of buckets cannot be shared")
        if first.hash_rows != feature.hash_rows:
            raise ValueError(
                f"table {feature.table_name!r}: {first.name} and {feature.name} need the same "
                f"hash_rows to share it"
            )
