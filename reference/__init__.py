"""How the reference policy was made: demonstrations, training, closed-loop evaluation (see README.md)."""
