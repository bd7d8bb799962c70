"""Which replica most likely holds a prompt's beginning in its prefix cache. Above: `dispatch`; below: nothing.

A prompt's beginning is known by hashes at a few boundaries, each over everything before it and over the caller's
cache scope, for scopes share nothing. The longest boundary that was seen before names the replica.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence

from hostler.inference.v1 import inference_pb2 as pb

from gateway.routing import ReplicaKey

MAX_REMEMBERED = 16_384
# The first messages tell conversations apart; later ones would only repeat it.
MAX_BOUNDARIES = 8
# Prefixes shorter than this, some hundred tokens, are computed again faster than they are worth a detour.
MIN_PREFIX_BYTES = 512
# Of one text or one file's bytes. Whoever differs only later is taken for the same, which costs nothing but time.
_MAX_HASHED_BYTES = 16 * 1024
_TEXT_CUTS = (1024, 8 * 1024, 64 * 1024)
_TOKEN_CUTS = (256, 2048, 16 * 1024)


class _Hash:
    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_bytes = 0

    def feed(self, data: str | bytes, *, counts: bool = True) -> None:
        raw = data[:_MAX_HASHED_BYTES].encode("utf-8", "replace") if isinstance(data, str) else data[:_MAX_HASHED_BYTES]
        self._hash.update(b"%d\0" % len(data))
        self._hash.update(raw)
        self.num_bytes += len(data) if counts else 0

    def digest(self) -> bytes:
        return self._hash.copy().digest()


def prefix_hashes(model: str, request: pb.GenerateRequest) -> list[bytes]:
    """Return a hash for each of the prompt's beginnings that is worth remembering, shortest first."""
    hashed = _Hash()
    for name in (model, request.adapter, request.cache_scope):
        hashed.feed(name, counts=False)
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        return _of_chat(hashed, request.chat)
    if kind == "text":
        return _of_cuts(hashed, request.text.encode("utf-8", "replace"), _TEXT_CUTS)
    ids = array("I", request.token_ids.ids[: _TOKEN_CUTS[-1]])
    return _of_cuts(hashed, ids.tobytes(), [num_ids * ids.itemsize for num_ids in _TOKEN_CUTS])


def _of_chat(hashed: _Hash, chat: pb.Chat) -> list[bytes]:
    # Tools and template variables stand in the rendered prompt before the first message.
    hashed.feed(chat.template_kwargs_json, counts=False)
    for tool in chat.tools:
        hashed.feed(tool.SerializeToString(deterministic=True))
    hashes = []
    for message in chat.messages[:MAX_BOUNDARIES]:
        hashed.feed(b"%d" % message.role, counts=False)
        for part in message.parts:
            kind = part.WhichOneof("part")
            if kind == "text":
                hashed.feed(part.text)
            elif kind is not None:
                hashed.feed(getattr(part, kind).data)
        for call in message.tool_calls:
            hashed.feed(call.SerializeToString(deterministic=True))
        if hashed.num_bytes >= MIN_PREFIX_BYTES:
            hashes.append(hashed.digest())
    return hashes


def _of_cuts(hashed: _Hash, data: bytes, cuts: Sequence[int]) -> list[bytes]:
    hashes = []
    begin = 0
    for cut in cuts:
        if len(data) < cut:
            break
        for at in range(begin, cut, _MAX_HASHED_BYTES):
            hashed.feed(data[at : min(cut, at + _MAX_HASHED_BYTES)])
        begin = cut
        hashes.append(hashed.digest())
    return hashes


class Affinity:
    """Where prompts' beginnings were sent last; the `max_remembered` latest. One event loop."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._replicas: OrderedDict[bytes, ReplicaKey] = OrderedDict()

    def recall(self, hashes: Sequence[bytes], among: Collection[ReplicaKey]) -> ReplicaKey | None:
        """Return the replica of `among` that holds the longest beginning; None if none is known to hold any."""
        for digest in reversed(hashes):
            if (replica := self._replicas.get(digest)) in among:
                return replica
        return None

    def remember(self, hashes: Sequence[bytes], replica: ReplicaKey) -> None:
        """Note that all these beginnings are with `replica` from now on."""
        for digest in hashes:
            self._replicas[digest] = replica
            self._replicas.move_to_end(digest)
        while len(self._replicas) > self._max_remembered:
            self._replicas.popitem(last=False)
