# SPDX-License-Identifier: Apache-2.0
"""Injects faults into the engine one at a time, and checks that a law fails for each.

    python scripts/check_laws_can_fail.py

Works on a copy of the tree. Prints a line per fault and exits with 1 if any fault is not caught. With `--out FILE`,
results are written after every fault: an interrupted run resumes, a finished one starts again, and results of another
version are overwritten only with `--force`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from vtprune.study import progress  # noqa: E402


@dataclass
class Fault:
    """Replaces `old` by `new` in `file`, after which `tests` must fail."""

    law: str
    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault("1 identity", "a ratio of one still drops a token", "core/budget.py",
          "final = max(1, round(ratio * total))", "final = max(1, round(ratio * total) - 1)",
          "test_1_identity.py -k qwen2_5_vl-random"),
    Fault("2 drop is mask", "rotations are not cut with the columns", "engine/layer_arguments.py",
          "index = columns.source if name in positions.NAMES else columns.index",
          "index = columns.index\n"
          "            if name in positions.NAMES:\n"
          "                index = torch.arange(index.shape[1]).expand_as(index)",
          "test_2_drop_is_mask.py -k llava-random"),
    Fault("2 drop is mask", "DeepStack features are not reordered", "engine/deepstack.py",
          "features.index_select(0, to_device(rows, features.device))", "features[: len(rows)]",
          "test_2_drop_is_mask.py -k qwen3_vl-random"),
    Fault("2 drop is mask", "dropped columns keep their states", "core/ragged.py",
          "x.new_zeros(x.shape[0], length", "x.new_ones(x.shape[0], length",
          "test_2_drop_is_mask.py -k llava-random"),
    Fault("3 decode", "the cache reports what it holds, not the conversation", "engine/kv_cache.py",
          "return count if state is None else count + state.removed(first)", "return count",
          "test_3_decode.py -k 'llava-steps and hand_written'"),
    Fault("3 decode", "beams are reordered without their slots", "engine/kv_cache.py",
          "self._vtprune_state.selected(beam_idx)", "self._vtprune_state.selected(beam_idx * 0)",
          "test_3_decode.py -k 'llava-steps and modes and beams'"),
    Fault("3 decode", "a continued chat forgets the first cut", "engine/columns.py",
          "before = self.state.slots(number, cached) if self.state is not None else None\n", "before = None\n",
          "test_3_decode.py -k 'llava-steps and text_only'"),
    Fault("4 batch", "padding counts as text", "engine/prefill.py",
          "return known, None", "return known | True, None",
          "test_4_batch.py -k 'llava'"),
    Fault("5 budget", "ties go to the larger column", "core/ragged.py",
          "order = order[torch.sort(tie * len(scores) + order).indices]",
          "order = order[torch.sort(tie * len(scores) - order).indices]",
          "../test_methods_attention.py -k ties_go"),
    Fault("5 budget", "the count is rounded down", "core/budget.py",
          "final = max(1, round(ratio * total))", "final = max(1, int(ratio * total))",
          "test_5_budget.py -k 'llava_next-random'"),
    Fault("6 cache", "layers run on all columns", "engine/prefill.py",
          "return gather.gather(hidden, self.slots, 1)",
          "return gather.gather(hidden, self.slots, 1).repeat(1, 2, 1)",
          "test_6_cache.py -k 'llava-random'"),
    Fault("7 leave no trace", "an encoder stays wrapped", "engine/hooks.py",
          "        delattr(self.module, self.name)\n", "        pass\n",
          "test_7_no_trace.py -k 'llava-random'"),
    Fault("7 leave no trace", "the attention registry stays wrapped", "models/attention_probe.py",
          "        del registry.get_interface\n", "        return\n",
          "test_7_no_trace.py -k 'llava-random'"),
    Fault("8 own your state", "calls share one state", "engine/thread_state.py",
          "class ThreadState(threading.local):", "class ThreadState:",
          "test_8_state.py -k 'threads and llava-steps'"),
    Fault("8 own your state", "every call leaves something behind", "engine/model_hooks.py",
          "        thread.end_decoder_call()\n",
          "        thread.end_decoder_call()\n"
          "        self._left = [*getattr(self, '_left', ()), torch.zeros(1)]\n",
          "test_8_state.py -k 'grows and llava-steps'"),
    Fault("9 never silent", "a budget that rounds to all tokens drops one", "core/budget.py",
          "final = max(1, round(ratio * total))", "final = max(1, min(total - 1, round(ratio * total)))",
          "test_9_never_silent.py -k 'nothing_dropped and llava-random'"),
    Fault("9 never silent", "NaN features are scored", "engine/token_view.py",
          "checks.add(states, lambda: _refuse_states(states, rows, number))", "pass",
          "test_9_never_silent.py -k 'nan and llava'"),
    Fault("10 any attention", "the probe reads another layer under eager attention", "models/attention_probe.py",
          "    if \"use_cache\" in kwargs:\n",
          "    if kwargs.get('attention_mask') is not None and kwargs['attention_mask'].is_floating_point():\n"
          "        args = (args[0] * torch.linspace(-1, 1, args[0].shape[-1]), *args[1:])\n"
          "    if \"use_cache\" in kwargs:\n",
          "test_10_any_attention.py -k 'llava-iwp'"),
    Fault("11 cheap", "padding is carried along", "engine/gather.py",
          "needed = keep_row & ((real_row.cumsum(0) > 0) if mixing else real_row)\n", "needed = keep_row.clone()\n",
          "test_4_batch.py -k 'padding_is_not and llava'"),
    Fault("11 cheap", "a layer runs on what was dropped as well", "engine/prefill.py",
          "        cut = LayerCut(None)\n",
          "        cut = LayerCut(None)\n"
          "        layer.forward(*args, **{**kwargs, 'past_key_values': None})\n",
          "test_11_cheap.py -k 'llava-input'"),
    Fault("12 open calls", "columns that somebody reads may be dropped", "engine/plan.py",
          "read[visual.sample, visual.position] if bool(read.any()) else None", "None",
          "test_12_open_calls.py -k 'llava-random and (ends_in or labels_read)'"),
    Fault("12 open calls", "the answer chooses", "engine/token_view.py",
          "if call.answer_starts is not None:", "if False:",
          "test_12_open_calls.py -k 'llava-iwp and answers_do'"),
    Fault("12 open calls", "a pruned cache goes on without a patch", "engine/kv_cache.py",
          "if not self._vtprune_state.calls and self._vtprune_state.is_pruned:", "if False:",
          "test_12_open_calls.py -k 'llava-random and after_remove'"),
    Fault("12 open calls", "attention maps keep the lengths of their layers", "engine/restore.py",
          'for name in ("hidden_states", "attentions", "router_logits"):', 'for name in ("hidden_states",):',
          "test_12_open_calls.py -k 'llava-random and generate_flags'"),
    Fault("12 open calls", "hidden pictures take the budget", "models/visual_tokens.py",
          "if bool(seen.all()):", "if True:",
          "test_12_open_calls.py -k 'llava-random and hidden_pictures'"),
    Fault("12 open calls", "foreign columns pass in silence", "engine/merged.py",
          "left = int((foreign & (kinds == 0)).sum())", "left = 0",
          "test_12_open_calls.py -k 'llava-random and merged_by_hand'"),
    Fault("12 open calls", "packed rows share a budget", "models/unsupported.py",
          "found = next(_packings(arguments, real, past), None)", "found = None",
          "test_12_open_calls.py -k 'llava-random and packed'"),
    Fault("12 open calls", "router logits in a decoding step hide the cache", "engine/model_hooks.py",
          " and not kv_cache.length(cache_of(kwargs)):", ":",
          "../test_arguments.py -k 'forward and llava'"),
    Fault("12 open calls", "an interrupted call leaves its cache unguarded", "engine/thread_state.py",
          "        if call is not None:\n            call.stop_reading()\n", "",
          "../test_calls.py -k interrupted"),
    Fault("12 open calls", "sliding masks are taken for packed rows", "models/unsupported.py",
          "if bool((rows & ~after[torch.arange(batch), 0, past + nearest.clamp(min=0)].cpu()).any()):",
          "if bool(rows.any()):",
          "../test_calls.py -k sliding_window_is_no_packed"),
    Fault("12 open calls", "padding is taken for features", "engine/merged.py",
          "            foreign &= mask[:, -foreign.shape[1] :].bool().cpu()  # padding may hold anything\n",
          "            pass\n",
          "../test_features_by_hand.py -k padding_may"),
    Fault("12 open calls", "stored features of adjacent pictures are one picture", "models/encoder_outputs.py",
          'Encoded(kind, {}, _lengths(getattr(given[kind], "pooler_output", None)))', "Encoded(kind, {}, None)",
          "../test_calls.py -k adjacent_pictures_that"),
    Fault("12 open calls", "cropping a pruned prompt loses its positions", "engine/kv_cache.py",
          "            self._vtprune_state = after\n", "            pass\n",
          "test_6_cache.py -k crop"),
    Fault("12 open calls", "merged states pass no gradient", "engine/selection.py",
          "differentiable = trains and method.differentiable", "differentiable = False",
          "../test_calls.py -k gradients_pass"),
    Fault("12 open calls", "a window that keeps the prompt does not know of the cut", "engine/layer_arguments.py",
          "            self._shorten_prompt(number)\n", "            pass\n",
          "../test_lasting_prompt.py"),
)  # fmt: skip


def survives(fault: Fault, tree: Path) -> bool:
    """Whether the tests pass despite the fault."""
    file = tree / "vtprune" / fault.file
    source = file.read_text()
    if source.count(fault.old) < 1:
        raise SystemExit(f"{fault.file} no longer contains {fault.old!r}: adapt the fault {fault.what!r}")
    file.write_text(source.replace(fault.old, fault.new))
    path = os.pathsep.join([str(tree), str(tree / "kernels" / "torch-ext")])
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider tests/laws/{fault.tests}"
    run = subprocess.run(
        command, shell=True, cwd=tree, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    file.write_text(source)
    if run.returncode not in (0, 1):
        raise SystemExit(f"{command}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 0


def check(out: Path | None, force: bool) -> dict[str, Any]:
    """Tries all faults, or the rest of an interrupted run; returns the content of `out`.

    Raises:
        StaleResultError: `out` holds results of another version.
    """
    data: dict[str, Any] = {"versions": progress.versions()}
    data |= {"caught": {}} | progress.load(out, data, force)
    faults = {f"law {fault.law}: {fault.what}": fault for fault in FAULTS}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.safetensors", "build", "dist", "out")
        shutil.copytree(ROOT, tree, ignore=ignore)

        def one(name: str) -> bool:
            return not survives(faults[name], tree)

        for name, caught in progress.each(data, list(faults), one, "faults", lambda: progress.save(out, data)):
            data["caught"][name] = caught
            print(f"{'caught' if caught else 'MISSED'}  {name}", flush=True)
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description="Injects faults into the engine and checks that a law fails for each.")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args()
    with progress.script(args.out):
        caught = check(args.out, args.force)["caught"].values()
    print(f"{sum(caught)} of {len(caught)} faults caught")
    return int(not all(caught))


if __name__ == "__main__":
    raise SystemExit(main())
