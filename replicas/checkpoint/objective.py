"""The training objectives, from arXiv 2607.05722: the joint loss of section 3 and the draft
adapter's of 3.3.

Both work on doubled sequences, [noisy | clean], so that one pass gives the diffusion and the causal
predictions. Positions restart in each half. The noisy half sees itself inside a block and the clean
half strictly before that block; the clean half is causal and never sees noise.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.rope import Rotary
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel, dense_attention

DIFFUSION_WEIGHT = 0.3  # alpha of equation 3; the AR loss has weight 1
MASK_EPSILON = 1e-3
# Our addition to the paper's random masks: this share of the sequences is masked as a draft pass
# has it, one known token a block and only masks behind it. An accepted draft needs all drafts
# before it to be right, so there a token's weight falls with its distance from the known one.
DRAFT_SHARE = 0.5
DRAFT_DECAY = 0.9
ADAPTER_TEMPERATURE = 3.0
ADAPTER_TOP_K = 200


def doubled_mask(seq_len: int, block_size: int) -> Tensor:
    """[2 * seq_len, 2 * seq_len] bool, True where the row may see the column."""
    position = torch.arange(seq_len)
    block = position // block_size
    noisy_noisy = block[:, None] == block[None, :]
    noisy_clean = block[None, :] < block[:, None]
    clean_clean = position[None, :] <= position[:, None]
    clean_noisy = torch.zeros(seq_len, seq_len, dtype=torch.bool)
    return torch.cat(
        (torch.cat((noisy_noisy, noisy_clean), 1), torch.cat((clean_noisy, clean_clean), 1))
    )


def run_dense(
    model: NemotronLabsDiffusionModel,
    token_ids: Tensor,  # [batch, len]
    positions: Tensor,  # [len]
    mask: Tensor,  # [len, len] bool
    draft_columns: int = 0,  # the first so many columns run with the draft adapter on
) -> Tensor:
    """Hidden states [batch, len, hidden_size] of a pass without a cache."""
    batch, length = token_ids.shape

    def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        return dense_attention(qkv, rotary, mask, batch)

    rows = None
    if draft_columns:
        rows = DraftRows((torch.arange(length) < draft_columns).repeat(batch))
    hidden: Tensor = model(token_ids.flatten(), positions.repeat(batch), attend, rows)
    return hidden.view(batch, length, -1)


def ar_loss(model: NemotronLabsDiffusionModel, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy; tokens [batch, len]."""
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = run_dense(model, tokens, torch.arange(length), mask)
    logits = model.logits(hidden[:, :-1].flatten(0, 1)).float()
    return functional.cross_entropy(logits, tokens[:, 1:].flatten())


def joint_loss(
    model: NemotronLabsDiffusionModel, tokens: Tensor, mask: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, AR part, diffusion part) with global averaging; tokens [batch, len], mask from
    doubled_mask.

    t ~ U(0, 1) per sequence, p = (1 - eps) t + eps, every token masked with p, cross-entropy on the
    masked tokens unshifted and weighted 1/p. Both sums share the divisor num_masked +
    num_ar_tokens. A DRAFT_SHARE of the sequences is masked and weighted for drafting instead.
    """
    batch, length = tokens.shape
    ratio = torch.rand(batch, 1, generator=generator) * (1 - MASK_EPSILON) + MASK_EPSILON
    masked = torch.rand(batch, length, generator=generator) < ratio
    drafting = torch.rand(batch, 1, generator=generator) < DRAFT_SHARE
    offset = torch.arange(length) % model.config.block_size
    decay = DRAFT_DECAY ** (offset - 1.0)
    masked = torch.where(drafting, offset > 0, masked)
    weight = torch.where(drafting, decay / decay[offset > 0].mean(), 1 / ratio)
    noisy = tokens.masked_fill(masked, model.config.mask_id)
    positions = torch.arange(length).repeat(2)
    hidden = run_dense(model, torch.cat((noisy, tokens), 1), positions, mask)
    rows, columns = masked.nonzero(as_tuple=True)
    picked = torch.cat((hidden[rows, columns], hidden[:, length:-1].flatten(0, 1)))
    targets = torch.cat((tokens[rows, columns], tokens[:, 1:].flatten()))
    losses = functional.cross_entropy(model.logits(picked).float(), targets, reduction="none")
    diffusion, ar = losses[: len(rows)] * weight[rows, columns], losses[len(rows) :]
    loss = (ar.sum() + DIFFUSION_WEIGHT * diffusion.sum()) / len(losses)
    return loss, ar.mean().detach(), diffusion.sum().detach() / (batch * length)


def adapter_loss(
    model: NemotronLabsDiffusionModel, tokens: Tensor, mask: Tensor, prompt_len: int
) -> tuple[Tensor, Tensor]:
    """(loss, mean accepted drafts per block) of one-pass drafts against the causal verifier on the
    same text.

    Every block keeps its first token and masks the rest, as a draft pass has it. Loss = LK + CE,
    where LK = l KL(p||q) + (1 - l) TV over the teacher's and student's top tokens at temperature 3
    and l falls with the acceptance (arXiv 2602.23881), on active positions only: the accepted
    prefix and the first rejected draft. Blocks of the first prompt_len tokens are context alone.
    """
    batch, length = tokens.shape
    block_size = model.config.block_size
    known = torch.arange(length) % block_size == 0
    noisy = torch.where(known, tokens, model.config.mask_id)
    positions = torch.arange(length).repeat(2)
    hidden = run_dense(model, torch.cat((noisy, tokens), 1), positions, mask, draft_columns=length)
    drafted = torch.arange(length)[~known & (torch.arange(length) >= prompt_len)]
    student = model.logits(hidden[:, drafted]).float()  # [batch, num_drafted, vocab_size]
    with torch.no_grad():
        teacher = model.logits(hidden[:, length + drafted - 1]).float()
        wanted = teacher.argmax(-1)
        agrees = (student.argmax(-1) == wanted).view(batch, -1, block_size - 1)
        prefix = agrees.long().cumprod(-1)
        active = torch.cat((torch.ones_like(prefix[..., :1]), prefix[..., :-1]), -1).bool()
    picked = active.flatten()
    student, teacher = student.flatten(0, 1)[picked], teacher.flatten(0, 1)[picked]
    cross_entropy = functional.cross_entropy(student, wanted.flatten()[picked])
    loss = _acceptance_divergence(teacher, student) + cross_entropy
    return loss, prefix.sum(-1).float().mean()


def _acceptance_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """The LK loss of [num_rows, vocab_size] logits on the union of both top-k supports."""
    top_k = min(ADAPTER_TOP_K, teacher.shape[-1])
    floor = [part.topk(top_k, -1).values[:, -1:] for part in (teacher, student)]
    outside = (teacher < floor[0]) & (student < floor[1])
    p = (teacher / ADAPTER_TEMPERATURE).masked_fill(outside, -1e9).softmax(-1)
    log_q = (student / ADAPTER_TEMPERATURE).masked_fill(outside, -1e9).log_softmax(-1)
    q = log_q.exp()
    acceptance = torch.minimum(p, q).sum(-1)
    share = torch.exp(-0.5 * acceptance.detach())
    divergence = (p * (p.clamp_min(1e-12).log() - log_q)).masked_fill(outside, 0).sum(-1)
    variation = 0.5 * (p - q).abs().sum(-1)
    return (share * divergence + (1 - share) * variation).mean()
