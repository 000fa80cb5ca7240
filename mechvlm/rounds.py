"""Work that asks for runs, so that what much work asks for is one job where the model runs elsewhere.

A piece of work is a generator. It yields a list of what it wants run, is given the runs one by one, and may yield again
once it has seen them; what it returns is what was found. In this process each piece is worked through before the next
begins. Elsewhere all pieces ask at once, and what they ask for is one job: a round.

>>> def answer(prompt):
...     (run,) = yield [{"prompt": prompt}]
...     return int(run.logits.argmax())
>>> [vlm.word(token) for token in together(vlm, [answer(real), answer(null)])]
['yes', 'no']
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from mechvlm.passes import forwards, pass_of
from mechvlm.run import Run

T = TypeVar("T")
U = TypeVar("U")
Asked = Sequence[Mapping[str, Any]]
"""For each run what `VLM.runs` takes; and `by`, the model with its edits, where that is another than who asks."""
Work = Generator[Asked, Iterator[Run], T]
"""A piece of work: it asks for runs, is given them, and returns what it found."""


def together(vlm: Any, works: Iterable[Work[T]]) -> Iterator[T]:
    """What pieces of work return, in their order: one piece after the other here, all of them in rounds elsewhere.

    Args:
        vlm: the model that runs.
    """
    if not vlm.place.remote:
        yield from (done(vlm, work) for work in works)
        return
    yield from done(vlm, beside(works))


def both(vlm: Any, one: Work[T], other: Work[U]) -> tuple[T, U]:
    """What two pieces of work return, which need not be alike."""
    works: list[Work[Any]] = [one, other]
    first, second = together(vlm, works)
    return first, second


def beside(works: Iterable[Work[T]]) -> Work[list[T]]:
    """Pieces of work as one, in which all of them ask at once; what each returns, in their order.

    Example:
        >>> def answer(prompt):
        ...     (run,) = yield [{"prompt": prompt}]
        ...     return int(run.logits.argmax())
        >>> [vlm.word(token) for token in done(vlm, beside([answer(real), answer(null)]))]
        ['yes', 'no']
    """
    listed, found = list(works), dict[int, T]()
    given: dict[int, Any] = dict.fromkeys(range(len(listed)))
    while given:
        asked: dict[int, Asked] = {}
        for number, some in given.items():
            try:
                asked[number] = listed[number].send(some)
            except StopIteration as end:
                found[number] = end.value
        if not asked:
            break
        runs = yield [one for some in asked.values() for one in some]
        given = {number: iter([next(runs) for _ in some]) for number, some in asked.items()}
    return [found[number] for number in range(len(listed))]


def done(vlm: Any, work: Work[T]) -> T:
    """What one piece of work returns."""
    given: Any = None
    while True:
        try:
            asked = work.send(given)
        except StopIteration as end:
            found: T = end.value
            return found
        given = ran(vlm, asked)


def unsaid(logits: Tensor) -> Tensor:  # batch vocab
    """For `value`, where of the logits nothing is wanted: a number of each row, instead of the whole vocabulary's.

    Example:
        >>> next(vlm.runs([{"prompt": real, "value": unsaid}])).logits.shape
        torch.Size([1, 0])
    """
    return logits[:, 0].clone()


def ran(vlm: Any, asked: Asked) -> Iterator[Run]:
    """The runs that were asked for: one after the other here, one job elsewhere."""
    held: dict[tuple, Any] = {}
    given = ((one.get("by", vlm), {name: x for name, x in one.items() if name != "by"}) for one in asked)
    return forwards(vlm, (pass_of(by, held, **what) for by, what in given))
