"""Sentence embeddings for the int8 benchmark: BERT's tokenizer, mean pooling, and the rank correlation with human scores."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]


class WordPiece:
    """BERT's uncased tokenizer (Devlin 2019): lower case, no accents, punctuation apart, then the longest known pieces."""

    def __init__(self, vocabulary: Path) -> None:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        self.number = {word: index for index, word in enumerate(words)}

    def __call__(self, text: str) -> list[int]:
        """Numbers of the pieces, between [CLS] and [SEP]."""
        pieces = [self.number["[CLS]"]]
        for word in self._words(text):
            pieces += self._pieces(word)
        return [*pieces, self.number["[SEP]"]]

    @staticmethod
    def _words(text: str) -> list[str]:
        plain = (c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        spaced = (f" {c} " if unicodedata.category(c).startswith("P") or c in "$+<=>^`|~" else c for c in plain)
        return "".join(spaced).split()

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = word[start:end] if not start else f"##{word[start:end]}"
                if piece in self.number:
                    found.append(self.number[piece])
                    start = end
                    break
            else:
                return [self.number["[UNK]"]]
        return found


def pairs(path: Path) -> list[tuple[str, str, float]]:
    """Sentence pairs with their score."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def batches(tokens: Sequence[list[int]], size: int) -> Iterator[Feeds]:
    """Feeds of `size` sentences in order, padded to the longest of each."""
    for start in range(0, len(tokens), size):
        some = tokens[start : start + size]
        width = max(map(len, some))
        ids = np.array([row + [0] * (width - len(row)) for row in some], np.int64)
        mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in some], np.int64)
        yield {"input_ids": ids, "attention_mask": mask}


def embed(run: Callable[[Feeds], Array], tokens: Sequence[list[int]]) -> Array:
    """Mean of the last hidden states of each sentence, of length 1; `run` gives [sentences, tokens, features]."""
    rows = []
    for feeds in batches(tokens, 32):
        mask = feeds["attention_mask"][..., None]
        rows.append((run(feeds) * mask).sum(1) / mask.sum(1))
    found = np.concatenate(rows)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def spearman(a: Array, b: Array) -> float:
    """Rank correlation, ties at their mean rank."""

    def ranks(values: Array) -> Array:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        return np.asarray((last - (counts - 1) / 2)[inverse])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
