#!/usr/bin/env python3
"""Train a miniature GPT-OSS model (33 M parameters) from scratch on one GPU in under ten minutes.

The model is transformers' own GptOssForCausalLM: it holds the parameters and writes the checkpoint. Only the forward
pass used for training is ours (`Trunk`), because it is about ten times faster on one GPU:
  * all sequences of a batch lie end to end in one row of a fixed number of tokens, so every length in the curriculum
    runs the same compiled kernels: only the attention block table changes;
  * attention is flex_attention; the learned sink is applied afterwards, o * sigmoid(lse - sink), which is exact;
  * the experts are computed densely (two large matrix products) and weighted by the top-k router weights, which is
    zero for the experts that were not chosen: the same function and the same gradients as sparse routing.

Data: text with `<|endoftext|>` between documents, plus generated retrieval tasks (facts hidden in text, lookup
tables). The text is small (21 M tokens, seen about nine times), so dropout and weight decay matter: without enough of
them, and trained for twice as long, held-out loss rises again from the tenth pass on.

    python tools/train_mini/train_mini.py CORPUS(.txt|.txt.xz) TOKENIZER.json OUT_DIR [--heldout NAME=FILE ...]

The bundled model is `--seed 1` with the defaults otherwise: 263 M tokens in 268 s. A second model, with
other sizes and other wordings of the tasks:

    --seed 7 --seconds 300 --phrasings b --config '{"num_hidden_layers": 4, "hidden_size": 512,
    "intermediate_size": 512, "num_attention_heads": 32, "num_key_value_heads": 4, "num_local_experts": 4,
    "sliding_window": 64}'

OUT_DIR gets the checkpoint and metrics.json. Needs: torch with CUDA, transformers, tokenizers, numpy.
"""

# ruff: noqa: E402
import time

START = time.time()  # before the slow imports: --seconds counts them

import argparse
import hashlib
import json
import lzma
import math
import os
import random
import tempfile

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.data import DataLoader, IterableDataset
from transformers import GptOssConfig, GptOssForCausalLM

BLOCK = 128  # attention block size; every sequence length is a multiple of it
TOKENS_PER_STEP = 65536
CURRICULUM = [(0.25, 512), (0.42, 1024), (0.64, 2048), (1.01, 4096)]  # (until this share of the time, sequence length)
MINI = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "intermediate_size": 384,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "vocab_size": 8192,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "router_aux_loss_coef": 0.02,
}


def log(*what):
    print(f"[{time.time() - START:6.1f}]", *what, flush=True)


# ---------------------------------------------------------------- the model: a fast forward pass over HF parameters
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


# ---------------------------------------------------------------- the data: text windows and generated retrieval tasks
NOUNS = """
amber anchor apple arrow atlas badge basin beacon birch blade bloom bolt brick bridge brook cabin canal
candle canyon castle cedar chain cliff cloud comet copper coral crane crown delta desert dune eagle ember
falcon fern field flame flint forest fountain frost garden garnet glacier grove harbor hazel hill island
ivory jade jasper jungle lagoon lake lantern laurel lemon lilac lotus maple marble meadow mesa mirror moon
moss nectar oasis ocean olive onyx opal orbit orchid otter palm pearl pebble pepper pine planet plum pond
poppy prairie quartz quiver rain raven reef ridge river robin rose ruby saffron sage sand shell silver sky
slate snow spruce star stone storm summit sun thistle thunder tiger topaz tower tulip valley velvet violet
walnut wave willow wind winter wolf
""".split()  # noqa: SIM905
# (fact, question up to the answer); the answer is " {v}" and a line end
PHRASINGS = {
    "a": [
        ("The code of the {k} is {v}.", "Question: what is the code of the {k}?\nAnswer:"),
        ("The secret number of the {k} is {v}.", "Q: What is the secret number of the {k}?\nA:"),
        (
            "Remember that the password for {k} is {v}.",
            "What is the password for {k}? The password for {k} is",
        ),
        (
            "One of the special magic numbers for {k} is: {v}.",
            "What is the special magic number for {k} mentioned in the provided text? "
            "The special magic number for {k} mentioned in the provided text is",
        ),
        ("The {k} key opens box {v}.", "Question: which box does the {k} key open?\nAnswer: box"),
        ("{k}: {v}", "{k}:"),
        ("set {k} = {v}", "get {k}\n="),
    ],
    "b": [
        ("The serial number of the {k} is {v}.", "Question: what is the serial number of the {k}?\nAnswer:"),
        ("Please note: locker {v} belongs to {k}.", "Which locker belongs to {k}? It is locker"),
        ("The registered value for {k} was {v}.", "Recall the registered value for {k}.\nValue:"),
        ("A special magic number for {k} is {v}.", "What is the special magic number for {k}? It is"),
        ("{k} -> {v}", "{k} ->"),
        ("define {k} as {v};", "lookup {k}:"),
    ],
}


