"""Variant → report → card."""
