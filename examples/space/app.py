# SPDX-License-Identifier: Apache-2.0
"""The vtprune demo: ask about a picture, with and without most of its visual tokens.

    python app.py

Environment: `VTPRUNE_MODELS` (comma-separated: `embedded-qwen2_5_vl`, `embedded`, local folders, names on the hub;
default `embedded-qwen2_5_vl`), `VTPRUNE_CERTIFICATES` (comma-separated files of `vtprune certify`; default: one of that
model, beside this file), `VTPRUNE_MAX_NEW_TOKENS` (32), `VTPRUNE_REPEATS` (timed runs, 3). Gradio's own variables, such
as `GRADIO_SERVER_PORT` and `GRADIO_TEMP_DIR`, work too. Uploads stay in Gradio's temporary folder and are deleted after
an hour.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr
import page
import uploads
from answers import Budget, Mean, Models
from PIL import Image

import vtprune
from vtprune import methods, refvlm

# Pictures of 1,296, 576, 400 and 144 visual tokens for the embedded Qwen2.5-VL.
LARGE, SMALLER = (36, 36), (24, 24)
DRAWN: dict[str, Any] = {f"crowd {seed}": refvlm.crowds.crowd(seed, LARGE) for seed in (27, 8, 3)}
DRAWN |= {"smaller crowd": refvlm.crowds.crowd(4, SMALLER), "page": refvlm.pages.page(2, (20, 20))}
DRAWN |= {f"scene {seed}": refvlm.scenes.scene(seed) for seed in (7, 12)}
UPLOAD = "my upload"
ABOUT = """# vtprune: most visual tokens are redundant
A vision-language model cuts a picture into patches, and its language model pays for **every one** of them. vtprune
keeps the few that matter and drops the others while the model reads the question: no training, same model. Pick a
picture, ask, and move the slider. Dropped patches turn dark; hover over a patch to see why it stayed or went.
"""
NOTE = """The model inside the package is small and knows drawn pictures only: ask it about shapes, colors, places and
digits, or about the words and lines of a page. Times are of this machine, measured in turn with the unpruned model. On
the scenes of 144 patches, choosing may cost more time than it saves. Small things, such as digits and words, can be
lost where the vision tower is cut."""
DEFAULT = "embedded-qwen2_5_vl"
MAX_QUESTION = 500
SHARE, AUTO = "a share of them", "auto: as many as each picture needs, with that share as the mean over the pictures"
TOWER = 0.35  # share of the patches in the later blocks of the vision tower, as in `vtprune demo`
CERTIFICATE = Path(__file__).resolve().parent / "certificate.json"


def _number(name: str, default: int) -> int:
    return max(1, int(os.environ.get(name) or default))


def models_from_environment() -> Models:
    """The models that `VTPRUNE_MODELS` names."""
    names = [name.strip() for name in os.environ.get("VTPRUNE_MODELS", "").split(",") if name.strip()]
    tokens, repeats = _number("VTPRUNE_MAX_NEW_TOKENS", 32), _number("VTPRUNE_REPEATS", 3)
    return Models(names or [DEFAULT], tokens, repeats, [picture(name, None)[0] for name in DRAWN])


def certificates_from_environment() -> dict[str, vtprune.Certificate]:
    """What is offered under each certificate's name."""
    files = [name.strip() for name in os.environ.get("VTPRUNE_CERTIFICATES", "").split(",") if name.strip()]
    found = [vtprune.Certificate.load(file) for file in files or [CERTIFICATE]]
    return {f"certified: {one.ratio:g} with {one.method}, at most {one.risk:.0%} changed": one for one in found}


def picture(choice: str, file: str | None) -> tuple[Image.Image, str]:
    """The chosen picture and a note about it; `uploads.UploadError` where it cannot be used."""
    if choice == UPLOAD:
        if not file:
            raise uploads.UploadError("No picture was uploaded yet: send one, or pick a scene.")
        return uploads.read(file)
    if choice not in DRAWN:
        raise uploads.UploadError(f"There is no picture {choice!r}.")
    drawn = DRAWN[choice]
    return getattr(drawn, "small", drawn.image).convert("RGB"), ""


def questions(choice: str) -> list[str]:
    """Questions that go well with a picture; the first is about its smallest part."""
    if choice in DRAWN:
        asked = sorted(DRAWN[choice].questions, key=lambda question: question.kind not in ("digit", "line"))
        return [question.text for question in asked]
    return ["what is in the picture?"]


