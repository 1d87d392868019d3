"""The parts of the page and where they stand; `app` says what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from .answer_html import EMPTY
from .conversation import OWN_PROMPT, REGION_PROMPTS
from .examples import Example
from .handlers import title_html
from .limits import Limits
from .models import DemoModel
from .picker import picture_picker
from .stage import picture_stage


@dataclass(frozen=True)
class PictureParts:
    """Where a picture comes from, and the picture."""

    source: gr.Accordion
    picker: gr.HTML
    stage: gr.HTML


@dataclass(frozen=True)
class ModelParts:
    """Which models answer, and what they have said: `a` always, `b` (in the column `second`) beside it."""

    model: gr.Dropdown
    other: gr.Dropdown
    title_a: gr.HTML
    chat_a: gr.HTML
    second: gr.Column
    title_b: gr.HTML
    chat_b: gr.HTML


@dataclass(frozen=True)
class QuestionParts:
    """What one asks and how. `saved` is not seen: the text of the saved page on its way to the browser."""

    question: gr.Textbox
    send: gr.Button
    stop: gr.Button
    find: gr.Button
    everything: gr.Button
    offers: gr.Radio
    region_prompt: gr.Radio
    longest: gr.Slider
    restart: gr.Button
    save: gr.Button
    saved: gr.Textbox


@dataclass(frozen=True)
class ViewParts:
    """What the towers see."""

    heat: gr.Button
    heat_panel: gr.HTML
    pca: gr.Button
    pca_panel: gr.HTML


def picture_column(examples: Sequence[Example], limits: Limits) -> PictureParts:
    """Left, and first on a phone."""
    with gr.Accordion("Picture: upload, paste, webcam or an example", open=True, elem_id="rt-source") as source:
        picker = picture_picker("rt-picker", examples, limits)
    return PictureParts(source, picker, picture_stage("rt-stage"))


def model_rows(models: Sequence[DemoModel]) -> ModelParts:
    """The two menus, shown when there is a choice, and the conversations."""
    names = [model.name for model in models]
    with gr.Row(visible=len(names) > 1, elem_id="rt-models"):
        model = gr.Dropdown(names, value=names[0], label="Model", filterable=False, elem_id="rt-model")
        beside = [("none", ""), *((name, name) for name in names)]
        other = gr.Dropdown(beside, value="", label="Side by side with", filterable=False, elem_id="rt-other")
    with gr.Row(equal_height=False, elem_id="rt-chats"):
        with gr.Column(min_width=150, elem_classes="rt-column"):
            title_a = gr.HTML(title_html(models[0]))
            chat_a = _conversation("rt-chat-a")
        with gr.Column(min_width=150, visible=False, elem_classes="rt-column") as second:
            title_b = gr.HTML("")
            chat_b = _conversation("rt-chat-b")
    return ModelParts(model, other, title_a, chat_a, second, title_b, chat_b)


def question_rows(limits: Limits) -> QuestionParts:
    """The question, its buttons, an example's questions, and the settings folded away."""
    question = gr.Textbox(
        label="Question",
        placeholder="What is in [1]?   Read [2].   Find the red star.",
        elem_id="rt-question",
        lines=1,
        max_lines=4,
        max_length=limits.question_chars,
    )
    with gr.Row(elem_id="rt-send-row"):
        send = gr.Button("Ask", variant="primary", elem_id="rt-send", min_width=80)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="rt-stop", min_width=80)
        find = gr.Button("Find ...", elem_id="rt-find", min_width=80)
        everything = gr.Button("List all", elem_id="rt-list", min_width=80)
    offers = gr.Radio([], label="Questions for this example", visible=False, elem_id="rt-offers")
    with gr.Accordion("Settings", open=False, elem_id="rt-settings"):
        region_prompt = gr.Radio(
            [("the model's own", OWN_PROMPT), *((name, name) for name in REGION_PROMPTS)],
            value=OWN_PROMPT,
            label="Region prompt: what a chip becomes for the model",
            info="An embedding of the region (tokens), its coordinates, both, or a box drawn into the picture "
            "(overlay). Models are trained on one; another one begins a new conversation.",
            elem_id="rt-region-prompt",
        )
        longest = gr.Slider(8, limits.new_tokens, value=128, step=8, label="Longest answer, tokens")
    with gr.Row():
        restart = gr.Button("New conversation", size="sm", elem_id="rt-restart", min_width=80)
        save = gr.Button("Save as HTML", size="sm", elem_id="rt-save", min_width=80)
    saved = gr.Textbox(visible="hidden", elem_id="rt-saved")
    return QuestionParts(question, send, stop, find, everything, offers, region_prompt, longest, restart, save, saved)


def view_tabs() -> ViewParts:
    """The two views of the tower, under the rest."""
    with gr.Tabs(elem_id="rt-tabs"):
        with gr.Tab("Region similarity", id="similarity"):
            gr.Markdown("Where the tower finds the picture like the selected box: yellow most, dark blue least.")
            heat = gr.Button("Show for the selected box", elem_id="rt-heat", size="sm")
            heat_panel = gr.HTML("", elem_id="rt-heat-panel", js_on_load=None)
        with gr.Tab("Tower tokens (PCA)", id="tokens"):
            gr.Markdown(
                "The image tokens the language model reads: their three largest principal components as red, green and "
                "blue. Like colours are like tokens, within one picture."
            )
            pca = gr.Button("Show for this picture", elem_id="rt-pca", size="sm")
            pca_panel = gr.HTML("", elem_id="rt-pca-panel", js_on_load=None)
    return ViewParts(heat, heat_panel, pca, pca_panel)


def _conversation(elem_id: str) -> gr.HTML:
    return gr.HTML(EMPTY, elem_id=elem_id, autoscroll=True, max_height=420, js_on_load=None)
