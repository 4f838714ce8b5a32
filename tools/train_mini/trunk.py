"""A fast forward pass for training over the parameters of transformers' GptOssForCausalLM; see train_mini.py."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # attention block size; every sequence length is a multiple of it


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attend(q, k, v, sinks, mask, scale):
    """q (1, heads, N, 64), k and v (1, kv heads, N, 64) -> (1, heads, N, 64); softmax with one extra logit per head."""
    if q.is_cuda:
        o, lse = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_lse=True)
        return o * torch.sigmoid(lse - sinks[None, :, None])[..., None].to(o.dtype)
    # plain version, for tests on a CPU
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return torch.cat((s, sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)), -1).softmax(-1)[..., :-1] @ v


def layer_forward(x, P, cos, sin, mask, drop, dims):
    """One decoder layer on x (N, hidden). P: the layer's parameters by name. Returns x and the load-balancing loss."""
    (nq, nkv, d, E, k_top, inner, eps), N = dims, x.shape[0]

    def dropout(t):
        return t * ((torch.rand_like(t, dtype=torch.float32) >= drop) / (1 - drop)).to(t.dtype)

    def linear(t, name):
        return F.linear(t, P[f"self_attn.{name}.weight"], P[f"self_attn.{name}.bias"])

    h = rms_norm(x, P["input_layernorm.weight"], eps)
    q, k, v = (
        linear(h, n).view(N, m, d).transpose(0, 1)[None] for n, m in (("q_proj", nq), ("k_proj", nkv), ("v_proj", nkv))
    )
    o = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, P["self_attn.sinks"], mask, d**-0.5)
    x = x + dropout(linear(o[0].transpose(0, 1).reshape(N, nq * d), "o_proj"))

    h = rms_norm(x, P["post_attention_layernorm.weight"], eps)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(h.float(), P["mlp.router.weight"], P["mlp.router.bias"])
    top, idx = logits.topk(k_top, -1)
    w = torch.zeros_like(logits).scatter(1, idx, top.softmax(-1))  # (N, E), zero where not chosen
    gu = h @ P["mlp.experts.gate_up_proj"].permute(1, 0, 2).reshape(-1, E * 2 * inner)
    gu = gu.view(N, E, 2 * inner) + P["mlp.experts.gate_up_proj_bias"].to(gu.dtype)
    gate, up = gu[..., ::2].clamp(max=7.0), gu[..., 1::2].clamp(-7.0, 7.0)  # interleaved, clamped
    a = (up + 1) * gate * torch.sigmoid(1.702 * gate) * w[..., None]
    y = a.to(gu.dtype).reshape(N, E * inner) @ P["mlp.experts.down_proj"].reshape(E * inner, -1)
    y = y + w @ P["mlp.experts.down_proj_bias"]
    used = torch.zeros_like(logits).scatter(1, idx, 1.0).mean(0)
    return x + dropout(y), E * (used * logits.softmax(-1).mean(0)).sum()


def head(x, norm_weight, weight, targets, eps):
    """Per-token cross entropy and whether the arg-max is the target."""
    logits = F.linear(rms_norm(x, norm_weight, eps), weight).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def block_table(N, T, mods, device, window=None):
    """BlockMask of N tokens = N/T causal sequences end to end, with a window if given; shapes depend on N alone."""
    nb, per = N // BLOCK, T // BLOCK
    q, j = torch.arange(nb), torch.arange(nb)[None]
    start = q // per * per  # first block of the sequence that block q is in
    if window is None:  # blocks before the diagonal whole, diagonal masked
        part_n, part_i, full_n, full_i = torch.ones(nb), q[:, None] + 0 * j, q - start, start[:, None] + j
        mod = mods["causal"]
    else:  # all masked
        lo = torch.maximum(start, q + (-(window - 1) // BLOCK))
        part_n, part_i, full_n, full_i = q - lo + 1, lo[:, None] + j, torch.zeros(nb), 0 * q[:, None] + 0 * j
        mod = mods["window"]
    parts = (
        t.clamp(max=nb - 1).to(device, torch.int32)[None, None].contiguous() for t in (part_n, part_i, full_n, full_i)
    )
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(N, N))


class Trunk:
    """The training forward pass over the parameters of a GptOssForCausalLM."""

    def __init__(self, hf):
        self.hf, self.cfg, self.device = hf, hf.config, hf.device
        c = self.cfg
        self.dims = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.num_local_experts,
            c.num_experts_per_tok,
            c.intermediate_size,
            c.rms_norm_eps,
        )
        self.layers = [dict(layer.named_parameters()) for layer in hf.model.layers]
        comp = torch.compile(dynamic=False) if hf.device.type == "cuda" else (lambda f: f)
        self.layer, self.head = comp(layer_forward), comp(head)
        W = self.cfg.sliding_window
        self.mods = {"causal": lambda b, h, q, k: q >= k, "window": lambda b, h, q, k: (q >= k) & (q - k < W)}
        self.cache = {}

    def setup(self, N, T):
        """cos, sin, {layer type: mask} for N/T sequences of length T."""
        if (N, T) not in self.cache:
            pos = torch.arange(T, device=self.device)[None]
            cos, sin = self.hf.model.rotary_emb(torch.zeros(1, device=self.device), pos)
            cos, sin = (t[0].repeat(N // T, 1) for t in (cos, sin))
            if self.device.type == "cuda":
                masks = {
                    "full_attention": block_table(N, T, self.mods, self.device),
                    "sliding_attention": block_table(N, T, self.mods, self.device, self.cfg.sliding_window),
                }
            else:
                i = torch.arange(N)
                same = i[:, None] // T == i[None] // T
                masks = {
                    "full_attention": same & self.mods["causal"](0, 0, i[:, None], i[None]),
                    "sliding_attention": same & self.mods["window"](0, 0, i[:, None], i[None]),
                }
            self.cache[N, T] = cos, sin, masks
        return self.cache[N, T]

    def __call__(self, x, y, drop):
        """x, y (B, T) token ids and targets; drop: 0-d tensor. Returns losses and hits (B, T), balance loss."""
        B, T = x.shape
        cos, sin, masks = self.setup(B * T, T)
        h, aux = F.embedding(x.reshape(-1), self.hf.model.embed_tokens.weight), 0.0
        for P, kind in zip(self.layers, self.cfg.layer_types, strict=True):
            h, a = self.layer(h, P, cos, sin, masks[kind], drop, self.dims)
            aux = aux + a
        loss, hit = self.head(
            h, self.hf.model.norm.weight, self.hf.lm_head.weight, y.reshape(-1), self.cfg.rms_norm_eps
        )
        return loss.view(B, T), hit.view(B, T), aux / len(self.layers)
