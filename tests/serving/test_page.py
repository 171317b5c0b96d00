"""The web page in a real browser: it asks, streams, and shows every step of the guard. Skipped without Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from stockade.engine.guards import EyesClosed, Guard, SelfJudge
from stockade.engine.models.loader import ModelSet
from stockade.engine.serving.policy import Policy
from tests.engine.screened import engine_of
from tests.serving.browser import PROGRAM, browser
from tests.serving.live import TURNS, data_url, picture, serving

ECSO = Guard(SelfJudge(threshold=1.0, min_mass=1e-9), EyesClosed(), 1, name="ecso")
STEPS = "[...document.querySelectorAll('.step > b')].map(node => node.textContent).join('|')"

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")


def ask(text: str, tokens: int) -> str:
    return f"$('tokens').value = {tokens}; $('text').value = {text!r}; $('form').requestSubmit()"


def test_the_page_asks_and_shows_every_step_of_the_guard(models: ModelSet, tmp_path: Path) -> None:
    policy = Policy({"ecso": ECSO, "protector": TURNS}, "ecso", loosest="window")
    with serving(engine_of(models, 200), policy, reveal=True) as live, browser(tmp_path) as page:
        page.open(live.url)
        assert page.until("offer && $('model').textContent") == "tiny"
        page.run(f"image = {data_url(picture())!r}; {ask('What is <b>this</b>?', 24)}")
        page.until("running === null && !!document.querySelector('.badge.refused')")
        steps = page.run(STEPS).split("|")
        assert steps[:4] == ["Answer", "Verdict", "Caption of the image", "Asked again, eyes closed"]
        assert steps[-1] == "Said instead"
        assert page.run("document.querySelector('.turn.user').textContent") == "What is <b>this</b>?"
        assert page.run("document.querySelectorAll('.row').length") >= 4

        page.run(f"$('policy').value = 'protector'; choose(); $('release').value = 'window'; {ask('And now?', 40)}")
        struck = page.until("running === null && document.querySelector('.turn s')?.textContent")
        assert struck and "Sorry" in page.run("[...document.querySelectorAll('.turn.reply')].at(-1).textContent")
        assert page.run("document.querySelectorAll('.gauge').length") >= 1

        page.run(ask("Stop!", 64) + "; setTimeout(() => $('send').click(), 30)")
        page.until("running === null && [...document.querySelectorAll('.badge')].at(-1).textContent !== 'refused'")
        assert page.errors == []
