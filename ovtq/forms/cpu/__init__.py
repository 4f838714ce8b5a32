"""The forms for the CPU plugin."""
