"""The Gradio app: draw a box, ask, see boxes back.

`serve.launch` starts it; `app.build_app` makes the page, `engine` holds what it does without any page. Gradio itself is
imported by `app` and `stage` alone, so that the engine works without it.
"""
