"""Compiled models, fed call by call."""
