"""Names of files and of repositories: what passes stays below its folder, on this system and on Windows."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import HubError
from featherbed.hub.names import check_inside, check_portable, hub_id
from featherbed.hub.near import is_near

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


@pytest.mark.parametrize(
    "names",
    [["x.json", "x.json/y.json"], ["x.json/y/z.json", "X.JSON"], ["é/a", "e\u0301"], ["STRASSE/a.json", "straße"]],
    ids=ascii,
)
def test_a_name_that_is_the_folder_of_another_is_refused_in_any_order(names: list[str]) -> None:
    for ordered in (names, names[::-1]):
        with pytest.raises(HubError, match="a name that is the folder of"):
            check_portable(ordered, "owner/name")
    check_portable(["x.json", "x/y.json", "xx.json", "x/z/y.json"], "owner/name")


NEAR = [
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0X7F000001", "2130706433", "017700000001", "0177.0.0.01", "10.8", "0",
    "192.168.257", "169.254.169.254", "100.64.0.1", "0x", "255.255.255.255", "224.0.0.1", "localhost", "localhost.",
    "LOCALHOST", "a.localhost", "printer.local", "metadata.google.internal.", "::1", "::", "::ffff:127.0.0.1",
    "::ffff:a00:1", "fe80::1%eth0", "fc00::1", "64:ff9b::7f00:1", "127.0.0.1.", "１２７.0.0.1", "127。0。0。1", "①",
    "1.2.3.4.5", "08.8.8.8", "256.1.1.1", "1.2.3.256", "4294967296", "x:y", "a.b.1",
]  # fmt: skip
FAR = [
    "huggingface.co", "cdn-lfs.hf.co.", "8.8.8.8", "8.526344", "134744072", "0x8080808", "010.8.8.8", "::ffff:8.8.8.8",
    "2606:4700::1111", "1e100.net", "0x7f.example", "127.0.0.1.nip.io", "local.example", "metadata",
]  # fmt: skip


@pytest.mark.parametrize("host", NEAR, ids=ascii)
def test_a_host_of_this_machine_or_a_private_network_is_near_however_it_is_written(host: str) -> None:
    assert is_near(host)


@pytest.mark.parametrize("host", FAR, ids=ascii)
def test_a_public_host_is_not_near(host: str) -> None:
    assert not is_near(host)


@given(st.lists(st.from_regex(r"\A(0[xX][0-9a-fA-F]{0,9}|[0-9]{1,11})\Z"), min_size=1, max_size=5))
def test_an_address_is_read_as_the_c_library_reads_it(parts: list[str]) -> None:
    try:
        there = ipaddress.IPv4Address(socket.inet_aton(".".join(parts)))
    except OSError:
        assert is_near(".".join(parts))  # nobody can read it
    else:
        assert is_near(".".join(parts)) == is_near(str(there))


@given(st.text(max_size=40))
def test_an_id_is_two_names_and_never_a_path_that_leads_out(source: str) -> None:
    found = hub_id(source)
    if found is not None:
        owner, name = found.name.split("/")
        assert owner
        assert name
        assert not source.startswith((".", "~", "/"))
        assert "\\" not in source
