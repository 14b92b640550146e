"""How tokens leave any decoder: hooks, the session around them, and what it measures. Nothing here knows a method or
a model.
"""
