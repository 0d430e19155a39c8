"""Runs the flow: which stages sit in which process, and what becomes of every frame."""
