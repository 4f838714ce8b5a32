#!/usr/bin/env python3
"""What a model loses on a GPU: the divergence of its next-token distributions from those of the exported one on a CPU.

usage: kld.py MODEL_DIR CANDIDATE… --text FILE [--device GPU] [--windows 1] [--window 1024] [--chunk 64] [--json FILE]

MODEL_DIR runs on the CPU with everything at f32. Each CANDIDATE, a folder with properties of the plugin behind it
(DIR,KEY=VALUE,…), runs on --device with everything at f32 unless its properties say otherwise, over the same windows of
the text in the same calls. So a row says what a cache, a precision and a device cost together, and two rows which of
them did. `ovtq-eval` compares on one device.

Exit code 2, and one line, for whatever is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ovtq.errors import OvtqError
from ovtq.evidence.candidates import open_candidate, parse
from ovtq.evidence.divergence import Reference, cut
from ovtq.runtime.runner import EXACT_PROPERTIES
from ovtq.runtime.text import Tokenizer


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, metavar="MODEL_DIR")
    p.add_argument("candidates", nargs="+", metavar="CANDIDATE")
    p.add_argument("--text", type=Path, required=True, metavar="FILE")
    p.add_argument("--device", default="GPU", help="of the candidates (default: %(default)s)")
    p.add_argument("--windows", type=int, default=1, metavar="N", help="of the text (default: %(default)s)")
    p.add_argument("--window", type=int, default=1024, metavar="TOKENS", help="length of one (default: %(default)s)")
    p.add_argument("--chunk", type=int, default=64, metavar="TOKENS", help="in a call (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures, after each candidate")
    return p.parse_args()


def main() -> int:
    """Print a row for each candidate."""
    args, rows = parse_args(), {}
    try:
        tokenizer = Tokenizer(args.model)
        text = cut(tokenizer.documents(args.text), tokenizer, args.windows, args.window, str(args.text))
        candidates = [parse(name, args.model) for name in args.candidates]
        exported = open_candidate(parse("stock", args.model), "CPU", EXACT_PROPERTIES)
        reference = Reference(exported, text, args.chunk, lambda: None)
        del exported
        for candidate in candidates:
            subject = open_candidate(candidate, args.device, EXACT_PROPERTIES)
            row = rows[candidate.label] = reference.compare(subject, args.chunk, lambda: None, candidate.label)
            print(
                f"{candidate.label}: mean KLD {row['mean_kld']:.3g}, same most likely {row['same_top']:.4f}", flush=True
            )
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            del subject
    except (OvtqError, OSError) as error:
        print(f"kld: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
