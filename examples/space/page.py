# SPDX-License-Identifier: Apache-2.0
"""Answers as HTML: a table side by side, and for each method the picture whose patches tell why they stayed or went."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from answers import Answer
from PIL import Image

import vtprune
from vtprune.report.explain import TokenExplanation
from vtprune.report.overlay import Pictures
from vtprune.report.patch_boxes import View
from vtprune.study.timing import Side

CSS = """
.vt table{border-collapse:collapse;width:100%}.vt td,.vt th{border:1px solid #8886;padding:4px 10px;text-align:left}
.vt .cards{display:flex;flex-wrap:wrap;gap:18px}.vt .card{flex:1 1 340px;max-width:560px;min-width:280px}
.vt img,.vt svg{width:100%;height:auto;display:block}.vt .error{color:#b00020}.vt figure{margin:6px 0}
.vt rect{fill:#fff;fill-opacity:0}.vt rect:hover{stroke:#ff0;stroke-width:.6%;fill-opacity:.25;cursor:pointer}
.vt rect.twin{stroke:#0ff;stroke-width:.8%}.vt .why{min-height:3em;font-size:90%}.vt .changed{font-weight:700}
.vt .row{display:flex;gap:6px}.vt .row figure{flex:1}
"""
HEADINGS = (
    "model",
    "method",
    "answer",
    "visual tokens",
    "KV cache",
    "first token after",
    "of it vision tower",
    "selection",
    "decoder",
    "pruning the decoder further: at most",
)
# A click writes down what hovering shows, and marks the kept patch that is most alike.
_CLICK = (
    "const p=event.target.closest('rect');if(!p)return;const c=this.closest('.card');"
    "c.querySelector('.why').textContent=p.querySelector('title').textContent;"
    "c.querySelectorAll('rect').forEach(r=>r.classList.toggle('twin',r.dataset.token===p.dataset.twin))"
)


def results(answers: Sequence[Answer]) -> str:
    """The whole result.

    Args:
        answers: Of all models and methods.
    """
    cards = "".join(_card(answer) for answer in answers)
    return f'<div class="vt"><style>{CSS}</style>{_table(answers)}<div class="cards">{cards}</div></div>'


def _table(answers: Sequence[Answer]) -> str:
    rows, seen = [], set()
    for answer in answers:
        if answer.before is None or answer.after is None:
            continue
        if answer.model not in seen:
            seen.add(answer.model)
            rows.append(_line(answer.model, "all tokens", answer.before, None))
        rows.append(_line(answer.model, answer.method, answer.after, answer.before))
    if not rows:
        return ""
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    return f'<table class="sides"><tr>{head}</tr>{"".join(rows)}</table>'


def _line(model: str, method: str, side: Side, before: Side | None) -> str:
    def against(value: float, full: float | None) -> str:
        return f" ({100 * (value / full - 1):+.0f} %)" if full else ""

    # Each method is timed in turn with the unpruned model, so each has an unpruned time of its own.
    taken = f" ({1000 * before.seconds:,.0f} ms unpruned)" if before else ""
    cells = [
        escape(model),
        escape(method),
        escape(side.answer or "(nothing)"),
        f"{side.visual_tokens:,}{against(side.visual_tokens, before and before.visual_tokens)}",
        f"{side.kv_bytes / 1024:,.0f} KiB{against(side.kv_bytes, before and before.kv_bytes)}",
        f"{1000 * side.seconds:,.0f} ms{taken}",
        *(f"{1000 * part:,.1f} ms" for part in (side.vision, side.selection_time, side.decoder)),
        f"{side.bound:.1f} times as fast" if side.bound else "",
    ]
    other = before is not None and side.answer != before.answer
    marks = [' class="changed"' if other and number == 2 else "" for number in range(len(cells))]
    return "<tr>" + "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, cells, strict=True)) + "</tr>"


def _card(answer: Answer) -> str:
    title = f"<h3>{escape(answer.method)} <small>{escape(answer.model)}</small></h3>"
    if answer.certificate is not None:
        title += f'<p class="certificate">Certified: {escape(str(answer.certificate))}.</p>'
    shown = answer.pictures
    if answer.pruning is None or shown is None:
        return f'<div class="card">{title}<p class="error">{escape(answer.error)}</p></div>'
    parts = [title]
    for view, (panel, caption) in zip(shown.views, shown.panels(), strict=True):
        parts.append(f"<figure>{_clickable(answer, view, panel)}<figcaption>{escape(caption)}</figcaption></figure>")
    parts.append('<p class="why">Hover over a patch or click it: why did it stay, why did it go?</p>')
    if len(answer.pruning.stages) > 1:
        parts.append(f'<h4>stage by stage</h4><div class="row stages">{_figures(shown.by_stage())}</div>')
    try:
        parts.append(f'<h4>score heat map</h4><div class="row heat">{_figures(shown.heatmap())}</div>')
    except vtprune.VTPruneError:
        parts.append(f'<p class="heat">{escape(answer.method)} chooses without scores: there is no heat map.</p>')
    return f'<div class="card" data-method="{escape(answer.method)}">{"".join(parts)}</div>'


def _figures(pictures: Pictures) -> str:
    return "".join(
        f'<figure><img alt="{escape(caption)}" src="{_data(panel)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for panel, caption in pictures.panels()
    )


def _clickable(answer: Answer, view: View, panel: Image.Image) -> str:
    """The picture with a rectangle for each patch that says why."""
    width, height = panel.size
    cells = []
    for token, box in zip(view.tokens.tolist(), view.boxes.tolist(), strict=True):
        why, words = _why(answer, token)
        x, y = box[0] * width, box[1] * height
        twin = "" if why.duplicate is None else f' data-twin="{why.duplicate}"'
        cells.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{box[2] * width - x:.1f}" height="{box[3] * height - y:.1f}" '
            f'data-token="{token}" data-kept="{int(why.kept)}"{twin}><title>{words}</title></rect>'
        )
    return (
        f'<svg class="patches" viewBox="0 0 {width} {height}" onclick="{_CLICK}">'
        f'<image href="{_data(panel)}" width="{width}" height="{height}"/>{"".join(cells)}</svg>'
    )


def _why(answer: Answer, token: int) -> tuple[TokenExplanation, str]:
    assert answer.pruning is not None
    why, places = answer.pruning.explain_token(token), answer.pruning.places

    def name(number: int) -> str:
        return f"row {int(places.grid_row[number]) + 1}, column {int(places.grid_col[number]) + 1}"

    fate = "kept" if why.kept else f"dropped before layer {why.layer}"
    words = [f"Patch {name(token)}: {fate}."]
    if why.score is not None:
        words.append(f"Score {why.score:.4g}, rank {why.rank} of {why.rank_of}.")
    if why.duplicate is not None:
        words.append(f"Most alike of the kept: {name(why.duplicate)} (cosine {why.similarity:.2f}).")
    return why, escape(" ".join(words))


def _data(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
