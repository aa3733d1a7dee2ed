# SPDX-License-Identifier: Apache-2.0
"""Which readings of which layer tell the needle's tokens from others: writes `benchmarks/results/needle_readings.json`.

    make real
    .venv-real/bin/python -m benchmarks.needle_readings

The texts and the decoder of `benchmarks.needle` at 256 places, unpruned. For every decoder layer and every reading, the
probability that a token of the fact (`fact`), or of the answer in it (`answer`), scores higher than a token of the
filler: 0.5 is chance. `question` and `last` are the attention of all text after the picture and of the last token,
mean over heads, as FastV, PyramidDrop and SparseVLM read it; `update` weights it by the length of the values and
`update, unrotated` is what IWP reads; `distance` is the length of a token's hidden state after subtracting the mean
token, which is what coverage methods respond to. `first column` is the attention of the question on column 0,
the sink.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.needle import TRIALS, model, trials
from benchmarks.real import parts
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "needle_readings.json"
PLACES = 256


def above(scores: Tensor, wanted: Tensor, others: Tensor) -> float:
    """Probability that a wanted token scores higher than another one."""
    return float((scores[wanted][:, None] > scores[others]).float().mean())


@torch.no_grad()
def readings(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """For every layer, `[256]` scores of the visual tokens by reading; `first column` is one number."""
    vlm = model()
    decoder = vlm.model.language_model
    visual = (inputs["input_ids"][0] == vlm.config.image_token_id).nonzero()[:, 0]
    end = int(visual[-1]) + 1
    states = vlm(**inputs, output_hidden_states=True).hidden_states
    length = states[0].shape[1]
    rotation = decoder.rotary_emb(states[0], torch.arange(length)[None])
    hidden_keys = torch.ones(length, length, dtype=torch.bool).triu(1)
    found = []
    for state, layer in zip(states, decoder.layers, strict=False):
        attention, normed = layer.self_attn, layer.input_layernorm(state)
        q, k, v = (
            projection(normed).view(1, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        sizes = v[0].float().norm(dim=-1).repeat_interleave(attention.num_key_value_groups, 0)  # [H, T]
        weights = {}
        for name, (query, key) in {"": apply_rotary_pos_emb(q, k, *rotation), ", unrotated": (q, k)}.items():
            key = key.repeat_interleave(attention.num_key_value_groups, 1).float()
            logits = (query.float() @ key.mT * attention.scaling)[0].masked_fill(hidden_keys, -torch.inf)
            weights[name] = logits.softmax(-1)[:, end:]  # [H, text, T]
        centered = state[0, visual].float() - state[0, visual].float().mean(0)
        scores = {"question": weights[""].mean((0, 1))[visual], "last": weights[""][:, -1].mean(0)[visual]}
        scores |= {f"update{n}": (w * sizes[:, None]).mean((0, 1))[visual] for n, w in weights.items()}
        found.append(scores | {"distance": centered.norm(dim=-1), "first column": weights[""][..., 0].mean()})
    return found


def measure(count: int) -> dict[str, dict[str, list[float]]]:
    """Means over trials, `[layers]` for each reading."""
    sums: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for number in range(count):
        (one,), inputs = trials(PLACES, TRIALS, number, number + 1)
        fact = torch.zeros(PLACES, dtype=torch.bool)
        fact[list(one.fact)] = True
        answer = torch.zeros_like(fact)
        answer[list(one.fact)[-len(parts.tokenizer()(f" {one.answer}")["input_ids"]) - 1 : -1]] = True  # not the stop
        layers = readings(inputs)
        for name in layers[0]:
            if name == "first column":
                sums[name, "share"].append([float(layer[name]) for layer in layers])
                continue
            for what, wanted in (("fact", fact), ("answer", answer)):
                sums[name, what].append([above(layer[name], wanted, ~fact) for layer in layers])
    out: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for (name, what), rows in sums.items():
        out[name][what] = [round(float(value), 3) for value in torch.tensor(rows).mean(0)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Which readings of which layer tell the needle's tokens from others.")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = {"decoder_sha256": parts.SHA256[parts.GGUF], "trials": args.trials, "versions": progress.versions()}
    progress.save(args.out, data | {"readings": measure(args.trials)})
    print(json.dumps(json.loads(args.out.read_text())["readings"]))


if __name__ == "__main__":
    main()
