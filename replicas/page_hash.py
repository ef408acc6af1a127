"""Page hashes: chained xxh3 over the token ids of full pages, so that one number names a prefix.

A hash finds a page, it never proves one: who serves a page compares its token ids and salt, too.
"""

from collections.abc import Sequence

import numpy as np
import xxhash


def root_hash(revision: str, salt: str) -> int:
    """What the first page of a text is chained to: the model's revision and the tenant's salt."""
    return xxhash.xxh3_64_intdigest(f"{len(revision)}:{revision}{salt}".encode())


def page_bytes(token_ids: Sequence[int]) -> bytes:
    """A page's token ids as they are hashed and compared: four bytes each, little-endian."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


def page_hash(parent: int, text: bytes) -> int:
    """64-bit hash of one full page, given as page_bytes, after the page (or root) hashed parent."""
    return xxhash.xxh3_64_intdigest(text, seed=parent)
