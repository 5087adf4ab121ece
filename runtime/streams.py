"""The tokens of one request as they come, for as long as nobody else changes the sequence they continue."""

from collections.abc import Iterator
from typing import Self

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.decoding import Decoding, Token
from mythos_edge.runtime.together import run_alone
from mythos_edge.runtime.turns import Turns, in_turn


class TokenStream(Iterator[Token]):
    """The tokens of ``Session.stream`` as they come. They hold the session while one is computed, not between two.

    Raises UsageError once another call has changed its sequence, after an error or an interrupt, and when the session
    is closed or in use by another thread.
    """

    def __init__(self, turns: Turns, backend: Backend, decoding: Decoding) -> None:
        self._turns, self._backend = turns, backend
        self._decoding: Decoding | None = decoding
        self._finished, self._why_ended = False, ""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        if self._finished:
            raise StopIteration
        return self._next_token()

    def end(self, why: str) -> None:
        """Makes every further token an error that says why, and lets go of the sequence."""
        self._decoding, self._why_ended = None, why

    def close(self) -> None:
        """Ends the stream where it is; the session keeps the tokens so far."""
        self._decoding, self._finished = None, True

    @in_turn
    def _next_token(self) -> Token:
        if self._finished:  # meanwhile, by another thread
            raise StopIteration
        if self._decoding is None:
            raise UsageError(f"this stream has ended: {self._why_ended}: start a new one")
        decoding = self._decoding
        try:
            token = run_alone(decoding.advance(), self._backend, decoding.note)
        except BaseException:
            self.end("an error or an interrupt stopped it")
            raise
        if decoding.finished:
            self.close()
        return token
