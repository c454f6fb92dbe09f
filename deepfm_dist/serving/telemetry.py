"""Request telemetry: ids, Prometheus metrics, log lines."""

import json
import logging
import os
import re
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepfm_dist.serving.replacement import ModelInUse

BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1, 5),
)
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
log = logging.getLogger(__name__)


def share_figures(folder: Path, worker: str) -> None:
    """Keeps this process' metrics in files, so that every worker can report those of all.

    Args:
        folder: the folder of the service.
        worker: distinguishes concurrent processes. A replacement of a dead process continues its
            metrics, so that the number of files is bounded.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


class Telemetry:
    """Counts requests by route and status, measures their time by route, and assigns ids.

    The id is that of the request's header ``X-Request-ID``, or a new one; the answer has it in the
    same header.

    Args:
        app: the application.
        model: the model in use.
        registry: the registry of Prometheus metrics.
        logs_requests: whether each request is logged.
    """

    def __init__(
        self, app: ASGIApp, model: ModelInUse, registry: CollectorRegistry, logs_requests: bool
    ) -> None:
        self._app, self._model, self._logs_requests = app, model, logs_requests
        disable_created_metrics()  # type: ignore[no-untyped-call]  # not useful
        own: CollectorRegistry | None = registry
        if model.folder is not None:  # the metrics of all workers, including this one
            own = None
            MultiProcessCollector(registry, str(model.folder))  # type: ignore[no-untyped-call]
        self._count = Counter(
            "deepfm_requests", "Requests answered.", ["route", "status"], registry=own
        )
        self._seconds = Histogram(
            "deepfm_request_seconds", "Time to answer.", ["route"], buckets=BUCKETS_S, registry=own
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, request_id = time.perf_counter(), 500, _request_id(scope)

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if self._model.is_retiring:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        finally:
            seconds = time.perf_counter() - begun
            # By template: raw paths would create one series per user.
            route = getattr(scope.get("route"), "path_format", "other")
            self._count.labels(route, str(status)).inc()
            self._seconds.labels(route).observe(seconds)
            if self._logs_requests:
                path = scope["path"]
                fields = {
                    "request_id": request_id.decode(),
                    "method": scope["method"],
                    "path": path,
                    "query": scope["query_string"].decode("latin-1"),
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 6),
                    "run": self._model.recommender.name if self._model.is_ready else None,
                }
                log.info("%s %s: %d", scope["method"], path, status, extra={"fields": fields})


def _request_id(scope: Scope) -> bytes:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the fields of a request if it is about one."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        time_ = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time_,
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
