"""The HTTP application around `Recommender`: routes and limits."""

import json
import sys
from collections import Counter as Names
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry
from prometheus_client.exposition import generate_latest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepfm_dist.data.cards import Card
from deepfm_dist.messages import short
from deepfm_dist.serving import live
from deepfm_dist.serving.live import Unknown, Unsupported
from deepfm_dist.serving.replacement import ModelInUse, NotReady, age_s
from deepfm_dist.serving.telemetry import Telemetry
from deepfm_dist.version import __version__

_make_fastapi: Callable[..., FastAPI] = FastAPI
with suppress(ModuleNotFoundError):  # its pages under /docs load nothing from a CDN
    from fastapi_offline import FastAPIOffline

    _make_fastapi = FastAPIOffline

MAX_K, MAX_ITEMS, MAX_ID, MAX_BODY_BYTES = 100, 500, 200, 1 << 20
"""Maximum items in an answer, items describing a user, characters of an id, bytes of a request."""
MAX_READ_BYTES = 8 * MAX_BODY_BYTES
"""Bytes read from a refused body: closing the connection earlier would lose the response."""
MAX_ROWS = 1000
"""Maximum number of rows to score per request."""
MAX_LISTED, MAX_FILTER = 10_000, 1000
"""Maximum items to allow or block per request; characters of its filter."""
PAGE = Path(__file__).parent / "pages" / "index.html"


class _IdConvertor(PathConvertor):
    """Ids in paths; those of starlette hold no newline."""

    regex = "(?s:.*)"


register_url_convertor("id", _IdConvertor())
Id = Annotated[str, InPath(min_length=1, max_length=MAX_ID)]
K = Annotated[int, Query(ge=1, le=MAX_K, description="items wanted")]
Explain = Annotated[int, Query(ge=0, le=MAX_K, description="reasons wanted for each item")]


class Item(BaseModel):
    """Display data of an item."""

    id: str | int
    title: str | None = None
    tags: list[str]


class Reason(BaseModel):
    """A value of the user, item or context, and its share of a score."""

    field: str
    value: str | None = None
    title: str | None = Field(None, description="of the item that the value names")
    share: float


class Explanation(BaseModel):
    """Shares of a score, which sum to it."""

    base: float = Field(description="what a pair without any value would have")
    reasons: list[Reason] = Field(description="the largest shares, largest first")
    other: float = Field(description="sum of all other shares")
    remainder: float = Field(description="what the numerical integral misses")


class Scored(Item):
    """An item in a ranking."""

    rank: int
    score: float
    probability: float | None = None
    explanation: Explanation | None = None


class Ranking(BaseModel):
    """The best items, best first; may be fewer than requested."""

    items: list[Scored]


class Answer(Ranking):
    """The ranking for a request."""

    unknown: dict[str, int] = Field(
        description="by list, allow or block: number of ids that are not in the training data"
    )


class User(BaseModel):
    """A user of the training data."""

    id: str
    n_items: int
    latest: list[Item]


class Users(BaseModel):
    """Some of the users."""

    total: int
    ids: list[str]


class Items(BaseModel):
    """Some of the items."""

    items: list[Item]


class Health(BaseModel):
    """The served model; null while the first one is loading."""

    status: Literal["ok", "loading"]
    run: str | None = None
    step: int | None = None
    model_age_s: float | None = Field(None, description="since its checkpoint was saved")
    users: int | None = None
    items: int | None = None
    knows_users_by_items: bool | None = None
    problem: str | None = Field(None, description="why a newer model is not in use")


class Ready(BaseModel):
    """The model that is ready to answer."""

    run: str


def _number(value: object) -> object:
    """Refuses text and booleans, which pydantic would convert; JSON's 10.0 is an integer."""
    if isinstance(value, str | bool):
        raise PydanticKnownError("int_type")
    return value


Whole = Annotated[int, BeforeValidator(_number)]


