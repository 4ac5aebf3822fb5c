"""Text → token ids: prompts before the text, truncation that keeps the end token, nothing from the text
itself taken for a special token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from featherbed.errors import TextError, TokenizerError
from featherbed.spec import Pooling, Spec


@dataclass(frozen=True)
class Tokens:
    """Token ids of N texts, and how many of the texts were cut."""

    ids: list[list[int]]
    truncated: int


class Tokenizer:
    """A tokenizer.json, with its own padding and truncation replaced by what the spec says.

    ``eos_id`` is the id that every text ends with, None for models that pool otherwise than by the last token;
    ``appends`` says that it is put there by us, because the tokenizer does not.
    Safe to use from many threads: nothing changes after it was opened.
    """

    def __init__(self, folder: Path, spec: Spec) -> None:
        """Open ``folder``/tokenizer.json, or a file ``folder`` itself. Raises TokenizerError when it is unusable or
        not the model's.
        """
        path = folder if folder.suffix == ".json" else folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every defect of the file
            raise TokenizerError(
                f"{path}",
                expected="a tokenizer in Hugging Face's JSON format",
                found=f"{error}" if path.is_file() else "no such file",
                remedy="fetch the file again",
            ) from error
        self._path, self._rows = path, spec.vocab_size
        self._check_ids(tokenizer.get_vocab_size(with_added_tokens=True) - 1)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        last = spec.pooling is Pooling.LAST
        probe = tokenizer.encode("a")
        ends = bool(probe.special_tokens_mask) and probe.special_tokens_mask[-1] == 1
        # what the tokenizer itself puts at the end is the end token, whatever a config says of chats
        self.eos_id = (probe.ids[-1] if ends else spec.eos_id) if last else None
        self.appends = last and not ends
        if last and self.eos_id is None:
            raise TokenizerError(
                f"{path}",
                expected="an end token: from the tokenizer, or eos_token_id in config.json",
                found="neither",
                remedy="add eos_token_id to config.json",
            )
        self._special = len(tokenizer.encode("").ids) + self.appends
        self._room = spec.max_length - self._special
        if self._special == 0 or self._room < 1:
            raise TokenizerError(
                f"{path}",
                expected=f"at least one and fewer than {spec.max_length} special tokens around a text",
                found=f"{self._special}",
                remedy="use the tokenizer.json and max_seq_length that belong to the weights",
            )
        tokenizer.enable_truncation(spec.max_length - self.appends)
        self._tokenizer = tokenizer

    def check_table(self) -> None:
        """Raises TokenizerError when any token's id is not a row of the model's table.

        Takes 0.2 s on a large vocabulary, so opening only compares sizes, and ``encode`` looks at the ids it gives.
        """
        self._check_ids(max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1))

    def _check_ids(self, highest: int) -> None:
        if highest >= self._rows:
            raise TokenizerError(
                f"{self._path}",
                expected=f"ids below {self._rows}, the rows of the model's table",
                found=f"the id {highest}",
                remedy="use the tokenizer.json that belongs to the weights",
            )

    def count(self, text: str) -> int:
        """Tokens of a text, special tokens included, after truncation."""
        return len(self.encode([text]).ids[0])

    def encode(self, texts: Sequence[str], prompt: str = "") -> Tokens:
        """Ids of each text behind ``prompt``, at most ``max_length`` of them.

        Raises TextError, naming the text's place, when one is not text; or when the prompt leaves no room.
        Raises TokenizerError on an id that the model has no row for.
        """
        if prompt:
            self._check_prompt(prompt)
        check_texts(texts)
        encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        end = [self.eos_id] if self.appends and self.eos_id is not None else []
        ids = [encoding.ids + end for encoding in encodings]
        self._check_ids(max(map(max, ids), default=-1))
        return Tokens(ids, sum(bool(encoding.overflowing) for encoding in encodings))

    def _check_prompt(self, prompt: str) -> None:
        _check_text(prompt, "prompt")
        length = len(self._tokenizer.encode(prompt, add_special_tokens=False).ids)
        if length >= self._room:
            raise TextError(
                "prompt",
                expected=f"fewer than {self._room} tokens, so that a text fits behind it",
                found=f"{length} or more",
                remedy="shorten the prompt",
            )


def check_texts(texts: Sequence[object], start: int = 0) -> None:
    """Raises TextError, naming the place from ``start`` on, when one of ``texts`` is not a string for UTF-8."""
    for place, text in enumerate(texts, start):
        _check_text(text, place)


def _check_text(text: object, place: int | str) -> None:
    subject = f"text {place}" if isinstance(place, int) else place
    if not isinstance(text, str):
        raise TextError(
            subject, expected="a string", found=type(text).__name__, remedy="pass strings only; nothing was embedded"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            subject,
            expected="text that UTF-8 can carry",
            found=f"a lone surrogate at character {error.start}",
            remedy="decode the text with errors='replace' where it comes from",
        ) from error
