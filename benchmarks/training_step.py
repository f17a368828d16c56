"""A training step: adapters in both forms and ranks against plain full fine-tuning; time and peak
memory.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
import tyro
from common import CLASS_NAMES, RESULTS, Process, Report, alternate, ratio, say

from radapter_serve.adapter import attach
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.training import Average
from radapter_serve.training.loss import distance_to_base, mpm_nce

FULL = "full fine-tuning"
Form = Literal["activation", "weight"]
ADAPTERS: dict[str, tuple[Form, int | None]] = {
    "activation form, full rank": ("activation", None),
    "activation form, full rank, preserve": ("activation", None),
    "activation form, full rank, all classes": ("activation", None),
    "weight form, full rank": ("weight", None),
    "activation form, rank 4": ("activation", 4),
    "weight form, rank 4": ("weight", 4),
}


class Step:
    """One candidate: a model with random weights, what is trained of it, its optimizer; a call is
    one step.
    """

    def __init__(
        self,
        name: str,
        architecture: str,
        batch: int,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.model: Any = open_clip.create_model(architecture, device=device).eval()
        self.batch = batch
        self.device = device
        self.dtype = dtype
        self.tokens = open_clip.get_tokenizer(architecture)(
            [f"a photo of a {label}." for label in CLASS_NAMES]
        )
        self.average = None
        self.preserve = name.endswith("preserve")
        self.all_classes = name.endswith("all classes")
        trained = self.model
        if name != FULL:
            form, rank = ADAPTERS[name]
            trained = attach(self.model, rank, form=form, drop=0.2)
            self.average = Average(trained, 0.999)
        self.adapters = trained
        self.optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def __call__(self, seed: int) -> float:
        """Seconds of forward, loss, backward, AdamW and average, on a batch that the seed draws."""
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(CLASS_NAMES), (self.batch,), generator=draw)
        pixels = torch.randn(self.batch, 3, *self.model.visual.image_size, generator=draw).to(
            self.device
        )
        of_texts = labels
        if self.all_classes:
            others = sorted(set(range(len(CLASS_NAMES))) - set(labels.tolist()))
            of_texts = torch.cat([labels, torch.tensor(others, dtype=torch.long)])
        tokens = self.tokens[of_texts].to(self.device)
        positive = (labels[:, None] == of_texts).to(self.device)
        self._synchronize()
        start = time.perf_counter()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            if self.average is None:
                images = F.normalize(self.model.encode_image(pixels), dim=-1)
                texts = F.normalize(self.model.encode_text(tokens), dim=-1)
            else:
                torch.manual_seed(seed)
                self.adapters.sample_drop()
                images = encode_image(self.model, pixels)
                texts = encode_text(self.model, tokens)
            loss = mpm_nce(
                images, texts, positive, logit_scale=self.model.logit_scale.exp(), epsilon=0.02
            )
            if self.preserve:
                self.adapters.alpha = 0.0
                with torch.no_grad():
                    base_embeds = encode_image(self.model, pixels)
                self.adapters.alpha = 1.0
                loss = loss + 10 * distance_to_base(images, base_embeds)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


_step: Step


def build(name: str, architecture: str, batch: int, dtype: torch.dtype | None) -> None:
    """Make the candidate of this process."""
    global _step
    _step = Step(name, architecture, batch, dtype=dtype)


def take(seed: int) -> float:
    """One step of this process's candidate."""
    return _step(seed)


def measure(
    names: Sequence[str],
    architecture: str,
    batch: int,
    repeats: int,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each step and peak bytes of each candidate, which all live in processes of their
    own.
    """
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(Process()) for name in names}
        for name, process in processes.items():
            say(f"batch {batch}: building {name}")
            process.call(build, name, architecture, batch, dtype)
        say(f"batch {batch}: {repeats} rounds and a warm-up of {len(names)} candidates")
        seeds = {name: count() for name in names}  # all candidates see the same batches
        steps = {
            name: partial(_next_step, process, seeds[name]) for name, process in processes.items()
        }
        times = alternate(steps, repeats)
        return times, {name: process.peak() for name, process in processes.items()}


def _next_step(process: Process, seeds: count[int]) -> float:
    return process.call(take, next(seeds))


def main(
    architecture: str = "ViT-B-32",
    batches: tuple[int, ...] = (16, 64),
    forms_only: tuple[int, ...] = (256,),
    repeats: int = 7,
    precision: Literal["no", "bf16"] = "no",
    out: Path = RESULTS,
) -> None:
    """Measure training steps.

    Args:
        architecture: open_clip architecture, with random weights.
        batches: batch sizes at which everything is compared with full fine-tuning.
        forms_only: batch sizes at which the forms of the adapters are compared with each other.
        repeats: steps of each candidate at the smallest batch; fewer at larger ones, at least 3.
        precision: of the products: fp32, or bf16.
        out: folder of the table.
    """
    report = Report(
        "training_step",
        f"A training step of {architecture}",
        "Forward of both towers, MPM-NCE, backward, AdamW (and for adapters their average), on"
        f" random pixels and prompts 'a photo of a {{}}.' of {len(CLASS_NAMES)} classes. Full"
        " fine-tuning is plain open_clip: all parameters, 77 tokens a text, every text of the"
        " batch; adapters go through radapter_serve's towers, which crop texts to the longest and"
        " encode equal ones once. Each candidate has a process of its own, whose peak memory"
        " (VmHWM, libraries included) is given.",
    )
    # Only here: its imports are not the candidates' memory.
    from radapter_serve.training import choose_form

    model = open_clip.create_model(architecture)
    choices = []
    for batch in sorted({*batches, *forms_only}):
        rounds = max(min(3, repeats), repeats * min(batches) // batch)
        if batch in batches:
            rounds = max(min(5, repeats), rounds)
        names = [*([FULL] if batch in batches else []), *ADAPTERS]
        dtype = torch.bfloat16 if precision == "bf16" else None
        times, peaks = measure(names, architecture, batch, rounds, dtype)
        rows = [
            [
                name,
                f"{statistics.median(times[name]):.2f}",
                f"{ratio(times[name], times[names[0]]):.2f}",
                f"{peaks[name] / 1e9:.2f}",
                f"{peaks[name] / peaks[names[0]]:.2f}",
            ]
            for name in names
        ]
        report.table(
            f"Batch {batch}, {rounds} rounds",
            ["candidate", "s", "ratio", "peak GB", "ratio "],
            rows,
        )
        for rank in (None, 4):
            forms = {
                form: times[name]
                for name, (form, other) in ADAPTERS.items()
                if other == rank and not name.endswith(("preserve", "all classes"))
            }
            quotient = ratio(forms["weight"], forms["activation"])
            faster = "weight" if quotient < 1 else "activation"
            chosen = choose_form(model, rank, batch)
            size = "full rank" if rank is None else f"rank {rank}"
            verdict = "even" if 0.95 < quotient < 1.05 else "right" if chosen == faster else "wrong"
            choices.append([f"{batch}, {size}", f"{quotient:.2f}", faster, chosen, verdict])
    report.note("Ratios are to the first line of a table.")
    report.note("Aim: at most 0.60 of the time of full fine-tuning.")
    report.table(
        "Which form", ["batch", "weight / activation", "faster", "choose_form says", ""], choices
    )
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
