"""What ovtq-eval and ovtq-bench write, as the tests of reports need it."""

from __future__ import annotations

from typing import Any

ODD = 'dir/<b>&"quoted",KV_CACHE_PRECISION=u8'


def row(name: str, role: str, kld: float, **more: Any) -> dict[str, Any]:
    found = {"candidate": name, "role": role, "cache": "12 caches u8", "bytes_per_token": 1728, "flat_bytes": 0}
    found |= {"mean_kld": kld, "median_kld": kld / 3, "kld_p999": kld * 90, "kld_by_position": [kld, 2 * kld]}
    found |= {"same_top": 0.9951, "perplexity": 20.5, "bits_per_byte": 1.1212, "verdict": "ok", "reason": ""}
    return found | {"needles": None, "greedy": None} | more


def runs() -> list[dict[str, Any]]:
    cells = [{"needles": 1, "length": 4096, "depth": depth, "right": 3, "of": 4} for depth in (0.1, 0.9)]
    greedy = {"prompts": 8, "tokens": 64, "same": 41.5, "identical": 3}
    common = {"ovtq": "0.1.0", "versions": {"openvino": "2026.4.1-1", "python": "3.11"}, "date": "2026-01-02T03:04:05"}
    rows = [
        row("stock", "reference", 0.0, verdict="equal", needles=cells, greedy=greedy),
        row("stock, in chunks of 32", "floor", 9e-13, verdict="equal"),
        row(ODD, "candidate", 1.4e-4, needles=cells, greedy=greedy),
        row("exact", "candidate", 1.1e-12, verdict="equal", bytes_per_token=None, flat_bytes=None),
        row("broken", "candidate", 0.5, verdict="wrong", reason="its results differ by <3>"),
    ]
    first = {"kind": "eval", "model": "m", "device": "CPU", "text": "t.txt", "windows": 5, "window": 1024, "chunk": 64}
    first |= common | {"positions": [[0, 512], [512, 1024]], "rows": rows}
    spread = {"median": 12.34, "low": 11.0, "high": 13.0}
    one = {"candidate": ODD, "through": "openvino", "wrong": "", "state_bytes": None, "rss_prefill": None}
    one |= {"rss_decode": 2.5e9, "tpot_ms": spread, "tpot_ratio": {"median": 0.73, "low": 0.7, "high": 0.8}}
    prompt = {"prompt": "Who <are> you?", "prompt_tokens": 5, "new_tokens": 200, "runs": 3, "ttft_ms": spread}
    prompt |= {"tokens_per_s": 81.25, "latency_s": 2.4}
    contexts = [
        one | {"context": n, "filled": True, "prefill_s": None, "prefill_ratio": None, "state_bytes": 1000 * n}
        for n in (256, 8192)
    ]
    machine = {"cpu": "A CPU", "cores": 2, "ram": 8 << 30}
    second = {"kind": "bench", "model": "m", "device": "CPU", "machine": machine, "prompts": [one | prompt]}
    return [first, second | common | {"contexts": contexts}]
