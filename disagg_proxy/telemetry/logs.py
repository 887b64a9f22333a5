"""The format of log lines: readable text, or one JSON object per line (``LOG_FORMAT``)."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from disagg_proxy.config import Config


def _request_id(record: logging.LogRecord) -> str:
    """The X-Request-Id of the request that the line is about, given as ``extra={"request_id": ...}``; else empty."""
    return getattr(record, "request_id", "")


class TextLines(logging.Formatter):
    """Readable lines; those about one request end with its ``request_id=``."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line without the traceback, which follows it."""
        line, request_id = super().formatMessage(record), _request_id(record)
        return f"{line} request_id={request_id}" if request_id else line


class JsonLines(logging.Formatter):
    """Keys: time (ISO 8601, UTC), level, logger, message; request_id in lines about one request; worker with several
    workers; exception with its traceback."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := _request_id(record):
            line["request_id"] = request_id
        if self._worker is not None:
            line["worker"] = str(self._worker)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class HideUnfinished(logging.Filter):
    """Drops uvicorn's error about a response aborted on purpose; server/asgi/exchange_scope.py logs the cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "returned without completing response" not in str(record.msg)


_HIDE_UNFINISHED = HideUnfinished()


def uvicorn_level(config: Config) -> int:
    """The level of uvicorn's logger: its informational lines are not shown at any LOG_LEVEL."""
    return max(logging.WARNING, int(logging.getLevelName(config.log_level.upper())))


def configure_logging(config: Config, worker: int | None = None) -> None:
    """Log everything to standard error in the configured format. A further call replaces what the former did.

    Args:
        worker: the number of this worker, None for a single process.
    """
    handler = logging.StreamHandler(sys.stderr)
    if config.log_format == "json":
        handler.setFormatter(JsonLines(worker))
    else:
        which = "" if worker is None else f"worker {worker} "
        handler.setFormatter(TextLines(f"%(asctime)s %(levelname)-7s {which}%(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.setLevel(uvicorn_level(config))
    uvicorn.addFilter(_HIDE_UNFINISHED)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