def look(choice: str, file: str | None):
    """Preview, message, and a question to start with."""
    try:
        image, note = picture(choice, file)
    except uploads.UploadError as error:
        return None, str(error), gr.skip()
    return image, note, gr.skip() if choice == UPLOAD else questions(choice)[0]


def uploaded(file: str | None):
    """A new file is looked at right away."""
    if not file:
        return gr.skip(), gr.skip(), ""
    image, note, _ = look(UPLOAD, file)
    return UPLOAD, image, note


def answer(models: Models, certificates: dict[str, vtprune.Certificate]):
    """The function behind the button."""

    def ask(
        file: str | None,
        choice: str,
        question: str,
        ratio: float,
        chosen: list[str],
        asked: list[str],
        how: str = SHARE,
        cut_tower: bool = False,
    ):
        """Answers a question about a picture: a message, and the result as HTML."""
        question = (question or "").strip()
        try:
            image, note = picture(choice, file)
        except uploads.UploadError as error:
            return str(error), ""
        if not question or len(question) > MAX_QUESTION:
            return f"Ask something, in at most {MAX_QUESTION} characters.", ""
        chosen = [name for name in methods.for_pictures() if name in (chosen or ())]
        asked = [name for name in models.names if name in (asked or ())]
        if not chosen or not asked:
            return "Choose at least one method and one model.", ""
        if not 0 < ratio <= 1:
            return "The ratio is a share of the tokens: above 0, at most 1.", ""
        budget: Budget = certificates.get(how) or (Mean(ratio) if how == AUTO else float(ratio))
        # Certificates and automatic counts are of the whole tower.
        tower = TOWER if cut_tower and isinstance(budget, float) else None
        answers = [a for name in asked for a in models.ask(name, image, question, budget, chosen, tower)]
        return note or "Done.", page.results(answers)

    return ask


def build(models: Models, certificates: dict[str, vtprune.Certificate]) -> gr.Blocks:
    """The page."""
    budgets = [SHARE, AUTO, *certificates]
    with gr.Blocks(title="vtprune", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                choice = gr.Radio([*DRAWN, UPLOAD], value=next(iter(DRAWN)), label="Picture", elem_id="choice")
                file = gr.File(label="Upload a picture", type="filepath", height=110, elem_id="upload")
                preview = gr.Image(label="Picture", interactive=False, height=260, buttons=[], elem_id="preview")
            with gr.Column(scale=2, min_width=320):
                first = questions(next(iter(DRAWN)))[0]
                question = gr.Textbox(first, label="Question", max_length=MAX_QUESTION, elem_id="question")
                how = gr.Radio(budgets, value=SHARE, label="How many visual tokens stay", elem_id="how")
                ratio = gr.Slider(0.02, 1.0, 0.1, step=0.01, label="Share of visual tokens kept", elem_id="ratio")
                chosen = gr.CheckboxGroup(
                    list(methods.for_pictures()), value=["resprune"], label="Methods", elem_id="methods"
                )
                cut = gr.Checkbox(False, label="Cut inside the vision tower, too", elem_id="tower")
                names = models.names
                asked = gr.CheckboxGroup(
                    names, value=names[:1], label="Models", visible=len(names) > 1, elem_id="models"
                )
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                message = gr.Markdown("", elem_id="message")
        result = gr.HTML(elem_id="result", js_on_load="")
        gr.Markdown(NOTE)
        quick = {"queue": True, "show_progress": "hidden"}
        demo.load(look, [choice, file], [preview, message, question], api_visibility="private", **quick)
        choice.input(look, [choice, file], [preview, message, question], api_name="look", **quick)
        file.change(uploaded, [file], [choice, preview, message], api_name="uploaded", **quick)
        inputs = [file, choice, question, ratio, chosen, asked, how, cut]
        # A certificate has a ratio and a method of its own.
        how.input(
            lambda how: (*[gr.update(visible=how not in certificates)] * 2, gr.update(visible=how == SHARE)),
            how,
            [ratio, chosen, cut],
            api_visibility="private",
            **quick,
        )
        # One at a time: the others wait in the queue, and the times that are shown are not disturbed.
        gr.on(
            [button.click, question.submit, ratio.release],
            answer(models, certificates),
            inputs,
            [message, result],
            api_name="ask",
            concurrency_limit=1,
            trigger_mode="always_last",
        )
    return demo.queue(max_size=256)


if __name__ == "__main__":
    build(models_from_environment(), certificates_from_environment()).launch(
        max_file_size=uploads.MAX_BYTES, show_error=True, footer_links=["api"]
    )
