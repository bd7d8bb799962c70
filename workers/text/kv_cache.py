"""Which cache block holds what: allocation, sharing of equal prefixes, eviction. Pure bookkeeping, no tensors.

Above: the scheduler. Beside it: each runner keeps keys and values in its own layout, addressed by the block indices
given here. A block holds `BLOCK_TOKENS` positions of every layer. A full block is known by a hash of everything it
depends on (all tokens up to its end, the cache scope, pictures), so a later prompt with the same beginning takes it
over instead of computing it. Blocks nobody uses stay known until their memory is needed, the least recently used first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

BLOCK_TOKENS = 16
MIN_BLOCKS = 4
"""A cache with fewer is of no use."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """The cache's fixed dimensions.

    Attributes:
        num_layers: layers that attend.
        num_kv_heads: key/value heads of each.
        head_dim: size of one head.
        num_blocks: blocks within the byte budget.
        max_context_tokens: most tokens of one sequence.
        capacity_blocks: to how many a bigger budget could raise them: everybody's whole context.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    max_context_tokens: int
    capacity_blocks: int = 0

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token occupies over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def in_dtype(self, itemsize: int, was: int) -> KVShape:
        """Return the shape of a cache with as many bytes, whose elements have another size."""
        num_blocks = max(MIN_BLOCKS, self.num_blocks * was // itemsize)
        return replace(
            self, num_blocks=num_blocks, max_context_tokens=min(self.max_context_tokens, num_blocks * BLOCK_TOKENS)
        )


def blocks_for(num_tokens: int) -> int:
    """Return how many blocks hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class PrefixHashes:
    """Hashes of a sequence's full blocks, each over everything up to its end; grows with the sequence.

    Args:
        root: what else the whole sequence depends on: cache scope, adapter.
        extras: (position, content hash) of inputs that are not tokens; each enters the block of its position.
    """

    __slots__ = ("_extras", "_hashes", "_root")

    def __init__(self, root: bytes = b"", extras: Iterable[tuple[int, bytes]] = ()) -> None:
        self._root = root
        self._hashes: list[bytes] = []
        self._extras: dict[int, bytes] = {}
        for position, content in extras:
            block = position // BLOCK_TOKENS
            self._extras[block] = self._extras.get(block, b"") + position.to_bytes(8, "little") + content

    def of(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """Return the hashes of the first `num_blocks` blocks of a sequence that must hold as many tokens."""
        while len(self._hashes) < num_blocks:
            index = len(self._hashes)
            digest = blake2b(self._hashes[-1] if self._hashes else self._root, digest_size=16)
            tokens = token_ids[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            digest.update(array("q", tokens).tobytes())
            digest.update(self._extras.get(index, b""))
            self._hashes.append(digest.digest())
        return self._hashes[:num_blocks]


class BlockPool:
    """The blocks of one model's cache. Used by the engine's thread only.

    Every block is in one of three states: in use (some sequences hold it), known (nobody holds it, its contents may be
    taken over), or free. Once it was given out, memory stands behind it until a resize takes it away.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._known: OrderedDict[int, None] = OrderedDict()
        self._backed: set[int] = set()

    @property
    def num_backed(self) -> int:
        """Blocks that were written since they came to be."""
        return len(self._backed)

    @property
    def kept(self) -> dict[int, int]:
        """Every held or known block, as itself: what a larger cache must still have."""
        return {block: block for block in set(range(self.num_blocks)).difference(self._free)}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give: free ones and known ones that nobody holds."""
        return len(self._free) + len(self._known)

    @property
    def num_in_use(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.num_available

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest beginning that is known or in use; holds nothing yet."""
        found: list[int] = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, block: int) -> None:
        """Take part in a block that `match` found."""
        if self._holders[block] == 0:
            del self._known[block]
        self._holders[block] += 1

    def is_held(self, block: int) -> bool:
        """Whether some sequence holds the block."""
        return self._holders[block] > 0

    def allocate(self) -> int | None:
        """Return a block for new contents, held once; None when all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._known:
            block, _ = self._known.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        self._backed.add(block)
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Say that a held block is full and what it holds. When another holds the same, that one stays the known."""
        if self._hash[block] is None and digest not in self._by_hash:
            self._hash[block] = digest
            self._by_hash[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks; the last ones of a prompt are evicted before its first ones."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._known[block] = None

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Have so many blocks from now on, or as many as are held, if those are more.

        Known blocks go first, the least recently used before the others. Contents that stay may have to move below the
        new end: the caller moves them, and renumbers what its sequences hold.

        Returns:
            The new index of every held or known block, most of them unchanged.
        """
        num_blocks = max(num_blocks, self.num_in_use)
        while self.num_in_use + len(self._known) > num_blocks:
            block, _ = self._known.popitem(last=False)
            self._forget(block)
            self._free.append(block)
        staying = set(range(self.num_blocks)).difference(self._free)
        gaps = (block for block in range(num_blocks) if block not in staying)
        kept = {block: block if block < num_blocks else next(gaps) for block in sorted(staying)}
        self._backed = {block for block in self._backed if block < num_blocks} | set(kept.values())
        holders, hashes = self._holders, self._hash
        self._holders, self._hash = [0] * num_blocks, [None] * num_blocks
        for old, new in kept.items():
            self._holders[new], self._hash[new] = holders[old], hashes[old]
        self._by_hash = {digest: kept[block] for digest, block in self._by_hash.items()}
        self._known = OrderedDict((kept[block], None) for block in self._known)
        taken = set(kept.values())
        # Those with memory behind them are given out first.
        fresh = [block for block in range(num_blocks - 1, -1, -1) if block not in taken]
        self._free = [b for b in fresh if b not in self._backed] + [b for b in fresh if b in self._backed]
        self.num_blocks = num_blocks
        return kept

    def clear(self) -> None:
        """Forget every known block, and that any was written: the contents are lost. Held blocks stay held."""
        for block in self._known:
            self._free.append(block)
        self._known.clear()
        self._by_hash.clear()
        self._backed = {block for block, holders in enumerate(self._holders) if holders}
        self._hash = [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        digest = self._hash[block]
        assert digest is not None
        del self._by_hash[digest]
        self._hash[block] = None
