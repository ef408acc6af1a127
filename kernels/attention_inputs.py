"""What every layer's paged attention of one pass shares: what rows see, where their KV lies, and
how rows are cut into tiles.

The mask is one integer a row: how many KV entries, from position 0 on, it sees. Causal rows see
themselves and what is before them; rows of a block pass see to the end of their block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from torch import Tensor
from torch.nn import functional

from trimode.kernels.attention_tiles import Tiles, build_tiles

# Rows of a tile: with the four query heads that share a KV head in the published models, a product
# of 16 to 128 rows.
MIN_TILE_LEN, MAX_TILE_LEN = 4, 32
INVARIANT_TILE_LEN = 16


def tile_len(num_tokens: int, num_sequences: int, batch_invariant: bool = False) -> int:
    """Rows of a pass's largest tiles: about those of its average sequence, a power of two.

    Decode rows in tiles of long queries would multiply zeros; a prompt cut to the size of decode
    rows would read its KV too often. Shapes alone decide, as a CUDA graph is captured for shapes.
    """
    if batch_invariant:
        return INVARIANT_TILE_LEN
    average = -(-num_tokens // max(1, num_sequences))
    return min(MAX_TILE_LEN, max(MIN_TILE_LEN, 1 << (average - 1).bit_length()))


def max_num_tiles(num_tokens: int, num_sequences: int, batch_invariant: bool = False) -> int:
    """Tiles of a pass of so many rows and at most so many sequences, however rows are shared out.

    Every sequence ends in at most one tile that is not full, and so do the padding rows.
    """
    size = tile_len(num_tokens, num_sequences, batch_invariant)
    return min(num_tokens, (num_tokens + (num_sequences + 1) * (size - 1)) // size)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Tensors of integers whose shapes a CUDA graph can be captured for, and constants that fit the
    shapes.
    """

    visible: Tensor  # [num_tokens]: KV entries each row sees, 0 for padding rows
    page_table: Tensor  # [num_sequences, num_pages], anything beyond a sequence's pages
    # [num_tiles, 3]: sequence, first row, end row. Padding rows are in tiles, too; a tile without
    # rows is all 0.
    tiles: Tensor
    page_size: int
    tile_len: int  # no tile has more rows
    batch_invariant: bool  # a row's result must not hang on the rest of the batch
    _reference: list[Tiles] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        query_start: np.ndarray,  # [num_sequences + 1]: rows of sequence i
        visible: np.ndarray | Tensor,  # [num_tokens]
        page_table: np.ndarray | Tensor,  # [num_sequences, num_pages]
        page_size: int,
        tensor: Callable[[np.ndarray], Tensor],  # moves an array to the device without waiting
        *,
        batch_invariant: bool = False,
        num_tokens: int | None = None,
        num_sequences: int | None = None,
        num_pages: int | None = None,
    ) -> "AttentionInputs":
        """Rows from query_start[-1] on are padding and must see nothing. Arrays become tensors of
        int32; what is a tensor already is on the device, and nobody waits for its values.

        num_tokens, num_sequences, num_pages: sizes to fill up to. Where they are given, all shapes
        hang on them alone.
        """
        is_padded = num_tokens is not None or num_sequences is not None
        num_tokens = len(visible) if num_tokens is None else num_tokens
        num_sequences = len(page_table) if num_sequences is None else num_sequences
        size = tile_len(num_tokens, num_sequences, batch_invariant)
        cuts = _cut(query_start, num_tokens, size)
        if is_padded:
            most = max_num_tiles(num_tokens, num_sequences, batch_invariant)
            cuts = _filled(cuts, (most, 3))
        pages = page_table.shape[1] if num_pages is None else num_pages
        return cls(
            visible=_on_device(visible, (num_tokens,), tensor),
            page_table=_on_device(page_table, (num_sequences, pages), tensor),
            tiles=tensor(cuts),
            page_size=page_size,
            tile_len=size,
            batch_invariant=batch_invariant,
        )

    def seeing(self, visible: Tensor) -> "AttentionInputs":
        """The same pass where rows see so many entries, which the page table must reach."""
        return AttentionInputs(
            visible.to(self.visible.dtype), self.page_table, self.tiles, self.page_size,
            self.tile_len, self.batch_invariant,
        )  # fmt: skip

    def reference_tiles(self) -> list[Tiles]:
        """How the reference cuts the pass. The first layer of a pass finds out; on a GPU it waits
        for the device.
        """
        if not self._reference:
            tiles, visible, page_table = (
                tensor.cpu().numpy() for tensor in (self.tiles, self.visible, self.page_table)
            )
            self._reference.extend(
                build_tiles(tiles, visible, page_table, self.page_size, self.visible.device)
            )
        return self._reference


def _on_device(
    values: np.ndarray | Tensor, shape: tuple[int, ...], tensor: Callable[[np.ndarray], Tensor]
) -> Tensor:
    """With zeros up to this shape."""
    if isinstance(values, np.ndarray):
        return tensor(_filled(values, shape))
    if values.shape == shape:
        return values
    missing = [(0, size - given) for size, given in zip(shape, values.shape, strict=True)]
    return functional.pad(values, tuple(chain.from_iterable(reversed(missing))))


def _filled(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As int32, with zeros up to this shape."""
    if array.shape == shape:
        return array.astype(np.int32, copy=False)
    filled = np.zeros(shape, dtype=np.int32)
    filled[tuple(map(slice, array.shape))] = array
    return filled


def _cut(query_start: np.ndarray, num_tokens: int, size: int) -> np.ndarray:
    """[num_tiles, 3] int32: sequence, first row and end row of every tile, in the order of rows."""
    num_sequences = len(query_start) - 1
    has_padding = query_start[-1] < num_tokens
    if has_padding:
        query_start = np.append(query_start, num_tokens)
    first, end = query_start[:-1], query_start[1:]
    lens = end - first
    owner = np.arange(len(lens))
    if lens.max(initial=0) > size:
        tiles_of = -(-lens // size)
        owner = np.repeat(owner, tiles_of)
        index = np.arange(len(owner)) - np.repeat(tiles_of.cumsum() - tiles_of, tiles_of)
        first = first[owner] + index * size
        end = np.minimum(first + size, end[owner])
    cuts = np.empty((len(owner), 3), dtype=np.int32)
    cuts[:, 0], cuts[:, 1], cuts[:, 2] = owner, first, end
    if has_padding:
        # The sequence of padding rows does not matter, but it must be in the page table.
        cuts[owner == num_sequences, 0] = 0
    return cuts
