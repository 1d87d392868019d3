"""The page: which parts it has and which handler belongs to which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..mllm.prompts import LIST_ALL
from .answer_html import EMPTY
from .api import add_api
from .conversation import OWN_PROMPT, REGION_PROMPTS
from .engine import Engine
from .examples import Example, photo_examples, scene_examples
from .handlers import Handlers, title_html
from .stage import picture_input, picture_stage

TITLE = "regiontower: draw a box, ask, see boxes back"
NO_OTHER = "no other model"
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
# The saved page never becomes a file of the server: the browser makes one of its text.
DOWNLOAD = """(page) => {
  if (!page) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([page], { type: "text/html" }));
  link.download = "conversation.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""
FIND = """() => {
  setTimeout(() => document.querySelector("#rt-question textarea")?.focus(), 100);
  return "Find the ";
}"""


def build_app(engine: Engine, examples: list[Example] | None = None) -> gr.Blocks:
    """The demo of an engine's models; `serve.launch` opens it. Examples are drawn here when none are given."""
    examples = [*scene_examples(), *photo_examples()] if examples is None else examples
    handlers, names, limits = Handlers(engine, examples), [model.name for model in engine.models], engine.limits
    several = len(names) > 1
    hidden: Any = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)) as app:
        add_api(engine)  # first, or the page's own events would take its endpoints' names
        # Gone when its page is closed.
        token = gr.State("", delete_callback=engine.sessions.close)
        gr.HTML('<h1 class="rt-heading">Draw a box, ask, see boxes back</h1>')
        notice = gr.HTML("", elem_id="rt-notice")
        with gr.Row(elem_id="rt-main"):
            with gr.Column(scale=5, min_width=320):
                with gr.Accordion("Picture: upload, paste or webcam", open=True, elem_id="rt-source") as source:
                    upload = picture_input("rt-upload", height=200)
                    size = gr.HTML("")
                stage = picture_stage("rt-stage")
            with gr.Column(scale=6, min_width=320):
                with gr.Row(visible=several, elem_id="rt-models"):
                    model = gr.Dropdown(names, value=names[0], label="Model", filterable=False, elem_id="rt-model")
                    other = gr.Dropdown(
                        [NO_OTHER, *names],
                        value=NO_OTHER,
                        label="Side by side with",
                        filterable=False,
                        elem_id="rt-other",
                    )
                with gr.Row(equal_height=False):
                    with gr.Column(min_width=150):
                        title_a = gr.HTML(title_html(names[0]))
                        chat_a = gr.HTML(
                            EMPTY,
                            elem_id="rt-chat-a",
                            autoscroll=True,
                            max_height=420,
                            js_on_load=None,
                        )
                    with gr.Column(min_width=150, visible=False) as second:
                        title_b = gr.HTML("")
                        chat_b = gr.HTML(
                            EMPTY,
                            elem_id="rt-chat-b",
                            autoscroll=True,
                            max_height=420,
                            js_on_load=None,
                        )
                question = gr.Textbox(
                    label="Question",
                    placeholder="What is in [1]?   Read [2].   Find the red star.   What is this?",
                    elem_id="rt-question",
                    lines=1,
                    max_lines=4,
                    max_length=limits.question_chars,
                    submit_btn=False,
                )
                with gr.Row(elem_id="rt-send-row"):
                    send = gr.Button("Ask", variant="primary", elem_id="rt-send", min_width=80)
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="rt-stop", min_width=80)
                    find = gr.Button("Find ...", elem_id="rt-find", min_width=80)
                    everything = gr.Button("List everything", elem_id="rt-list", min_width=80)
                offers = gr.Radio([], label="Questions for this example", visible=False, elem_id="rt-offers")
                with gr.Accordion("Settings", open=False, elem_id="rt-settings"):
                    region_prompt = gr.Radio(
                        [("the model's own", OWN_PROMPT), *REGION_PROMPTS],
                        value=OWN_PROMPT,
                        label="Region prompt: what a chip becomes for the model",
                        info="An embedding of the region (tokens), its coordinates, both, or a box drawn into the "
                        "picture (overlay). Models are trained on one; another one begins a new conversation.",
                        elem_id="rt-region-prompt",
                    )
                    longest = gr.Slider(8, limits.new_tokens, value=128, step=8, label="Longest answer, tokens")
                with gr.Row():
                    restart = gr.Button("New conversation", size="sm", elem_id="rt-restart", min_width=80)
                    save = gr.Button("Save as HTML", size="sm", elem_id="rt-save", min_width=80)
                saved = gr.Textbox(visible="hidden", elem_id="rt-saved")
        with gr.Tabs(elem_id="rt-tabs"):
            with gr.Tab("Examples"):
                gallery = gr.Gallery(
                    [(example.image, example.title) for example in examples],
                    columns=5,
                    height="auto",
                    allow_preview=False,
                    show_label=False,
                    buttons=[],
                    elem_id="rt-examples",
                )
            with gr.Tab("Region similarity", id="similarity"):
                gr.Markdown("Where the tower finds the picture like the selected box: yellow most, dark blue least.")
                heat = gr.Button("Show for the selected box", elem_id="rt-heat", size="sm")
                heat_panel = gr.HTML("", elem_id="rt-heat-panel", js_on_load=None)
            with gr.Tab("Tower tokens (PCA)", id="tokens"):
                gr.Markdown(
                    "The image tokens the language model reads: their three largest principal components as red, green "
                    "and blue. Like colours are like tokens, within one picture."
                )
                pca = gr.Button("Show for this picture", elem_id="rt-pca", size="sm")
                pca_panel = gr.HTML("", elem_id="rt-pca-panel", js_on_load=None)

        opened = [upload, token, stage, chat_a, chat_b, question, offers, source, heat_panel, pca_panel, size, notice]
        upload.change(handlers.open_upload, [upload, token], opened, concurrency_limit=4, **hidden)

        def choose(event: gr.SelectData, current: str) -> list[Any]:
            return handlers.open_example(int(event.index), current)

        gallery.select(choose, token, opened, concurrency_limit=4, **hidden)
        offers.input(lambda text: text or "", offers, question, queue=False, **hidden)
        working: Any = {"concurrency_limit": limits.at_once, "concurrency_id": "model", **hidden}
        gr.on(
            [send.click, question.submit],
            handlers.ask,
            [token, question, stage, model, other, region_prompt, longest],
            [chat_a, chat_b, stage, question, send, stop, notice],
            trigger_mode="once",
            **working,
        )
        stop.click(handlers.stop, token, None, queue=False, **hidden)
        find.click(None, None, question, js=FIND, **hidden)
        everything.click(None, None, question, js=f"() => {LIST_ALL!r}", **hidden)
        gr.on(
            [model.change, other.change],
            handlers.show,
            [token, model, other],
            [chat_a, chat_b, title_a, title_b, second, stage],
            **hidden,
        )
        restart.click(handlers.restart, token, [chat_a, chat_b, stage, notice], **hidden)
        save.click(handlers.save, token, [saved, notice], **hidden).then(None, saved, None, js=DOWNLOAD, **hidden)
        looking = working | {"show_progress": "minimal"}
        heat.click(handlers.similarity, [token, stage, model, other], [heat_panel, notice], **looking)
        pca.click(handlers.tokens, [token, model, other], [pca_panel, notice], **looking)
    app.queue(max_size=limits.waiting, api_open=False, default_concurrency_limit=4)
    return app
