"""The one error tree. Rooms raise these; edges translate them (gRPC status here, HTTP in the gateway).

    HostlerError
    ├── InvalidRequest            400  INVALID_ARGUMENT     invalid_request
    │   ├── ContextLengthExceeded 400  INVALID_ARGUMENT     context_length_exceeded
    │   ├── UnsupportedParameter  400  INVALID_ARGUMENT     unsupported_parameter
    │   └── ModelNeverFits        400  INVALID_ARGUMENT     model_never_fits
    ├── InvalidApiKey             401  UNAUTHENTICATED      invalid_api_key
    ├── PermissionDenied          403  PERMISSION_DENIED    permission_denied
    ├── ModelNotFound             404  NOT_FOUND            model_not_found
    ├── PayloadTooLarge           413  INVALID_ARGUMENT     payload_too_large
    ├── UnsupportedMedia          415  INVALID_ARGUMENT     unsupported_media_type
    ├── Overloaded                429  RESOURCE_EXHAUSTED   overloaded            Retry-After
    ├── Cancelled                 499  CANCELLED            cancelled
    ├── Internal                  500  INTERNAL             internal_error
    └── Unavailable               503  UNAVAILABLE          unavailable           Retry-After
        ├── WorkerLost            503  UNAVAILABLE          worker_lost           Retry-After
        ├── StaleGeneration       503  FAILED_PRECONDITION  stale_generation      Retry-After
        ├── OutOfMemory           503  RESOURCE_EXHAUSTED   out_of_memory         Retry-After
        ├── ModelLoadFailed       503  UNAVAILABLE          model_load_failed     Retry-After
        └── OrchestratorAway      503  UNAVAILABLE          orchestrator_away     Retry-After

A status travels with `google.rpc.ErrorInfo(reason, domain="hostler")`; `param`, `retry_after_s` and counts of tokens
ride in its metadata. Messages are for people: what was wrong, with the value, and what to do next.
They never carry paths, addresses, prompts or keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NoReturn, Self, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "hostler"


class HostlerError(Exception):
    """A failure that has a name on the wire.

    Args:
        message: one sentence for the caller.
        param: the request field at fault, as the caller named it.
        retry_after_s: when trying again is worthwhile, in seconds.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s


class InvalidRequest(HostlerError):
    """The request can never succeed as it is."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", 400


class ContextLengthExceeded(InvalidRequest):
    """Prompt (plus requested tokens) does not fit the model's context or the KV cache.

    Attributes:
        num_tokens, max_tokens: of the prompt, and of what fits; 0 where they were not counted.
    """

    reason = "context_length_exceeded"
    num_tokens = 0
    max_tokens = 0

    def counted(self, num_tokens: int, max_tokens: int) -> Self:
        """Set the counts, and return the error itself."""
        self.num_tokens, self.max_tokens = num_tokens, max_tokens
        return self


class UnsupportedParameter(InvalidRequest):
    """A field that would change the answer and that this model or version cannot honour."""

    reason = "unsupported_parameter"


class ModelNeverFits(InvalidRequest):
    """No device could hold the model even when empty."""

    reason = "model_never_fits"


class InvalidApiKey(HostlerError):
    """Missing, wrong or revoked key."""

    code, reason, http_status = grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key", 401


class PermissionDenied(HostlerError):
    """A valid caller may not do this, or the Host header is not allowed."""

    code, reason, http_status = grpc.StatusCode.PERMISSION_DENIED, "permission_denied", 403


class ModelNotFound(HostlerError):
    """No such model is configured or present."""

    code, reason, http_status = grpc.StatusCode.NOT_FOUND, "model_not_found", 404


class PayloadTooLarge(HostlerError):
    """Body or media over its cap."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "payload_too_large", 413


class UnsupportedMedia(HostlerError):
    """A content type that this route or model does not read."""

    code, reason, http_status = grpc.StatusCode.INVALID_ARGUMENT, "unsupported_media_type", 415


class Overloaded(HostlerError):
    """Queues are full; nothing was started."""

    code, reason, http_status = grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", 429
    default_retry_after_s = 1.0


class Cancelled(HostlerError):
    """The caller went away or asked to stop."""

    code, reason, http_status = grpc.StatusCode.CANCELLED, "cancelled", 499


class Internal(HostlerError):
    """Our bug. The details are in the log under the request id, not in the message."""


class Unavailable(HostlerError):
    """Not now; the same request may succeed later."""

    code, reason, http_status = grpc.StatusCode.UNAVAILABLE, "unavailable", 503
    default_retry_after_s = 2.0


class WorkerLost(Unavailable):
    """The worker died or froze while it held the request."""

    reason = "worker_lost"
    default_retry_after_s = 1.0


class StaleGeneration(Unavailable):
    """A message of an older placement reached a newer worker, or the other way round."""

    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "stale_generation"
    default_retry_after_s = 1.0


class OutOfMemory(Unavailable):
    """Device or host memory ran out for this request."""

    code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, "out_of_memory"


class ModelLoadFailed(Unavailable):
    """The model could not be brought up; the message says why."""

    reason = "model_load_failed"
    default_retry_after_s = 30.0


class OrchestratorAway(Unavailable):
    """The orchestrator does not answer; loaded models go on serving."""

    reason = "orchestrator_away"


def _tree(root: type[HostlerError]) -> dict[str, type[HostlerError]]:
    classes = {root.reason: root}
    for child in root.__subclasses__():
        classes.update(_tree(child))
    return classes


BY_REASON: dict[str, type[HostlerError]] = _tree(HostlerError) | {Internal.reason: Internal}


def to_status(error: HostlerError) -> rpc_status._Status:
    """Return the gRPC status (code, message, ErrorInfo) that `from_rpc_error` reads back."""
    metadata = {}
    if error.param is not None:
        metadata["param"] = error.param
    if error.retry_after_s is not None:
        metadata["retry_after_s"] = repr(error.retry_after_s)
    if isinstance(error, ContextLengthExceeded) and error.num_tokens:
        metadata |= {"num_tokens": str(error.num_tokens), "max_tokens": str(error.max_tokens)}
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    status = status_pb2.Status(code=error.code.value[0], message=error.message, details=[detail])
    return rpc_status.to_status(status)


async def abort(context: grpc.aio.ServicerContext, error: HostlerError) -> NoReturn:  # type: ignore[type-arg]
    """End a servicer's call with `error`. Never returns."""
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")


def from_rpc_error(error: grpc.RpcError) -> HostlerError:
    """Return the error that the far side raised, or the one that the transport's failure amounts to.

    Works for `grpc.aio.AioRpcError` and for sync errors, also after a mid-stream abort: the ErrorInfo is
    in the trailing metadata.
    """
    code = error.code()
    # Pairs at run time, in sync and aio alike; the stubs know only their names.
    for key, value in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode("latin-1"))
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in BY_REASON:
                retry = info.metadata.get("retry_after_s")
                raised = BY_REASON[info.reason](
                    status.message, param=info.metadata.get("param"), retry_after_s=float(retry) if retry else None
                )
                if isinstance(raised, ContextLengthExceeded) and "num_tokens" in info.metadata:
                    raised.counted(int(info.metadata["num_tokens"]), int(info.metadata["max_tokens"]))
                return raised
    if code == grpc.StatusCode.CANCELLED:
        return Cancelled("The request was cancelled.")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return WorkerLost("The process that held this request went away. Try again.")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PayloadTooLarge("The request is larger than the internal message limit.")
    return Internal(f"Internal error ({code.name}); the server's log has the details.")