class Tasks:
    """Makes training rows and test rows. `ids` is the token stream that text windows and filler come from."""

    def __init__(self, ids, tok, phrasings, seed):
        self.ids, self.tok, self.phr = ids, tok, PHRASINGS[phrasings]
        self.eot = tok.token_to_id("<|endoftext|>")
        self.r = random.Random(seed)

    def enc(self, s):
        """Ids of a piece that more text follows: line ends are split as they are in running text."""
        return self.tok.encode(s + "x").ids[:-1] if s.endswith("\n") else self.tok.encode(s).ids

    def text(self, n):
        s = self.r.randrange(len(self.ids) - n)
        return self.ids[s : s + n].tolist()

    def keys(self, n):
        r, out = self.r, set()
        while len(out) < n:
            out.add(r.choice(NOUNS) if r.random() < 0.5 and n <= 8 else f"{r.choice(NOUNS)} {r.choice(NOUNS)}")
        out = list(out)
        r.shuffle(out)
        return out

    def digits(self, n):
        return "".join(self.r.choice("0123456789") for _ in range(n))

    def value(self):
        """Mostly numbers, some pairs of words, some like XY-1234."""
        r, p = self.r, self.r.random()
        if p < 0.75:
            return self.digits(r.choice((4, 5, 6)))
        if p < 0.9:
            return f"{r.choice(NOUNS)} {r.choice(NOUNS)}"
        return "".join(r.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + "-" + self.digits(4)

    def needles(self, T, n_facts, n_asked, phrasing=None, digits=0):
        """T tokens: filler with n_facts facts at random places, then n_asked questions with answers.

        Returns the ids and the (start, end) spans of the answers, or None if there is no room.
        """
        r = self.r
        fact, question = phrasing or r.choice(self.phr)
        pairs = [(k, self.digits(digits) if digits else self.value()) for k in self.keys(n_facts)]
        glue = r.choice(("\n{}\n", " {}", "\n\n{}\n\n"))
        facts = [self.enc(glue.format(fact.format(k=k, v=v))) for k, v in pairs]
        tail, chars = "\n\n", []
        for k, v in r.sample(pairs, n_asked):
            tail += question.format(k=k) + " "
            chars.append((len(tail), len(tail) + len(v)))
            tail += v + "\n"
        e = self.tok.encode(tail)
        tail = e.ids
        where = [[i for i, (s, t) in enumerate(e.offsets) if t > a and s < b] for a, b in chars]
        spans = [(w[0], w[-1] + 1) for w in where]
        room = T - len(tail) - sum(map(len, facts))
        if room < 8:
            return None
        fill, out, p = self.text(room), [], 0
        for f, at in zip(facts, sorted(r.randrange(room) for _ in facts), strict=True):
            out += fill[p:at] + f
            p = at
        out += fill[p:]
        return out + tail, [(len(out) + a, len(out) + b) for a, b in spans]

    def table(self, T):
        """A table of keys and values, then look-ups in it."""
        r = self.r
        fact, question = r.choice(self.phr[-2:])
        n = r.randint(8, max(9, min(100, T // 24)))
        pairs = [(k, self.value()) for k in self.keys(n)]
        s = "\n" + "".join(fact.format(k=k, v=v) + "\n" for k, v in pairs) + "\n"
        s += "".join(f"{question.format(k=k)} {v}\n" for k, v in r.sample(pairs, r.randint(2, 8)))
        return self.enc(s)[:T]

    def row(self, T, share):
        """T tokens of text or, with probability `share`, of a task and text after it, so that rows are full."""
        r = self.r
        if r.random() >= share:
            return self.text(T)
        n = min(T, r.choice((T, T, T, T // 2, 256)))
        if r.random() < 0.15:
            t = self.table(n)
        else:
            facts = r.choice((1, 2, 4, 4, 6, 8, 12, 16)[: None if n > 1000 else 6])
            t = self.needles(n, facts, r.randint(1, facts))
            t = t[0] if t else []
        pad = self.text(T - len(t) - 1) if len(t) < T - 1 else []
        return (t + [self.eot] * (len(t) < T) + pad)[:T]


class Rows(IterableDataset):
    """Batches of a step, each (TOKENS_PER_STEP / T, T + 1); every worker has its own seed."""

    def __init__(self, ids, tok, phrasings, seed, T, share):
        self.args, self.T, self.share, self.seed = (ids, tok, phrasings), T, share, seed

    def __iter__(self):
        w = torch.utils.data.get_worker_info()
        tasks = Tasks(*self.args, seed=f"{self.seed}/{self.T}/{w.id}")
        while True:
            rows = [tasks.row(self.T + 1, self.share) for _ in range(TOKENS_PER_STEP // self.T)]
            yield torch.from_numpy(np.array(rows, dtype=np.int64))


def tokenize(path, tok):
    """A file's documents as one stream of token ids, each closed by the end-of-text token; kept in the temp folder."""
    key = tok.to_str() + os.path.abspath(path) + str(os.stat(path).st_mtime_ns)
    cache = os.path.join(tempfile.gettempdir(), f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy")
    if os.path.exists(cache):
        return np.load(cache)
    with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf-8") as file:
        docs = [d.strip() for d in file.read().split("<|endoftext|>")]
    eot = tok.token_to_id("<|endoftext|>")
    ids = [
        np.asarray([*e.ids, eot], dtype=np.uint16)
        for i in range(0, len(docs), 2000)
        for e in tok.encode_batch([d for d in docs[i : i + 2000] if d])
    ]
    ids = np.concatenate(ids)
    np.save(cache, ids)
    return ids


# ---------------------------------------------------------------- measurements
def text_loss(trunk, tok, path, T, zero):
    """Mean nats per token and bits per byte of a file, every token predicted from at most T before it."""
    ids = tokenize(path, tok).astype(np.int64)
    per = TOKENS_PER_STEP // T
    n = (len(ids) - 1) // T
    x, y = (torch.from_numpy(ids[o : o + n * T].reshape(n, T)) for o in (0, 1))
    total = 0.0
    for i in range(0, n, per):
        a, b = x[i : i + per], y[i : i + per]
        m = len(a)
        a, b = (F.pad(t, (0, 0, 0, per - m)).to(trunk.device) for t in (a, b))
        total += trunk(a, b, zero)[0][:m].sum().item()
    text = tok.decode(ids[1 : n * T + 1].tolist(), skip_special_tokens=False)
    return total / (n * T), total / math.log(2) / len(text.encode())


def needle_accuracy(trunk, tasks, T, n_facts, rows, zero, phrasing=None):
    """Share of answers that greedy decoding gets right in every token, and share of rows with all answers right."""
    per, right, all_right, total = TOKENS_PER_STEP // T, 0, 0, 0
    for i in range(0, rows, per):
        batch = [tasks.needles(T + 1, n_facts, n_facts, phrasing, digits=5) for _ in range(per)]
        t = torch.tensor([b[0] for b in batch], device=trunk.device)
        hit = trunk(t[:, :-1], t[:, 1:], zero)[1].cpu()
        for h, (_, spans) in list(zip(hit, batch, strict=True))[: rows - i]:
            ok = [bool(h[a - 1 : b - 1].all()) for a, b in spans]
            right += sum(ok)
            total += len(ok)
            all_right += all(ok)
    return right / total, all_right / rows


def evaluate(trunk, tok, ids, heldout, phrasings, rehearsal):
    """Loss on the held-out files {name: path}, this forward pass against transformers' own, and retrieval."""
    zero = torch.zeros((), device=trunk.device)
    result = {"text": {}, "needles": {}}
    for name, path in heldout.items():
        nats, bits = result["text"][name] = text_loss(trunk, tok, path, 2048, zero)
        log(f"text {name}: {nats:.4f} nats/token {bits:.4f} bits/byte")
    fill = tokenize(next(iter(heldout.values())), tok) if heldout else ids
    tasks = Tasks(fill, tok, phrasings, "test")
    x = torch.tensor([tasks.text(1025)], device=trunk.device)
    with torch.no_grad():
        ref = F.cross_entropy(trunk.hf(x[:, :-1]).logits[0].float(), x[0, 1:], reduction="none")
    pad = x.repeat(TOKENS_PER_STEP // 1024, 1)
    mine = trunk(pad[:, :-1], pad[:, 1:], zero)[0][0]
    log(
        f"same text: transformers {ref.mean().item():.5f}, this forward {mine.mean().item():.5f}, "
        f"largest difference of a token {(ref - mine).abs().max().item():.4f}"
    )
    for T in (1024, 2048, 4096, 8192):
        for n in (1, 4):
            one, every = needle_accuracy(trunk, tasks, T, n, 64, zero, tasks.phr[0])
            mix, mix_all = needle_accuracy(trunk, tasks, T, n, 64, zero)
            result["needles"][f"{T}/{n}"] = one, every, mix, mix_all
            log(
                f"needles T={T} facts={n}: first phrasing {one:.3f} (rows all right {every:.3f}), "
                f"mixed {mix:.3f} ({mix_all:.3f})"
            )
        if rehearsal and T == 2048:
            break
    return result


# ---------------------------------------------------------------- training
def batches(ids, tok, phrasings, seed, T, share):
    """An endless iterator over the batches of one stage, (TOKENS_PER_STEP / T, T + 1) in pinned memory."""
    return iter(
        DataLoader(
            Rows(ids, tok, phrasings, seed, T, share),
            batch_size=None,
            num_workers=12,
            prefetch_factor=8,
            pin_memory=True,
            multiprocessing_context="fork",
        )
    )


def optimizer(hf, lr, decay):
    def decays(name, p):
        return p.dim() >= 2 and "embed" not in name and not name.endswith("bias")

    named = list(hf.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(trunk, tok, ids, heldout, a):
    """Train until `a.seconds` after START, by the curriculum and a cosine schedule; returns (tokens seen, steps)."""
    hf, dev, coef = trunk.hf, trunk.device, trunk.cfg.router_aux_loss_coef
    opt = optimizer(hf, a.lr, a.decay)
    drop, zero = torch.full((), a.dropout, device=dev), torch.zeros((), device=dev)
    start = time.time()
    span = a.seconds - (start - START)
    step = seen = stage_step = 0
    stage_start, length, loader = start, None, None

    def log_stage(more=""):
        torch.cuda.synchronize()
        speed = (step - stage_step) * TOKENS_PER_STEP / (time.time() - stage_start)
        log(f"T={length}: {speed:.0f} tokens/s{more}")

    while (done := (time.time() - start) / span) < 1:
        T = next(T for until, T in CURRICULUM if done < until)
        if length != T:
            if length is not None:
                log_stage()
            loader = batches(ids, tok, a.phrasings, a.seed, T, a.share)
            length, stage_step, stage_start = T, step, time.time()
        wait = time.time()
        rows = next(loader).to(dev, non_blocking=True)
        wait = time.time() - wait
        lr = a.lr * min(1, (step + 1) / 200) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in opt.param_groups:
            group["lr"] = lr
        with torch.autocast("cuda", torch.bfloat16):
            loss, _, aux = trunk(rows[:, :-1], rows[:, 1:], drop)
            loss = loss.mean()
        (loss + coef * aux).backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        seen += T * len(rows)
        if step % (20 if a.rehearsal else 200) == 0 or step in (1, 2, 5):
            log(
                f"step {step} T {T} loss {loss.item():.4f} balance {aux.item():.3f} norm {norm.item():.2f} "
                f"lr {lr:.2e} tokens {seen / 1e6:.1f} M wait {wait * 1e3:.0f} ms "
                f"memory {torch.cuda.max_memory_allocated() / 1e9:.0f} GB"
            )
        if step % 1000 == 0 and heldout:
            with torch.autocast("cuda", torch.bfloat16):
                nats = {name: text_loss(trunk, tok, path, 2048, zero)[0] for name, path in heldout.items()}
            log("held-out nats/token:", *(f"{name} {n:.4f}" for name, n in nats.items()))
    log_stage(f"; trained on {seen / 1e6:.1f} M tokens, {step} steps")
    return seen, step


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("corpus")
    ap.add_argument("tokenizer")
    ap.add_argument("out")
    ap.add_argument("--seconds", type=float, default=268, help="training time, counted from the program's start")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--config", default="{}", help="JSON of GptOssConfig fields to change")
    ap.add_argument("--phrasings", default="a", choices=sorted(PHRASINGS))
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--dropout", type=float, default=0.2, help="on the residual branches, in training")
    ap.add_argument("--decay", type=float, default=0.3, help="weight decay of the matrices")
    ap.add_argument("--share", type=float, default=0.3, help="share of rows that are retrieval tasks")
    ap.add_argument("--heldout", nargs="*", default=[], metavar="NAME=FILE")
    ap.add_argument("--rehearsal", action="store_true", help="more output, stop early in the measurements")
    a = ap.parse_args()
    heldout = dict(item.split("=", 1) for item in a.heldout)
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tok = Tokenizer.from_file(a.tokenizer)
    eot = tok.token_to_id("<|endoftext|>")
    ids = tokenize(a.corpus, tok)
    log(f"{len(ids) / 1e6:.2f} M tokens of text")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # from here on, tokenizing happens in worker processes

    cfg = GptOssConfig(
        **{**MINI, **json.loads(a.config), "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    )
    cfg._attn_implementation = "eager"
    hf = GptOssForCausalLM(cfg).cuda().float()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                p.mul_((2 * cfg.num_hidden_layers) ** -0.5)
    trunk = Trunk(hf)
    log(f"{sum(p.numel() for p in hf.parameters()) / 1e6:.1f} M parameters", cfg.layer_types, cfg.rope_parameters)

    seen, steps = train(trunk, tok, ids, heldout, a)

    for p in hf.parameters():
        p.data = p.data.to(torch.bfloat16)  # the parameters alone: the rotary table stays in fp32
    hf.save_pretrained(a.out, max_shard_size="15MB")
    log("saved", sorted(os.listdir(a.out)))
    for p in hf.parameters():
        p.data = p.data.float()  # measured on the weights as saved
    with torch.autocast("cuda", torch.bfloat16):
        result = {"tokens": seen, "steps": steps, **evaluate(trunk, tok, ids, heldout, a.phrasings, a.rehearsal)}
    with open(os.path.join(a.out, "metrics.json"), "w") as file:
        json.dump(result, file, indent=1)
    log("done")


if __name__ == "__main__":
    main()
