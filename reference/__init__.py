"""The making of the reference policy: demonstrations, training, closed-loop evaluation (see README.md)."""
