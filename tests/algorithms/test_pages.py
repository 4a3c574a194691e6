"""algorithms/README.md says what the code does: its settings, metrics, commands and links are checked here."""

import importlib
import re
import shlex
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import ACTION_DIM, OBS_DIM, ROOT, hopper_like, parsed

from benchmarks import throughput
from benchmarks.tables import Table
from common.cli import parse
from common.replay import Replay, Transitions

FOLDER = ROOT / "algorithms"
PAGE = (FOLDER / "README.md").read_text()
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
every_algorithm = pytest.mark.parametrize("name", NAMES)


def section(name: str) -> str:
    """The part of the page whose heading is the algorithm's name."""
    (found,) = (
        part
        for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
        if re.sub(r"\W", "_", part.splitlines()[0].lower()) == name
    )
    return found


def table(name: str, first: str) -> dict[str, dict[str, str]]:
    """The section's table whose first column is called `first`: rows by what stands there, cells by column."""
    (lines,) = re.findall(rf"^\| {first} \|.*?(?:\n\n|\Z)", section(name), flags=re.MULTILINE | re.DOTALL)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.strip().splitlines()]
    assert all(len(row) == len(header) for row in rows), "a row has more or fewer cells than the header"
    cells = {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows}
    assert len(cells) == len(rows), "a name stands twice"
    return cells


def value(word: str) -> Any:
    """`0.7`, `1/3`, `20,000`, `True`, `None`, or a word."""
    if word in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[word]
    try:
        return float(Fraction(word.replace(",", "")))
    except ValueError:
        return word


def settings(name: str, preset: str) -> dict[str, Any]:
    """All flags and hyperparameters under a preset."""
    script = importlib.import_module(f"algorithms.{name}")
    args = parse(script.Args, script.PRESETS, ["--preset", preset])
    return vars(args) | args.hp._asdict()


@every_algorithm
def test_every_setting_is_there_with_its_value_and_that_of_each_preset(name: str) -> None:
    """A cell of ours is `value; preset, preset value`, where only presets that change the value are named."""
    script = importlib.import_module(f"algorithms.{name}")
    rows, plain = table(name, "setting"), settings(name, "none")
    own = {*script.Hyperparameters._fields, *script.Args.__annotations__} - {"hp"}
    own |= {setting for preset in script.PRESETS.values() for setting in preset}
    assert own <= set(rows) <= set(plain)
    presets = {preset: settings(name, preset) for preset in script.PRESETS}
    for setting, cells in rows.items():
        default, *others = cells["ours"].split("; ")
        said = {}
        for other in others:
            names, word = other.rsplit(" ", 1)
            said |= dict.fromkeys(names.split(", "), value(word))
        changed = {preset: chosen[setting] for preset, chosen in presets.items() if chosen[setting] != plain[setting]}
        assert (value(default), said) == (plain[setting], changed), setting


@every_algorithm
def test_every_metric_of_a_run_is_there(name: str) -> None:
    script = importlib.import_module(f"algorithms.{name}")
    arrays = hopper_like()
    data = Transitions(*(jnp.asarray(arrays[field], jnp.float32) for field in Transitions._fields))
    found = set()
    for args in [script.Args(), *([script.Args(behavior="vae")] if name == "emaq" else [])]:
        init = partial(script.init, args=args, obs_dim=OBS_DIM, action_dim=ACTION_DIM)
        state = jax.eval_shape(init, jax.random.key(0), args.hp)
        for train in (script.train, *([script.train_behavior] if name == "emaq" else [])):
            found |= set(jax.eval_shape(partial(train, args=args), state, args.hp, Replay(data), 2)[1].sums)
    rows = table(name, "metric")
    assert set(rows) == found
    assert all(all(cells.values()) for cells in rows.values()), "an empty cell"


def test_commands_are_read_by_their_scripts() -> None:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert all(line.startswith("python algorithms/") for line in blocks)
    for line in blocks:
        parsed(shlex.split(line, comments=True))
    for name in NAMES:
        assert f"```bash\npython algorithms/{name}.py " in section(name)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE)
    assert len(links) > 6 and all((FOLDER / link).exists() for link in links)


def test_speed_is_what_was_measured() -> None:
    """The tables in the pages are those of results/speed.csv; where there is none, they have a place for it."""
    rows = Table(ROOT / "results" / "speed.csv").read()
    for page in throughput.PAGES:
        text = re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", page.read_text(), re.DOTALL)[1]
        assert text.strip() == (throughput.speed_table(rows) if rows else "")
