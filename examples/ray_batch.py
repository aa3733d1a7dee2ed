# SPDX-License-Identifier: Apache-2.0
"""Asks one question about every picture of a folder: Ray Data, several vLLM engines, pruned by the vtprune plug-in.

    python examples/ray_batch.py --model OWNER/NAME --images FOLDER --question "What is this?" --out answers.jsonl

Every answer is a line of the output as soon as it is there. The same command goes on with what is not answered yet, so
that no picture is answered twice; it ends with exit code 1 and the names of the pictures that have no answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune.core.images import open_picture
from vtprune.errors import VTPruneError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def pictures(folder: Path) -> list[str]:
    """Names of the pictures of a folder, in order."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def answered(out: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run has written, by picture; a last line that was cut off is dropped from the file."""
    found: dict[str, dict[str, Any]] = {}
    if not out.exists():
        return found
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        out.write_text("".join(whole), encoding="utf-8")
    for line in whole:
        row = json.loads(line)
        if not row["error"]:
            found[row["picture"]] = row
    return found


def prompt(model: str, question: str) -> str:
    """The text of a prompt with one picture, by the model's own chat template."""
    from transformers import AutoProcessor

    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return AutoProcessor.from_pretrained(model).apply_chat_template(chat, add_generation_prompt=True)


def request(row: dict[str, Any], folder: str, text: str, tokens: int) -> dict[str, Any]:
    """What the engine gets for one picture, which is read with the limits of vtprune."""
    picture, error = None, ""
    try:
        picture = open_picture(Path(folder) / row["picture"]).image
    except VTPruneError as found:  # a damaged file is one row with an error, and not the end of the job
        error = str(found)
    return {
        "picture": row["picture"],
        "prompt": text,
        "multimodal_data": {"image": picture},
        "sampling_params": {"max_tokens": tokens, "temperature": 0.0},
        "__inference_error__": error,
    }


def rows(args: argparse.Namespace, todo: list[str]) -> Iterator[dict[str, Any]]:
    """Answers as they come, in any order: `picture`, `answer`, `prompt_tokens` and `error`."""
    try:
        import ray
        from ray import serve  # noqa: F401  (an engine of vLLM inside Ray reports its statistics through it)
    except ImportError as error:
        raise SystemExit(f'Ray Data and Ray Serve are needed ({error}): pip install "ray[data,serve]"') from error
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    engine = {"max_model_len": args.max_model_len, "enforce_eager": args.cpu}
    engine["additional_config"] = {"vtprune": {"method": args.method, "ratio": args.ratio}}
    if args.cpu:
        engine |= {"dtype": "float32", "kv_cache_memory_bytes": 2**28}
        ray.init(num_cpus=args.workers + 2)  # engines and the reading of pictures share what cores there are
    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs=engine,
        concurrency=(args.workers, args.workers),  # a number alone starts with one engine
        batch_size=args.batch,
        should_continue_on_error=True,  # a request that fails is a row with an error
        # One prompt serves all, made by `prompt`; the engine makes tokens of it.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": 1}]} if args.cpu else None,
    )
    folder, text, tokens = str(args.images.resolve()), prompt(args.model, args.question), args.max_tokens

    def before(row: dict[str, Any]) -> dict[str, Any]:
        return request(row, folder, text, tokens)

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "picture": row["picture"],
            "answer": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
        }

    processor = build_processor(config, preprocess=before, postprocess=after)
    data = ray.data.from_items([{"picture": name} for name in todo])
    for row in processor(data).iter_rows():
        yield {
            "picture": row["picture"],
            "answer": row.get("answer"),
            "prompt_tokens": row.get("prompt_tokens"),
            "error": row.get("__inference_error__") or None,
        }


def main() -> int:
    """Runs the job; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--question", required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the tokens of each picture that is kept")
    parser.add_argument("--workers", type=int, default=2, help="vLLM engines, each with a GPU of its own")
    parser.add_argument("--batch", type=int, default=16, help="pictures handed to an engine at a time")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--cpu", action="store_true", help="engines on the CPU, for trying it out")
    args = parser.parse_args()

    names, done = pictures(args.images), answered(args.out)
    todo = [name for name in names if name not in done]
    print(f"{len(names)} pictures, {len(names) - len(todo)} answered before", file=sys.stderr)
    failed: dict[str, str] = {}
    if todo:
        with args.out.open("a", encoding="utf-8") as file:
            for row in rows(args, todo):
                if row["picture"] in done:  # a batch that ran again after its engine was lost
                    continue
                file.write(json.dumps(row) + "\n")
                file.flush()
                if row["error"]:
                    failed[row["picture"]] = row["error"]
                else:
                    done[row["picture"]] = row
    missing = [name for name in names if name not in done]
    for name in missing:
        print(f"no answer: {name}: {failed.get(name, 'its engine was lost')}", file=sys.stderr)
    print(f"{len(names) - len(missing)} of {len(names)} pictures answered, each once", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
