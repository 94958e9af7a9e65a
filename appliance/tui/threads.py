"""What waits for the network does so beside the screen."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable


async def in_thread(function: Callable[[], object]) -> None:
    """As asyncio.to_thread, but nobody waits for the thread when the application ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, name="dashboard", daemon=True).start()
    await done