def _id(value: object) -> str | int:
    """A JSON id. A single validator, since a union would report two errors."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("id_type", "input should be text or a whole number")
    return value


def _cell(value: object) -> str | float:
    """A JSON value of a field, checked by a single validator like `_id`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise PydanticCustomError("value_type", "input should be text or a number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise PydanticCustomError("value_size", "input should be a number of double precision")
    if isinstance(value, str) and len(value) > MAX_ID:
        raise PydanticKnownError("string_too_long", {"max_length": MAX_ID})
    return value


def _cells(value: object) -> str | float | list[str | float]:
    return [_cell(element) for element in value] if isinstance(value, list) else _cell(value)


_JsonCell = Annotated[str, Field(max_length=MAX_ID)] | float
Cell = Annotated[str | float, PlainValidator(_cell, json_schema_input_type=_JsonCell)]
Cells = Annotated[
    str | float | list[str | float],
    PlainValidator(_cells, json_schema_input_type=_JsonCell | list[_JsonCell]),
]

ItemId = Annotated[str | int, PlainValidator(_id, json_schema_input_type=str | int)]


_DESCRIBED: list[JsonValue] = [
    {"required": ["items"], "properties": {"items": {"minItems": 1}}},
    {"required": ["attributes"], "properties": {"attributes": {"minProperties": 1}}},
    {"required": ["user"]},
]
"""Arguments of `Recommender.recommend_for` as JSON Schema."""


class Described(BaseModel):
    """A user of the training data or a described one, and the items to choose from."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"anyOf": _DESCRIBED})

    items: list[ItemId] = Field(default_factory=list, max_length=MAX_ITEMS)
    k: Whole = Field(10, ge=1, le=MAX_K)
    attributes: dict[str, Cells] = Field(
        default_factory=dict, description="values of the model's fields of users"
    )
    context: dict[str, Cell] = Field(
        default_factory=dict, description="values of context fields, if not the service's own"
    )
    explain: Whole = Field(0, ge=0, le=MAX_K, description="reasons wanted for each item")
    user: ItemId | None = Field(None, description="id of a user of the training data")
    allow: list[ItemId] | None = Field(
        None, min_length=1, max_length=MAX_LISTED, description="the only items that may be ranked"
    )
    block: list[ItemId] | None = Field(
        None, max_length=MAX_LISTED, description="items that are left out"
    )
    where: str | None = Field(
        None,
        max_length=MAX_FILTER,
        description="filter by item fields, such as genre=Drama and year!=1999",
    )


class RowsToScore(BaseModel):
    """Rows with the log's columns."""

    model_config = ConfigDict(extra="forbid")

    rows: list[dict[str, JsonValue]] = Field(
        min_length=1,
        max_length=MAX_ROWS,
        description="by the names of the log's columns: user, item and context",
    )


class Score(BaseModel):
    """The score of a row."""

    score: float | None = Field(description="logit; null if a number is far from those of training")
    probability: float | None
    targets: dict[str, "Score"] = Field(
        {}, description="by target, if there are several; score is then what items are ranked by"
    )


class Scores(BaseModel):
    """Scores in the order of the rows."""

    run: str
    scores: list[Score]
    unknown: dict[str, int] = Field(
        description="by field: number of values that training has never seen, scored as unknown"
    )


class Problem(BaseModel):
    """An error and its cure."""

    detail: str


NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "not in the training data"}
}
NOT_ABLE: dict[int | str, dict[str, Any]] = {
    409: {"model": Problem, "description": "this model cannot do that"}
}
NOT_READABLE: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body is not JSON"},
    413: {"model": Problem, "description": "the body is too long"},
}
NOT_ALLOWED: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "description": "a parameter or field is unknown or has a bad value"}
}


NOT_LOADED: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "the first model is still being loaded"}
}


def make_app(
    model: ModelInUse, hosts: Sequence[str] = ("*",), logs_requests: bool = False
) -> ASGIApp:
    """The application.

    Args:
        model: the model in use.
        hosts: accepted Host names; others are refused to prevent DNS rebinding.
        logs_requests: whether each request is logged.
    """
    app = _make_fastapi(
        title="deepfm_dist",
        version=__version__,
        description="Recommendations of a trained model; /healthz names its run.",
        dependencies=[Depends(_refuse_unknown_parameters)],
        responses=NOT_ALLOWED | NOT_LOADED,
    )
    registry = CollectorRegistry()
    registry.register(model)
    app.add_middleware(_Limited)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _add_error_handlers(app)
    _add_status_routes(app, model, registry)
    _add_recommender_routes(app, model)
    _add_post_routes(app, model)
    # Outside FastAPI's handler of unhandled errors, so that its answers have ids, too.
    return _AnswersHead(Telemetry(app, model, registry, logs_requests))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(NotReady)
    async def not_ready(request: Request, error: NotReady) -> JSONResponse:
        text = "the model is still being loaded; /readyz says when it is ready"
        return JSONResponse({"detail": text}, 503, {"Retry-After": "2"})

    @app.exception_handler(Unknown)
    async def unknown(request: Request, error: Unknown) -> JSONResponse:
        id_, run_name = error.args
        text = (
            f"{short(id_, MAX_ID)} is not in the training data of run {run_name}; /users and "
            f"/items?q=TITLE list known ids"
        )
        return JSONResponse({"detail": text}, 404)

    @app.exception_handler(Unsupported)
    async def unsupported(request: Request, error: Unsupported) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409)

    @app.exception_handler(live.Invalid)
    async def not_known(request: Request, error: live.Invalid) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        if problems[0]["type"] == "json_invalid":
            reason = problems[0]["ctx"]["error"]
            return JSONResponse({"detail": f"the body is not JSON: {reason}"}, 400)
        body = request.scope["route"].body_field
        fields = [] if body is None else [*body.field_info.annotation.model_fields]
        by_place = {_place(problem): _sentence(problem, fields) for problem in reversed(problems)}
        return JSONResponse({"detail": "; ".join(reversed(by_place.values()))}, 422)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        if error.detail == "There was an error parsing the body":
            text = "the body is not JSON in UTF-8, is nested too deeply or has too long a number"
            return JSONResponse({"detail": text}, error.status_code)
        return await http_exception_handler(request, error)


