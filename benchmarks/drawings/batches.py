"""Batches of drawings and captions from the pairs, and the tokens of the captions."""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from benchmarks.drawings.names import ONE_WAY, Classes

TEMPLATES = ("{}", "a drawing of {}", "an icon of {}", "a picture of {}")
MOST_TOKENS = 16


class Pairs:
    """Drawings by name. Names that mean one class are one name.

    Attributes:
        pixels: uint8 [N, S, S, 4], premultiplied RGBA.
        black: bool [N], drawings without colours of their own.
        one_way: bool [N], drawings whose name a mirror makes wrong.
        by_name: name to its sets' drawings: {name: {set: rows}}, of the training part.
        words: the words of each row.
        validation: rows of classes in the sets that training does not see, by set.
        meaning: the one name of all words that mean the same.
        classes: of the benchmark.
    """

    def __init__(self, folder: Path) -> None:
        self.pixels = torch.from_numpy(np.load(folder / "pixels.npy", mmap_mode="c"))
        self.classes = Classes()
        self.meaning = self.classes.meanings
        with (folder / "pairs.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self.words = [row["words"] for row in rows]
        self.by_name: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.validation: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            name = self.meaning.get(row["words"], row["words"])
            if row["split"] == "train":
                self.by_name[name][row["set"]].append(index)
            elif name in self.classes.names:
                self.validation[row["set"]].append(index)
        self.synonyms: dict[str, list[str]] = defaultdict(list)
        for synonym, name in self.meaning.items():
            self.synonyms[name].append(synonym)
        self.one_way = torch.tensor([not ONE_WAY.isdisjoint(words.split()) for words in self.words])
        self.black = torch.from_numpy(np.array([row["black"] == "1" for row in rows]))

    def batch(self, names: list[str], draw: random.Random) -> tuple[Tensor, list[str]]:
        """Two drawings of each name, by two hands where there are, and a caption of each name."""
        chosen = []
        captions = []
        for name in names:
            hands = list(self.by_name[name].values())
            two = draw.sample(hands, 2) if len(hands) > 1 else hands * 2
            chosen += [draw.choice(rows) for rows in two]
            words = self.words[chosen[-1]]
            if name in self.synonyms and draw.random() < 0.4:
                words = draw.choice(self.synonyms[name])
            captions.append(draw.choice(TEMPLATES).format(words))
        return torch.tensor(chosen), captions


class Words:
    """The tokenizer, cut down to the words that names and templates use, and remembering what it
    has seen.

    Attributes:
        used: token ids, sorted; the end token stays the largest.
    """

    def __init__(self, words: set[str]) -> None:
        self.tokenizer = open_clip.SimpleTokenizer()
        self.pieces: dict[str, list[int]] = {}
        for word in sorted(
            {part for text in (*words, *TEMPLATES) for part in text.replace("{}", "").split()}
        ):
            self.pieces[word] = self.tokenizer.encode(word)
        self.start = self.tokenizer.sot_token_id
        self.end = self.tokenizer.eot_token_id
        self.used = sorted(
            {self.start, self.end} | {token for pieces in self.pieces.values() for token in pieces}
        )
        self.row_of = {token: row for row, token in enumerate(self.used)}

    def __call__(self, texts: list[str]) -> Tensor:
        """Rows of the used tokens, integer [N, L], padded with zeros."""
        lines = []
        for text in texts:
            inner = [token for word in text.split() for token in self.pieces[word]][
                : MOST_TOKENS - 2
            ]
            lines.append([self.row_of[token] for token in (self.start, *inner, self.end)])
        tokens = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.long)
        for row, line in enumerate(lines):
            tokens[row, : len(line)] = torch.tensor(line)
        return tokens
