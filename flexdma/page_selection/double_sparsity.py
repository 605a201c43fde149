"""Double Sparsity: scores over a few channels pick the keys that a token reads.

Yang et al., "Post-Training Sparse Attention with Double Sparsity", arXiv 2408.07092.
"""

from torch import Tensor

from flexdma import checks
from flexdma.page_selection.pages import attend_to_pages, one_token


def double_sparsity_channels(query: Tensor, key: Tensor, num_channels: int) -> Tensor:
    """The channels that weigh most, found once on sample data: the largest mean of |q_d k_d| over a token and itself.

    query: [B, Hq, N, D], key: [B, Hkv, N, D], after rotary embeddings.  num_channels: at most D.
    Returns [Hq, num_channels], int64, the largest first.
    """
    checks.attention_arguments(query, key, key)
    checks.positive_int("num_channels", num_channels)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query: expected {key.shape[2]} tokens as key has, got {query.shape[2]}")
    if num_channels > query.shape[3]:
        raise ValueError(f"num_channels: expected at most D = {query.shape[3]}, got {num_channels}")
    products = query.detach() * key.detach().repeat_interleave(query.shape[1] // key.shape[1], 1)
    return products.abs().float().mean((0, 2)).topk(num_channels, dim=-1).indices


def double_sparsity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    channels: Tensor,
    num_keys: int,
    labels: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention of one token to the `num_keys` keys of a full cache whose products over `channels` are largest.

    query: [B, Hq, 1, D], the newest token.  key: [B, Hkv, K, D].  value: [B, Hkv, K, Dv].
    channels: [Hq, r], of `double_sparsity_channels`.
    labels: [B, Hq, K, r], those channels of the keys, if the caller keeps them in memory of their own, as the paper does;
        None gathers them from `key`.
    num_keys: K or more = full attention.  Of equal products any.
    scale: of the attention; None = D ** -0.5.  key_padding_mask: [B, K], True for real keys.

        q = [3 1 0], channels = [0], keys (1 0 0)(0 9 9)(2 0 0), num_keys = 2      picks keys 0 and 2: 3 and 6 > 0

    Returns [B, Hq, 1, Dv].  O(K r + num_keys D) per query head with labels.  Values and labels are not quantized here.
    Raises ValueError or TypeError naming the argument.
    """
    one_token(query, key, value, key_padding_mask)
    checks.positive_int("num_keys", num_keys)
    (batch, query_heads, _one, _size), keys = query.shape, key.shape[2]
    width = checks.tensor("channels", channels, (query_heads, "r"), query).shape[1]
    if labels is None:
        index = channels.expand(batch, -1, -1)[:, :, None].expand(-1, -1, keys, -1)
        labels = key.repeat_interleave(query_heads // key.shape[1], 1).gather(-1, index)
    checks.tensor("labels", labels, (batch, query_heads, keys, width), query)
    part = query.gather(-1, channels.expand(batch, -1, -1)[:, :, None])
    scores = (part @ labels.mT)[:, :, 0]  # [B, Hq, K]
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None], float("-inf"))
    picked = scores.topk(min(num_keys, keys), dim=-1).indices
    return attend_to_pages(query, key, value, picked, page_size=1, scale=scale, key_padding_mask=key_padding_mask)
