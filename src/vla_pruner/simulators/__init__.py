"""Simulators that the reference policy was trained in and that the demo and the evaluation run."""
