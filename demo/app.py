"""The page: which handler belongs to which of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..mllm.prompts import LIST_ALL
from .api import OPENING, add_api
from .engine import Engine
from .examples import photo_examples, scene_examples
from .handlers import Handlers
from .layout import (
    ModelParts,
    PictureParts,
    QuestionParts,
    ViewParts,
    model_rows,
    picture_column,
    question_rows,
    view_tabs,
)
from .limits import Limits
from .picker import PICTURE_OVER

TITLE = "regiontower: draw a box, ask, see boxes back"
HEADING = (
    '<h1 class="rt-heading">Draw a box, ask, see boxes back</h1>'
    '<p class="rt-lead">Open a picture, drag a box over something, ask about it.</p>'
)
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
# The button tells who waits in the queue; it comes back when the question's event is over, well or not, because a click
# before that would be lost.
WAITING = '() => ({ __type__: "update", value: "Waiting ...", interactive: false })'
ASK_AGAIN = """() => {
  const update = (props) => ({ __type__: "update", ...props }), menu = update({ interactive: true });
  return [update({ value: "Ask", interactive: true, visible: true }), update({ visible: false }), menu, menu];
}"""
# Seconds between sweeps, and the age at which an uploaded file goes. Not at once: users with one photo share one file.
KEPT_UPLOADS = (60, 300)
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build_app(engine: Engine, uploads: Path) -> gr.Blocks:
    """The demo of an engine's models; `serve.launch` opens it. `uploads` is the folder that uploads come into."""
    examples = [*scene_examples(), *photo_examples()]
    handlers = Handlers(engine, examples, uploads)
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=KEPT_UPLOADS) as app:
        add_api(engine)  # first, or the page's own events would take its endpoints' names
        # Gone an hour after its page is closed: Gradio waits that long for the page to come back.
        token = gr.State("", delete_callback=engine.sessions.close)
        gr.HTML(HEADING)
        notice = gr.HTML("", elem_id="rt-notice")
        with gr.Row(elem_id="rt-main"):
            with gr.Column(scale=1, min_width=320):
                picture = picture_column(examples, engine.limits)
            with gr.Column(scale=1, min_width=320):
                models = model_rows(engine.models)
                asking = question_rows(engine.limits)
        views = view_tabs()
        _opening(handlers, token, notice, picture, models, asking, views)
        _talking(handlers, token, notice, picture, models, asking, engine.limits)
        _looking(handlers, token, notice, picture, models, views, engine.limits)
    # How many may wait is `guard`'s to see: Gradio would not let anybody stop an answer when the queue is full.
    app.queue(max_size=None, api_open=False, default_concurrency_limit=4)
    return app


def _opening(
    handlers: Handlers,
    token: gr.State,
    notice: gr.HTML,
    picture: PictureParts,
    models: ModelParts,
    asking: QuestionParts,
    views: ViewParts,
) -> None:
    """A picture comes, of the user's or of the examples."""
    opened = [token, picture.stage, models.chat_a, models.chat_b, asking.question, asking.offers]
    opened += [picture.source, views.heat_panel, views.pca_panel, notice]
    # The picker sends the next choice when this one is over, so "multiple" never runs two at once.
    choice = picture.picker.upload(
        handlers.open, [picture.picker, token], opened, trigger_mode="multiple", **OPENING, **HIDDEN
    )
    for over in (choice.success, choice.failure):
        over(None, None, None, js=PICTURE_OVER, **HIDDEN)
    # An offer is let go at once, so that it can be taken again.
    taken = [asking.question, asking.offers]
    asking.offers.input(lambda text: (text or "", None), asking.offers, taken, queue=False, **HIDDEN)


def _talking(
    handlers: Handlers,
    token: gr.State,
    notice: gr.HTML,
    picture: PictureParts,
    models: ModelParts,
    asking: QuestionParts,
    limits: Limits,
) -> None:
    """Questions, answers, and what is done with a conversation."""
    chats, menus = [models.chat_a, models.chat_b], [models.model, models.other]
    asked, buttons = [asking.send.click, asking.question.submit], [asking.send, asking.stop, *menus]
    gr.on(asked, None, None, asking.send, js=WAITING, **HIDDEN)  # before the next, which it would else wait for
    question = gr.on(
        asked,
        handlers.ask,
        [token, asking.question, picture.stage, *menus, asking.region_prompt, asking.longest],
        [*chats, picture.stage, asking.question, *buttons, notice],
        trigger_mode="once",
        **_working(limits),
    )
    for over in (question.success, question.failure):
        over(None, None, buttons, js=ASK_AGAIN, **HIDDEN)
    asking.stop.click(handlers.stop, token, None, queue=False, **HIDDEN)
    asking.find.click(None, None, asking.question, js=FIND, **HIDDEN)
    asking.everything.click(None, None, asking.question, js=f"() => {LIST_ALL!r}", **HIDDEN)
    gr.on(
        [models.model.change, models.other.change],
        handlers.show,
        [token, *menus],
        [*chats, models.title_a, models.title_b, models.second, picture.stage],
        **HIDDEN,
    )
    asking.restart.click(handlers.restart, token, [*chats, picture.stage, notice], **HIDDEN)
    saving = asking.save.click(handlers.save, token, [asking.saved, notice], **HIDDEN)
    saving.then(None, asking.saved, None, js=DOWNLOAD, **HIDDEN)


def _looking(
    handlers: Handlers,
    token: gr.State,
    notice: gr.HTML,
    picture: PictureParts,
    models: ModelParts,
    views: ViewParts,
    limits: Limits,
) -> None:
    """The views of the tower."""
    looking: dict[str, Any] = _working(limits) | {"show_progress": "minimal"}
    menus = [models.model, models.other]
    views.heat.click(handlers.similarity, [token, picture.stage, *menus], [views.heat_panel, notice], **looking)
    views.pca.click(handlers.tokens, [token, *menus], [views.pca_panel, notice], **looking)


def _working(limits: Limits) -> dict[str, Any]:
    """Of events in which a model works: they wait for each other, in the page and in the HTTP API."""
    return {"concurrency_limit": limits.at_once, "concurrency_id": "model", **HIDDEN}
