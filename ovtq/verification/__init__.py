"""The converted file beside the original, as hosts load them."""
