"""A text as it is being written: the generation runs in a thread of its own, and its pieces are an iterator."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Self

Tell = Callable[[str], bool]    # takes the text's beginning, as far as it stands; True: nobody listens any more
_Told = SimpleQueue[str | BaseException | None]    # pieces, or what was raised; None: that was all

# What runs, with the event that ends it. A daemon would be cut off amid its work when the interpreter ends, any other would hold it up.
_running: dict[threading.Thread, threading.Event] = {}


class Stream(Iterator[str]):
    """Pieces of one text, in order: joined they are the text. Nothing runs before the first piece is asked for.

    `close`, by any thread, or leaving a `with` ends the generation and returns when what it held is free; who waits for a piece gets
    none. Letting go of it ends the generation too, within a token, and waits for nothing: whoever's thread drops it may hold locks.
    """

    def __init__(self, run: Callable[[Tell], str], *, truncated: bool) -> None:
        """`run` writes the text and returns all of it; meanwhile it tells how it begins. What it raises, the iterator raises."""
        self.truncated = truncated    # the input was longer than the base's max_tokens
        self._lock = threading.RLock()
        self._told: _Told = SimpleQueue()
        self._closed = threading.Event()
        # It knows nothing of this object, which can be let go of while it runs.
        self._thread = threading.Thread(target=_write, args=(run, self._told, self._closed), name="adapter_hub stream", daemon=True)

    def __next__(self) -> str:
        with self._lock:
            if self._closed.is_set():
                raise StopIteration
            if self._thread.ident is None:
                self._thread.start()
        piece = self._told.get()
        if piece is None or self._closed.is_set():
            self._told.put(None)    # for whoever waits beside this thread, or asks again
            raise StopIteration
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self) -> None:
        with self._lock:    # after it no thread starts
            self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()


def _write(run: Callable[[Tell], str], told: _Told, closed: threading.Event) -> None:
    given = 0

    def tell(text: str) -> bool:
        nonlocal given
        if len(text) > given:
            told.put(text[given:])
            given = len(text)
        return closed.is_set()

    _running[threading.current_thread()] = closed
    try:
        tell(run(tell))
    except BaseException as error:    # the reader's to handle, whatever it is
        told.put(error)
    finally:
        told.put(None)
        del _running[threading.current_thread()]


@atexit.register
def _end() -> None:
    for thread, closed in list(_running.items()):
        closed.set()
        thread.join()
