"""Generated retrieval tasks: facts hidden in text, and look-ups in a table."""

import random

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