# Routes are coroutines: a thread hop would take longer than the answer.


def _add_status_routes(app: FastAPI, model: ModelInUse, registry: CollectorRegistry) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/healthz")
    async def health() -> Health:
        """Liveness, and the served model."""
        if not model.is_ready:
            return Health(status="loading")
        recommender = model.recommender
        return Health(
            status="ok",
            run=recommender.name,
            step=recommender.step,
            model_age_s=age_s(recommender),
            users=recommender.n_users,
            items=recommender.n_items,
            knows_users_by_items=recommender.knows_users_by_items,
            problem=model.status.problem,
        )

    @app.get("/readyz")
    async def ready() -> Ready:
        """Readiness: 503 until the first model is loaded."""
        return Ready(run=model.recommender.name)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Prometheus metrics: requests and seconds by route, and the model in use."""
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_recommender_routes(app: FastAPI, model: ModelInUse) -> None:
    @app.get("/users")
    async def users(
        q: Annotated[str, Query(max_length=MAX_ID, description="beginning of the id")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Users:
        """Ids of users."""
        recommender = model.recommender
        return Users(total=recommender.n_users, ids=recommender.find_users(q, limit))

    @app.get("/users/{user_id:id}/recommendations", responses=NOT_FOUND)
    async def recommendations(user_id: Id, k: K = 10, explain: Explain = 0) -> Ranking:
        """A user's best unseen items of the whole catalogue; the score is the logit.

        The probability is that the user takes the item; null if scores are not log-odds.
        """
        recommender = model.recommender
        return _ranking(recommender.recommend(user_id, k, explain), recommender)

    @app.get("/users/{user_id:id}", responses=NOT_FOUND)
    async def user(user_id: Id, limit: Annotated[int, Query(ge=1, le=MAX_K)] = 20) -> User:
        """A user's latest training items."""
        latest, total = model.recommender.history(user_id, limit)
        return User(id=user_id, n_items=total, latest=[_item(card) for card in latest])

    @app.get("/items")
    async def items(
        q: Annotated[str, Query(max_length=MAX_ID, description="part of the title")] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_K)] = 20,
    ) -> Items:
        """Items with a text in their title."""
        return Items(items=[_item(card) for card in model.recommender.find(q, limit)])

    @app.get("/items/{item_id:id}/similar", responses=NOT_FOUND | NOT_ABLE)
    async def similar(item_id: Id, k: K = 10) -> Ranking:
        """The items most similar to one; the score is the cosine."""
        recommender = model.recommender
        return _ranking(recommender.similar(item_id, k), recommender)


def _add_post_routes(app: FastAPI, model: ModelInUse) -> None:
    @app.post(
        "/recommend",
        responses=NOT_FOUND | NOT_ABLE | NOT_READABLE,
        dependencies=[Depends(_refuse_ambiguous_body)],
    )
    async def recommend(described: Described) -> Answer:
        """The best items for a user, or for a user described by items, attributes or both.

        All items may be ranked, unless the request chooses: allow, block and where.
        """
        user, allow, block = described.user, described.allow, described.block
        recommender = model.recommender
        ranking, unknown = recommender.recommend_for(
            [str(item) for item in described.items],
            described.k,
            described.attributes,
            described.context,
            user=None if user is None else str(user),
            choice=live.ItemChoice(
                None if allow is None else [str(item) for item in allow],
                None if block is None else [str(item) for item in block],
                described.where,
            ),
            explain=described.explain,
        )
        return Answer(items=_ranking(ranking, recommender).items, unknown=unknown)

    @app.post(
        "/predict",
        responses=NOT_READABLE,
        dependencies=[Depends(_refuse_ambiguous_body)],
        response_model_exclude_unset=True,  # a single target has no targets
    )
    async def predict(body: RowsToScore) -> Scores:
        """Scores rows of users, items and context, as the command predict does."""
        recommender = model.recommender
        predictions, unknown = recommender.predict(body.rows)
        scores = [_score(prediction) for prediction in predictions]
        return Scores(run=recommender.name, scores=scores, unknown=unknown)


