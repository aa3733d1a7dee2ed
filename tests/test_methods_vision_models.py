# SPDX-License-Identifier: Apache-2.0
"""Methods that read the vision tower, in models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, Image
from torch import Tensor, nn
from torch.nn.functional import normalize

import vtprune
from vtprune import methods
from vtprune.methods import Tokens


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_estimators_agree_about_a_model(family: str) -> None:
    model, batch, found = FAMILIES[family].build(), FAMILIES[family].batch([[3, Image(0), 5]]), {}
    closed = family != "smolvlm"  # its connector is a single linear layer
    for estimator in ("jvp", "difference") + ("exact",) * closed:
        method = methods.ZOOPrune(estimator=estimator, directions=400 if family == "llava" else 8, step=1e-2)
        with torch.inference_mode(), vtprune.patch(model, ratio=0.5, method=method) as patch:
            model(**batch)
        found[estimator] = patch.last.scores[0].double()
    torch.testing.assert_close(found["difference"], found["jvp"], rtol=1e-2, atol=0)
    if family == "llava":
        assert torch.corrcoef(torch.stack([found["jvp"], found["exact"]]))[0, 1] > 0.99
    if not closed:
        with pytest.raises(vtprune.MethodError, match="linear - activation - linear"):
            vtprune.patch(model, ratio=0.5, method=methods.ZOOPrune(estimator="exact"))


class Opaque(nn.Linear):
    """A linear layer by a kernel that PyTorch knows nothing of, as serving engines have: its derivative comes out 0."""

    library = torch.library.Library("vtprune_tests", "DEF")
    library.define("linear(Tensor x, Tensor weight, Tensor bias) -> Tensor")
    library.impl("linear", nn.functional.linear, "CPU")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.vtprune_tests.linear(x, self.weight, self.bias)


def test_zoo_prune_takes_differences_where_derivatives_are_lost() -> None:
    family, kept = FAMILIES["llava"], {}
    model, batch = family.build(), family.batch([[3, Image(0), 5]])
    projector = model.model.multi_modal_projector
    for estimator in ("difference", "auto"):
        with torch.no_grad(), vtprune.patch(model, ratio=0.5, method=methods.ZOOPrune(estimator=estimator)) as patch:
            model(**batch)
        kept[estimator] = patch.last.kept[0].tolist()
        projector.linear_1.__class__ = projector.linear_2.__class__ = Opaque
    assert kept["auto"] == kept["difference"]
    patch = vtprune.patch(model, ratio=0.5, method=methods.ZOOPrune(estimator="jvp"))
    with patch, torch.no_grad(), pytest.raises(vtprune.MethodError, match="derivatives are 0; use.*'difference'"):
        model(**batch)


def test_zoo_prune_takes_rounding_for_no_difference() -> None:
    """Central differences of a linear projector are equal up to rounding, and so the kept tokens those of `jvp`."""
    family, kept = FAMILIES["smolvlm"], {}
    model, batch = family.build(), family.batch([[3, Image(0), 5]])
    for estimator in ("jvp", "difference"):
        with torch.no_grad(), vtprune.patch(model, ratio=0.3, method=methods.ZOOPrune(estimator=estimator)) as patch:
            model(**batch)
        kept[estimator] = patch.last.kept[0].tolist()
    assert kept["difference"] == kept["jvp"]


def test_zoo_prune_travels_and_forgets_old_weights() -> None:
    family, method = FAMILIES["llava"], methods.ZOOPrune()
    model, batch, scores = family.build(), family.batch([[3, Image(0), 5]]), []
    with torch.no_grad(), vtprune.patch(model, ratio=0.5, method=method) as patch:
        for factor in (1.0, 3.0):
            model.model.multi_modal_projector.linear_2.weight.mul_(factor)
            model(**batch)
            scores.append(patch.last.scores[0])
    torch.testing.assert_close(scores[1], 3 * scores[0])
    assert pickle.loads(pickle.dumps(method)) == method == copy.deepcopy(method)


def test_visionzip_sends_sums_of_features_through_the_projector() -> None:
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5]])
    anatomy, taken = vtprune.inspect(model), {}
    for with_class in (False, True):
        method = methods.VisionZip(contextual=0.2, keep_class_token=with_class)
        choose = method.choose
        method.choose = lambda t, choose=choose, key=with_class: taken.setdefault(key, (t, choose(t)))[1]
        with torch.no_grad(), vtprune.patch(model, keep=10, method=method):
            model(**batch)
    tokens, plain = taken[False]
    inputs, _, _ = tokens.recorded["vision.projector"][0]
    changed = (plain.hidden != tokens.hidden).any(1).nonzero()[:, 0]
    order = plain.scores.sort(descending=True, stable=True).indices
    rest = order[8:].sort().values
    assert len(changed) == 2 and torch.equal(changed, rest[[0, 8]])
    sums = [inputs[0][0, row] + inputs[0][0, others].mean(0) for row, others in _groups(tokens, rest, changed)]
    with torch.no_grad():
        torch.testing.assert_close(plain.hidden[changed], anatomy.projector(torch.stack(sums)), rtol=1e-4, atol=1e-5)
    tokens, classed = taken[True]
    extra = (classed.hidden != tokens.hidden).any(1) & ~torch.isin(torch.arange(25), changed)
    assert int(classed.keep.sum()) == 10 and int(extra.sum()) >= 1
    layer = tokens.recorded["vision.layer"][0][3]
    state = anatomy.projector((layer[0] if isinstance(layer, tuple) else layer)[0, :1])
    distance = (classed.hidden[classed.keep] - state).norm(dim=1)
    assert distance.min() < 1e-4 < distance.sort().values[1]


def _groups(tokens: Tokens, rest: Tensor, targets: Tensor) -> list[tuple[int, Tensor]]:
    """The patches of each target, assigned one by one by the similarity of keys."""
    layer, args, kwargs, *_ = tokens.recorded["vision.layer"][0]
    hidden = layer.layer_norm1(args[0] if args else kwargs["hidden_states"])
    keys = layer.self_attn.k_proj(hidden)[0, 1:].unflatten(1, (layer.self_attn.num_heads, -1)).mean(1)
    members: dict[int, list[int]] = {int(t): [] for t in targets}
    for patch in rest.tolist():
        if patch not in members:
            similar = {t: torch.cosine_similarity(keys[patch], keys[t], dim=0) for t in members}
            members[max(similar, key=similar.get)].append(patch)
    return [(t, torch.tensor(others)) for t, others in members.items()]


def chosen(method: methods.Method, keep: int = 10) -> tuple[nn.Module, Tokens, methods.Choice]:
    """Projector, tokens and choice of one prompt with one picture."""
    model, out, choose = FAMILIES["llava"].build(), [], method.choose
    method.choose = lambda tokens: out.append((tokens, choose(tokens))) or out[-1][1]  # type: ignore[method-assign]
    with torch.no_grad(), vtprune.patch(model, keep=keep, method=method):
        model(**FAMILIES["llava"].batch([[3, Image(0), 5]]))
    return vtprune.inspect(model).projector, *out[0]


@torch.no_grad()
def test_prumerge_sends_merged_features_through_the_projector() -> None:
    projector, tokens, choice = chosen(methods.PruMerge(plus=False, near=4))
    features, attention = tokens.recorded["vision.projector"][0][0][0][0], choice.scores
    best = attention.sort(descending=True, stable=True).indices[:9]
    left = torch.tensor([i for i in range(25) if i not in best.tolist()])
    extra = int(left[0])
    assert choice.keep.nonzero()[:, 0].tolist() == sorted([*best.tolist(), extra])
    rest = (attention[left, None] * features[left]).sum(0)
    torch.testing.assert_close(choice.hidden[extra], projector(rest), rtol=1e-4, atol=1e-5)
    layer, args, kwargs, *_ = tokens.recorded["vision.layer"][0]
    keys = layer.self_attn.k_proj(layer.layer_norm1(args[0] if args else kwargs["hidden_states"]))[0, 1:]
    for row in best.tolist():
        similar = torch.cosine_similarity(keys[row], keys, dim=1)
        similar[row] = -2
        near = similar.topk(4).indices
        merged = features[row] + (attention[near, None] * features[near]).sum(0)
        torch.testing.assert_close(choice.hidden[row], projector(merged), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vflowopt_merges_what_it_drops_into_the_best_of_each_cell() -> None:
    _, tokens, choice = chosen(methods.VFlowOpt(grid=3, later=()))
    cell = (tokens.grid_row // 3) * 2 + tokens.grid_col // 3
    changed = (choice.hidden != tokens.hidden).any(1)
    assert int(choice.keep.sum()) == 10 and 1 <= int(changed.sum()) <= 4
    for row in changed.nonzero()[:, 0].tolist():
        members = (~choice.keep & (cell == cell[row])).nonzero()[:, 0]
        members = torch.cat([members, torch.tensor([row])])
        weights = choice.scores[members] / choice.scores[members].sum()
        torch.testing.assert_close(choice.hidden[row], (weights[:, None] * tokens.hidden[members]).sum(0))
        assert choice.scores[row] == choice.scores[members].max()
    _, _, plain = chosen(methods.VFlowOpt(grid=3, later=(), recycle=False))
    assert plain.hidden is None and not torch.equal(plain.keep, choice.keep)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_vflowopt_adds_the_entropy_of_the_pixels(family: str) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch([[3, Image(0), 5], [2, Image(1), 3]])
    scores = []
    for alpha in (0.0, 0.5):
        with vtprune.patch(model, ratio=0.5, method=methods.VFlowOpt(alpha=alpha)) as patch:
            model(**batch)
        places, scores = patch.last.places, [*scores, patch.last.scores[0]]
    added = (scores[1] - scores[0])[places.grid_row >= 0]
    assert (added > 0).all() and added.std() > 0
    if family in ("llava", "internvl"):  # one softmax per crop
        crops = 2 if family == "llava" else 3
        assert float(added.sum()) == pytest.approx(0.5 * crops, rel=1e-4)


def test_vflowopt_says_which_pixels_it_can_read() -> None:
    model, method = FAMILIES["qwen2_vl"].build(), methods.VFlowOpt(alpha=0.5)
    patch = vtprune.patch(model, ratio=0.5, method=method)
    with patch, torch.no_grad(), pytest.raises(vtprune.MethodError, match="square crops of pixels"):
        model(**FAMILIES["qwen2_vl"].batch([[3, Image(0), 5]]))


def cdpruner_scores(prompts: list, **options: object) -> list[Tensor]:
    model = FAMILIES["llava"].build()
    with torch.no_grad(), vtprune.patch(model, ratio=0.4, method=methods.CDPruner(**options)) as patch:
        model(**FAMILIES["llava"].batch(prompts))
    return list(patch.last.scores[0].split([len(v) for v in patch.last.visual if len(v)]))


def test_relevance_is_scaled_by_sample_or_as_released_by_batch() -> None:
    prompts = [[3, Image(0), 5], [2, Image(1), 4, Image(2), 7]]
    for scores in cdpruner_scores(prompts):
        assert scores.max() == pytest.approx(1, abs=1e-3) and scores.min() < 1e-4
    lowest = [float(scores.min()) for scores in cdpruner_scores(prompts, scale_over="batch")]
    assert min(lowest) < 1e-4 < max(lowest)
    other = cdpruner_scores([[3, Image(0), 6]])[0]  # another question about the same picture
    assert not torch.allclose(other, cdpruner_scores(prompts)[0])


def test_relevance_without_clip_is_the_cosine_with_the_text_and_none_leaves_the_text_out() -> None:
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5]])
    seen = {}
    with torch.no_grad(), vtprune.patch(model, ratio=0.4, method="cdpruner") as patch:
        hook = patch.anatomy.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True, prepend=True
        )
        model(**batch)
        hook.remove()
    embeds, visual = normalize(seen["inputs_embeds"][0], dim=-1), patch.last.visual[0]
    cosine = (embeds[visual] @ embeds[int(visual[-1]) + 1 :].T).mean(1)
    scores = patch.last.scores[0]
    assert torch.equal(scores.argsort(), cosine.argsort())  # the most similar token has the largest score
    kept = {}
    for options in ({"relevance": "none"}, {"theta": 0}, {"theta": "released"}, {}, {"theta": 0.5}):
        with torch.no_grad(), vtprune.patch(model, ratio=0.4, method=methods.CDPruner(**options)) as patch:
            model(**batch)
        kept[str(options)] = patch.last.kept[0].tolist()
    none, zero, released, auto, half = kept.values()
    assert none == zero and auto == half and len({str(x) for x in (none, released, half)}) == 3
    for theta in (1, -0.1, "half"):
        with pytest.raises(vtprune.MethodError, match="theta"):
            methods.CDPruner(theta=theta)


class Words:
    """A minimal tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [40, *(int(word) % 40 for word in text.split()), 41]}


