#!/usr/bin/env python3
"""Train a miniature GPT-OSS model (33 M parameters) from scratch on one GPU in under ten minutes.

The model is transformers' own GptOssForCausalLM: it holds the parameters and writes the checkpoint. Only the forward
pass used for training is ours (`trunk.py`), because it is about ten times faster on one GPU:
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
import tempfile

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tasks import PHRASINGS, Tasks
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import GptOssConfig, GptOssForCausalLM
from trunk import Trunk

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


# ---------------------------------------------------------------- the data
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
