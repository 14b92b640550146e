"""Pruning of any decoder: hooks, the session around them, and its measurements. Nothing here knows a method or a
model.
"""
