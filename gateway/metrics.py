"""What this gateway counts of the requests it serves, for Prometheus. Above: `dispatch`, `routes.metrics`.

Names are OpenTelemetry's for generative AI where it has one (https://opentelemetry.io/docs/specs/semconv/gen-ai/
gen-ai-metrics/, dots as underscores), else they begin with `hostler_`. Nothing is counted for each token: a stream's
pace is known at its end.

Several gateways share one socket, and a scrape reaches any of them. So each keeps its numbers in files of a directory
that all share (prometheus-client's multiprocess mode), and whoever is asked adds them up. Numbers of gateways that have
died stay in the sums, except what was in flight in them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from google.protobuf.message import Message
from hostler.errors import HostlerError
from hostler.inference.v1 import inference_pb2 as pb
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.registry import Collector

from gateway.shared_numbers import DIRECTORY_VARIABLE

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_MODEL, _OPERATION, _ERROR = "gen_ai_request_model", "gen_ai_operation_name", "error_type"


@dataclass(slots=True)
class Seen:
    """What has been seen of one request so far; times are of `time.perf_counter`."""

    began_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    finish: pb.Finish | None = None
    num_events: int = 0

    def take(self, message: Message) -> None:
        """Take in a worker's message: an event of a generation, one of another stream, or a whole answer."""
        if isinstance(message, pb.GenerateResponse):
            kind = message.WhichOneof("event")
            if kind == "progress":
                return
            self._clock()
            if kind == "finish":
                self.finish = message.finish
        elif isinstance(message, pb.EmbedResponse | pb.RerankResponse):
            self.finish = pb.Finish(usage=message.usage)
        elif "finish" in message.DESCRIPTOR.fields_by_name:  # A stream that is no text has times, but no tokens.
            self._clock()
            if message.HasField("finish"):
                self.finish = pb.Finish()

    def num_tokens(self, prompt_bytes: Callable[[], int]) -> int:
        """Return the tokens of prompt and reply: as counted, or, of a reply that was broken off, about so many.

        Its prompt is taken as a token for every four bytes, its reply as one for each event.
        """
        if self.finish is not None:
            return self.finish.usage.num_prompt_tokens + self.finish.usage.num_completion_tokens
        return self.num_events + prompt_bytes() // 4 if self.num_events else 0

    def _clock(self) -> None:
        self.num_events += 1
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s


class Meter:
    """The counters of one gateway process."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        by_request = (_OPERATION, _MODEL)
        self._durations = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From a request's arrival to its last byte; error_type is empty for those that were served.",
            (*by_request, _ERROR),
            buckets=_SECONDS,
            registry=own,
        )
        self._first_tokens = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's arrival to its first token, waiting for the model included.",
            by_request,
            buckets=_SECONDS,
            registry=own,
        )
        self._paces = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time between the tokens of a reply, after its first.",
            by_request,
            buckets=_TOKEN_SECONDS,
            registry=own,
        )
        self._queues = Histogram(
            "hostler_request_queue_seconds",
            "In the worker, from a request's arrival to its first step.",
            (_MODEL,),
            buckets=_SECONDS,
            registry=own,
        )
        self._prefills = Histogram(
            "hostler_request_prefill_seconds",
            "In the worker, from a request's first step to its first token.",
            (_MODEL,),
            buckets=_SECONDS,
            registry=own,
        )
        self._tokens = Counter(
            "hostler_tokens",
            "Tokens of requests that were served; cached ones are part of prompt, reasoning ones of completion.",
            (_MODEL, "type"),
            registry=own,
        )
        self._in_flight = Gauge(
            "hostler_requests_in_flight",
            "Requests that are being served, those that wait for a model or a place included.",
            (_MODEL,),
            multiprocess_mode="livesum",
            registry=own,
        )
        self._replies = Counter(
            "hostler_http_replies", "HTTP replies by method and status.", ("method", "status"), registry=own
        )

    def reply(self, method: str, status: int) -> None:
        """Count one HTTP reply."""
        self._replies.labels(method if method in _METHODS else "other", status).inc()

    @contextmanager
    def request(self, operation: str, model: str) -> Iterator[Seen]:
        """Count one request of a model that exists; what it saw is taken in when it ends, however it ends."""
        seen = Seen(time.perf_counter())
        in_flight = self._in_flight.labels(model)
        in_flight.inc()
        error = ""
        try:
            yield seen
        except BaseException as exception:
            error = _error_type(exception)
            raise
        finally:
            in_flight.dec()
            self._take(operation, model, "" if seen.finish else error, seen)

    def _take(self, operation: str, model: str, error: str, seen: Seen) -> None:
        self._durations.labels(operation, model, error).observe(time.perf_counter() - seen.began_s)
        if seen.first_s:
            self._first_tokens.labels(operation, model).observe(seen.first_s - seen.began_s)
        if (finish := seen.finish) is None:
            return
        usage, timing = finish.usage, finish.timing
        if usage.num_completion_tokens > 1:
            pace_s = (seen.last_s - seen.first_s) / (usage.num_completion_tokens - 1)
            self._paces.labels(operation, model).observe(pace_s)
        if timing.prefill_us:
            self._queues.labels(model).observe(timing.queue_us / 1e6)
            self._prefills.labels(model).observe(timing.prefill_us / 1e6)
        for kind, number in (
            ("prompt", usage.num_prompt_tokens),
            ("cached", usage.num_cached_tokens),
            ("completion", usage.num_completion_tokens),
            ("reasoning", usage.num_reasoning_tokens),
        ):
            if number:
                self._tokens.labels(model, kind).inc(number)

    def text(self, *further: Collector) -> bytes:
        """Return everything in Prometheus' text format, this and the other gateways' numbers added up. Reads files."""
        registry = self._registry
        if os.environ.get(DIRECTORY_VARIABLE):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        alone = CollectorRegistry()
        for collector in further:
            alone.register(collector)
        return generate_latest(registry) + generate_latest(alone)


_METHODS = ("GET", "POST", "DELETE", "OPTIONS", "HEAD")


def _error_type(exception: BaseException) -> str:
    if isinstance(exception, HostlerError):
        return exception.reason
    return "cancelled" if isinstance(exception, asyncio.CancelledError | GeneratorExit) else "internal_error"
