"""The Gradio app (not written yet)."""
