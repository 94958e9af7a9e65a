"""What routes need of a model, and the plainest host of one."""

from __future__ import annotations

from typing import Protocol

from appliance.server.adapters import Adapters
from appliance.server.state import ServerState


class Host(Protocol):
    """What routes need of a model."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def state(self) -> ServerState | None:
        """None until it was loaded for the first time."""

    @property
    def status(self) -> str:
        """loading, ok, unloaded, draining or dead."""

    @property
    def root(self) -> str:
        """What it was made from."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens; None where nobody knows before it is loaded."""

    @property
    def adapters(self) -> Adapters: ...
    @property
    def waiting(self) -> int:
        """Requests that wait for it to be loaded."""

    async def enter(self, visitor: object) -> ServerState:
        """The state, once requests can be served; until ``leave(visitor)`` the model stays. Raises RequestError (503)."""

    def leave(self, visitor: object) -> None: ...

    async def read(self) -> ServerState:
        """The state, whose engine may do what it likes: for what needs the tokenizer alone. Raises RequestError (503)."""


class FixedHost:
    """A model whose engine somebody else looks after."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    @property
    def names(self) -> tuple[str, ...]:
        return self.state.names

    @property
    def status(self) -> str:
        return self.state.status

    @property
    def root(self) -> str:
        return self.state.engine_config.model or self.names[0]

    @property
    def max_model_len(self) -> int | None:
        return self.state.client.info.max_model_len if self.state.client.info else None

    @property
    def adapters(self) -> Adapters:
        return self.state.adapters

    @property
    def waiting(self) -> int:
        return 0

    async def enter(self, visitor: object) -> ServerState:
        return self.state

    def leave(self, visitor: object) -> None:
        """Nothing depends on it."""

    async def read(self) -> ServerState:
        return self.state
