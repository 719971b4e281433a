"""The methods of `LLM` that give states."""

from __future__ import annotations

import os

from forge.errors import ParameterError
from forge.hooks.scope import bound, entered
from forge.keywords import keywords, path_of
from forge.runtime import state_files, states
from forge.runtime.encoder import Prompt
from forge.runtime.prompts import is_single
from forge.runtime.scoring_front import ScoringFront
from forge.runtime.state import State


class StateFront(ScoringFront):
    """Base of `LLM`: prompts that are computed, and stay so."""

    @keywords()
    def prefill(self, prompt: Prompt, *, adapter: str | None = None) -> State:
        """Compute a prompt, and keep what the model has computed of it.

        Args:
            prompt: As in `generate`, with one BOS; no batch.
            adapter: As in `generate`.

        Returns:
            A `State`: `generate` goes on from it as often as wanted, without computing the prompt again.

        Raises:
            ParameterError: The prompt is empty, or holds ids outside the vocabulary.
            ContextLengthError: The prompt is too long.
            OutOfMemoryError: States or passes hold the pages that it needs; the message says which.
        """
        if not is_single(prompt):
            raise ParameterError("prefill takes one prompt: call it for each", parameter="prompt")
        slot, ids = self._slot_of(adapter), self.encode_prompt(prompt)
        self.engine.check_ids(ids)
        ((hooks,),) = bound(entered(self._loop), [ids])
        return State(self, self._loop.run(states.computed(self._loop, self.engine, ids, slot, hooks)), adapter)

    @keywords()
    def load_state(self, path: str | os.PathLike[str]) -> State:
        """Read a state that `State.save` has written.

        The model must have the same configuration and tensors, and the same adapter if there is one; a hash says so.
        It computes in the same precision. Its context and device may differ.

        Args:
            path: A file.

        Returns:
            A `State` that goes on as the one that was saved.

        Raises:
            FormatError: The file is damaged or forged, or of another model.
            ContextLengthError: It has more tokens than the context.
            OutOfMemoryError: It does not fit the memory, or others hold the pages that it needs.
        """
        self._loop.check()
        with state_files.opened(path_of("path", path)) as file:
            adapter = state_files.adapter_of(file, self.adapters, self._fingerprints)
            stored = state_files.read(file, self.engine, self._name)
        slot = self._slot_of(adapter)
        parts = states.written(self._loop, self.engine, stored.ids, slot, stored.arrays, stored.logits)
        return State(self, self._loop.run(parts), adapter)
