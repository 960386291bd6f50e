"""A headless Chromium, driven through its DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from tests.support.requirements import missing

Answer = TypeVar("Answer")
_DEADLINE = 60.0


class Browser:
    """One Chromium with one tab. Used as a context."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            missing("chromium is not installed (scripts/test installs it as root on Debian)")
        assert program is not None
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--hide-scrollbars"]
        self._port = folder / "DevToolsActivePort"
        self._process = subprocess.Popen(
            [program, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.problems: list[str] = []
        """What the console has had of errors and warnings, refused loads included, since the page was opened."""

    def __enter__(self) -> Self:
        try:
            self._run(self._connect())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._disconnect())
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._loop.close()

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> float:
        """Load a page. Returns the seconds until it was drawn for the first time."""
        self._run(self._ask("Page.navigate", url="about:blank"))
        self.problems.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._run(self._ask("Emulation.setDeviceMetricsOverride", **size))
        self.prefer("dark" if dark else "light")
        self._loaded.clear()
        began = time.monotonic()
        self._run(self._ask("Page.navigate", url=page.absolute().as_uri()))
        self._run(self._loaded.wait())
        self.ask("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)))")
        return time.monotonic() - began

    def prefer(self, scheme: str) -> None:
        """Switch between light and dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._run(self._ask("Emulation.setEmulatedMedia", features=features))

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page, as JSON has it."""
        answer = self._run(self._ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True))
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def place(self, selector: str) -> dict[str, float]:
        """Scroll an element into view; its x, y, width and height there."""
        found: dict[str, float] = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "const {x, y, width, height} = e.getBoundingClientRect(); return {x, y, width, height}; })()"
        )
        return found

    def mouse(self, kind: str, x: float, y: float, *, count: int = 1) -> None:
        """`kind`: mouseMoved, mousePressed or mouseReleased."""
        button = "none" if kind == "mouseMoved" else "left"
        self._run(self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=count))
        self.ask("new Promise((done) => requestAnimationFrame(() => done()))")

    def click(self, selector: str) -> None:
        """In the middle of an element."""
        at = self.place(selector)
        x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, x, y)

    def photograph(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, or of what is in view."""
        answer = self._run(self._ask("Page.captureScreenshot", captureBeyondViewport=whole))
        path.write_bytes(base64.b64decode(answer["data"]))

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return self._loop.run_until_complete(asyncio.wait_for(work, _DEADLINE))

    async def _connect(self) -> None:
        # The file is there before its lines are.
        while not self._port.exists() or self._port.read_text().count("\n") < 1:
            assert self._process.poll() is None, "chromium did not start"
            await asyncio.sleep(0.05)
        port = self._port.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            tabs = await answer.json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        self._listening = asyncio.create_task(self._listen())
        for domain in ("Page", "Runtime", "Log"):
            await self._ask(f"{domain}.enable")

    async def _disconnect(self) -> None:
        self._listening.cancel()
        await self._socket.close()
        await self._session.close()

    async def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await answer

    async def _listen(self) -> None:
        async for message in self._socket:
            told = message.json()
            if (waits := self._answers.pop(told.get("id"), None)) is not None:
                if "error" in told:
                    waits.set_exception(AssertionError(told["error"]))
                else:
                    waits.set_result(told["result"])
            elif told.get("method") == "Page.loadEventFired":
                self._loaded.set()
            elif told.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(told["params"]["exceptionDetails"]))
            elif told.get("method") == "Runtime.consoleAPICalled" and told["params"]["type"] in ("error", "warning"):
                self.problems.append(json.dumps(told["params"]["args"]))
            elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] in ("error", "warning"):
                self.problems.append(told["params"]["entry"]["text"])
