"""Paged attention over rows of any kind: prefill chunk, decode, denoise, draft and verify in one
call.

The mask is one integer a row: how many KV entries, from position 0 on, it sees. Causal rows see
themselves and what is before them; rows of a block pass see to the end of their block.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trimode.kernels.kv_cache import KVCache

MAX_TILE_LEN = 32


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows cut into tiles of one sequence each, for the reference; built once a pass, used by every
    layer.
    """

    rows: Tensor  # [num_tiles, tile_len] int64, num_tokens where a lane is empty
    slots: Tensor  # [num_tiles, context_len] int64: where the tile's sequence keeps each position
    mask: Tensor | None  # [num_tiles, 1, tile_len, context_len] bool, None where all see all
    are_all_rows: bool  # the tiles are all rows of the pass, in order and without an empty lane
    _biases: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype, group: int) -> Tensor | None:
        """The mask as what is added to the scores of `group` heads packed into one product:
        [num_tiles, 1, group * tile_len, context_len]. The first layer of a pass makes it.
        """
        if self.mask is None:
            return None
        bias = self._biases.get((dtype, group))
        if bias is None:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            bias = bias.masked_fill_(~self.mask, -torch.inf).repeat(1, 1, group, 1)
            self._biases[dtype, group] = bias
        return bias


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What every layer's attention of one pass shares."""

    visible: Tensor  # [num_tokens] int64, 0 for padding rows
    # Single-row tiles apart from longer ones, so that decode rows are not padded.
    tiles: tuple[Tiles, ...]

    @classmethod
    def build(
        cls,
        query_start: np.ndarray,  # [num_sequences + 1]: rows of sequence i
        visible: np.ndarray,  # [num_tokens] int64
        page_table: np.ndarray,  # [num_sequences, num_pages] int64
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "AttentionInputs":
        lens = np.diff(query_start)
        groups = [np.flatnonzero(lens == 1), np.flatnonzero(lens > 1)]
        tiles = tuple(
            _tiles(members, query_start, visible, page_table, page_size, device)
            for members in groups
            if len(members)
        )
        return cls(torch.as_tensor(visible, device=device), tiles)


def _tiles(
    members: np.ndarray,  # [num_members]: sequences
    query_start: np.ndarray,
    visible: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    device: torch.device | str,
) -> Tiles:
    num_tokens = len(visible)
    owner, rows = _cut(members, query_start, num_tokens)
    is_empty = rows == num_tokens
    seen = np.append(visible, 0)[rows]  # [num_tiles, tile_len]
    reach = seen.max(axis=1, keepdims=True)
    position = np.arange(reach.max())
    slots = page_table[owner[:, None], position // page_size] * page_size + position % page_size
    # Lanes past what a tile sees read its first slot: masked, but finite, for 0 × NaN would be NaN.
    slots = np.where(position < reach, slots, slots[:, :1])
    # Empty lanes see what their tile does: no NaN.
    mask = position < np.where(is_empty, reach, seen)[..., None]
    are_all_rows = rows.size == num_tokens and bool((rows.ravel() == np.arange(num_tokens)).all())
    return Tiles(
        rows=torch.as_tensor(rows, device=device),
        slots=torch.as_tensor(slots, device=device),
        mask=None if mask.all() else torch.as_tensor(mask[:, None], device=device),
        are_all_rows=are_all_rows,
    )


def _cut(
    members: np.ndarray, query_start: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sequence of each tile [num_tiles] and its rows [num_tiles, tile_len], num_tokens where a
    lane is empty.
    """
    first, end = query_start[members], query_start[members + 1]
    lens = end - first
    tile_len = min(MAX_TILE_LEN, int(lens.max()))
    if tile_len == 1:
        return members, first[:, None]
    tiles_of = -(-lens // tile_len)
    owner = np.repeat(np.arange(len(members)), tiles_of)
    index = np.arange(len(owner)) - np.repeat(tiles_of.cumsum() - tiles_of, tiles_of)
    rows = (first[owner] + index * tile_len)[:, None] + np.arange(tile_len)
    rows[rows >= end[owner][:, None]] = num_tokens
    return members[owner], rows


def paged_attention_reference(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    cache: KVCache,
    layer: int,
    inputs: AttentionInputs,
) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v over the entries each row sees; like query. Padding rows
    give exactly 0.
    """
    num_tokens = len(query)
    entries = cache.layers[layer]  # [num_slots, 2, num_kv_heads, head_dim]
    if len(inputs.tiles) == 1 and inputs.tiles[0].are_all_rows:
        return _attend(query, entries, inputs.tiles[0])
    out = query.new_zeros(num_tokens + 1, *query.shape[1:])  # the last row takes the empty lanes
    for tiles in inputs.tiles:
        rows = tiles.rows.flatten()
        # What an empty lane asks does not matter, as nobody reads its answer.
        packed = query.index_select(0, rows.clamp(max=num_tokens - 1))
        out.index_copy_(0, rows, _attend(packed, entries, tiles))
    return out[:num_tokens]


def _attend(query: Tensor, entries: Tensor, tiles: Tiles) -> Tensor:
    """query [num_tiles * tile_len, num_heads, head_dim], result likewise.

    The heads that share a KV head are packed into the query dimension of one product.
    """
    num_tiles, tile_len = tiles.rows.shape
    num_kv_heads, head_dim = entries.shape[2:]
    group = query.shape[1] // num_kv_heads
    # index_select copies whole slots, many times faster than indexing does.
    gathered = entries.flatten(1).index_select(0, tiles.slots.view(-1))
    gathered = gathered.view(num_tiles, -1, 2, num_kv_heads, head_dim)
    key, value = gathered.transpose(1, 3).unbind(2)  # [num_tiles, num_kv_heads, context_len, ..]
    if tile_len == 1:
        packed = query.reshape(num_tiles, num_kv_heads, group, head_dim)
    else:
        packed = query.view(num_tiles, tile_len, num_kv_heads, group, head_dim)
        packed = packed.permute(0, 2, 3, 1, 4).flatten(2, 3)
    mixed = functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=tiles.bias(query.dtype, group)
    )  # [num_tiles, num_kv_heads, group * tile_len, head_dim]
    if tile_len > 1:
        mixed = mixed.unflatten(2, (group, tile_len)).permute(0, 3, 1, 2, 4)
    return mixed.reshape(query.shape)


paged_attention = paged_attention_reference
