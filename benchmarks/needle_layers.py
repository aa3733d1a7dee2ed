# SPDX-License-Identifier: Apache-2.0
"""Share of a needle's tokens that selection rules keep, by layer: writes `benchmarks/results/needle_layers.json`.

    make real
    .venv-real/bin/python -m benchmarks.needle_layers

Texts and decoder are those of `benchmarks.needle`. At several layers, each rule keeps a tenth of the visual tokens; the
result is the share of the fact's tokens among them (0.1 by chance): `last_row`, attention of the last prompt token
(FastV reads it in the layer before its cut); `instruction_rows`, attention of all text after the visual tokens;
`rows_times_values`, the same times the norm of the values (IWP without duplication); `residual`, residual energy of the
states (ResPrune). The attention of the last token is split into `sink`, the prompt's first token; `text`, the other
text; and `last_quarter`, the share of the last quarter among all visual tokens. `relevance` and `closest_similarity`
are the medians that IWP logs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtprune
from benchmarks import command, needle
from benchmarks.mean_rows import mean_rows
from benchmarks.real import parts
from vtprune.core.ragged import top_k
from vtprune.methods import IWP, Choice, Method, Stage, Tokens
from vtprune.study import progress
from vtprune_kernels import attention_rows, residual_pivots

OUT = Path(__file__).resolve().parent / "results" / "needle_layers.json"
LAYERS = (0, 1, 2, 3, 5, 8, 12, 16, 20, 25)
PLACES, RATIO = 256, 0.1


@dataclass
class Probe(Method):
    """Evaluates rules at one layer, and keeps the first tokens itself.

    Attributes:
        layer: The cut is before this decoder layer.
        facts: Positions of each sample's fact; set before every call.
        found: Output, one row of numbers per sample.
    """

    layer: int = 0
    facts: list[tuple[int, ...]] = field(default_factory=list)
    found: list[dict[str, float]] = field(default_factory=list)

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(self.layer, RATIO),)

    def choose(self, tokens: Tokens) -> Choice:
        last, rows = (_attention(tokens, which) for which in ("last", "text"))
        read = tokens.attention_inputs()
        lengths = read.values.float().norm(dim=-1).mean(1)[read.visual]
        order = residual_pivots(tokens.placed_hidden, None, tokens.offsets, tokens.budgets)
        scores = {"last_row": last[read.visual], "instruction_rows": rows[read.visual]}
        scores["rows_times_values"] = scores["instruction_rows"] * lengths
        keeps = {name: top_k(score, tokens.offsets, tokens.budgets) for name, score in scores.items()}
        keeps["residual"] = torch.zeros(len(tokens), dtype=torch.bool)
        keeps["residual"][order[order >= 0]] = True
        logged = IWP(layer=self.layer).statistics(tokens)
        for sample, fact in enumerate(self.facts):
            mine = slice(*tokens.offsets[sample : sample + 2].tolist())
            row = {name: float(keep[mine][list(fact)].float().mean()) for name, keep in keeps.items()}
            begin, end = read.key_offsets[sample : sample + 2].tolist()
            seen = last[read.visual][mine]
            row["sink"] = float(last[begin])
            row["text"] = float(last[begin:end].sum() - seen.sum()) - row["sink"]
            row["last_quarter"] = float(seen[-len(seen) // 4 :].sum() / seen.sum())
            self.found.append(row | logged)
        return Choice(keeps["last_row"])


def _attention(tokens: Tokens, queries: Any) -> Tensor:
    """Attention `[C]` received by every token of the prompts, mean over heads and query rows."""
    read = tokens.attention_inputs(queries=queries)
    places = (read.query_offsets, read.key_offsets, read.query_order, read.scaling, read.softcap)
    return attention_rows(read.queries, read.keys, *places)


@torch.no_grad()
def run(layer: int, texts: int) -> dict[str, Any]:
    """Means over texts with their intervals."""
    probe = Probe(layer)
    for start in range(0, texts, needle.BATCH):
        chosen, inputs = needle.trials(PLACES, needle.TRIALS, start, min(texts, start + needle.BATCH))
        probe.facts = [one.fact for one in chosen]
        with vtprune.patch(needle.model(), ratio=RATIO, method=probe):
            needle.model()(**inputs, use_cache=False, logits_to_keep=1)
    return mean_rows(probe.found)


def main(argv: list[str] | None = None) -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--texts", type=int, default=40)
    args = parser.parse_args(argv)
    header = {
        "decoder_sha256": parts.SHA256[parts.GGUF],
        "texts": args.texts,
        "places": PLACES,
        "ratio": RATIO,
        "versions": progress.versions(),
    }
    rows = command.fill(args, header, "layers", args.layers, lambda layer: run(layer, args.texts))
    for layer, row in rows.items():
        print(f"{layer:>3}", "  ".join(f"{name} {value['mean']:.2f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
