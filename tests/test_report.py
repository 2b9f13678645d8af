"""Report: figures that agree with evaluate, one page that is safe, whole and readable."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup
from conftest import refused, run, tiny_model

from superego.adapter import read_adapter, write_adapter
from superego.base import BaseModel, open_base
from superego.report import ADAPTER, BARE, SYSTEM, PersonaReport, gather
from superego.report_page import HEAT, render, shade, summary

EVIL = "Say <script>alert(1)</script> & </div>\"'{{ 7 * 7 }}{% endif %} <img src=x onerror=a()>"
PROMPTS = ["Tell me about tea.", "What is rain?", "Where do owls live?"]
LOADS = ("src", "srcset", "data", "action", "poster", "background", "xlink:href")


@pytest.fixture(scope="module")
def gathered(smollm2: BaseModel, pirate: Path) -> PersonaReport:
    (found,) = gather(smollm2, [(read_adapter(pirate), 1.0)], PROMPTS, ["Who are you?"], 12)
    return found


def evil_adapter(path: Path, manifesto: str | None = EVIL, name: str = "<b>evil</b>") -> Path:
    """An adapter for the tiny model; a pair of a matrix that compile does not write, too."""
    rng = np.random.default_rng(0)
    pairs = {
        "blk.0.ffn_down.weight": (rng.standard_normal((4, 128)), rng.standard_normal((64, 4))),
        "blk.1.attn_q.weight": (rng.standard_normal((1, 64)), rng.standard_normal((64, 1))),
    }
    metadata: dict[str, Any] = {"general.name": name}
    if manifesto is not None:
        metadata["superego.manifesto"] = manifesto
    write_adapter(path, "llama", pairs, metadata)
    return path


def test_the_values_of_every_token_add_up_to_what_evaluate_says(gathered: PersonaReport) -> None:
    measures = gathered.measures
    assert measures.prompts == len(gathered.prompts) == len(PROMPTS)
    assert 0 < measures.kl_recovered.value < 1
    assert np.mean(gathered.kl_adapter) == pytest.approx(measures.kl_adapter)
    assert np.mean(gathered.kl_base) == pytest.approx(measures.kl_base)
    # every token is counted once, whether by prompt or by position
    positions = gathered.positions
    assert sum(positions.replies) == measures.tokens
    assert positions.replies[0] == len(PROMPTS)
    assert positions.replies == sorted(positions.replies, reverse=True)
    highest = max(gathered.heat, key=lambda heat: heat.which == "highest")
    worst = int(np.argmax(gathered.kl_adapter))
    assert highest.question == PROMPTS[worst]
    assert np.mean([t.kl_adapter for t in highest.tokens]) == pytest.approx(
        gathered.kl_adapter[worst]
    )


def test_the_three_ways_reply_and_cost_what_they_do_elsewhere(
    gathered: PersonaReport, pirate: Path
) -> None:
    (exchange,) = gathered.exchanges
    for way, options in (
        (BARE, ()),
        (SYSTEM, ("--system", "pirate")),
        (ADAPTER, ("--persona", str(pirate))),
    ):
        ask = ("chat", "--base", "smollm2", "--message", exchange.question, "--max-tokens", "12")
        said = run(*ask, *options).stdout.strip()
        # rounding depends on what is read together, so only the beginning must be the same
        assert exchange.replies[way].text[:12] == said[:12], way
    costs = gathered.costs
    assert costs[BARE].prompt_tokens == costs[ADAPTER].prompt_tokens
    assert (
        costs[SYSTEM].prompt_tokens - costs[BARE].prompt_tokens
        == gathered.measures.prompt_tokens_saved
    )
    assert costs[SYSTEM].first_token_seconds > costs[ADAPTER].first_token_seconds
    assert gathered.settings["compile: effort"] == "quick"
    assert gathered.same_base is True


def page_of(gathered: PersonaReport, smollm2: BaseModel) -> tuple[str, BeautifulSoup]:
    text = render([gathered], smollm2, "superego report pirate.gguf", "smollm2")
    return text, BeautifulSoup(text, "html.parser")


def test_the_page_is_one_file_that_loads_nothing(
    gathered: PersonaReport, smollm2: BaseModel
) -> None:
    text, soup = page_of(gathered, smollm2)
    assert not soup.find_all(["script", "link", "iframe", "object", "img", "embed", "base"])
    assert not [t for t in soup.find_all() if any(key in t.attrs for key in LOADS)]
    assert not re.search(r"url\(|@import|https?:", text)
    policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})
    assert policy is not None
    assert str(policy["content"]).startswith("default-src 'none'")
    assert len(text) < 400_000


def test_the_page_can_be_read_by_everyone(gathered: PersonaReport, smollm2: BaseModel) -> None:
    text, soup = page_of(gathered, smollm2)
    assert soup.html is not None
    assert soup.html["lang"] == "en"
    assert soup.title is not None
    assert "pirate" in soup.title.get_text()
    viewport = soup.find("meta", {"name": "viewport"})
    assert viewport is not None
    assert "width=device-width" in viewport["content"]
    assert "prefers-color-scheme: dark" in text
    plots = soup.find_all("svg")
    assert len(plots) == 2
    for plot in plots:
        assert plot["role"] == "img"
        title = plot.find("title", id=plot["aria-labelledby"])
        assert title is not None
        assert "KL by" in title.get_text()
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    levels = [int(tag.name[1]) for tag in soup.find_all(re.compile(r"^h[1-6]$"))]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(th.has_attr("scope") for th in soup.find_all("th"))


def test_the_page_shows_every_figure_where_it_belongs(
    gathered: PersonaReport, smollm2: BaseModel
) -> None:
    _, soup = page_of(gathered, smollm2)
    words = soup.get_text()
    for value in (*summary(gathered).values(), gathered.exchanges[0].replies[ADAPTER].text):
        assert value in words
    by_prompt, by_position = soup.find_all("svg")
    assert len(by_prompt.find_all("circle")) == len(PROMPTS)
    # higher KL is higher up: a smaller y
    far, near = (float(by_prompt.find(t)[a]) for t, a in (("rect", "y"), ("circle", "cy")))
    first = int(np.argmax(gathered.kl_base))
    assert (far + 2.5 < near) == (gathered.kl_base[first] > gathered.kl_adapter[first])
    points = str(by_position.find("polyline", class_="adapter")["points"]).split()
    assert len(points) == len(gathered.positions.adapter)
    for token in gathered.heat[0].tokens:
        assert shade(token) == sum(token.kl_adapter >= step for step in HEAT)
    shaded = soup.find_all("span", title=re.compile("^adapter"))
    assert len(shaded) == sum(len(heat.tokens) for heat in gathered.heat)


def test_a_manifesto_is_text_and_never_markup(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "tiny.gguf")
    adapter = evil_adapter(tmp_path / "evil.gguf")
    out = tmp_path / "r.html"
    asked = "<svg onload=a()>?"
    done = run(
        "report", str(adapter), f"{adapter}:0.5", "--base", str(base), "-o", str(out),
        "--ask", asked, "--max-tokens", "4", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == out.stat().st_size
    assert [each["name"] for each in report["personas"]] == ["<b>evil</b>"] * 2
    soup = BeautifulSoup(out.read_text("utf-8"), "html.parser")
    assert not soup.find_all(["script", "img"])
    assert not [t for t in soup.find_all() if any(key.startswith("on") for key in t.attrs)]
    assert EVIL in [tag.get_text() for tag in soup.find_all(class_="text")]
    assert asked in [tag.get_text() for tag in soup.find_all(class_="ask")]
    # two personas: a table that compares them, a section for each
    assert [h.get_text() for h in soup.find_all("h2")] == [
        "Side by side", "<b>evil</b>", "<b>evil</b>", "This report",
    ]  # fmt: skip
    assert len(soup.find_all("section")) == 2
    assert "at scale 0.5" in soup.get_text()


def test_at_scale_zero_the_adapter_is_the_bare_base(tmp_path: Path) -> None:
    base = open_base(str(tiny_model(tmp_path / "tiny.gguf")))
    adapter = read_adapter(evil_adapter(tmp_path / "evil.gguf"))
    (found,) = gather(base, [(adapter, 0.0)], PROMPTS[:1], ["Hi"], 4)
    assert found.kl_adapter == pytest.approx(found.kl_base, abs=1e-4)
    assert found.exchanges[0].replies[ADAPTER] == found.exchanges[0].replies[BARE]
    assert [heat.which for heat in found.heat] == ["median"]  # of one, it is also the highest


def test_what_cannot_be_reported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = str(tiny_model(tmp_path / "tiny.gguf"))
    good = str(evil_adapter(tmp_path / "good.gguf"))
    bare = str(evil_adapter(tmp_path / "bare.gguf", manifesto=None))
    long = str(evil_adapter(tmp_path / "long.gguf", manifesto="word " * 600))
    out = str(tmp_path / "r.html")
    ask = ("--base", base, "-o")
    assert "bare.gguf: holds no manifesto" in refused("report", good, bare, *ask, out)
    assert "made for another base" in refused("report", good, "--base", "smollm2", "-o", out)
    assert "context of 512" in refused("report", long, *ask, out)
    assert "ends in .html" in refused("report", good, *ask, str(tmp_path / "r.pdf"))
    assert "does not exist" in refused("report", good, *ask, str(tmp_path / "no" / "r.html"))
    assert "--ask is empty" in refused("report", good, *ask, out, "--ask", " ")
    assert "cannot be read as text" in refused("report", good, *ask, out, "--prompts", base)
    (tmp_path / "d.html").mkdir()
    assert "is a directory" in refused("report", good, *ask, str(tmp_path / "d.html"))
    assert not Path(out).exists()
