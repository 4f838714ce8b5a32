"""The command line of ovtq-eval."""

from __future__ import annotations

import argparse

from ovtq.cli.command import Parser, count, listed, path_of, positive


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def parser(description: str | None) -> Parser:
    """The options; `description` is what the help says first."""
    p = Parser("ovtq-eval", description)
    p.add_argument("model_dir", type=path_of, metavar="MODEL_DIR", help="the model as exported: the reference")
    p.add_argument("others", nargs="*", metavar="CANDIDATE", help="see above")
    p.add_argument(
        "--candidate", action="append", default=[], metavar="CANDIDATE", help="one more, as above; may be repeated"
    )
    p.add_argument(
        "--text",
        type=path_of,
        required=True,
        metavar="FILE",
        help="the text to score, UTF-8; <|endoftext|> between documents",
    )
    p.add_argument("--device", default="CPU", metavar="DEVICE", help="where all are run (default: %(default)s)")
    p.add_argument(
        "--windows",
        type=positive,
        default=5,
        metavar="N",
        help="pieces of the text to score, at most (default: %(default)s)",
    )
    p.add_argument(
        "--window", type=positive, default=1024, metavar="TOKENS", help="length of a piece (default: %(default)s)"
    )
    p.add_argument("--chunk", type=positive, default=64, metavar="TOKENS", help="read per call (default: %(default)s)")
    p.add_argument(
        "--at",
        choices=("f32", "hosts", "both"),
        default="f32",
        help="compute in f32, which says what a cache loses and nothing else; or as hosts load a model, with no "
        "property, the exported one among them; or both, a row each (default: %(default)s)",
    )
    p.add_argument("--max-kld", type=float, metavar="NATS", help="fail candidates whose mean KLD is above it")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="verify converted folders first (default: on)",
    )
    stacks = p.add_argument_group("needles in a haystack (--trials 0: none)")
    stacks.add_argument(
        "--lengths",
        type=listed(positive, "numbers"),
        default="4k",
        metavar="TOKENS,…",
        help="lengths of a haystack (default: 4k)",
    )
    stacks.add_argument(
        "--depths",
        type=listed(share, "shares"),
        default="0.1,0.3,0.5,0.7,0.9",
        metavar="0…1,…",
        help="where in it the fact stands, as a share of it (default: %(default)s)",
    )
    stacks.add_argument(
        "--needles",
        type=listed(positive, "numbers"),
        default="1",
        metavar="N,…",
        help="facts in one haystack (default: %(default)s)",
    )
    stacks.add_argument(
        "--trials",
        type=count,
        default=4,
        metavar="N",
        help="haystacks of each length, depth and number of facts (default: %(default)s)",
    )
    stacks.add_argument(
        "--answer-tokens",
        type=positive,
        default=24,  # a sentence before five digits, each a token of its own
        metavar="N",
        help="tokens of an answer, which may begin with words, or think aloud (default: %(default)s)",
    )
    stacks.add_argument(
        "--read-chunk",
        type=positive,
        default=256,
        metavar="N",
        help="tokens of a haystack per call (default: %(default)s)",
    )
    stacks.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the haystacks (default: 0)")
    p.add_argument(
        "--greedy", type=count, default=8, metavar="N", help="texts continued greedily (default: 8; 0: none)"
    )
    p.add_argument(
        "--greedy-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="tokens of each continuation (default: %(default)s)",
    )
    p.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="candidates at a time, each with its share of the cores; on a CPU (default: 1)",
    )
    p.add_argument("--json", type=path_of, metavar="FILE", help="write the figures, anew after each candidate")
    p.add_argument("--resume", action="store_true", help="take over what the file of --json holds of the same options")
    p.add_argument(
        "--reference",
        type=path_of,
        metavar="FILE",
        help="keep the reference's logits there (4 bytes a token of text and of vocabulary), and take them from there "
        "if made alike",
    )
    p.add_argument("--report", type=path_of, metavar="FILE", help="write a page to look at (HTML)")
    return p
