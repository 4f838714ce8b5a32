"""The forms for the GPU plugin."""
