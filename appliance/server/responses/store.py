"""Responses that are kept in memory, for who asks for them again or goes on with them: each key's own, the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from appliance.core.params import RequestError
from appliance.server.responses.items import Item

if TYPE_CHECKING:
    from appliance.server.job import Job

KEY_BYTES, ALL_BYTES = 32 * 2**20, 256 * 2**20  # of JSON: one key's, and all keys' together


@dataclass(slots=True)
class Record:
    """One response, its own input (not that of those before it), and the job while it is under way."""

    id: str
    previous: str | None
    raw: bytes  # {"response": ..., "input": [...]}
    job: Job | None = None

    @classmethod
    def of(cls, response: dict[str, Any], items: list[Item], job: Job | None = None) -> Record:
        raw = to_json({"response": response, "input": items}, inf_nan_mode="null")
        return cls(response["id"], response["previous_response_id"], raw, job)

    @property
    def response(self) -> dict[str, Any]:
        return from_json(self.raw)["response"]

    @property
    def items(self) -> list[Item]:
        """Its input, then its output."""
        found = from_json(self.raw)
        return found["input"] + found["response"]["output"]

    @property
    def input(self) -> list[Item]:
        return from_json(self.raw)["input"]


@dataclass(slots=True)
class _Shelf:
    """What one key has, those used last behind."""

    records: OrderedDict[str, Record] = field(default_factory=OrderedDict)
    size: int = 0

    def drop(self, response_id: str) -> Record:
        record = self.records.pop(response_id)
        self.size -= len(record.raw)
        return record


class ResponseStore:
    """Up to ``most`` responses of each key (-1: any number), and so many bytes as KEY_BYTES and ALL_BYTES allow."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._shelves: dict[str | None, _Shelf] = {}

    def put(self, key: str | None, record: Record) -> None:
        """Keep a response; one of the same id is replaced."""
        if not self.most:
            return
        shelf = self._shelves.setdefault(key, _Shelf())
        if record.id in shelf.records:
            shelf.drop(record.id)
        shelf.records[record.id] = record
        shelf.size += len(record.raw)
        while 0 <= self.most < len(shelf.records) or shelf.size > KEY_BYTES:
            shelf.drop(next(iter(shelf.records)))
        while sum(one.size for one in self._shelves.values()) > ALL_BYTES:
            largest = max(self._shelves.values(), key=lambda one: one.size)
            largest.drop(next(iter(largest.records)))

    def find(self, key: str | None, response_id: str) -> Record | None:
        """It counts as used."""
        shelf = self._shelves.get(key)
        if shelf is None or response_id not in shelf.records:
            return None
        shelf.records.move_to_end(response_id)
        return shelf.records[response_id]

    def get(self, key: str | None, response_id: str) -> Record:
        """Raises RequestError (404)."""
        record = self.find(key, response_id)
        if record is None:
            message = f"no response with the id {response_id!r:.100} is kept here"
            raise RequestError(message, param="response_id", code="response_not_found", status=404)
        return record

    def delete(self, key: str | None, response_id: str) -> None:
        """Raises RequestError (404)."""
        self.get(key, response_id)
        self._shelves[key].drop(response_id)

    def chain(self, key: str | None, response_id: str | None) -> list[Record]:
        """A response and those that it goes on with, the first one first; all of them count as used. Raises RequestError.

        An id that was deleted may be given again, to a response that goes on with one that went on with the first: a circle.
        """
        found: dict[str, Record] = {}
        while response_id is not None:
            record = self.find(key, response_id)
            if record is None or response_id in found:
                message = (
                    f"no response with the id {response_id!r:.100} is kept here (any more): send the whole conversation as input"
                )
                raise RequestError(
                    f"previous_response_id: {message}", param="previous_response_id", code="previous_response_not_found"
                )
            if record.job is not None:
                message = f"previous_response_id: {response_id!r:.100} is still in progress"
                raise RequestError(message, param="previous_response_id")
            found[response_id] = record
            response_id = record.previous
        records = [*reversed(found.values())]
        for record in records:  # the first one is to go first
            self.find(key, record.id)
        return records

    def lookup(self, key: str | None) -> Callable[[str], Item | None]:
        """Finds items of the responses that are kept, for one request: each is read once at most, the latest first."""
        shelf = self._shelves.get(key)
        records = iter([*reversed(shelf.records.values())] if shelf else [])  # as they are now: it may be asked in a thread
        seen: dict[str, Item] = {}

        def item(item_id: str) -> Item | None:
            while item_id not in seen and (record := next(records, None)) is not None:
                for one in record.items:
                    seen.setdefault(one["id"], one)
            return seen.get(item_id)

        return item
