"""The origin of a checkpoint comes from its own card, and from the id that was asked for; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherbed.errors import CheckpointError
from featherbed.origin import Origin, front_matter, read_origin

CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags: [a]\n---\n# A model\n"


def with_card(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, "utf-8")
    return folder


def test_licence_and_languages_are_those_of_the_card(tmp_path: Path) -> None:
    assert read_origin(with_card(tmp_path, CARD)) == Origin(license="apache-2.0", languages=("en", "de"))


def test_a_licence_with_a_name_of_its_own_is_called_by_it(tmp_path: Path) -> None:
    card = "---\nlicense: other\nlicense_name: llama3\nlanguage: en\n---\n"
    assert read_origin(with_card(tmp_path, card)) == Origin(license="llama3", languages=("en",))


def test_the_revision_is_that_of_the_cache(tmp_path: Path) -> None:
    folder = with_card(tmp_path / ("0123456789" * 4), CARD)
    assert read_origin(folder, "owner/name").revision == "0123456789" * 4
    assert read_origin(folder).revision == ""  # a folder's name is no revision of nothing


@pytest.mark.parametrize("text", ["# no front matter\n", "---\n- a list\n---\n", "", "---\nunclosed: true\n"])
def test_a_card_that_says_nothing_gives_nothing(tmp_path: Path, text: str) -> None:
    assert front_matter(with_card(tmp_path, text) / "README.md") == {}
    assert read_origin(tmp_path) == Origin()


def test_without_a_card_nothing_is_known(tmp_path: Path) -> None:
    assert read_origin(tmp_path, "owner/name") == Origin("owner/name")


def test_a_card_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"README.md.*YAML"):
        read_origin(with_card(tmp_path, "---\na: [1\n---\n"))


def test_an_origin_comes_back_from_json() -> None:
    origin = Origin("owner/name", "abc", "mit", ("en", "zh"))
    assert Origin.from_json(origin.to_json()) == origin
    assert Origin.from_json({}) == Origin()
