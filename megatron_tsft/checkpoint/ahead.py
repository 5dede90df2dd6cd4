"""One step ahead: the next item of an iterator is made in a thread while the consumer works on the
last one."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ahead[T](items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order; at most two exist at a time. What `items` raises is raised
    here."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # pyright: ignore[reportReturnType]
