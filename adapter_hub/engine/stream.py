"""A text as it is being written: the generation runs in a thread of its own, and its pieces are an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Self

Tell = Callable[[str], bool]    # takes the text's beginning, as far as it stands; True: nobody listens any more


class Stream(Iterator[str]):
    """Pieces of one text, in order: joined they are the text. Nothing runs before the first piece is asked for.

    `close`, leaving a `with`, or letting go of it ends the generation and waits until what it held is free.
    """

    def __init__(self, run: Callable[[Tell], str], *, truncated: bool) -> None:
        """`run` writes the text and returns all of it; meanwhile it tells how it begins. What it raises, the iterator raises."""
        self.truncated = truncated    # the input was longer than the base's max_tokens
        self._pieces = _pieces(run)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(run: Callable[[Tell], str]) -> Generator[str, None, None]:
    told: SimpleQueue[tuple[str, bool] | BaseException] = SimpleQueue()
    closed = threading.Event()

    def tell(text: str) -> bool:
        told.put((text, False))
        return closed.is_set()

    def work() -> None:
        try:
            told.put((run(tell), True))
        except BaseException as error:    # the reader's to handle, whatever it is
            told.put(error)

    thread = threading.Thread(target=work, name="adapter_hub stream")
    thread.start()
    try:
        given, last = 0, False
        while not last:
            news = told.get()
            if isinstance(news, BaseException):
                raise news
            text, last = news
            if len(text) > given:
                yield text[given:]
                given = len(text)
    finally:
        closed.set()
        thread.join()
