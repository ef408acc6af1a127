"""Rows cut into dense products, as paged attention's reference computes them on a CPU."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MAX_TILE_LEN = 32


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows cut into tiles of one sequence each, all of the same size."""

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

    def attend(self, query: Tensor, entries: Tensor) -> Tensor:
        """query [num_tiles * tile_len, num_heads, head_dim], result likewise; entries
        [num_slots, 2, num_kv_heads, head_dim].

        The heads that share a KV head are packed into the query dimension of one product.
        """
        num_tiles, tile_len = self.rows.shape
        num_kv_heads, head_dim = entries.shape[2:]
        group = query.shape[1] // num_kv_heads
        # index_select copies whole slots, many times faster than indexing does.
        gathered = entries.flatten(1).index_select(0, self.slots.view(-1))
        gathered = gathered.view(num_tiles, -1, 2, num_kv_heads, head_dim)
        key, value = gathered.transpose(1, 3).unbind(2)  # [num_tiles, num_kv_heads, context_len, .]
        if tile_len == 1:
            packed = query.reshape(num_tiles, num_kv_heads, group, head_dim)
        else:
            packed = query.view(num_tiles, tile_len, num_kv_heads, group, head_dim)
            packed = packed.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = functional.scaled_dot_product_attention(
            packed, key, value, attn_mask=self.bias(query.dtype, group)
        )  # [num_tiles, num_kv_heads, group * tile_len, head_dim]
        if tile_len > 1:
            mixed = mixed.unflatten(2, (group, tile_len)).permute(0, 3, 1, 2, 4)
        return mixed.reshape(query.shape)


def build_tiles(
    cuts: np.ndarray,  # [num_cuts, 3]: sequence, first row, end row; in the order of rows
    visible: np.ndarray,  # [num_tokens]
    page_table: np.ndarray,  # [num_sequences, num_pages]
    page_size: int,
    device: torch.device,
) -> list[Tiles]:
    """Single-row tiles apart from longer ones, so that decode rows are not padded. Rows that see
    nothing are in none.
    """
    if cuts[-1, 2] < len(visible) or not visible.all():
        cuts = cuts[(cuts[:, 1] < cuts[:, 2]) & (visible[cuts[:, 1]] > 0)]
        if len(cuts) == 0:
            return []
    owner, first, end = cuts.T
    is_other = owner[1:] != owner[:-1]
    if np.count_nonzero(is_other) < len(is_other):
        # The cuts of a sequence are put together again: other sizes are right here.
        owner, first = cuts[np.append(True, is_other), :2].T
        end = end[np.append(is_other, True)]
    is_single = end - first == 1
    if np.count_nonzero(is_single) in (0, len(first)):
        return [_tiles(owner, first, end, visible, page_table, page_size, device)]
    return [
        _tiles(owner[members], first[members], end[members], visible, page_table, page_size, device)
        for members in (is_single, ~is_single)
    ]


def _tiles(
    owner: np.ndarray,  # [num_members]: sequences
    first: np.ndarray,  # [num_members]: their first rows
    end: np.ndarray,  # [num_members]
    visible: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    device: torch.device,
) -> Tiles:
    num_tokens = len(visible)
    members, rows = _cut(first, end, num_tokens)
    is_empty = rows == num_tokens
    seen = np.append(visible, 0)[rows]  # [num_tiles, tile_len]
    reach = seen.max(axis=1, keepdims=True)
    position = np.arange(reach.max())
    pages = page_table[owner[members][:, None], position // page_size]
    slots = pages.astype(np.int64) * page_size + position % page_size
    # Lanes past what a tile sees read its first slot: masked, but finite, for 0 × NaN would be NaN.
    slots = np.where(position < reach, slots, slots[:, :1])
    # Empty lanes see what their tile does: no NaN.
    mask = position < np.where(is_empty, reach, seen)[..., None]
    are_all_rows = rows.size == num_tokens and bool((rows.ravel() == np.arange(num_tokens)).all())
    return Tiles(
        rows=torch.as_tensor(rows.astype(np.int64, copy=False), device=device),
        slots=torch.as_tensor(slots, device=device),
        mask=None if mask.all() else torch.as_tensor(mask[:, None], device=device),
        are_all_rows=are_all_rows,
    )


def _cut(first: np.ndarray, end: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The member of each tile [num_tiles] and its rows [num_tiles, tile_len], num_tokens where a
    lane is empty.
    """
    lens = end - first
    tile_len = min(MAX_TILE_LEN, int(lens.max()))
    if tile_len == 1:
        return np.arange(len(first)), first[:, None]
    tiles_of = -(-lens // tile_len)
    owner = np.repeat(np.arange(len(first)), tiles_of)
    index = np.arange(len(owner)) - np.repeat(tiles_of.cumsum() - tiles_of, tiles_of)
    rows = (first[owner] + index * tile_len)[:, None] + np.arange(tile_len)
    rows[rows >= end[owner][:, None]] = num_tokens
    return owner, rows