def test_relevance_by_clip_depends_on_the_question() -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 42, "eos_token_id": 41, "bos_token_id": 40, "pad_token_id": 0}
    vision = text | {"hidden_size": 24, "image_size": 20, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    options = {"clip": clip, "clip_tokenizer": Words(), "tokenizer": Words()}
    (short,), (long,) = cdpruner_scores([[3, Image(0), 5]], **options), cdpruner_scores([[3, Image(0), 90]], **options)
    assert short.shape == long.shape == (25,) and not torch.allclose(short, long)
    with pytest.raises(vtprune.MethodError, match="pass all three or none"):
        methods.CDPruner(clip=clip)
    clip.visual_projection = nn.Linear(7, 12)
    with pytest.raises(vtprune.MethodError, match="width 7"):
        cdpruner_scores([[3, Image(0), 5]], **options)


@pytest.mark.parametrize(
    ("architecture", "names", "refused"),
    [
        ("ernie4_5_vl_moe", ("visionzip", "prumerge", "sink_aware"), ""),  # a projector that takes the pictures' grids
        ("ovis2", ("zoo_prune", "visionzip"), ""),  # one that is called with token ids of separators too
        ("got_ocr2", ("zoo_prune",), r"GotOcr2MultiModalProjector takes \(1, 256, 8, 8\).*'divprune'"),
    ],
)
@torch.inference_mode()
def test_projectors_with_other_inputs_than_patches(architecture: str, names: tuple[str, ...], refused: str) -> None:
    from tests.architectures.run import prepare, registered

    if architecture not in registered():
        pytest.skip("not in this version of transformers")
    built, prompts = prepare(architecture, registered()[architecture])
    for name in names:
        with vtprune.patch(built.model, ratio=0.25, method=name) as patch:
            if refused:
                with pytest.raises(vtprune.MethodError, match=refused):
                    built.model(**prompts.batch([[3, "image", 5]]))
                continue
            built.model(**prompts.batch([[3, "image", 5]]))
            assert len(patch.last.kept[0]) == len(patch.last.visual[0]) // 4
