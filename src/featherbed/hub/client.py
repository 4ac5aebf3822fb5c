"""The only room with a network: what a repository holds, a file of it, and a folder into it, through huggingface_hub.

Endpoint, tokens, proxies, offline mode and timeouts are huggingface_hub's own. A file's body is not: its client forgets
what has arrived when it is stopped, so it is read here, from where it ended (docs/decisions/0007).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from featherbed.errors import FeatherbedError, HubError, OutputError, UnreachableError
from featherbed.hub.listing import Listing, Remote, checked
from featherbed.hub.names import COMMIT, HubId, check_id, check_inside
from featherbed.hub.near import is_near
from featherbed.hub.store import disk_failed

TRIES = 5  # without a byte of progress
LISTING_TRIES = 3  # newer clients try a few times themselves
FIRST_WAIT_S = 0.5  # doubled with every try
LONGEST_WAIT_S = 300  # what a server may ask for; longer, and people rather come back
HOPS = 5
AGAIN = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")
Sleep = Callable[[float], None]
Arrived = Callable[[int], None]  # told bytes as they arrive; negative where some are thrown away


def default_root() -> Path:
    """Where fetched models are: FEATHERBED_CACHE, or huggingface_hub's place for libraries, below HF_HOME."""
    own = os.environ.get("FEATHERBED_CACHE")
    if own:
        return Path(own) / "models"
    from huggingface_hub import constants  # 0.1 s to import, needed for ids only

    return Path(constants.HF_ASSETS_CACHE) / "featherbed" / "models"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE says that nobody is to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def connection() -> dict[str, str | bool]:
    """Which Hub is asked, and how: the endpoint, offline mode, whether there is a token (never the token itself)."""
    from huggingface_hub import constants, get_token

    return {"endpoint": constants.ENDPOINT, "offline": offline(), "token": get_token() is not None}


def resolve(wanted: HubId, patient: bool = True, sleep: Sleep = time.sleep) -> str:
    """The commit that a revision is now. A server that is busy is asked again only if ``patient``.

    Raises HubError; UnreachableError where the Hub cannot be asked.
    """
    from huggingface_hub import HfApi

    info = _patiently(
        lambda: HfApi().model_info(wanted.name, revision=wanted.revision),
        wanted,
        "a repository to read",
        TRIES if patient else 1,
        sleep,
    )
    if not COMMIT.fullmatch(str(info.sha)):
        raise HubError(
            f"Hub id {wanted}", expected="a commit of 40 digits", found=f"{info.sha!r}", remedy="check HF_ENDPOINT"
        )
    return str(info.sha)