def _score(prediction: live.Prediction) -> Score:
    score = Score(score=prediction.score, probability=prediction.probability)
    if prediction.targets is not None:
        score.targets = {name: _score(each) for name, each in prediction.targets.items()}
    return score


async def _refuse_unknown_parameters(request: Request) -> None:
    """Refuses parameters that a route would ignore.

    Raises:
        HTTPException: 422 with the names that are allowed.
    """
    route = request.scope["route"]
    if not route.include_in_schema:  # the page
        return
    allowed = [parameter.alias for parameter in route.dependant.query_params]
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in allowed:
            names = f"allowed: {', '.join(allowed)}" if allowed else "none is allowed here"
            raise HTTPException(422, f"unknown parameter {short(name, 50)}; {names}")
        if given.count(name) > 1:
            raise HTTPException(422, f"{name} is given {given.count(name)} times; give it once")


async def _refuse_ambiguous_body(request: Request) -> None:
    """Refuses ambiguous JSON: repeated keys and lone surrogates.

    Parsers differ in which repeated value they keep. Lone surrogates are not valid UTF-8, so they
    occur neither in training data nor in answers.

    Raises:
        HTTPException: 422 with the key or the surrogate.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Names(key for key, _ in pairs)
        for key, count in counts.items():
            if count > 1:
                raise HTTPException(422, f"{short(key, 50)} is given {count} times; give it once")
        return dict(pairs)

    body = await request.body()
    with suppress(ValueError, RecursionError):  # invalid JSON is refused when it is parsed
        parsed = json.loads(body, object_pairs_hook=once)
        if b"\\ud" not in body.lower():
            return
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = short(error.object[error.start])
            raise HTTPException(422, f"{half} is half of a character; send it whole") from None


def _sentence(problem: Any, fields: Sequence[str]) -> str:
    """A validation error as a sentence that names the field or parameter.

    Args:
        problem: the error.
        fields: names of the route's body.
    """
    name = _place(problem)
    if problem["type"] == "extra_forbidden":
        return f"unknown field {short(name, 50)}; allowed: {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "model_attributes_type":
        return f"{name} must be a JSON object with {', '.join(fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("valid dictionary", "JSON object").replace("valid list", "list")
    message = message[0].lower() + message[1:]
    return f"{name}: {message} (got {short(problem['input'], 50)})"


def _place(problem: Any) -> str:
    return ".".join(map(str, problem["loc"][1:])) or "the body"


def _item(card: Card) -> Item:
    return Item(id=card.id, title=card.title, tags=card.tags)


def _ranking(ranking: Sequence[live.Scored], recommender: live.Recommender) -> Ranking:
    return Ranking(
        items=[
            Scored(
                id=scored.card.id,
                title=scored.card.title,
                tags=scored.card.tags,
                rank=rank,
                score=scored.score,
                probability=scored.probability,
                explanation=_explanation(scored, recommender),
            )
            for rank, scored in enumerate(ranking, 1)
        ]
    )


def _explanation(scored: live.Scored, recommender: live.Recommender) -> Explanation | None:
    explained = scored.explanation
    if explained is None:
        return None
    reasons = []
    for reason in explained.reasons:
        title = None if reason.item is None else recommender.card_of(reason.item).title
        reasons.append(
            Reason(field=reason.field, value=reason.value, title=title, share=reason.share)
        )
    return Explanation(
        base=explained.base,
        reasons=reasons,
        other=explained.other,
        remainder=explained.remainder,
    )


class _AnswersHead:
    """Treats HEAD as GET; the server omits the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class _Limited:
    """Refuses bodies over `MAX_BODY_BYTES`, with or without a declared length."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        declared = int(headers.get(b"content-length", 0))  # the server has parsed it
        # A client that sent Expect: 100-continue gets the answer instead.
        limit = MAX_BODY_BYTES if b"expect" in headers else MAX_READ_BYTES
        messages: list[Message] = []
        size, more = 0, declared <= limit
        while more and size <= MAX_READ_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if max(size, declared) <= MAX_BODY_BYTES:
                messages.append(message)
            more = message.get("more_body", False)
        if max(size, declared) > MAX_BODY_BYTES:
            text = f"the body is longer than {MAX_BODY_BYTES:,} bytes"
            # The rest of the body is not read, so the connection cannot be reused.
            answer = JSONResponse({"detail": text}, 413, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        waiting = iter(messages)

        async def again() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, again, send)
