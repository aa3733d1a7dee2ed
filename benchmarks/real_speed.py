# SPDX-License-Identifier: Apache-2.0
"""Speed of every method on a real decoder, SmolLM2: writes `benchmarks/results/real-speed.json`.

    make real
    .venv-real/bin/python -m benchmarks.real_speed
    .venv-real/bin/python -m benchmarks.real_speed --again resprune    # after a change to one method

Time to the first token, time per token and KV bytes with 256, 1,024 and 2,304 visual places, beside the unpruned
decoder and beside the limit: a prompt that has only the kept tokens. All variants alternate, round
after round, on one thread, and what is compared is CPU time, which other programs do not affect.
The visual places hold the words of a text (see `benchmarks.real`), so there is no vision tower, and its time is none.

`--again` replaces the runs of some methods by rounds of their own, beside the unpruned decoder and the limit; times
compare within a round. Methods that need a vision tower's attention are refused, with their reason in the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import command
from benchmarks.real import needles, parts, text_vlm
from vtprune.bench import measure, summary
from vtprune.bench.variants import variants
from vtprune.core.budget import Budget
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "real-speed.json"
PLACES = (256, 1024, 2304)
RATIO = 0.1


def prompt(setting: measure.Setting) -> dict[str, torch.Tensor]:
    """A text of `setting.tokens` visual places with a question, the same in every sample."""
    assert setting.tokens is not None
    one = needles.needle(7, 40, setting.tokens)
    return text_vlm.inputs("<|im_start|>Text:", [one.words] * setting.batch, [one.question] * setting.batch)


def again(
    bench: measure.Bench, settings: list[measure.Setting], names: list[str], rounds: int, header: Any, out: Path
) -> dict[str, Any]:
    """Replaces the runs of some methods in a result by new rounds of them, the unpruned decoder and the limit."""
    data = progress.load(out, {key: value for key, value in header.items() if key != "variants"})
    bench.variants = [one for one in bench.variants if one.kind != "method" or one.label in names]
    for setting in settings:
        done = data["settings"][setting.key]["rounds"]
        for entry in done:
            entry["runs"] = {key: run for key, run in entry["runs"].items() if key.split()[0] not in names}
        prompt = bench.prepare(setting)
        bench.round(bench.warming(setting, prompt))
        for _ in range(rounds):
            done.append({"load": progress.load_average(), "runs": bench.round(prompt)})
            progress.save(out, data)
    return data


def main(argv: list[str] | None = None) -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--places", type=int, nargs="+", default=list(PLACES), help="visual places of the text")
    parser.add_argument("--methods", nargs="+", default=command.METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", nargs="+", metavar="METHOD", help="measure only these methods again")
    args = parser.parse_args(argv)
    chosen = variants(args.methods, [Budget(ratio=RATIO)])
    bench = measure.Bench(text_vlm.load(torch.bfloat16), prompt, chosen, new_tokens=8)
    settings = [measure.Setting(1, places) for places in args.places]
    header = measure.header(bench, "SmolLM2-135M-Instruct Q4_1, dequantized", None)
    header["decoder_sha256"] = parts.SHA256[parts.GGUF]
    with progress.script(args.out):
        if args.again:
            data = again(bench, settings, args.again, args.rounds, header, args.out)
        else:
            data = measure.run(bench, settings, args.rounds, header, args.out, args.force)
    data["rows_in_cpu_time"] = summary.rows(data, cpu=True)
    progress.save(args.out, data)
    for row in data["rows_in_cpu_time"]:
        if "refused" in row:
            print(f"{row['tokens']:5} {row['variant']:26} refused: {row['refused'][:80]}")
            continue
        first, token = row["prefill"]["median"], row["token"]["median"]
        print(
            f"{row['tokens']:5} {row['variant']:26} first token {1e3 * first:7.0f} ms, {row['speedup']:.2f}x, "
            f"per token {1e3 * token:5.1f} ms, KV {row['kv_bytes'] / 2**20:6.1f} MiB, "
            f"over the limit {row.get('over_limit', 0.0):+.0%} {row.get('verdict', '')}"
        )


if __name__ == "__main__":
    main()
