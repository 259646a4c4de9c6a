"""Repositories of the Hugging Face hub: `hf://datasets/OWNER/NAME[@REVISION]/folder`.

Folders are listed by `huggingface_hub`, files are read over HTTPS like those of any web server, so
that one policy of tries and timeouts holds for all. Token and endpoint are what `huggingface_hub`
finds: `HF_TOKEN`, the file that `hf auth login` writes, `HF_ENDPOINT`.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from pipeline.tools.errors import UsageError

SCHEME = "hf"
LOG_IN = "set HF_TOKEN to a token that may read it, or run `hf auth login`"

_REFUSALS = {
    "RepoNotFound": f"the hub has no such repository, or it is private: {LOG_IN}",
    "GatedRepo": f"its owner asks for consent: give it on the repository's page, then {LOG_IN}",
    "RevisionNotFound": "the repository has no such revision; name a branch, a tag or a commit "
    "that it has behind the @",
    "EntryNotFound": "the repository has no such file; look for a slip in the address",
}
"""Way out for each `X-Error-Code` of the hub."""


def is_hub(address: str) -> bool:
    """Return whether an address is one of the hub, without a chain of schemes before it."""
    return address.startswith(f"{SCHEME}://")


def check_hub_address(address: str, named: str) -> None:
    """Check that an address names a repository; nothing is sent.

    Args:
        address: an address of the hub.
        named: the thing at the address, for messages.

    Raises:
        UsageError: it names none.
    """
    from huggingface_hub import parse_hf_uri

    try:
        uri = parse_hf_uri(address)
    except ValueError:
        uri = None
    if uri is None or uri.is_bucket:
        raise UsageError(
            f"{named} names no repository of the hub; give hf://datasets/OWNER/NAME, "
            "hf://datasets/OWNER/NAME@REVISION, or a folder or a file in it"
        )


def locate_on_web(address: str) -> tuple[str, dict[str, str]]:
    """Return the web address of a file or a folder of the hub, and the headers of its requests.

    The server redirects a request for a large file to another host, which the token is not sent to.
    """
    from huggingface_hub import constants, get_token, hf_hub_url, parse_hf_uri

    uri = parse_hf_uri(address)
    # The function refuses an empty name, as of the root; what it makes of "." ends in "/.".
    url = hf_hub_url(
        uri.id,
        uri.path_in_repo or ".",
        repo_type=uri.type,
        revision=uri.revision,
        endpoint=constants.ENDPOINT,
    ).removesuffix("/.")
    token = get_token()
    return url, {"Authorization": f"Bearer {token}"} if token else {}


def client_options(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return what the web client of a hub address needs beyond that of any web server."""
    if not headers:
        return {}
    own: dict[str, Any] = {"headers": dict(headers)}
    # aiohttp refuses a request that has a token and an entry in .netrc, where git may keep one.
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).hostname or ""):
            own["trust_env"] = False
    return own


def silence_library() -> None:
    """Keep `huggingface_hub` from printing each try that fails: errors are reported by the caller.

    A level that the user has set (`HF_HUB_VERBOSITY`) stays.
    """
    if "HF_HUB_VERBOSITY" not in os.environ:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()


def advise(headers: Mapping[str, str]) -> str:
    """Return the way out of a refusal by the headers of the hub's answer; "" of other servers.

    Args:
        headers: names in small letters.
    """
    code, words = headers.get("x-error-code", ""), headers.get("x-error-message", "")
    if not code and words.startswith("Invalid"):  # credentials, or user name and password
        return f"the hub refuses the token: {LOG_IN}"
    return _REFUSALS.get(code, "")
