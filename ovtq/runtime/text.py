"""Text and tokens, by the tokenizer of a model folder as openvino_genai runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ovtq import files
from ovtq.errors import InputError
from ovtq.ir.io import last_line, load_config

SEPARATOR = "<|endoftext|>"
FAILURES = (RuntimeError, ValueError, TypeError, LookupError)  # of openvino_genai, whose texts may be no UTF-8


class Tokenizer:
    """The tokenizer of a model folder. Raises InputError if there is none, or no openvino_genai (extra `genai`)."""

    def __init__(self, folder: Path) -> None:
        try:
            import openvino_genai
        except ImportError:
            raise InputError("openvino_genai is not installed: pip install 'ovtq[genai]'") from None
        for name in ("openvino_tokenizer.xml", "openvino_detokenizer.xml"):
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no such file; convert_tokenizer of openvino-tokenizers makes it")
        for path in folder.iterdir():  # what is read of it openvino_genai decides, and a pipe would hold it for ever
            if path.suffix in (".json", ".jinja", ".txt", ".xml", ".bin", ".model"):
                files.check_regular(path)
        self.folder = folder
        try:
            self.genai = openvino_genai.Tokenizer(folder)
        except FAILURES as error:
            raise self._unfit(error) from None

    def _unfit(self, error: Exception) -> InputError:
        return InputError(f"{self.folder}: its tokenizer can't be used ({last_line(error)})")

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids (tokens,) i64, with what the tokenizer puts before or after a text only if told to.

        Raises InputError if the tokenizer fails.
        """
        try:
            return np.array(self.genai.encode(text, add_special_tokens=special).input_ids.data[0], np.int64)
        except FAILURES as error:
            raise self._unfit(error) from None

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text, special tokens written out. Raises InputError if the tokenizer fails."""
        try:
            return self.genai.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)
        except FAILURES as error:
            raise self._unfit(error) from None

    @property
    def begin(self) -> int | None:
        """Id of the token that the tokenizer puts before every text (BOS), without which some models degenerate."""
        whole, plain = self.encode("a", special=True), self.encode("a")
        return int(whole[0]) if len(whole) > 1 and [*whole[:1]] != [*plain[:1]] else None

    @property
    def templated(self) -> bool:
        """Whether the model has a chat template."""
        try:
            return bool(self.genai.chat_template)
        except FAILURES as error:
            raise self._unfit(error) from None

    def chat(self, text: str) -> np.ndarray:
        """Token ids of `text` as a user's message to the model, by its chat template if it has one.

        Raises InputError if the template or the tokenizer fails.
        """
        if self.templated:
            try:
                text = self.genai.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            except FAILURES as error:
                raise InputError(f"{self.folder}: its chat template can't be used ({last_line(error)})") from None
        return self.encode(text)

    @property
    def end(self) -> int:
        """Id of the token that ends a document: `<|endoftext|>`, or what the tokenizer says ends a text."""
        ids = self.encode(SEPARATOR)
        return int(ids[0]) if len(ids) == 1 else self.genai.get_eos_token_id()

    def ends(self) -> frozenset[int]:
        """Ids of the tokens that end an answer: all that generation_config.json names, as hosts read it, or `end`.

        Raises InputError for a file that is not as it should be.
        """
        name = "generation_config.json"
        named = load_config(self.folder, name).get("eos_token_id") if (self.folder / name).exists() else None
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise InputError(
                f"{self.folder / name}: eos_token_id must be a token id or a list of some, found {named!r}"
            )
        return frozenset(ids) or frozenset({self.end})

    def documents(self, path: Path) -> np.ndarray:
        """Token ids of a text file's documents, end to end, each closed by `end`; `<|endoftext|>` stands between them.

        Raises InputError if it is no text.
        """
        content = files.read_text(path)
        end = np.array([self.end], np.int64)
        parts = [part for text in content.split(SEPARATOR) if text.strip() for part in (self.encode(text.strip()), end)]
        if not parts:
            raise InputError(f"{path}: no text in it")
        return np.concatenate(parts)
