"""One step ahead: a thread makes an iterator's next item while the consumer works on the last."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ahead[T](items: Iterable[T]) -> Iterator[T]:
    """The same items in their order, at most two at a time; what `items` raises is raised here."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # pyright: ignore[reportReturnType]