def listing(wanted: HubId, commit: str) -> Listing:
    """All files of a repository at a commit. Raises HubError, also on a name that leaves the repository."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    def asked() -> list[Remote]:
        rows = HfApi().list_repo_tree(wanted.name, recursive=True, revision=commit)
        found = [row for row in rows if isinstance(row, RepoFile)]
        return [
            checked(f.path, f.lfs.size, f.lfs.sha256) if f.lfs else checked(f.path, f.size, f.blob_id) for f in found
        ]

    files = _patiently(asked, wanted, "a list of files", LISTING_TRIES, time.sleep)
    check_inside((file.path for file in files), wanted.name)
    return Listing(wanted.name, commit, constants.ENDPOINT, tuple(files))


def download(source: Listing, file: Remote, part: Path, arrived: Arrived, sleep: Sleep = time.sleep) -> None:
    """Bring ``part`` to the file's size, going on where it ended: its bytes are not compared here.

    Goes on after cut connections and busy servers as long as bytes keep coming, and gives up after ``TRIES`` in a row
    that brought none. Raises HubError when the Hub refuses or gives something else, OutputError when the disk fails;
    what has arrived stays in ``part``.
    """
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(source.repository, file.path, revision=source.commit, endpoint=source.endpoint)
    failed, most = 0, -1
    while (size := part.stat().st_size if part.exists() else 0) != file.size_bytes or not part.exists():
        if size > file.size_bytes:
            arrived(-size)
            part.unlink()
            size = 0
        try:
            _one_try(url, source, file, part, arrived)
        except FeatherbedError:
            raise
        except Exception as error:  # httpx, requests or huggingface_hub, whichever it is built upon: no common base
            reached = part.stat().st_size if part.exists() else 0
            grown = reached > max(most, size)  # further than ever: a server without ranges begins anew each time
            most, failed = max(most, reached), 0 if grown else failed + 1
            wait = _wait_s(error, failed)
            if failed >= TRIES or wait is None:
                raise _translated(error, source.repository, HubError, f"the bytes of {file.path}", None) from error
            sleep(0 if grown else wait)


def _one_try(url: str, source: Listing, file: Remote, part: Path, arrived: Arrived) -> None:
    """Append what one connection gives."""
    size = part.stat().st_size if part.exists() else 0
    with _answer(url, source, size) as (status, headers, chunks):
        if status != 206:
            if size:  # the server knows no ranges: from the start again
                arrived(-size)
            size = 0
        _check_length(source, file, status, headers, size)
        with _opened(part, "ab" if size else "wb") as out:
            for chunk in chunks:
                chunk = chunk[: file.size_bytes - size]
                try:
                    out.write(chunk)
                except OSError as error:
                    raise disk_failed(part, error) from error
                size += len(chunk)
                arrived(len(chunk))
                if size == file.size_bytes:  # whatever else comes is none of it
                    break
    if size < file.size_bytes:
        raise ConnectionError(f"the answer ended after {size} of {file.size_bytes} bytes")


def _opened(part: Path, mode: str) -> Any:
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        return part.open(mode, buffering=0)  # what has arrived is in the file, even if we are killed now
    except OSError as error:
        raise disk_failed(part, error) from error


def _check_length(source: Listing, file: Remote, status: int, headers: dict[str, str], start: int) -> None:
    """Raises HubError where an answer is of a file of another size: a portal's page, another commit."""
    said = headers.get("content-range", "").rpartition("/")[2] if status == 206 else headers.get("content-length", "")
    begins = headers.get("content-range", "").removeprefix("bytes ").partition("-")[0] if status == 206 else "0"
    if (said.isdigit() and int(said) != file.size_bytes) or (begins.isdigit() and int(begins) != start):
        raise HubError(
            f"file {file.path} of {source.repository}",
            expected=f"{file.size_bytes} bytes from {start} on",
            found=f"{said} bytes from {begins} on",
            remedy="check HF_ENDPOINT and the network: a page to log in, perhaps; then fetch again",
        )


@contextmanager
def _answer(url: str, source: Listing, size: int) -> Iterator[tuple[int, dict[str, str], Iterator[bytes]]]:
    """(status, headers by lower-case name, body) of a GET from byte ``size`` on, redirections followed by our rules."""
    # documented, and not re-exported in a way that type checkers see
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = {**build_hf_headers(library_name="featherbed"), "accept-encoding": "identity"}
    if size:
        headers["range"] = f"bytes={size}-"
    for _ in range(HOPS):
        with _streamed(url, headers) as (answer, chunks):
            if answer.status_code not in (301, 302, 303, 307, 308):
                hf_raise_for_status(answer)
                yield answer.status_code, {str(k).lower(): str(v) for k, v in answer.headers.items()}, chunks
                return
            target = urljoin(url, answer.headers["location"])
        _check_redirection(url, target, source)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:  # a token is for the Hub, and never for where it sends us
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    raise ConnectionError(f"more than {HOPS} redirections")


