"""Policies as their users call them: images and an instruction in, an action chunk out."""
