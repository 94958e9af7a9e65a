"""Who is there: every request by its id, and in the order of service. Nothing here looks at all that wait."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from appliance.core.request import Request

_ticket = attrgetter("ticket")


class Queues:
    """A request is in one of three lists, each in order of tickets, as its flags ``running`` and ``held`` say.

    ``running``; ``waiting``: for a place; ``deferred``: for its group's decision or for its grammar, and only then for a place.
    Who runs has a seat of its own, which is a number: where the device keeps what it has no blocks for.
    """

    def __init__(self, *, priorities: bool, seats: int) -> None:
        """``priorities``: whether a request's priority counts, or only its order of arrival. ``seats``: so many run at most."""
        self.priorities = priorities
        self.seats = list(reversed(range(seats)))  # that are free, the next one last
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.deferred: list[Request] = []
        self._requests: dict[str, dict[int, Request]] = {}  # by id and index
        self._tickets = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def find(self, request_id: str, index: int | None = None) -> list[Request]:
        """All completions of a request, or the one of ``index``; none for one that is not there."""
        return [request for request in self._requests.get(request_id, {}).values() if index in (None, request.index)]

    def has(self, request: Request) -> bool:
        return self._requests.get(request.request_id, {}).get(request.index) is request

    def hold(self, request: Request, held: bool) -> None:
        """Whether it waits for its group or its grammar. When it does no more it has the place in the queue that it had."""
        waits = not request.running and self.has(request)
        if waits:
            self._take(request)
        request.held = held
        if waits:
            self._put(request)

    def _enter(self, request: Request) -> None:
        self._requests.setdefault(request.request_id, {})[request.index] = request
        self._enqueue(request)

    def _leave(self, request: Request) -> None:
        group = self._requests[request.request_id]
        del group[request.index]
        if not group:
            del self._requests[request.request_id]
        self._take(request)

    def _enqueue(self, request: Request, *, last: bool = True) -> None:
        """To those that do not run: behind all of its priority, or where its ticket says."""
        if last:
            self._tickets += 1
            request.ticket = (request.priority if self.priorities else 0, self._tickets)
        self._put(request)

    def _put(self, request: Request) -> None:
        if request.running:
            request.seat = self.seats.pop()
        insort(self._list(request), request, key=_ticket)

    def _take(self, request: Request) -> None:
        requests = self._list(request)
        del requests[bisect_left(requests, request.ticket, key=_ticket)]
        if request.running:
            self.seats.append(request.seat)
            request.seat = -1

    def _list(self, request: Request) -> list[Request]:
        return self.running if request.running else self.deferred if request.held else self.waiting