@contextmanager
def _streamed(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """An answer and its body as it comes, by huggingface_hub's session: httpx since its version 1, requests before."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as answer:
            yield answer, answer.iter_bytes()
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True, allow_redirects=False) as answer:
            yield answer, answer.iter_content(2**13)  # what of a piece has come is lost when the rest does not


def _check_redirection(url: str, target: str, source: Listing) -> None:
    """Raises HubError where we are sent from https to less, to a file, or to a machine that only we can reach."""
    before, after = urlsplit(url), urlsplit(target)
    inwards = is_near(after.hostname or "") and not is_near(urlsplit(source.endpoint).hostname or "")
    if after.scheme not in ("https", "http") or (before.scheme, after.scheme) == ("https", "http") or inwards:
        raise HubError(
            f"Hub id {source.repository}",
            expected="redirections to https, and to public machines",
            found=f"one to {after.scheme}://{after.netloc}",
            remedy="check HF_ENDPOINT and the network",
        )


def upload(folder: Path, name: str, message: str, private: bool) -> str:
    """Put a folder on the Hub as ``owner/name``, in one commit; returns the commit's address.

    The repository is made where there is none. Of an older model folder there, graphs and reports that this one lacks
    are taken away in the same commit. Raises OptionError on what is no id, OutputError when the Hub refuses.
    """
    from huggingface_hub import HfApi  # 0.2 s to import

    check_id(name)
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, delete_patterns=["onnx/*", "reports/*"]
        )
    except Exception as error:  # huggingface_hub, httpx and the disk: no common base
        raise _translated(error, name, OutputError, "a place to write to", None) from error
    return str(done.commit_url)


def _patiently(call: Callable[[], T], wanted: HubId, expected: str, tries: int, sleep: Sleep) -> T:
    """What a call of the Hub's API returns, tried again while the server is busy. Raises HubError."""
    for failed in range(1, tries + 1):
        try:
            return call()
        except Exception as error:  # huggingface_hub, httpx and the disk: no common base
            wait = _wait_s(error, failed)
            # a network that is not there stays away; what is in the cache should not wait for it
            if failed >= (tries if _status(error) else min(tries, 2)) or wait is None:
                kind = UnreachableError if _unreachable(error) else HubError
                raise _translated(error, wanted.name, kind, expected, wanted.revision) from error
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def _status(error: Exception) -> int | None:
    """The status of an answer that was no success; None where there was no answer."""
    answer = getattr(error, "response", None)
    return int(answer.status_code) if answer is not None else None


def _unreachable(error: Exception) -> bool:
    """Whether the Hub could not be asked, so that what is here is the best there is."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return isinstance(error, OfflineModeIsEnabled) or status in AGAIN or (status is None and _transport(error))


def _transport(error: Exception) -> bool:
    """Whether it is the connection that failed: the errors of httpx (or httpx2) and of requests have no common base."""
    if isinstance(error, ValueError):  # an answer that is no JSON has come
        return False
    foreign = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return foreign or isinstance(error, ConnectionError | TimeoutError)


def _wait_s(error: Exception, failed: int) -> float | None:
    """Seconds to wait before another try; None where there is no use in one."""
    status = _status(error)
    if status is None:
        return FIRST_WAIT_S * 2**failed if _transport(error) and not offline() else None
    if status not in AGAIN:
        return None
    said = getattr(error, "response").headers.get("retry-after", "")  # noqa: B009
    wait = float(said) if said.isdigit() else FIRST_WAIT_S * 2**failed
    return wait if wait <= LONGEST_WAIT_S else None


def _translated(
    error: Exception, name: str, kind: type[FeatherbedError], expected: str, revision: str | None
) -> FeatherbedError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    remedies: tuple[tuple[type[Exception], str, str], ...] = (
        (GatedRepoError, "a gated repository", "accept its terms on the Hub and set HF_TOKEN"),
        (RepositoryNotFoundError, "no such repository, or a private one", "check the id, or set HF_TOKEN"),
        (RevisionNotFoundError, f"no revision {revision}", "check the part behind the @"),
        (LocalTokenNotFoundError, "no token", "set HF_TOKEN, or log in with `hf auth login`"),
        (OfflineModeIsEnabled, "offline mode", "unset HF_HUB_OFFLINE, or take what is in the cache"),
        (HFValidationError, "an id the Hub does not allow", "check the id"),
        (EntryNotFoundError, "a file missing on the Hub", "check the revision"),
        (HfHubHTTPError, "an answer that is no success", "try again later"),
        (ValueError, "an answer that is not the Hub's", "check HF_ENDPOINT and the network: a page to log in, perhaps"),
        (OSError, "a connection or disk that failed", "check the network and the free space"),
    )
    found, remedy = next(
        (r[1:] for r in remedies if isinstance(error, r[0])), (type(error).__name__, "try again later")
    )
    status = _status(error)
    if _transport(error) and not isinstance(error, OfflineModeIsEnabled):
        found, remedy = (
            "no connection, or one that broke",
            "check the network and HF_ENDPOINT; what has arrived is kept",
        )
    elif status in (401, 403) and found == "an answer that is no success":
        found, remedy = f"{status}: not allowed", "set HF_TOKEN to a token that may do this"
    elif status == 429:
        found, remedy = "429: too many requests", "wait, or set HF_TOKEN: the Hub allows more to those it knows"
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return kind(f"Hub id {name}", expected=expected, found=f"{found} ({said})", remedy=remedy)
