"""Headless Chromium for tests, driven through its debugging pipe: commands are JSON, each ended by a NUL byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=1300,900")


@dataclass
class Browser:
    """One tab. errors: exceptions of the page's scripts."""

    reading: int
    writing: int
    session: str | None = None
    number: int = 0
    waiting: bytes = b""
    errors: list[str] = field(default_factory=list)

    def command(self, method: str, **params: Any) -> Any:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.waiting:
                piece = os.read(self.reading, 65536)
                assert piece, "the browser is gone"
                self.waiting += piece
            first, self.waiting = self.waiting.split(b"\0", 1)
            said = json.loads(first)
            if said.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["params"]))
            if said.get("id") == self.number:
                assert "error" not in said, said
                return said["result"]

    def open(self, url: str) -> None:
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.command("Runtime.enable")
        self.command("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        return self.command("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> Any:
        """The first value of the script that is true."""
        ends = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < ends, f"{script} never came true; {self.errors}"
            time.sleep(0.05)
        return value


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    assert PROGRAM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [PROGRAM, *OPTIONS, f"--user-data-dir={profile}"]
    # the browser reads from descriptor 3 and writes to 4
    shell = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", *command]
    process = subprocess.Popen(shell, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_in, ours_out)
    finally:
        process.kill()
        process.wait()
        os.close(ours_in)
        os.close(ours_out)
