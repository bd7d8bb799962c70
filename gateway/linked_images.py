"""Images that a request gives by address: fetched, checked, put into the contract's message.

Above: routes, after the request was found good and the model able. Below: `links`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.links import Budget, Fetch, FetchRefused, Link

MAX_FETCHED_BYTES = 25 * 10**6
"""Of all images of one request together."""
_AT_ONCE = 4
_MAX_FETCHING = 32
_NUM_START_BYTES = 12


def image_type(start: bytes) -> str:
    """Return the MIME type that the first twelve bytes of an image tell; empty for anything else."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if start.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "image/webp"
    return ""


class LinkedImages:
    """Fills requests with what their links point at. One for each process.

    Args:
        fetcher: None where the configuration does not allow fetching.
    """

    def __init__(self, fetcher: Fetch | None) -> None:
        self._fetcher = fetcher
        self._slots = asyncio.Semaphore(_MAX_FETCHING)

    async def fill(self, messages: Iterable[pb.Message], links: Sequence[Link]) -> None:
        """Fetch every link into its part: the image parts without data, in order. Mutates `messages`.

        Raises:
            UnsupportedParameter: fetching is not allowed here.
            InvalidRequest: an address is refused, or holds no image; `param` names it.
        """
        if not links:
            return
        if self._fetcher is None:
            raise UnsupportedParameter(
                f"'{links[0].name}': this server does not fetch addresses. Send the image's bytes as a data: URL.",
                param=links[0].name,
            )
        parts = [part for message in messages for part in message.parts if part.HasField("image")]
        empty = [part.image for part in parts if not part.image.data]
        left = MAX_FETCHED_BYTES
        for begin in range(0, len(links), _AT_ONCE):
            group = links[begin : begin + _AT_ONCE]
            async with asyncio.TaskGroup() as tasks:
                fetching = [tasks.create_task(self._fetch(self._fetcher, link, left)) for link in group]
            for media, link, task in zip(empty[begin:], group, fetching, strict=False):
                data = task.result()
                if isinstance(data, InvalidRequest):
                    raise data
                left -= len(data)
                if left < 0:
                    raise _refusal(link, f"with it, the images are larger than {MAX_FETCHED_BYTES} bytes")
                media.data = data
                media.mime_type = image_type(data[:_NUM_START_BYTES])

    async def _fetch(self, fetcher: Fetch, link: Link, max_bytes: int) -> bytes | InvalidRequest:
        budget = Budget(max_bytes, _NUM_START_BYTES, lambda start: bool(image_type(start)))
        try:
            async with self._slots:
                return await fetcher.get(link.url, budget)
        except FetchRefused as refused:
            return _refusal(link, str(refused))


def _refusal(link: Link, reason: str) -> InvalidRequest:
    return InvalidRequest(f"The image at '{link.name}' was not fetched: {reason}.", param=link.name)
