#!/usr/bin/env python3
"""Train the mini model's tokenizer: byte-level BPE of 8,192 tokens, digits one by one.

    python tools/train_mini/train_tokenizer.py CORPUS.txt OUT.json

Prints the vocabulary's size and, over every 50th document, UTF-8 bytes per token. Needs: tokenizers.
"""

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
# as GPT-2 splits words, but every digit is a piece of its own
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    corpus, out = sys.argv[1:]
    documents = Path(corpus).read_text(encoding="utf-8").split(END)
    tokenizer = train(documents)
    tokenizer.save(out)
    sample = documents[::50]
    tokens = sum(len(tokenizer.encode(document).ids) for document in sample)
    print("vocabulary", tokenizer.get_vocab_size())
    print("bytes/token", sum(len(document.encode()) for document in sample) / tokens)


if __name__ == "__main__":
    main()
