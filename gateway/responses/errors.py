"""What the store has to say, in the gateway's error tree. Above: `database`, routes; below: `hostler.errors`."""

from __future__ import annotations

import grpc
from hostler.errors import HostlerError, InvalidRequest, Unavailable

from gateway.fields import show


class NotStored(HostlerError):
    """No such response, conversation or item, or another key made it: both look the same."""

    code, reason, http_status = grpc.StatusCode.NOT_FOUND, "not_found", 404

    def __init__(self, kind: str, identity: str) -> None:
        super().__init__(f"{kind.capitalize()} with id {show(identity)} not found.")


class HistoryGone(InvalidRequest):
    """The response that is to be continued, or one before it, is not stored."""

    reason = "previous_response_not_found"

    def __init__(self, asked: str, link: str, *, conversation: str | None = None) -> None:
        if conversation is not None:
            message = (
                f"Response {show(link)} belongs to the conversation {show(conversation)}: continue that with "
                "'conversation'."
            )
        elif asked == link:
            message = f"Previous response with id {show(asked)} not found."
        else:
            message = f"Previous response {show(asked)} continues {show(link)}, which is no longer stored."
        super().__init__(message, param="previous_response_id")


class StillRunning(InvalidRequest):
    """The response that is to be continued has not ended, or has no answer."""

    reason = "previous_response_not_completed"

    def __init__(self, asked: str, link: str, status: str) -> None:
        super().__init__(
            f"Response {show(link)} cannot be continued: its status is {status}.", param="previous_response_id"
        )


class HistoryTooLong(InvalidRequest):
    """More than can be sent to a model at once."""

    reason = "context_length_exceeded"

    def __init__(self, asked: str) -> None:
        super().__init__(
            f"The history of {show(asked)} is too long to be sent to a model. Begin a new one.",
            param="previous_response_id",
        )


class StoreUnavailable(Unavailable):
    """The database cannot be read or written now."""

    reason = "store_unavailable"

    def __init__(self) -> None:
        super().__init__("Stored responses cannot be reached now; the server's log has the details. Try again.")


class TooLargeToStore(InvalidRequest):
    """One object is more than the whole store may hold."""

    reason = "too_large_to_store"

    def __init__(self) -> None:
        super().__init__("This is larger than all that may be stored here. Send 'store': false.", param="store")
