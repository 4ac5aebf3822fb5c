"""Names of files and of repositories: what passes stays below its folder, on this system and on Windows."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import HubError
from featherbed.hub.names import check_inside, check_portable, hub_id

PIECES = st.sampled_from(
    ["..", ".", "/", "\\", "//", "a", "onnx", "C:", "c", "\0", "\n", " ", "~", "model.onnx", "ﬁ", "x" * 300]
)


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join) | st.text(max_size=30))
def test_a_name_that_passes_stays_below_its_folder_on_every_system(name: str) -> None:
    with suppress(HubError):
        check_inside([name], "owner/name")
        root = Path("/cache/owner--name")
        assert os.path.normpath(root / name).startswith(f"{root}/")
        assert not PurePosixPath(name).is_absolute()
        windows = PureWindowsPath("C:\\cache") / PureWindowsPath(name)
        assert windows.drive == "C:"
        assert windows.parts[:2] == ("C:\\", "cache")
        assert ".." not in windows.parts


@given(st.lists(st.text("aAbB/.ﬁ", min_size=1, max_size=6), max_size=6, unique=True))
def test_names_that_pass_are_still_apart_where_case_does_not_count(names: list[str]) -> None:
    with suppress(HubError):
        check_portable(names, "owner/name")
        assert len({name.casefold() for name in names}) == len(names)


@given(st.text(max_size=40))
def test_an_id_is_two_names_and_never_a_path_that_leads_out(source: str) -> None:
    found = hub_id(source)
    if found is not None:
        owner, name = found.name.split("/")
        assert owner
        assert name
        assert not source.startswith((".", "~", "/"))
        assert "\\" not in source
