"""The usual wiring: hooks on the layers of transformers decoders, and taps on their attention modules."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vla_pruner.attach.deepstack import DeepStack
from vla_pruner.attach.family import Family
from vla_pruner.attach.recorder import Recorder
from vla_pruner.attach.shortener import Shortener
from vla_pruner.replacements import undo

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session


class HookWiring:
    """Shortens a family's decoders and reads the attention that the session's method needs."""

    def __init__(self, session: Session, family: Family) -> None:
        self._session = session
        self._family = family
        self._recorder = Recorder()
        self._shortener = Shortener(session, family, session.method.layer)
        self._deepstack = DeepStack(session, family.decoder)

    def install(self) -> None:
        """Put taps and hooks in place.

        Raises:
            UnsupportedModelError: see `Shortener.install`.
        """
        session, family = self._session, self._family
        layers, needs = family.decoder.layers, session.method.needs
        for layer, stage in session.stages.items():
            if "semantic" in stage.method.needs:
                attention = layers[stage.method.semantic_layer].self_attn
                self._recorder.watch(attention, family.backend, partial(session.record_semantic, layer))
        if "action" in needs:
            record = session.record_reader if family.readers else session.record_decoder
            for actor in family.readers or (family.decoder,):
                for index in session.method.action_layers(len(actor.layers)):
                    callback = partial(record, index)
                    self._recorder.watch(actor.layers[index].self_attn, family.backend, callback)
        self._shortener.install()
        self._deepstack.install()

    def remove(self) -> None:
        """Take all of it away."""
        undo(self._deepstack.remove, self._shortener.remove, self._recorder.remove)
