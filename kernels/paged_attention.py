"""Paged attention over rows of any kind: prefill chunk, decode, denoise, draft and verify in one
call.

The mask is one integer a row: how many KV entries, from position 0 on, it sees. Causal rows see
themselves and what is before them; rows of a block pass see to the end of their block.
"""

from dataclasses import dataclass

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
    mask: Tensor  # [num_tiles, 1, tile_len, context_len] bool


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What every layer's attention of one pass shares."""

    visible: Tensor  # [num_tokens] int64, 0 for padding rows
    tiles: tuple[
        Tiles, ...
    ]  # single-row tiles apart from longer ones, so that decode rows are not padded

    @classmethod
    def build(
        cls,
        query_start: np.ndarray,  # [num_sequences + 1]: rows of sequence i
        context_lens: np.ndarray,  # [num_sequences]: KV entries after this pass's write
        visible: Tensor,  # [num_tokens] int64
        page_table: Tensor,  # [num_sequences, num_pages] int64
        page_size: int,
    ) -> "AttentionInputs":
        lens = np.diff(query_start)
        groups = []
        for members in (np.flatnonzero(lens == 1), np.flatnonzero(lens > 1)):
            if len(members):
                tile_len = min(MAX_TILE_LEN, int(lens[members].max()))
                groups.append(
                    _tiles(
                        members, tile_len, query_start, context_lens, visible, page_table, page_size
                    )
                )
        return cls(visible, tuple(groups))


def _tiles(
    members: np.ndarray,
    tile_len: int,
    query_start: np.ndarray,
    context_lens: np.ndarray,
    visible: Tensor,
    page_table: Tensor,
    page_size: int,
) -> Tiles:
    num_tokens, device = len(visible), visible.device
    tiles_of = -(-np.diff(query_start)[members] // tile_len)
    owner = np.repeat(members, tiles_of)  # [num_tiles]: sequence of each tile
    index = np.arange(len(owner)) - np.repeat(tiles_of.cumsum() - tiles_of, tiles_of)
    rows = (query_start[owner] + index * tile_len)[:, None] + np.arange(tile_len)
    rows[rows >= query_start[owner + 1][:, None]] = num_tokens
    tile_rows = torch.from_numpy(rows).to(device)

    position = torch.arange(int(context_lens[members].max()), device=device)  # [context_len]
    tables = page_table[torch.from_numpy(owner).to(device)]
    slots = tables[:, position // page_size] * page_size + position % page_size
    # Lanes past a sequence's end read its first slot: masked, but finite, for 0 × NaN would be NaN.
    ends = torch.from_numpy(context_lens[owner]).to(device)[:, None]
    slots = torch.where(position < ends, slots, slots[:, :1])
    seen = functional.pad(visible, (0, 1), value=1)[tile_rows]  # empty lanes see one entry: no NaN
    return Tiles(tile_rows, slots, (position < seen[..., None])[:, None])


def paged_attention_reference(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    cache: KVCache,
    layer: int,
    inputs: AttentionInputs,
) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v over the entries each row sees; like query. Padding rows
    give exactly 0.

    The heads that share a KV head are packed into the query dimension of one product.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = cache.keys.shape[2]
    group = num_heads // num_kv_heads
    out = query.new_zeros(num_tokens + 1, num_heads, head_dim)
    padded = functional.pad(query, (0, 0, 0, 0, 0, 1))  # the row that empty lanes read
    for tiles in inputs.tiles:
        num_tiles, tile_len = tiles.rows.shape
        q = padded[tiles.rows].view(num_tiles, tile_len, num_kv_heads, group, head_dim)
        q = q.permute(0, 2, 3, 1, 4).flatten(
            2, 3
        )  # [num_tiles, num_kv_heads, group * tile_len, head_dim]
        k = cache.keys[layer][tiles.slots].transpose(
            1, 2
        )  # [num_tiles, num_kv_heads, context_len, ..]
        v = cache.values[layer][tiles.slots].transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=tiles.mask.repeat(1, 1, group, 1)
        )
        mixed = mixed.unflatten(2, (group, tile_len)).permute(0, 3, 1, 2, 4)
        out[tiles.rows] = mixed.reshape(num_tiles, tile_len, num_heads, head_dim)
    return out[:num_tokens]


paged_attention = paged_attention_reference
